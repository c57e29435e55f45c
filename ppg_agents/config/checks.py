"""What no single type can say of a run's settings: their ranges, and which of them exclude one another.

Called by `config` for every `TrainConfig` that is made; nothing here knows a file, an environment or a model.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ppg_agents.config.parsing import ConfigError

if TYPE_CHECKING:
    from ppg_agents.config.settings import TrainConfig


def check(config: TrainConfig) -> None:
    """Refuse settings that no run can have.

    Raises:
        ConfigError: A value out of range, or settings that contradict one another.
    """
    _check_numbers(config)
    _check_sampling(config)
    _check_shares(config)
    _check_batch(config)
    _check_policy_class(config)
    _check_environment(config)


def _check_numbers(config: TrainConfig) -> None:
    at_least_one = {
        "iterations": config.iterations,
        "batch": config.batch,
        "group": config.group,
        "steps_per_batch": config.steps_per_batch,
        "auto.every": config.auto.every,
        "micro_batch_tokens": config.micro_batch_tokens,
        "checkpoint_every": config.checkpoint_every,
        "keep_checkpoints": config.keep_checkpoints,
        "threads": config.threads,
        "lora.alpha": config.lora.alpha,
        "sampling.max_new_tokens": config.sampling.max_new_tokens,
        "env.max_turns": config.env.max_turns,
        "offline.epochs": config.offline.epochs,
        "offline.max_tokens": config.offline.max_tokens,
    }
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}")
    positive = {
        "learning_rate": config.learning_rate,
        "max_grad_norm": config.max_grad_norm,
        "aggregation_constant": config.aggregation_constant,
        "max_log_prob_gap": config.max_log_prob_gap,
        "sampling.temperature": config.sampling.temperature,
    }
    for name, number in positive.items():
        if number is not None and not (math.isfinite(number) and number > 0):
            raise ConfigError(f"{name}: expected a finite number above 0, got {number}")
    not_negative = {
        "seed": config.seed,
        "lora.rank": config.lora.rank,
        "max_staleness": config.max_staleness,
        "evaluation.seed": config.evaluation.seed,
        "evaluation.conversations": config.evaluation.conversations,
    }
    for name, value in not_negative.items():
        if value < 0:
            raise ConfigError(f"{name}: expected at least 0, got {value}")
    if not (math.isfinite(config.importance_cap) and config.importance_cap >= 1):
        raise ConfigError(f"importance_cap: expected a finite number of at least 1, got {config.importance_cap}")
    if not (math.isfinite(config.kl_coefficient) and config.kl_coefficient >= 0):
        raise ConfigError(f"kl_coefficient: expected a finite number of at least 0, got {config.kl_coefficient}")


def _check_sampling(config: TrainConfig) -> None:
    if config.lora.dora and config.sampling.backend == "vllm" and config.sampling.sync == "adapter":
        raise ConfigError("lora.dora: vLLM takes no DoRA adapters; add --set sampling.sync=merged")
    if config.load.quantisation == "4bit" and (config.lora.rank == 0 or config.sampling.sync == "merged"):
        raise ConfigError("load.quantisation: 4-bit weights are neither trained nor merged; use LoRA adapters")
    if config.sampling.endpoints and config.sampling.backend != "vllm":
        raise ConfigError('sampling.endpoints belong to the backend "vllm"; add --set sampling.backend=vllm')


def _check_shares(config: TrainConfig) -> None:
    if not 0 <= config.discount <= 1:
        raise ConfigError(f"discount: expected a number in [0, 1], got {config.discount}")
    if not 0 < config.auto.cosine <= 1:
        raise ConfigError(f"auto.cosine: expected a number in (0, 1], got {config.auto.cosine}")
    if not 0 <= config.env.max_failure_rate <= 1:
        raise ConfigError(f"env.max_failure_rate: expected a share in [0, 1], got {config.env.max_failure_rate}")
    if not 0 <= config.lora.dropout < 1:
        raise ConfigError(f"lora.dropout: expected a number in [0, 1), got {config.lora.dropout}")
    if not 0 < config.offline.held_out < 1:
        raise ConfigError(f"offline.held_out: expected a share in (0, 1), got {config.offline.held_out}")


def _check_batch(config: TrainConfig) -> None:
    if config.batch % config.group:
        raise ConfigError(f"batch: expected a multiple of group = {config.group}, got {config.batch}")
    if config.offline.files and config.steps_per_batch > 1:
        raise ConfigError("steps_per_batch: of logged dialogues take more passes; set offline.epochs")
    if config.baseline == "leave-one-out" and config.group < 2:
        raise ConfigError("baseline 'leave-one-out' needs companions: expected group >= 2, got 1")


def _check_policy_class(config: TrainConfig) -> None:
    if config.policy_class == "auto" and config.baseline == "moving-average":
        raise ConfigError("baseline 'moving-average' remembers one policy class; name it, not 'auto'")
    if config.policy_class == "auto" and config.batch == config.group:
        raise ConfigError("policy class 'auto' compares personas: expected a batch of several groups, got one")
    if config.policy_class == "auto" and config.offline.files:
        raise ConfigError(
            "policy class 'auto' is chosen on conversations of the policy itself; choose one for logged dialogues "
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
