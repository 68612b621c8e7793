"""A run on several processes, in closed form: how they split it, what each holds, what it sends."""
