"""Memory and time of a training run: the budget it fits, the peak it reached, the rate it ran at."""
