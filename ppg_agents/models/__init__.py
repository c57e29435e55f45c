"""The language models: those that ship with the package (data), and how any model is found, loaded and saved."""
