"""From what a person names to a model in memory, and back to a Hugging Face directory."""
