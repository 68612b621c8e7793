"""`lorry moe`: its stages, and what each of them makes."""
