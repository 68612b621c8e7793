"""A router over frozen experts, trained on rows of every expert's domain."""
