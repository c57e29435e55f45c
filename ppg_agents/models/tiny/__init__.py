"""The embedded language model: a Hugging Face checkpoint folder; data only."""
