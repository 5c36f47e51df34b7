"""A run as a folder for Hugging Face transformers, and such a folder as a run."""
