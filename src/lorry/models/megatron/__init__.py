"""Megatron-core's GPTModel behind the face of a CausalLM. Nothing here imports Megatron but `model.py`, so
that a run without it never looks for it.
"""
