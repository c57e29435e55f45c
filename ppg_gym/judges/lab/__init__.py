"""Judges put to the test: labels, other verdicts, tricks."""
