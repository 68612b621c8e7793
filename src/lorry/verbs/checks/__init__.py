"""Numbers by which merges and exports are held to the run they were made of: logits and losses."""
