"""Other views of a conversation, as Gymnasium wrappers."""

from ppg_gym.wrappers.selection import ReplySelection, TranscriptObservation, UnjudgedError, select_replies

__all__ = ["ReplySelection", "TranscriptObservation", "UnjudgedError", "select_replies"]
