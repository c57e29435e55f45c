"""Wrappers for environments that show plain text: the text becomes the message, below one fixed instruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector.utils import batch_space


def is_text(space: gym.Space[Any]) -> bool:
    """Return whether a space holds strings: ``gymnasium.spaces.Text``, or your own text space."""
    return space.dtype is not None and space.dtype.kind == "U"


class TextObservation(gym.ObservationWrapper[dict[str, str], str, str], RecordConstructorArgs):
    """Show an environment's text as ``{"instruction": instruction, "message": text}``.

    Args:
        env: Its observations are strings.
        instruction: The policy's instruction; empty for none.

    Raises:
        ValueError: The observations are not strings.
    """

    def __init__(self, env: gym.Env[str, str], instruction: str = "") -> None:
        RecordConstructorArgs.__init__(self, instruction=instruction)
        gym.ObservationWrapper.__init__(self, env)
        self.instruction = instruction
        self.observation_space = _with_instruction(env.observation_space, instruction)

    def observation(self, observation: str) -> dict[str, str]:
        """Return the text below the instruction."""
        return {"instruction": self.instruction, "message": observation}


class TextObservations(
    gym.vector.VectorObservationWrapper[dict[str, Sequence[str]], Sequence[str], Any, Any], RecordConstructorArgs
):
    """`TextObservation` for a vector environment, whose observations are N strings.

    Args:
        env: The vector environment.
        instruction: The same for all conversations; empty for none.

    Raises:
        ValueError: The observations are not strings, or an environment that has ended is reset in the same step.
    """

    def __init__(self, env: gym.vector.VectorEnv[Any, Any, Any], instruction: str = "") -> None:
        RecordConstructorArgs.__init__(self, instruction=instruction)
        gym.vector.VectorObservationWrapper.__init__(self, env)
        self.instruction = instruction
        self.single_observation_space = _with_instruction(env.single_observation_space, instruction)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)

    def observations(self, observations: Sequence[str]) -> dict[str, Sequence[str]]:
        """Return the N texts below the instruction."""
        return {"instruction": (self.instruction,) * self.num_envs, "message": observations}


def _with_instruction(space: gym.Space[Any], instruction: str) -> gym.Space[Any]:
    if not is_text(space):
        raise ValueError(f"expected an environment whose observations are strings, got {space}")
    # Gymnasium's Text allows only the characters it is given, and needs at least one
    only = gym.spaces.Text(max(len(instruction), 1), min_length=0, charset=frozenset(instruction or " "))
    return gym.spaces.Dict({"instruction": only, "message": space})
