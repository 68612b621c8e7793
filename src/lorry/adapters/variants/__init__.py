"""What an adapter may have beside its A's and B's, a module for each kind: magnitudes, biases, rows of
an embedding, whole weights. `parameters` is what the bank knows of them all, `registry` which there are."""
