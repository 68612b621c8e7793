"""Lorry's own decoder over packed tokens, driven by family data."""
