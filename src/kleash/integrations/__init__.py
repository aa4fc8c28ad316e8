"""kleash inside other trainers: none of them is imported unless its file here is."""
