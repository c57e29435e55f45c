"""What a person at the terminal sees, and how they stop a run."""
