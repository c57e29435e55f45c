"""Language models that ship with the package; data only."""
