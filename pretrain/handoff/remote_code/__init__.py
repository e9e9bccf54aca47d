"""Code that an exported Hugging Face folder carries; it runs there, beside its siblings, not here."""
