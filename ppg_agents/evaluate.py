"""How consistent a policy is on held-out personas, with intervals.

The figure of merit is the judge's mean score over all judged turns of fixed, seeded conversations. The intervals are
those of `ppg_agents.intervals`, clustered by persona: turns of one are alike. Nothing here may learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ppg_agents.config.settings import TrainConfig
from ppg_agents.intervals import Array, Interval, clustered
from ppg_agents.rollout.environment import HELD_OUT, make_envs
from ppg_agents.rollout.metrics import check_partner, partner_faults, partner_weights, reward_table
from ppg_agents.trajectory import NO_OPENING

if TYPE_CHECKING:
    from ppg_agents.generation import Sampler
    from ppg_agents.policy.policy import Policy
    from ppg_agents.rollout.speaker import Speaker
    from ppg_agents.trajectory import Trajectory

_APART = 2_654_435_761  # between the seeds of two attempts at a conversation; of seeds, torch reads 32 bits


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation; rewards and consistency are the judge's scores in [0, 1].

    Attributes:
        persona_consistency: Mean over all judged turns (see `partner_weights`), NaN when none was judged.
        ci95: Its 95% interval, for this policy and other personas; NaN with too few personas to say (below four).
        per_turn: Mean reward of each turn, [n].
        per_turn_ci95: Its intervals, [n] pairs.
        n_personas: Different personas that were judged at least once.
        conversations: Conversations played.
        reachable: Best possible mean reward per turn according to the environment, NaN when unknown.
        judge_failures: Turns played but not judged.
        judge_failure_rate: Their share, NaN without turns.
        partner_failures: The partner's (not the policy's) faults -> conversations that each ended.
        personas: Per persona ``scores`` (the judge's, added up) and ``judged`` (how many) of each turn, both [n].
    """

    persona_consistency: float
    ci95: Interval
    per_turn: tuple[float, ...]
    per_turn_ci95: tuple[Interval, ...]
    n_personas: int
    conversations: int
    reachable: float
    judge_failures: int
    judge_failure_rate: float
    partner_failures: Mapping[str, int]
    personas: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON, with None for NaN."""
        from ppg_agents.runs.run import finite

        result: dict[str, Any] = finite(asdict(self))
        return result


def play(
    policy: Policy,
    sampler: Sampler,
    config: TrainConfig,
    *,
    personas: str,
    conversations: int,
    seed: int,
    best_of: int = 1,
    done: Callable[[int], None] = lambda count: None,
    speaker: Speaker | None = None,
) -> tuple[list[Trajectory], NDArray[np.float64]]:
    """Play seeded conversations in lockstep, ``config.batch`` at a time.

    Args:
        policy: The policy.
        sampler: Draws its replies.
        config: Domain, partner, judge and batch.
        personas: ``train``, ``held-out`` or a path.
        conversations: How many, at least 1.
        seed: Same seed, same personas, same partner, same draws.
        best_of: How often to play every conversation, with different draws; the one with the highest mean score
            counts, the first of ties.
        done: Called with the number of conversations finished.
        speaker: Speaks in place of the policy; None for the policy.

    Returns:
        The conversations, and the reachable value of each, [conversations], NaN where unknown.

    Raises:
        ConversationError: The environment cannot go on, or the partner fails too often (`check_partner`).
    """
    import torch

    from ppg_agents.generation import speaking
    from ppg_agents.rollout.lockstep import collect

    chunk = min(config.batch, conversations)
    seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(conversations)]
    trajectories: list[Trajectory] = []
    attempted: list[Trajectory] = []
    reachable: list[float] = []
    envs = make_envs(config, chunk, personas)
    try:
        sampler.sync(policy)
        with speaking(policy, sampler):
            for start in range(0, conversations, chunk):
                some = seeds[start : start + chunk]
                padded = some + some[:1] * (chunk - len(some))
                tries = []
                for attempt in range(best_of):
                    draws = seed * 1_000_003 + start + attempt * _APART
                    generator = torch.Generator(policy.device).manual_seed(draws)
                    tries.append(collect(envs, policy, sampler, padded, generator, config.world, speaker=speaker))
                attempted += [trajectory for one in tries for trajectory in one[: len(some)]]
                check_partner(attempted, config.env.max_partner_failure_rate)
                played = [max(same, key=_score) for same in zip(*tries, strict=True)]
                trajectories += played[: len(some)]
                reachable += envs.reachable()[: len(some)].tolist()
                done(len(trajectories))
    finally:
        envs.close()
    return trajectories, np.array(reachable)


def evaluate(
    policy: Policy,
    sampler: Sampler,
    config: TrainConfig,
    *,
    conversations: int | None = None,
    seed: int | None = None,
    personas: str = HELD_OUT,
    best_of: int = 1,
    done: Callable[[int], None] = lambda count: None,
    speaker: Speaker | None = None,
) -> Evaluation:
    """Play held-out personas and summarise; see `play` for the arguments."""
    trajectories, reachable = play(
        policy,
        sampler,
        config,
        personas=personas,
        conversations=config.evaluation.conversations if conversations is None else conversations,
        seed=config.evaluation.seed if seed is None else seed,
        best_of=best_of,
        done=done,
        speaker=speaker,
    )
    return summarise(trajectories, reachable)


def summarise(trajectories: Sequence[Trajectory], reachable: NDArray[np.float64] | None = None) -> Evaluation:
    """Return the consistency of played conversations.

    Args:
        trajectories: At least one conversation.
        reachable: The best value of each conversation, [len(trajectories)], NaN where unknown.

    Raises:
        ValueError: No conversations.
    """
    if not trajectories:
        raise ValueError("expected at least one conversation to summarise, got none")
    rewards = reward_table(trajectories)
    names = sorted({t.persona for t in trajectories})
    row = np.array([names.index(t.persona) for t in trajectories])
    judged = np.isfinite(rewards)
    sums, counts = np.zeros((len(names), rewards.shape[1])), np.zeros((len(names), rewards.shape[1]))
    np.add.at(sums, row, np.where(judged, rewards, 0.0))
    np.add.at(counts, row, judged)
    weights = partner_weights(trajectories)  # all 1 where no fault of the partner ended a conversation
    sums, counts = sums * weights, counts * weights
    turns = sum(len(t.turns) for t in trajectories if t.partner_status != NO_OPENING)
    known = np.isfinite(reachable) if reachable is not None else np.zeros(0, dtype=np.bool_)
    return Evaluation(
        persona_consistency=_ratio(sums.sum(), counts.sum()),
        ci95=_interval(sums.sum(1), counts.sum(1)),
        per_turn=tuple(_ratio(s, c) for s, c in zip(sums.sum(0), counts.sum(0), strict=True)),
        per_turn_ci95=tuple(_interval(s, c) for s, c in zip(sums.T, counts.T, strict=True)),
        n_personas=int((counts.sum(1) > 0).sum()),
        conversations=len(trajectories),
        reachable=float(reachable[known].mean()) if reachable is not None and known.any() else math.nan,
        judge_failures=turns - int(judged.sum()),
        judge_failure_rate=_ratio(turns - judged.sum(), turns),
        partner_failures=partner_faults(trajectories),
        personas={
            name: {"scores": tuple(s.tolist()), "judged": tuple(c.tolist())}
            for name, s, c in zip(names, sums, counts, strict=True)
        },
    )


def _interval(sums: Array, counts: Array) -> Interval:
    """Return the interval of Σ sums / Σ counts over personas [P]."""
    return clustered([(sums[None], counts[None])], [1.0], trained=False).ci95


def _score(trajectory: Trajectory) -> float:
    """Return a conversation's mean score, minus infinity if no turn was judged."""
    judged = trajectory.judged()
    return sum(judged) / len(judged) if judged else -math.inf


def _ratio(total: float, count: float) -> float:
    return float(total / count) if count else math.nan


class Target(NamedTuple):
    """A policy named on the command line, ready to speak.

    Attributes:
        policy: The policy.
        sampler: Draws its replies.
        speaker: The run's own agent, if it speaks for itself; None for the policy.
    """

    policy: Policy
    sampler: Sampler
    speaker: Speaker | None = None


def load_target(target: str, config: TrainConfig) -> Target:
    """Load the target that the command line names.

    Args:
        target: A run folder (its newest checkpoint), ``tiny``, or a Hugging Face model or folder.
        config: Names the agent and the sampler's settings.

    Raises:
        RunError: A run without a checkpoint.
    """
    from ppg_agents.agents.methods import METHODS
    from ppg_agents.building import load_model
    from ppg_agents.generation.hf import HFSampler
    from ppg_agents.runs.files import RunError
    from ppg_agents.runs.run import Run, is_run

    checkpoint: Path | None = None
    if is_run(Path(target)):
        latest = Run.open(Path(target)).latest_checkpoint()
        if latest is None:
            raise RunError(f"expected a run with a checkpoint, got {target} without; resume it first")
        checkpoint = latest[1]
    if config.agent not in METHODS:
        spoken_for = _own_agent(config, checkpoint)
        if spoken_for is not None:
            return spoken_for
    policy = load_model(config, checkpoint or target, lora=None)
    return Target(policy, HFSampler(policy, config.sampling.max_new_tokens, config.sampling.temperature))


def _own_agent(config: TrainConfig, checkpoint: Path | None) -> Target | None:
    """Return the run's agent as speaker; None if the policy speaks for it."""
    from ppg_agents.agents.protocol import SpeakingAgent
    from ppg_agents.building import build_agent, load_policy
    from ppg_agents.distributed import Alone
    from ppg_agents.generation.hf import HFSampler
    from ppg_agents.horizon.planner import Planner
    from ppg_agents.rollout.speaker import AgentSpeaker

    policy = load_policy(config)
    sampler = HFSampler(policy, config.sampling.max_new_tokens, config.sampling.temperature)
    planner = Planner(config, config.env.max_turns)
    agent = build_agent(config, policy, sampler, Alone(), config.iterations, config.env.max_turns, planner.mask)
    if not isinstance(agent, SpeakingAgent):
        return None
    if checkpoint is not None:
        agent.load(checkpoint)
    return Target(policy, sampler, AgentSpeaker(agent, policy, sampler))
