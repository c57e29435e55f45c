"""Builds a run: settings in; policy, agent and schedule out, and a sampler that keeps up with the policy.

Nothing here loops, writes a file or talks to an environment.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from ppg_agents.agents.protocol import Agent
from ppg_agents.agents.registry import make_agent
from ppg_agents.agents.settings import LearnerSettings
from ppg_agents.config.parsing import ConfigError
from ppg_agents.config.settings import LoraSettings, TrainConfig
from ppg_agents.credit import Mask
from ppg_agents.distributed import Workers, shard_layers, whole_weights
from ppg_agents.generation import Sampler
from ppg_agents.policy.policy import Policy
from ppg_agents.terminal.progress import quiet_libraries, say

_LARGE = 50_000_000


def load_policy(config: TrainConfig) -> Policy:
    """Return the policy at the start of a run: the model with a fresh adapter.

    Raises:
        ValueError: The model cannot be used, or cannot be trained; the message says why.
    """
    policy = load_model(config, config.model, config.lora if config.lora.rank else None)
    policy.gradient_checkpointing(config.load.gradient_checkpointing)
    policy.try_learning()
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


def advise(config: TrainConfig, policy: Policy) -> None:
    """Report settings made for the embedded model that do not suit a large one; nothing is changed.

    Activations are estimated at (12 hidden + 5 intermediate) numbers per layer and token (measured: 1.7 MB per token
    for 30 layers of width 576 in float32).
    """
    model, everything = policy.config, sum(p.numel() for p in policy.model.parameters())
    usual, most = ("1e-4 to 1e-3", 1e-3) if config.lora.rank else ("1e-6 to 1e-5", 1e-4)
    if everything > _LARGE and config.learning_rate > most:
        say(
            f"learning_rate {config.learning_rate:g} suits the embedded model; for {everything / 1e6:,.0f} M weights "
            f"{'with LoRA ' if config.lora.rank else ''}{usual} is usual: --set learning_rate={usual.split()[0]}"
        )
    width, layers = getattr(model, "intermediate_size", None), getattr(model, "num_hidden_layers", None)
    if config.load.gradient_checkpointing or not isinstance(width, int) or not isinstance(layers, int):
        return
    per_token = layers * (12 * model.hidden_size + 5 * width) * torch.finfo(policy.model.dtype).bits // 8
    tokens = min(config.micro_batch_tokens, config.batch * policy.context_length)
    if policy.device.type == "cuda":
        memory = torch.cuda.mem_get_info(policy.device)[0]
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if tokens * per_token > memory / 2:
        fit = max(256, int(memory / 2 / per_token) // 256 * 256)
        say(
            f"micro_batch_tokens {tokens} may need {tokens * per_token / 1e9:.0f} GB for activations, of "
            f"{memory / 1e9:.0f} GB: --set micro_batch_tokens={fit} or --set load.gradient_checkpointing=true"
        )


def split(config: TrainConfig, policy: Policy) -> None:
    """Split the model's weights over all ranks.

    Raises:
        ConfigError: Replies would have to be sampled with split weights.
    """
    if not config.offline.files and not config.sampling.endpoints:
        raise ConfigError("sampling: split weights (fsdp) cannot sample; give vLLM servers with --rollout-endpoints")
    shard_layers(policy.model)


def synchronise(sampler: Sampler, policy: Policy, team: Workers) -> None:
    """Bring a sampler's own weights up to date; all ranks must call it together."""
    with whole_weights(policy.model) if team.sharded else nullcontext():
        if team.main:
            sampler.sync(policy)
        team.gather([])  # wait until rank 0 has written
        if not team.main:
            sampler.sync(policy)


def build_agent(
    config: TrainConfig,
    policy: Policy,
    sampler: Sampler,
    team: Workers,
    iterations: int,
    turns: int | None,
    mask: Callable[[int], Mask],
) -> Agent:
    """Return the agent for conversations of ``turns`` turns, None if open.

    Raises:
        ConfigError: No such agent, or settings that it cannot work with.
    """
    turns = turns or (None if config.policy_class == "auto" else config.policy_class.turns)
    if config.baseline == "moving-average" and turns is None:
        raise ConfigError("baseline 'moving-average' needs the number of turns; set env.max_turns")
    named = {field.name for field in fields(LearnerSettings)} & {field.name for field in fields(config)}
    settings = {
        **{name: getattr(config, name) for name in named},
        "n_turns": turns,
        "constant": config.aggregation_constant,
        "learning_rate": lambda step: learning_rate(config, step, iterations * config.steps_per_batch),
        "sampler": sampler,
        "workers": team,
    }
    for key in config.agent_options:
        if key in settings or hasattr(config, key):
            todo = f"set {key} without the prefix" if hasattr(config, key) else "leave it out"
            raise ConfigError(f"agent_options.{key}: expected an option of the agent {config.agent!r} alone; {todo}")
    try:
        agent = make_agent(config.agent, policy, mask, **settings, **config.agent_options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"agent: {error}") from error
    _check_agent(agent, config, team)
    return agent


def _check_agent(agent: Agent, config: TrainConfig, team: Workers) -> None:
    """Raise a ConfigError where the agent needs other settings."""
    if config.offline.files:
        return
    name, needs = config.agent, agent.needs
    group, together = needs.group, needs.together
    if config.group < group:
        raise ConfigError(
            f"agent {name!r} compares conversations with one persona: expected group >= {group}, got {config.group}; "
            f"add --set group={group if needs.branch else 2 * group}"
        )
    if needs.branch and config.group != group:
        raise ConfigError(f"agent {name!r} learns from pairs: expected group = {group}, got {config.group}")
    if config.group % together or (together > 1 and config.batch % (config.group * team.size)):
        raise ConfigError(
            f"agent {name!r} learns from {together} conversations at a time: expected a group that is a multiple of "
            f"{together}, and a batch that is one of group × processes, got group {config.group}, batch {config.batch} "
            f"and {team.size} processes"
        )
    if config.policy_class == "auto" and needs.one_class:
        raise ConfigError(f"agent {name!r} learns the values of one policy class; name it, not 'auto'")
    if config.policy_class == "auto" and needs.full_only:
        raise ConfigError(f"agent {name!r} takes the policy class 'full' alone here, got 'auto'; leave it out")


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step out of ``steps``: rising during warm-up, then constant or falling towards 0.

    Warm-up over W steps multiplies step s < W, from 0, by (s + 1)/W; the schedule spans the steps after it.
    """
    rising = math.ceil(config.warmup * steps) if config.warmup < 1 else int(config.warmup)
    if step < rising:
        return config.learning_rate * (step + 1) / rising
    left = max(0.0, 1.0 - (step - rising) / max(steps - rising, 1))
    cosine = 0.5 - 0.5 * math.cos(math.pi * left)
    return config.learning_rate * {"constant": 1.0, "linear": left, "cosine": cosine}[config.schedule]


def integer_seed(seed: int, iteration: int, rank: int = 0) -> int:
    """Return one integer from all three, for torch's generators; rank -1 is for dropout."""
    mixed = np.random.SeedSequence([seed, iteration, 1 + rank])
    return int(mixed.generate_state(1, np.uint64)[0] >> np.uint64(1))
