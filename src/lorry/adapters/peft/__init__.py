"""Adapter files in PEFT's format: `config.py` its JSON, `tensors.py` its weights, `files.py` both."""
