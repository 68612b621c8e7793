"""The run directory: its files, who is at work there, and what they come down to. No torch."""
