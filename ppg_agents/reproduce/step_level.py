"""Step-level evaluation: how consistent a trained policy is at turn t, after a history that is not its own.

Rollout-level (`evaluate`): the policy plays the whole conversation, so its early replies change its later situations.
Step-level: the untrained policy plays turns 1..t−1, the trained policy speaks at turn t, and that reply alone counts.
The paper (arXiv 2603.06138) distinguishes the two; this definition is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv, VectorWrapper

from ppg_agents.config.settings import ConfigError, TrainConfig
from ppg_agents.evaluate import Evaluation, summarise
from ppg_agents.generation import Sample, Sampler, speaking
from ppg_agents.rollout.environment import HELD_OUT, make_envs, planned_turns
from ppg_agents.rollout.lockstep import collect

if TYPE_CHECKING:
    from ppg_agents.policy.policy import Policy
    from ppg_agents.trajectory import Trajectory


class Handover:
    """A sampler made of two: one speaks before a given turn, the other from it on, prompted with all tokens so far."""

    def __init__(self, before: Sampler, then: Sampler, turn: int) -> None:
        """Combine two samplers.

        Args:
            before: Speaks in turns 1..turn−1.
            then: Speaks from `turn` on; its conversations start there.
            turn: Counted from 1.
        """
        self.before, self.then, self.turn = before, then, turn
        self.max_new_tokens = max(before.max_new_tokens, then.max_new_tokens)
        limits = [getattr(one, "context_length", None) for one in (before, then)]
        known = [limit for limit in limits if limit is not None]
        if known:
            self.context_length = min(known)

    def start(self, n: int) -> None:
        """Begin n new conversations."""
        self.now = 1
        self._tokens: list[list[int]] = [[] for _ in range(n)]
        self.before.start(n)

    def reply(self, prompts: Sequence[Sequence[int] | None], generator: torch.Generator | None) -> list[Sample | None]:
        """Return one reply per conversation; None in, None out."""
        for history, prompt in zip(self._tokens, prompts, strict=True):
            history.extend(prompt or ())
        if self.now == self.turn:
            self.then.start(len(prompts))
            both = zip(self._tokens, prompts, strict=True)
            prompts = [None if prompt is None else history for history, prompt in both]
        samples = (self.before if self.now < self.turn else self.then).reply(prompts, generator)
        for history, sample in zip(self._tokens, samples, strict=True):
            history.extend(sample.token_ids if sample is not None else ())
        self.now += 1
        return samples


class Until(VectorWrapper):
    """Truncates every conversation after ``turn`` turns, which may be changed between conversations."""

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        self.turn = 1
        self._now = 0

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset; the count of turns starts again, unless only some of the conversations are reset."""
        self._now = self._now if "reset_mask" in (options or {}) else 0
        return self.env.reset(seed=seed, options=options)

    def step(self, actions: Any) -> Any:
        """Step, and truncate all conversations when the turn has come."""
        observations, rewards, ends, cuts, infos = self.env.step(actions)
        self._now += 1
        return observations, rewards, ends, np.logical_or(cuts, self._now >= self.turn), infos


def evaluate_steps(
    policy: Policy,
    sampler: Sampler,
    base: Policy,
    base_sampler: Sampler,
    config: TrainConfig,
    *,
    conversations: int | None = None,
    seed: int | None = None,
    personas: str = HELD_OUT,
    done: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Judge a trained policy at every turn of conversations that another policy began.

    Every seeded conversation is played once for each turn t = 1..n, so that all turns see the same personas. Personas,
    partner and the base's draws follow from `seed` and ``config.batch`` as in `evaluate`: the histories are the
    beginnings of the conversations that the base plays there, whatever the trained policy is.

    Args:
        policy: The policy that speaks at turn t.
        sampler: Its sampler.
        base: The policy that speaks before turn t.
        base_sampler: Its sampler.
        config: Domain, partner, judge and batch.
        conversations: Number of seeded conversations; default ``config.evaluation.conversations``.
        seed: Default ``config.evaluation.seed``.
        personas: ``train``, ``held-out`` or a path.
        done: Called with the number of conversations played so far, out of ``conversations * n``.

    Returns:
        As `evaluate` returns, for the replies of `policy` alone; ``conversations`` counts every replay, ``reachable``
        is NaN. A conversation that ended before turn t has no reply there.

    Raises:
        ValueError: The two policies lay out their prompts differently.
        ConfigError: An environment whose conversations have no fixed number of turns.
    """
    if policy.format != base.format:
        raise ValueError("expected policies of one chat template, got two; load the one that training began with")
    count = config.evaluation.conversations if conversations is None else conversations
    seed = config.evaluation.seed if seed is None else seed
    chunk = min(config.batch, count)
    seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(count)]
    heard: list[Trajectory] = []
    rewards: list[float] = []
    with ExitStack() as held:
        envs = make_envs(config, chunk, personas)
        held.callback(envs.close)
        turns = planned_turns(envs, config)
        if turns is None:
            raise ConfigError("expected conversations of a fixed length to judge turn by turn; set env.max_turns")
        until = Until(envs)
        for one, how in ((base, base_sampler), (policy, sampler)):
            getattr(how, "sync", lambda policy: None)(one)
            held.enter_context(speaking(one, how))
        for turn in range(1, turns + 1):
            until.turn = turn
            handover = Handover(base_sampler, sampler, turn)
            for start in range(0, count, chunk):
                some = seeds[start : start + chunk]
                padded = some + some[:1] * (chunk - len(some))
                generator = torch.Generator(policy.device).manual_seed(seed * 1_000_003 + start)
                played = collect(until, policy, handover, padded, generator, config.domain)
                heard += [_alone(trajectory, turn) for trajectory in played[: len(some)]]
                rewards += [t.turns[-1].reward for t in heard[-len(some) :] if len(t.turns) == turn]
                done(len(heard))
    failures = sum(not math.isfinite(reward) for reward in rewards)
    rate = failures / len(rewards) if rewards else math.nan
    return replace(summarise(heard), judge_failures=failures, judge_failure_rate=rate)


def _alone(trajectory: Trajectory, turn: int) -> Trajectory:
    """Return the conversation without the rewards of all turns but one."""
    turns = (
        played if t == turn else replace(played, reward=math.nan) for t, played in enumerate(trajectory.turns, start=1)
    )
    return replace(trajectory, turns=tuple(turns))
