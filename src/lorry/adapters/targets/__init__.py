"""Which modules of a model an adapter goes to (`target_modules`): what there is, what a spec names, what is passed over."""
