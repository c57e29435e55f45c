"""Language models: the ones that ship with the package (data), and code to find, load and save any model."""
