"""``PersonaChat-v0`` as a vector environment: N conversations in lockstep, one partner, one judge.

A conversation that has ended stays so until it is reset (autoreset ``disabled``), or a new one begins in the same step
(``same-step``). The same seeds give the same conversations as N single environments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from ppg_gym.conversation import Conversation
from ppg_gym.env import Observation, PersonaChatEnv, check_reply, observe, start_info, transcript, turn_info
from ppg_gym.nearest import not_among, refuse_unknown

AUTORESET = {"disabled": AutoresetMode.DISABLED, "same-step": AutoresetMode.SAME_STEP}
Arrays = npt.NDArray[Any]


class PersonaChatVectorEnv(VectorEnv[dict[str, tuple[str, ...]], Sequence[str], Arrays]):
    """N conversations at once; see :class:`~ppg_gym.env.PersonaChatEnv` for the keyword arguments.

    Observations are ``{"instruction": (str, …), "message": (str, …)}``, actions N strings. Stepping a conversation that
    has ended ignores the action: reward 0, an empty message, no info.

    Args:
        num_envs: N.
        autoreset_mode: ``disabled``: ``reset(options={"reset_mask": bool[N]})`` begins new conversations where
            the mask is true. ``same-step``: an ended conversation is replaced at once; its last observation and
            info are in ``infos["final_obs"]`` and ``infos["final_info"]``.
        max_episode_steps: Truncate after so many turns.
        **kwargs: Those of the single environment.

    Raises:
        ValueError: An argument is not what it should be.
    """

    def __init__(
        self,
        num_envs: int = 1,
        autoreset_mode: str = "disabled",
        max_episode_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(num_envs, int) or num_envs < 1:
            raise ValueError(f"expected num_envs to be a positive integer, got {num_envs!r}")
        if autoreset_mode not in AUTORESET:
            raise ValueError(not_among("autoreset_mode", autoreset_mode, AUTORESET))
        single = PersonaChatEnv(**kwargs)
        self.simulator = single.simulator
        self.max_turns = single.max_turns
        self.usage = single.usage
        self.num_envs = num_envs
        self.render_mode = single.render_mode
        self.metadata = {
            **single.metadata,
            "autoreset_mode": AUTORESET[autoreset_mode],
            "ended_may_step": True,  # stepping an ended conversation is harmless: no reset is needed first
        }
        self.single_observation_space = single.observation_space
        self.single_action_space = single.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._same_step = autoreset_mode == "same-step"
        self._limit = max_episode_steps
        self._rngs: list[np.random.Generator] = [seeding.np_random()[0] for _ in range(num_envs)]
        self._conversations: list[Conversation | None] = [None] * num_envs
        self._messages = [""] * num_envs
        self._over = np.ones(num_envs, dtype=bool)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, tuple[str, ...]], dict[str, Any]]:
        """Begin conversations.

        Args:
            seed: One integer (conversation i gets ``seed + i``), or one integer or None for each conversation.
            options: ``reset_mask`` (bool [N]): begin only these conversations anew. ``persona``: one for all, or a list
                with one for each; see the single environment.

        Raises:
            ValueError: Seeds, personas or mask are not of length N, or an option is unknown.
        """
        options = dict(options or {})
        refuse_unknown("options", options, ("persona", "reset_mask"))
        mask = np.asarray(options.pop("reset_mask", np.ones(self.num_envs, dtype=bool)))
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_:
            raise ValueError(
                f"expected reset_mask to be bool of shape ({self.num_envs},), got {mask.dtype} {mask.shape}"
            )
        if isinstance(seed, str):
            raise ValueError(f"expected seed to be an integer or {self.num_envs} of them, got {seed!r}")
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed
        seeds = [None] * self.num_envs if seeds is None else list(seeds)
        wanted = options.get("persona")
        wanted = list(wanted) if isinstance(wanted, list | tuple) else [wanted] * self.num_envs
        for name, values in (("seeds", seeds), ("personas", wanted)):
            if len(values) != self.num_envs:
                raise ValueError(f"expected {self.num_envs} {name}, got {len(values)}")
        which = [int(i) for i in np.flatnonzero(mask)]
        for i in which:
            if seeds[i] is not None:
                self._rngs[i] = seeding.np_random(seeds[i])[0]
        infos = self._begin(which, wanted)
        return self._observations(), infos

    def _begin(self, which: Sequence[int], wanted: Sequence[object]) -> dict[str, Any]:
        rngs = [self._rngs[i] for i in which]
        personas = [self.simulator.persona(wanted[i], rng) for i, rng in zip(which, rngs, strict=True)]
        infos: dict[str, Any] = {}
        for i, (conversation, opening) in zip(which, self.simulator.open(personas, rngs), strict=True):
            self._conversations[i], self._messages[i] = conversation, opening.text
            self._over[i] = False
            infos = self._add_info(infos, start_info(conversation, opening, self.simulator.reachable), i)
        return infos

    def step(self, actions: Sequence[str]) -> tuple[dict[str, tuple[str, ...]], Arrays, Arrays, Arrays, dict[str, Any]]:
        """Play one reply in every conversation that is not over.

        Raises:
            ValueError: Not N strings.
            JudgeError: The judge gave no score and ``on_judge_failure`` is ``raise``.
            FailureRateError: The judge left too many replies without a score.
            PartnerFailureRateError: Too many of the partner's lines were missing.
            RuntimeError: ``reset`` was never called.
        """
        if isinstance(actions, str) or not hasattr(actions, "__len__"):
            raise ValueError(
                f"expected {self.num_envs} replies, got one {type(actions).__name__}; pass a list with one for each "
                "conversation"
            )
        if len(actions) != self.num_envs:
            raise ValueError(f"expected {self.num_envs} replies, got {len(actions)}")
        going = [int(i) for i in np.flatnonzero(~self._over)]
        conversations = [c for i in going if (c := self._conversations[i]) is not None]
        if any(c is None for c in self._conversations):
            raise RuntimeError("expected conversations that go on; call reset() first")
        for i in going:
            check_reply(actions[i])
        rewards = np.zeros(self.num_envs)
        terminated, truncated = np.zeros((2, self.num_envs), dtype=bool)
        infos: dict[str, Any] = {}
        self._messages = ["" if over else m for over, m in zip(self._over, self._messages, strict=True)]
        outcomes = self.simulator.turn(conversations, [actions[i] for i in going], [self._rngs[i] for i in going])
        finals: dict[int, tuple[Observation, dict[str, Any]]] = {}
        for i, outcome in zip(going, outcomes, strict=True):
            info = turn_info(outcome)
            self._conversations[i], self._messages[i] = outcome.conversation, outcome.message
            cut = outcome.truncated or (self._limit is not None and info["turn"] >= self._limit)
            rewards[i], terminated[i] = outcome.reward, outcome.terminated
            truncated[i] = cut and not outcome.terminated
            if (terminated[i] or truncated[i]) and self._same_step:
                finals[i] = observe(outcome.conversation, outcome.message), info
            else:
                infos = self._add_info(infos, info, i)
        self._over |= terminated | truncated
        if finals:
            begun = self._begin(list(finals), [None] * self.num_envs)
            infos = _merge(begun, infos)
            infos = self._add_finals(infos, finals)
        return self._observations(), rewards, terminated, truncated, infos

    def _add_info(self, vector_infos: dict[str, Any], env_info: dict[str, Any], env_num: int) -> dict[str, Any]:
        """Gather infos as Gymnasium does, but scores as objects: a float array could not hold None for "no score"."""
        if "score" in env_info:
            vector_infos.setdefault("score", np.full(self.num_envs, None, dtype=object))
        return super()._add_info(vector_infos, env_info, env_num)

    def _add_finals(
        self, infos: dict[str, Any], finals: Mapping[int, tuple[Observation, dict[str, Any]]]
    ) -> dict[str, Any]:
        for i, (observation, info) in finals.items():
            infos = self._add_info(infos, {"final_obs": observation, "final_info": info}, i)
        return infos

    def _observations(self) -> dict[str, tuple[str, ...]]:
        instructions = tuple("" if c is None else c.persona.instruction for c in self._conversations)
        return {"instruction": instructions, "message": tuple(self._messages)}

    def close_extras(self, **kwargs: Any) -> None:
        """Close the connections of judge and partner."""
        self.simulator.close()

    def render(self) -> tuple[str, ...] | None:
        """Return every conversation so far as text (``ansi``), else None."""
        if self.render_mode is None:
            return None
        return tuple("" if c is None else transcript(c) for c in self._conversations)


def _merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Join two vector infos that fill different rows; where both hold a key, the masks tell the rows apart."""
    merged = dict(second)
    for key, value in first.items():
        if key not in second:
            merged[key] = value
        elif isinstance(value, dict):
            merged[key] = _merge(value, second[key])
        elif key.startswith("_"):
            merged[key] = value | second[key]
        else:
            merged[key] = np.where(first[f"_{key}"], value, second[key])
    return merged
