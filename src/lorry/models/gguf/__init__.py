"""GGUF files: their header and tensors accounted for, converted once into a Hugging Face directory."""
