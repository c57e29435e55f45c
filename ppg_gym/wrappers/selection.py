"""A choice among candidate replies, as numbers: for learners that pick a reply instead of writing one.

Wraps any environment with observation ``{"instruction": str, "message": str}`` and string actions. Never judges or
changes a reply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.utils import RecordConstructorArgs

from ppg_gym.env import Observation, PersonaChatEnv, check_reply
from ppg_gym.nearest import not_among
from ppg_gym.wrappers.candidates import Array, DomainBank, Features, HashedWords, History, Propose, Scene, find, named
from ppg_gym.wrappers.transcript import check_text, planned_turns

DOMAIN_BANK, HASHED_WORDS = "domain", "words"
ON_UNJUDGED = ("raise", "nan")


class UnjudgedError(RuntimeError):
    """A reply has no score, and the learner needs one."""


class ReplySelection(gym.Wrapper[Array, np.int64, Observation, str], RecordConstructorArgs):
    """The action is which of N candidate replies is said; the observation is an array.

    Observation: ``Box(0, 1, float32)``. ``layout`` = (shared, N, each): how many entries belong to no candidate, how
    many candidates there are, and how many entries each has; see :class:`~ppg_gym.wrappers.candidates.HashedWords`.
    Action: ``Discrete(N)``. Reward and end: the environment's. Info, besides the environment's: ``candidates``, the N
    replies on offer for the *next* action, and after a step ``reply``, the one that was said. Where there is nothing to
    answer (the conversation is over, or the partner never opened it), the candidates are empty strings.

    **Unjudged replies.** Stable-baselines3 cannot mask a turn: a NaN reward would spoil its networks, any other number
    would be made up, and a transition once handed over cannot be taken back. So a reply without a score raises. Use a
    judge that retries, or the embedded one, which never fails. For evaluation, where nothing learns,
    ``on_unjudged="nan"`` passes NaN on, to be left out of the mean.

    Args:
        env: The environment.
        candidates: N, at least 2.
        bank: ``domain``: replies of different kinds in the domain's words, drawn from the environment's generator, in
            an order that means nothing. Or a function ``propose(instruction, message, history, rng)`` that returns N
            replies, such as a language model's samples, kept in its order; or its name as
            ``package.module:function``, which a spec can hold.
        features: ``words``, or a class that is made as ``Class(N, **features_options)`` and is a
            :class:`~ppg_gym.wrappers.candidates.Features`; or its name as ``package.module:Class``.
        features_options: Plain options of the features.
        on_unjudged: ``raise`` or ``nan``.

    Attributes:
        instruction: The role-play instruction of the conversation.
        history: (partner's line, reply) of every turn played.
        message: The partner's newest line.
        candidates: The replies on offer.
        layout: (shared, N, each).

    Raises:
        ValueError: An option is not what it should be, or the environment does not speak in text.
    """

    env: gym.Env[Any, Any]

    def __init__(
        self,
        env: gym.Env[Any, Any],
        candidates: int = 4,
        bank: str | Propose = DOMAIN_BANK,
        features: str | Callable[..., Features] = HASHED_WORDS,
        features_options: Mapping[str, Any] | None = None,
        on_unjudged: str = "raise",
    ) -> None:
        RecordConstructorArgs.__init__(
            self,
            candidates=candidates,
            bank=named(bank),  # names, never live models: outer wrappers copy the spec
            features=named(features),
            features_options=features_options,
            on_unjudged=on_unjudged,
        )
        gym.Wrapper.__init__(self, env)
        check_text(env)
        if type(candidates) is not int or candidates < 2:
            raise ValueError(f"expected candidates to be an integer of at least 2, got {candidates!r}")
        if on_unjudged not in ON_UNJUDGED:
            raise ValueError(not_among("on_unjudged", on_unjudged, ON_UNJUDGED))
        self._n, self._on_unjudged = candidates, on_unjudged
        if bank == DOMAIN_BANK:
            self._offer = _domain_offer(env, candidates)
        else:
            self._offer = bank if callable(bank) else find("bank", bank, DOMAIN_BANK)
        maker = HashedWords if features == HASHED_WORDS else features
        maker = maker if callable(maker) else find("features", maker, HASHED_WORDS)
        self._features: Features = maker(candidates, **(features_options or {}))
        self.layout = (self._features.shared, candidates, self._features.each)
        self._turns = planned_turns(env)
        self.observation_space = Box(0.0, 1.0, (self._features.shared + candidates * self._features.each,), np.float32)
        self.action_space = Discrete(candidates)
        self.instruction, self.message = "", ""
        self.history: History = ()
        self.candidates: tuple[str, ...] = ()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Begin a conversation and offer the first candidates."""
        observation, info = self.env.reset(seed=seed, options=options)
        self.instruction, self.history = observation["instruction"], ()
        return self._observe(observation["message"], over=False), info | {"candidates": self.candidates}

    def step(self, action: np.int64) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Say a candidate.

        Raises:
            ValueError: The action is not the index of a candidate, or the bank did not give N replies.
            UnjudgedError: The reply has no score, and ``on_unjudged`` is ``raise``.
        """
        if not self.action_space.contains(action):
            raise ValueError(f"expected the action to be an integer from 0 to {self._n - 1}, got {action!r}")
        if not self.candidates:
            raise RuntimeError("expected a conversation that is not over; call reset() first")
        reply = self.candidates[int(action)]
        observation, reward, terminated, truncated, info = self.env.step(reply)
        self.history = (*self.history, (self.message, reply))
        if math.isnan(reward) and self._on_unjudged == "raise":
            raise UnjudgedError(
                f"expected a score for the reply {reply!r}, got none ({_why(info)}); this learner cannot leave a turn "
                "out: let the judge retry more often, use judge='facts', or pass on_unjudged='nan' to evaluate"
            )
        seen = self._observe(observation["message"], over=terminated or truncated)
        added = {"reply": reply, "candidates": self.candidates}
        return seen, float(reward), terminated, truncated, info | added

    def _observe(self, message: str, *, over: bool) -> Array:
        """Draw candidates for a message and return the features."""
        self.message = message
        self.candidates = ("",) * self._n if over else self._draw()
        progress = min(1.0, len(self.history) / self._turns) if self._turns else 0.0
        row = self._features(Scene(self.instruction, message, self.history, self.candidates, progress))
        if row not in self.observation_space:
            raise ValueError(
                f"expected features of shape {self.observation_space.shape} in [0, 1], float32, got "
                f"{getattr(row, 'dtype', type(row).__name__)} of shape {np.shape(row)}"
            )
        return row

    def _draw(self) -> tuple[str, ...]:
        replies = tuple(self._offer(self.instruction, self.message, self.history, self.np_random))
        if len(replies) != self._n:
            raise ValueError(f"expected {self._n} replies from the bank, got {len(replies)}")
        for reply in replies:
            check_reply(reply)
        return replies


def select_replies(
    candidates: int = 4,
    bank: str | Propose = DOMAIN_BANK,
    features: str | Callable[..., Features] = HASHED_WORDS,
    features_options: Mapping[str, Any] | None = None,
    on_unjudged: str = "raise",
    **kwargs: Any,
) -> ReplySelection:
    """Return ``ReplySelection`` around a new PersonaChat-v0, which gets all other keyword arguments."""
    env = PersonaChatEnv(**kwargs)
    return ReplySelection(env, candidates, bank, features, features_options, on_unjudged)


def _domain_offer(env: gym.Env[Any, Any], candidates: int) -> Propose:
    """Return a function that proposes replies from the domain's bank for the environment's present conversation."""
    base = env.unwrapped
    if not isinstance(base, PersonaChatEnv):
        raise ValueError(
            f"expected PersonaChat-v0 for the domain's bank, got {type(base).__name__}; "
            "pass bank= with a function that proposes replies"
        )
    bank = DomainBank(base.simulator.domain.source, candidates)

    def propose(instruction: str, message: str, history: History, rng: np.random.Generator) -> tuple[str, ...]:
        conversation = base._conversation
        opened = conversation is not None and conversation.lines
        return bank(conversation, rng) if conversation and opened else ("",) * candidates

    return propose


def _why(info: Mapping[str, Any]) -> str:
    verdict = info.get("verdict") or {}
    return f"{verdict.get('status', 'no verdict')}: {verdict.get('rationale') or 'no reason given'}"
