"""Metrics of answers and options, each with an interval."""
