"""Tensor parallel: a model's matrices cut over several processes, its adapters with them."""
