"""Whole conversations between a policy and a Gymnasium vector environment.

Works for any vector environment with observation ``{"instruction": str, "message": str}`` and ``str`` actions. Nothing
here learns or knows what the conversation is about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from ppg_agents.generation import Sampler, speaking
from ppg_agents.policy.policy import Policy
from ppg_agents.rollout.record import Record, texts
from ppg_agents.rollout.speaker import PolicySpeaker, Speaker
from ppg_agents.trajectory import Trajectory


def collect(
    envs: gym.vector.VectorEnv[Any, Any, Any],
    policy: Policy,
    sampler: Sampler,
    seeds: Sequence[int | None],
    generator: torch.Generator | None = None,
    domain: str = "",
    *,
    speaker: Speaker | None = None,
) -> list[Trajectory]:
    """Hold one whole conversation per sub-environment.

    A sub-environment that has ended is not sampled for. With autoreset disabled it is reset before the next step
    (Gymnasium refuses to step it otherwise), unless ``envs.metadata["ended_may_step"]`` is true.

    Args:
        envs: N sub-environments.
        policy: The policy; its LoRA is merged while its own model samples.
        sampler: Draws its replies.
        seeds: N seeds of the episodes; equal seeds share a persona.
        generator: Random numbers for the sampler.
        domain: Written into the trajectories.
        speaker: Speaks in place of the policy; None for the policy.

    Returns:
        N trajectories, in the order of `seeds`. A NaN reward is an unjudged turn. A conversation whose next
        reply might not fit into the policy's context ends truncated.

    Raises:
        ValueError: Not one seed per sub-environment, or observations of another kind.
    """
    n = envs.num_envs
    if len(seeds) != n:
        raise ValueError(f"expected one seed for each of {n} sub-environments, got {len(seeds)}")
    mode = envs.metadata.get("autoreset_mode")
    observations, infos = envs.reset(seed=list(seeds))  # type: ignore[arg-type]
    pairs = zip(*_texts(observations, n), strict=True)
    records = [Record(pair, _info(infos, i), seeds[i], domain) for i, pair in enumerate(pairs)]
    instructions = [record.instruction for record in records]
    speaker = speaker or PolicySpeaker(policy, sampler)
    speaker.start(n, generator)
    with speaking(policy, sampler):
        while True:
            messages, active = [r.message for r in records], [not r.over for r in records]
            replies = speaker.reply(instructions, messages, active, generator)
            for i, (record, spoken) in enumerate(zip(records, replies, strict=True)):
                if not record.over and spoken is None:
                    record.cut(i)
            if all(record.over for record in records):
                break
            observations, rewards, ends, cuts, infos = envs.step(tuple("" if r is None else r.text for r in replies))
            for i, (record, spoken) in enumerate(zip(records, replies, strict=True)):
                if spoken is not None:
                    info = _info(infos, i)
                    info = info.get("final_info", info)  # same-step autoreset keeps the episode's info there
                    record.add(spoken, float(rewards[i]), ends[i], cuts[i], info)
            if all(record.over for record in records):
                break
            ended = np.logical_or(ends, cuts)
            if mode == AutoresetMode.DISABLED and ended.any() and not envs.metadata.get("ended_may_step"):
                observations, _ = envs.reset(options={"reset_mask": ended})
            for record, message in zip(records, _texts(observations, n)[1], strict=True):
                record.message = message
    return [record.trajectory() for record in records]


def _texts(observations: Any, n: int) -> tuple[list[str], list[str]]:
    """Return instructions and messages of a batched observation."""
    instructions, messages = map(list, texts(observations))
    if len(instructions) != n or len(messages) != n:
        raise ValueError(f"expected {n} texts of each kind, got {len(instructions)} and {len(messages)}")
    return [str(text) for text in instructions], [str(text) for text in messages]


def _info(infos: Mapping[str, Any], i: int) -> dict[str, Any]:
    """Return sub-environment i's own info out of Gymnasium's dict of arrays with ``_key`` masks."""
    picked: dict[str, Any] = {}
    for key, values in infos.items():
        mask = infos.get(f"_{key}")
        if key.startswith("_") or (mask is not None and not mask[i]):
            continue
        if isinstance(values, Mapping):
            picked[key] = _info(values, i)
        elif mask is not None or isinstance(values, np.ndarray | list | tuple):
            value = values[i]
            value = value.item() if isinstance(value, np.generic) else value
            picked[key] = None if isinstance(value, float) and math.isnan(value) else value
    return picked
