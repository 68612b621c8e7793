"""Megatron-core's GPTModel behind the face of a CausalLM. `layout.py` and `terms.py` import
no Megatron, and `backends.distributed.megatron` the others only when a run asks for them.
"""
