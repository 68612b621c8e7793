"""Backends: where a run happens. `protocol.py` is the seam, `registry.py` names them, `local.py` is one device."""
