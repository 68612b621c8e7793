"""Suites of unlearning benchmarks as open-unlearning has them: their rows, metrics and files."""
