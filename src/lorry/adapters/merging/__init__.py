"""Several adapters made one: `methods.py` the maths on tensors, `core_space.py` a small space that
holds all of them, `weighted.py` the adapter of a model's bank.
"""
