"""Generation: many prompts at once over a key/value cache, greedy or sampled."""
