"""Checks of a run's settings beyond their types: ranges, and settings that exclude one another.

Run for every `TrainConfig`; nothing here knows a file, an environment or a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from ppg_agents.agents.methods import METHODS
from ppg_agents.config.parsing import ConfigError
from ppg_agents.group_advantage import PER_TURN

if TYPE_CHECKING:
    from ppg_agents.config.settings import TrainConfig


RANGES: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (
        lambda value: value >= 1,
        "at least 1",
        "iterations batch group steps_per_batch auto.every micro_batch_tokens checkpoint_every keep_checkpoints "
        "threads lora.alpha sampling.max_new_tokens env.max_turns offline.epochs offline.max_tokens",
    ),
    (
        lambda value: math.isfinite(value) and value > 0,
        "a finite number above 0",
        "learning_rate aggregation_constant max_log_prob_gap",
    ),
    (
        lambda value: value >= 0,
        "at least 0",
        "seed lora.rank max_staleness reference_kl_every evaluation.seed evaluation.conversations",
    ),
    (lambda value: math.isfinite(value) and value >= 1, "a finite number of at least 1", "importance_cap"),
    (
        lambda value: math.isfinite(value) and value >= 0,
        "a finite number of at least 0",
        "kl_coefficient entropy_coefficient weight_decay max_grad_norm sampling.temperature",
    ),
    (
        lambda value: 0 <= value < 1 or (value >= 1 and float(value).is_integer()),
        "a share in [0, 1) or a whole number of steps",
        "warmup",
    ),
    (
        lambda values: len(values) == 2 and all(0 <= value < 1 for value in values),
        "two numbers in [0, 1) such as [0.9, 0.999]",
        "betas",
    ),
    (lambda value: 0 <= value <= 1, "a number in [0, 1]", "discount env.max_failure_rate env.max_partner_failure_rate"),
    (lambda value: 0 < value <= 1, "a number in (0, 1]", "auto.cosine"),
    (lambda value: 0 <= value < 1, "a number in [0, 1)", "lora.dropout"),
    (lambda value: 0 < value < 1, "a share in (0, 1)", "offline.held_out"),
)
"""Allowed numbers, their description in messages, and the settings they apply to; None is always allowed."""


def check(config: TrainConfig) -> None:
    """Refuse settings that no run can have.

    Raises:
        ConfigError: A value out of range, or settings that contradict one another.
    """
    for fits, expected, names in RANGES:
        for name in names.split():
            value = attrgetter(name)(config)
            if value is not None and not fits(value):
                raise ConfigError(f"{name}: expected {expected}, got {value}")
    _check_sampling(config)
    _check_batch(config)
    _check_offline(config)
    _check_reward(config)
    _check_policy_class(config)
    _check_environment(config)


def check_learning(config: TrainConfig) -> None:
    """Refuse settings that only what does not learn can have.

    Raises:
        ConfigError: Replies are to be sampled greedily.
    """
    if config.sampling.temperature == 0:
        raise ConfigError(
            "sampling.temperature: expected a number above 0 for learning, got 0: a greedy reply is not drawn from a "
            "distribution, so it has no gradient; 0 is for evaluate, rollout and chat"
        )


def _check_sampling(config: TrainConfig) -> None:
    if config.lora.dora and config.sampling.backend == "vllm" and config.sampling.sync == "adapter":
        raise ConfigError("lora.dora: vLLM does not load DoRA adapters; add --set sampling.sync=merged")
    if config.load.quantisation == "4bit" and (config.lora.rank == 0 or config.sampling.sync == "merged"):
        raise ConfigError("load.quantisation: 4-bit weights can be neither trained nor merged; use LoRA adapters")
    if config.sampling.endpoints and config.sampling.backend != "vllm":
        raise ConfigError('sampling.endpoints belong to the backend "vllm"; add --set sampling.backend=vllm')


def _check_batch(config: TrainConfig) -> None:
    if config.batch % config.group:
        raise ConfigError(f"batch: expected a multiple of group = {config.group}, got {config.batch}")
    if config.offline.files and config.steps_per_batch > 1:
        raise ConfigError("steps_per_batch: expected 1 for logged dialogues; for more passes set offline.epochs")
    if config.optimizer == "sgd" and config.betas != type(config).betas:
        raise ConfigError(f"betas: expected only with the optimizer 'adamw', got {list(config.betas)} with 'sgd'")
    compares = config.baseline == "leave-one-out" or (config.baseline in PER_TURN and not config.offline.files)
    if compares and config.group < 2:
        todo = "add --set group=4"
        raise ConfigError(f"baseline {config.baseline!r} needs companions: expected group >= 2, got 1; {todo}")
    if config.baseline in PER_TURN and config.standardise:
        raise ConfigError(f"standardise: expected false with baseline {config.baseline!r}, which scales by itself")


def _check_offline(config: TrainConfig) -> None:
    """Refuse settings that learning from logged dialogues would ignore."""
    if not config.offline.files:
        return
    unread = {
        "baseline": config.baseline not in ("none", type(config).baseline, *PER_TURN),
        "importance": config.importance != "none",
        "kl_coefficient": config.kl_coefficient != 0,
        "entropy_coefficient": config.entropy_coefficient != 0,
    }
    for name in (name for name, given in unread.items() if given):
        raise ConfigError(
            f"{name}: logged dialogues are learned from without it, got {getattr(config, name)!r}; leave it out, or "
            "train online"
        )


def _check_reward(config: TrainConfig) -> None:
    """Refuse what would not raise the score of the conversation that ``reward = "prefix"`` stands for."""
    if config.reward != "prefix":
        return
    if config.discount != 1:
        raise ConfigError(
            f"discount: expected 1 with reward 'prefix', got {config.discount}: discounted, these rewards do not add "
            "up to the conversation's score"
        )
    if config.agent in METHODS and not METHODS[config.agent].credit:
        raise ConfigError(
            f"reward: expected 'turn' with the agent {config.agent!r}, got 'prefix': it keeps conversations by the "
            "mean of their scores, which these rewards are not"
        )


def _check_policy_class(config: TrainConfig) -> None:
    if config.policy_class == "auto" and config.baseline == "moving-average":
        raise ConfigError("baseline 'moving-average' remembers one policy class; name it, not 'auto'")
    if config.policy_class == "auto" and config.batch == config.group:
        raise ConfigError("policy class 'auto' compares personas: expected a batch of several groups, got one")
    if config.policy_class == "auto" and config.offline.files:
        raise ConfigError(
            "policy class 'auto' needs conversations of the policy itself; for logged dialogues choose a class "
            "with: ppg-agent horizon MODEL --offline FILES"
        )


def _check_environment(config: TrainConfig) -> None:
    """Refuse settings that only PersonaChat-v0 reads with another environment, which gets ``env.kwargs`` alone."""
    if config.env.is_persona_chat:
        return
    defaults = type(config.env)()
    unread = ["domain"] if config.domain != type(config).domain else []
    for name in ("partner", "partner_options", "judge", "judge_options", "on_judge_failure"):
        unread += [f"env.{name}"] if getattr(config.env, name) != getattr(defaults, name) else []
    if unread:
        raise ConfigError(
            f"{', '.join(unread)}: expected only with PersonaChat-v0, got env.id = {config.env.id!r}, which does not "
            "read it; leave it out, or pass the environment its own arguments with env.kwargs"
        )
