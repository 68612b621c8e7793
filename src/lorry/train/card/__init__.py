"""README.md of a run: the hub's model card, made from the files of the run."""
