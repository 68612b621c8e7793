"""Any other causal language model of transformers, behind the decoder's face."""
