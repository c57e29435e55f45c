"""Step-level evaluation: how consistent a trained policy is at turn t, after a history that is not its own.

Rollout-level (`evaluate`): the policy plays the whole conversation, so its early replies change its later situations.
Step-level: the untrained policy plays turns 1..t−1, the trained policy speaks at turn t, and that reply alone counts.
The paper (arXiv 2603.06138) distinguishes the two; this definition is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv, VectorWrapper

from ppg_agents.config.parsing import ConfigError
from ppg_agents.config.settings import TrainConfig
from ppg_agents.evaluate import Evaluation, summarise
from ppg_agents.generation import Sampler, speaking
from ppg_agents.rollout.environment import HELD_OUT, make_envs, planned_turns
from ppg_agents.rollout.handover import Handover
from ppg_agents.rollout.lockstep import collect

if TYPE_CHECKING:
    from ppg_agents.policy.policy import Policy
    from ppg_agents.trajectory import Trajectory


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
            how.sync(one)
            held.enter_context(speaking(one, how))
        for turn in range(1, turns + 1):
            until.turn = turn
            handover = Handover(base_sampler, sampler, [turn - 1] * chunk)
            for start in range(0, count, chunk):
                some = seeds[start : start + chunk]
                padded = some + some[:1] * (chunk - len(some))
                generator = torch.Generator(policy.device).manual_seed(seed * 1_000_003 + start)
                played = collect(until, policy, handover, padded, generator, config.world)
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
