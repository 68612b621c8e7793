"""What a run needs before its first step, one after the other: the base, what trains on it, its rows, its loop."""
