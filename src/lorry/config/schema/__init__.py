"""The description of a training run, a module for each group of settings. No torch here."""
