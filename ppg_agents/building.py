"""What a run is built from: settings in; policy, agent and schedule out, and a sampler that keeps up with the policy.

Nothing here loops, writes a file or talks to an environment.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch

from ppg_agents.agents import Agent, make_agent
from ppg_agents.config import ConfigError, TrainConfig
from ppg_agents.credit import Mask
from ppg_agents.distributed import Workers, shard_layers, whole_weights
from ppg_agents.generation import Sampler
from ppg_agents.policy import Policy
from ppg_agents.progress import quiet_libraries


def load_policy(config: TrainConfig) -> Policy:
    """Return the policy that the run starts from: the model with a fresh adapter."""
    quiet_libraries()
    policy = Policy.load(
        config.model,
        lora=config.lora if config.lora.rank else None,
        seed=config.seed,
        dtype=None if config.load.dtype == "auto" else getattr(torch, config.load.dtype),
        chat_template=config.load.chat_template,
        template_options=config.load.template_options,
        quantisation=config.load.quantisation,
        kernels=config.load.kernels,
    )
    policy.gradient_checkpointing(config.load.gradient_checkpointing)
    return policy


def split(config: TrainConfig, policy: Policy) -> None:
    """Split the model's weights over all ranks, as the launch asks for.

    Raises:
        ConfigError: Replies would have to be sampled with split weights.
    """
    if not config.offline.files and not config.sampling.endpoints:
        raise ConfigError("sampling: split weights (fsdp) can not sample; give vLLM servers with --rollout-endpoints")
    shard_layers(policy.model)


def synchronise(sampler: Sampler, policy: Policy, team: Workers) -> None:
    """Make a sampler with weights of its own speak as the policy is now; all ranks call it together."""
    sync = getattr(sampler, "sync", None)
    if sync is None:
        return
    with whole_weights(policy.model) if team.sharded else nullcontext():
        if team.main:
            sync(policy)
        team.gather([])  # what rank 0 writes is there
        if not team.main:
            sync(policy)


def build_agent(
    config: TrainConfig,
    policy: Policy,
    sampler: Sampler,
    team: Workers,
    iterations: int,
    turns: int | None,
    mask: Callable[[int], Mask],
) -> Agent:
    """Return the learner of a policy class, for conversations of ``turns`` turns, None if that is open.

    Raises:
        ConfigError: No agent of that name, or one that lacks what the settings ask of it.
    """
    turns = turns or (sum(config.segments) if config.segments else None)
    if config.baseline == "moving-average" and turns is None:
        raise ConfigError("baseline 'moving-average' needs the number of turns; set env.max_turns")
    try:
        agent = make_agent(
            config.agent,
            policy,
            mask,
            n_turns=turns,
            discount=config.discount,
            baseline=config.baseline,
            standardise=config.standardise,
            aggregation=config.aggregation,
            constant=config.aggregation_constant,
            learning_rate=lambda step: learning_rate(config, step, iterations * config.steps_per_batch),
            max_grad_norm=config.max_grad_norm,
            weight_decay=config.weight_decay,
            micro_batch_tokens=config.micro_batch_tokens,
            importance=config.importance,
            importance_cap=config.importance_cap,
            kl_coefficient=config.kl_coefficient,
            max_log_prob_gap=config.max_log_prob_gap,
            max_staleness=config.max_staleness,
            sampler=sampler,
            **({"workers": team} if team.size > 1 else {}),
            **({"steps_per_batch": config.steps_per_batch} if config.steps_per_batch > 1 else {}),
            **config.agent_options,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"agent: {error}") from error
    if config.offline.files and not hasattr(agent, "learn_offline"):
        raise ConfigError(f"agent: expected one that learns offline, such as 'ppg', got {config.agent!r}")
    return agent


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step out of ``steps``: constant, or falling towards 0."""
    left = max(0.0, 1.0 - step / steps)
    cosine = 0.5 - 0.5 * math.cos(math.pi * left)
    return config.learning_rate * {"constant": 1.0, "linear": left, "cosine": cosine}[config.schedule]


def integer_seed(seed: int, iteration: int, rank: int = 0) -> int:
    """Return one integer made of all, for torch's generators; rank -1 is dropout's."""
    mixed = np.random.SeedSequence([seed, iteration, 1 + rank])
    return int(mixed.generate_state(1, np.uint64)[0] >> np.uint64(1))
