"""The first values of an adapter (`init_lora_weights`): random, or made from the base or from its rows."""
