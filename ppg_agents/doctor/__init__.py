"""Checks what is installed, what would be used, and which servers answer."""
