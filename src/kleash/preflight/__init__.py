"""The self-test before a run: each promise of the loop tried on a few real responses, with a remedy where it fails."""
