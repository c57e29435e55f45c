"""Other views of a conversation, as Gymnasium wrappers."""

from ppg_gym.wrappers.selection import ReplySelection, UnjudgedError, select_replies
from ppg_gym.wrappers.transcript import TranscriptObservation

__all__ = ["ReplySelection", "TranscriptObservation", "UnjudgedError", "select_replies"]
