"""ppg_gym: conversations with a persona to keep, as Gymnasium environments.

Importing the package registers ``PersonaChat-v0``, and ``ReplySelection-v0``, where an action chooses among candidate
replies. It needs gymnasium and numpy and never imports torch.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (a source tree on the path was never checked by an installer)
    version = sys.version.split()[0]
    raise ImportError(f"expected Python 3.11 or newer, got {version}; install one, and ppg-gym with its pip")

from gymnasium.envs.registration import register

from ppg_gym.conversation import Conversation, Line, Persona, Verdict
from ppg_gym.domain.loading import DOMAINS

__all__ = ["DOMAINS", "Conversation", "Line", "Persona", "Verdict"]

register(
    id="PersonaChat-v0",
    entry_point="ppg_gym.env:PersonaChatEnv",
    vector_entry_point="ppg_gym.vector:PersonaChatVectorEnv",
)
register(id="ReplySelection-v0", entry_point="ppg_gym.wrappers.selection:select_replies")
