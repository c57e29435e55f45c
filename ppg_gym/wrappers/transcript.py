"""The whole transcript as one text, for any environment of text conversations.

The checks at the end serve every wrapper here: they take any environment with observation
``{"instruction": str, "message": str}`` and string actions.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs

from ppg_gym.env import Observation
from ppg_gym.simulator import MAX_CHARS, heard
from ppg_gym.spaces import Utterance

MOST_CHARS = 2**20  # of a transcript, where nobody knows the number of turns


class TranscriptObservation(gym.Wrapper[str, str, Observation, str], RecordConstructorArgs):
    """The observation is the whole conversation so far, as one string; actions and rewards stay as they are.

    The instruction, an empty line, then one line per utterance, ``partner: …`` and ``you: …``, the newest last. Further
    lines of an utterance are indented, so that no speaker can put words into the other's mouth.

    Args:
        env: The environment.
        max_chars: Most characters of a transcript; None for what the environment's turns can fill, or 2**20 where the
            number of turns is not known.

    Raises:
        ValueError: The environment does not speak in text, or ``max_chars`` is not a positive integer.
    """

    env: gym.Env[Any, Any]

    def __init__(self, env: gym.Env[Any, Any], max_chars: int | None = None) -> None:
        RecordConstructorArgs.__init__(self, max_chars=max_chars)
        gym.Wrapper.__init__(self, env)
        check_text(env)
        turns = planned_turns(env)
        # Indenting an utterance of line breaks alone makes it five times as long; a label takes up to 20 characters.
        known = MAX_CHARS * 5 * (2 * turns + 1) + 20 * (2 * turns + 1) if turns else MOST_CHARS
        self.observation_space = Utterance(known if max_chars is None else max_chars)
        self._rows: list[str] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin a conversation."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._rows = [observation["instruction"], ""]
        return self._hear(observation["message"]), info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Say a reply.

        Raises:
            ValueError: The transcript is longer than ``max_chars``.
        """
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._rows.append(_line("you", heard(action)))
        return self._hear(observation["message"]), float(reward), terminated, truncated, info

    def _hear(self, message: str) -> str:
        if message:
            self._rows.append(_line("partner", message))
        text = "\n".join(self._rows)
        if text not in self.observation_space:
            most = getattr(self.observation_space, "max_length", "?")
            raise ValueError(f"expected a transcript of at most {most} characters, got {len(text)}; raise max_chars")
        return text


def _line(speaker: str, text: str) -> str:
    return f"{speaker}: " + "\n    ".join(text.splitlines() or [""])


def planned_turns(env: gym.Env[Any, Any]) -> int | None:
    """Return how many turns a conversation is planned to have, None if the environment does not say."""
    limit = getattr(env.unwrapped, "max_turns", None) or (env.spec.max_episode_steps if env.spec else None)
    return int(limit) if limit else None


def check_text(env: gym.Env[Any, Any]) -> None:
    """Raise a ValueError unless an environment shows instruction and message, and takes strings."""
    spaces = getattr(env.observation_space, "spaces", {})
    if not {"instruction", "message"} <= set(spaces) or env.action_space.dtype != np.dtype(str):
        raise ValueError(
            'expected an environment with observation {"instruction": str, "message": str} and string actions, got '
            f"{env.observation_space} and {env.action_space}"
        )
