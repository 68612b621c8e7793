"""Adapters at parameters of modules that are no linears (PEFT's `target_parameters`): all experts of
a layer in one tensor, and the weight of a router."""
