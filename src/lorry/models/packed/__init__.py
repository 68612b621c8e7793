"""Checkpoints whose matrices are packed already: which format a config.json means (`formats.py`), what
each stores and how it is held (`bitsandbytes.py`, `groups.py`, `float8.py`), and their tensors among a
directory's (`reading.py`). No library of those formats is needed."""
