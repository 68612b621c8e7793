"""From rows to tokens with loss weights."""
