"""Unlearning: make a model forget some rows and keep others. Methods by name, pure losses, a task."""
