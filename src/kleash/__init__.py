"""kleash."""
