"""What the user sees at the terminal, and how they stop a run."""
