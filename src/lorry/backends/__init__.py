"""Backends: where a run happens. `base.py` is the seam, `local.py` one device."""
