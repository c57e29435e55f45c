"""The record of one conversation, in either loop, and the reading of observations."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from ppg_agents.rollout.speaker import Spoken
from ppg_agents.trajectory import NO_OPENING, Trajectory, Turn

log = logging.getLogger(__name__)


class Record:
    """A conversation under way.

    Attributes:
        instruction: The role-play instruction.
        message: The partner's newest line.
        over: Whether it has ended in any way.
    """

    def __init__(self, observation: tuple[str, str], info: Mapping[str, Any], seed: int | None, domain: str) -> None:
        """Begin with the instruction and message from the environment's reset."""
        self.instruction, self.message = observation
        self.over = False
        self._persona, self._domain = str(info.get("persona", "")), domain
        self._seed = None if seed is None else int(seed)
        self._turns: list[Turn] = []
        self._terminated = self._truncated = False
        self._partner, self._lost = "ok", False
        self._partner = "ok"
        self._opening = str((info.get("partner") or {}).get("reason") or "")
        self._partner_reason = ""

    def cut(self, number: int) -> None:
        """End conversation ``number``: another reply might not fit into the context."""
        log.warning("conversation %d truncated: no room for another reply in the context", number)
        self._truncated = self.over = True

    def add(self, spoken: Spoken, reward: float, terminated: bool, truncated: bool, info: Mapping[str, Any]) -> None:
        """Record a reply and the environment's answer; a reward that is not finite means unjudged."""
        self._turns.append(
            Turn(
                message=self.message,
                reply=spoken.text,
                prompt_ids=tuple(spoken.prompt),
                token_ids=spoken.sample.token_ids,
                log_probs=spoken.sample.log_probs,
                reward=reward if math.isfinite(reward) else math.nan,
                verdict=dict(info.get("verdict") or {}),
                policy_version=spoken.sample.policy_version,
                sampler=spoken.sample.sampler,
                temperature=spoken.sample.temperature,
            )
        )
        partner = info.get("partner") or {}
        self._partner = str(partner.get("status", "ok"))
        self._partner_reason = self._opening if self._partner == NO_OPENING else str(partner.get("reason") or "")
        self._terminated, self._truncated = bool(terminated), bool(truncated)
        self.over = self._terminated or self._truncated
        # An environment that cuts a conversation without a score lost its judge; a limit on turns leaves a score.
        self._lost = self._truncated and (self._partner != "ok" or not math.isfinite(reward))

    def trajectory(self) -> Trajectory:
        """Return the conversation so far."""
        return Trajectory(
            instruction=self.instruction,
            persona=self._persona,
            domain=self._domain,
            seed=self._seed,
            turns=tuple(self._turns),
            terminated=self._terminated,
            truncated=self._truncated,
            partner_status=self._partner,
            lost=self._lost,
            partner_reason=self._partner_reason,
        )


def texts(observation: Any) -> tuple[Any, Any]:
    """Return instruction and message of an observation, or of a batch of them.

    Raises:
        ValueError: Another kind of observation.
    """
    try:
        return observation["instruction"], observation["message"]
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError(
            "expected observations with 'instruction' and 'message' (a Dict space of texts), got "
            f"{type(observation).__name__}; wrap the environment"
        ) from error
