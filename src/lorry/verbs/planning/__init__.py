"""Parts of `lorry plan`: how fast this machine makes a step, and the tables that are printed."""
