"""The adapter bank: K named low-rank adapters on one frozen model."""
