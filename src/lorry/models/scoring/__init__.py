"""Per-token scalars of the logits, computed without ever holding [T, V]."""
