"""A domain: its data, what its words mean, and its exact twin."""
