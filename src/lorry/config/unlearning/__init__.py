"""Settings of `lorry unlearn` and of what measures it: attacks, and alternate answers."""
