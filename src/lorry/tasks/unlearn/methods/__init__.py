"""Unlearning methods, by what their forget term is: one class each, and their names."""
