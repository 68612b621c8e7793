"""Starts of an adapter that are made from the base, or from its rows (`init_lora_weights`)."""
