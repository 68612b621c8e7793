"""From encoded rows to the batches of each step."""
