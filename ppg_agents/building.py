"""What a run is built from: settings in; policy, agent and schedule out, and a sampler that keeps up with the policy.

Nothing here loops, writes a file or talks to an environment.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from ppg_agents.agents import Agent, make_agent
from ppg_agents.config.settings import ConfigError, LoraSettings, TrainConfig
from ppg_agents.credit import Mask
from ppg_agents.distributed import Workers, shard_layers, whole_weights
from ppg_agents.generation import Sampler
from ppg_agents.policy.policy import Policy
from ppg_agents.terminal.progress import quiet_libraries


def load_policy(config: TrainConfig) -> Policy:
    """Return the policy that the run starts from: the model with a fresh adapter."""
    policy = load_model(config, config.model, config.lora if config.lora.rank else None)
    policy.gradient_checkpointing(config.load.gradient_checkpointing)
    return policy


def load_model(config: TrainConfig, place: str | Path, lora: LoraSettings | None) -> Policy:
    """Load a policy as the run's settings say.

    Args:
        config: Its ``load`` and ``seed``.
        place: A model's name or folder, or a checkpoint.
        lora: Put on a model that comes without an adapter; None for none.
    """
    quiet_libraries()
    return Policy.load(
        place,
        lora=lora,
        seed=config.seed,
        dtype=None if config.load.dtype == "auto" else getattr(torch, config.load.dtype),
        chat_template=config.load.chat_template,
        template_options=config.load.template_options,
        quantisation=config.load.quantisation,
        kernels=config.load.kernels,
    )


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
    turns = turns or (None if config.policy_class == "auto" else config.policy_class.turns)
    if config.baseline == "moving-average" and turns is None:
        raise ConfigError("baseline 'moving-average' needs the number of turns; set env.max_turns")
    settings = {
        "n_turns": turns,
        "discount": config.discount,
        "baseline": config.baseline,
        "standardise": config.standardise,
        "aggregation": config.aggregation,
        "constant": config.aggregation_constant,
        "learning_rate": lambda step: learning_rate(config, step, iterations * config.steps_per_batch),
        "max_grad_norm": config.max_grad_norm,
        "weight_decay": config.weight_decay,
        "micro_batch_tokens": config.micro_batch_tokens,
        "importance": config.importance,
        "importance_cap": config.importance_cap,
        "kl_coefficient": config.kl_coefficient,
        "max_log_prob_gap": config.max_log_prob_gap,
        "max_staleness": config.max_staleness,
        "sampler": sampler,
        **({"workers": team} if team.size > 1 else {}),
        **({"steps_per_batch": config.steps_per_batch} if config.steps_per_batch > 1 else {}),
    }
    for key in config.agent_options:
        if key in settings or hasattr(config, key) or config.agent == "ppg":
            todo = f"set {key} without the prefix" if hasattr(config, key) else "leave it out"
            raise ConfigError(f"agent_options.{key}: expected an option of the agent {config.agent!r} alone; {todo}")
    try:
        agent = make_agent(config.agent, policy, mask, **settings, **config.agent_options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"agent: {error}") from error
    _check_agent(agent, config, team)
    return agent


def _check_agent(agent: Agent, config: TrainConfig, team: Workers) -> None:
    """Raise a ConfigError where the agent says that it needs other settings; one that says nothing takes any."""
    name, group = config.agent, getattr(agent, "group", 1)
    if config.offline.files:
        if not (hasattr(agent, "learn_offline") and getattr(agent, "learns_offline", True)):
            raise ConfigError(f"agent: expected one that learns offline, such as 'ppg', got {name!r}")
        return
    if config.group < group:
        raise ConfigError(
            f"agent {name!r} compares conversations with one persona: expected group >= {group}, got {config.group}; "
            f"add --set group={2 * group if not getattr(agent, 'branch', False) else group}"
        )
    if getattr(agent, "branch", False) and config.group != group:
        raise ConfigError(f"agent {name!r} learns from pairs: expected group = {group}, got {config.group}")
    together = getattr(agent, "together", 1)
    if config.group % together or (together > 1 and config.batch % (config.group * team.size)):
        raise ConfigError(
            f"agent {name!r} learns from {together} conversations at a time: expected a group that is a multiple of "
            f"{together}, and a batch that is one of group × processes, got group {config.group}, batch {config.batch} "
            f"and {team.size} processes"
        )
    if config.policy_class == "auto" and getattr(agent, "head", None) is not None:
        raise ConfigError(f"agent {name!r} learns the values of one policy class; name it, not 'auto'")
    if config.policy_class == "auto" and getattr(agent, "full_only", False):
        raise ConfigError(f"agent {name!r} takes the policy class 'full' alone here, got 'auto'; leave it out")


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step out of ``steps``: constant, or falling towards 0."""
    left = max(0.0, 1.0 - step / steps)
    cosine = 0.5 - 0.5 * math.cos(math.pi * left)
    return config.learning_rate * {"constant": 1.0, "linear": left, "cosine": cosine}[config.schedule]


def integer_seed(seed: int, iteration: int, rank: int = 0) -> int:
    """Return one integer made of all, for torch's generators; rank -1 is dropout's."""
    mixed = np.random.SeedSequence([seed, iteration, 1 + rank])
    return int(mixed.generate_state(1, np.uint64)[0] >> np.uint64(1))
