"""Samplers, which turn prompts into sampled replies. None of them decides what a conversation is about."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from ppg_agents.nearest import not_one_of

if TYPE_CHECKING:
    from ppg_agents.config.settings import SamplingSettings
    from ppg_agents.policy.policy import Policy


class GenerationError(RuntimeError):
    """No reply came back, or not the one asked for; the message says what to do."""


@dataclass(frozen=True)
class Sample:
    """A sampled reply.

    Attributes:
        token_ids: The sampled tokens, end-of-turn included when it was sampled.
        log_probs: Their log-probabilities under the distribution sampled from, temperature applied; at
            temperature 1 for a greedy reply (temperature 0).
        ended: True if end-of-turn was sampled, False if the reply hit the length limit.
        policy_version: Optimiser steps the policy had taken when it spoke.
        temperature: Sampling temperature.
        sampler: What sampled it: ``hf`` or ``vllm``.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    ended: bool
    policy_version: int = 0
    temperature: float = 1.0
    sampler: str = "hf"


class Sampler(Protocol):
    """Speaks for n conversations in lockstep and remembers their tokens from turn to turn.

    A sampler that can also serve each conversation at its own pace is a `SingleSampler` too.
    """

    @property
    def own_model(self) -> bool:
        """Whether the policy's own model samples, which makes merging its LoRA worthwhile."""

    @property
    def max_new_tokens(self) -> int:
        """Longest reply, in tokens."""

    @property
    def context_length(self) -> int:
        """Longest conversation, prompt and reply, in tokens; may be less than the policy's."""

    @property
    def temperature(self) -> float:
        """Sampling temperature; 0 takes the most likely token."""

    def start(self, n: int) -> None:
        """Start n new conversations and forget the old ones."""

    def reply(self, prompts: Sequence[Sequence[int] | None], generator: torch.Generator | None) -> list[Sample | None]:
        """Return one reply per conversation; None in, None out.

        Args:
            prompts: The tokens since the conversation's last sampled token; None when it is finished.
            generator: Source of randomness; None only for greedy sampling.
        """

    def sync(self, policy: Policy | None = None) -> None:
        """Take over the policy's current weights; does nothing where the policy's own model samples."""

    def close(self) -> None:
        """Release servers, engines and files."""


@runtime_checkable
class SingleSampler(Sampler, Protocol):
    """Also speaks for each conversation at its own pace; `reply_one` may be called from several threads at once."""

    def reply_one(self, conversation: int, prompt: Sequence[int], seed: int | None) -> Sample:
        """Return a conversation's next reply.

        Args:
            conversation: Its number; only one thread at a time speaks for it.
            prompt: The tokens since its last sampled token.
            seed: Seed of this reply; None only for greedy sampling.
        """

    def cancel(self) -> None:
        """Make every running `reply_one` raise a GenerationError."""


BACKENDS = ("hf", "vllm")


def make_sampler(
    policy: Policy, settings: SamplingSettings, folder: str | Path, *, run: str | None = None, write: bool = True
) -> Sampler:
    """Return the sampler that the settings ask for.

    Args:
        policy: The policy that speaks.
        settings: ``backend`` ``hf`` samples with the policy's own model, ``vllm`` with an engine in this process,
            or with servers when there are ``endpoints``.
        folder: Where a sampler with its own weights writes them; use it for nothing else.
        run: With servers and several learner processes: one name, the same in all of them.
        write: With servers and several learner processes: True in exactly one of them.

    Raises:
        ValueError: The settings contradict one another or do not suit the policy.
        ModuleNotFoundError: The backend's library is not installed.
        GenerationError: A server cannot be reached, or is not what it should be.
    """
    if settings.backend not in BACKENDS:
        raise ValueError(not_one_of("the sampling backend", settings.backend, BACKENDS))
    if settings.endpoints and settings.backend != "vllm":
        raise ValueError(f"expected backend 'vllm' with endpoints, got {settings.backend!r}; set the backend")
    length, temperature = settings.max_new_tokens, settings.temperature
    if settings.backend == "hf":
        from ppg_agents.generation.hf import HFSampler

        return HFSampler(policy, length, temperature)
    if settings.endpoints:
        from ppg_agents.generation.servers import VLLMServerSampler

        return VLLMServerSampler(
            policy,
            folder,
            settings.endpoints,
            length,
            temperature,
            sync=settings.sync,
            timeout=settings.timeout,
            patience=settings.patience,
            api_key_env=settings.api_key_env,
            run=run,
            write=write,
        )
    from ppg_agents.generation.vllm import VLLMSampler

    return VLLMSampler(policy, folder, length, temperature, sync=settings.sync, engine=settings.engine)


def speaking(policy: Policy, sampler: Sampler) -> AbstractContextManager[None]:
    """Return the context to sample in: LoRA merged if the policy's own model samples, else an empty one."""
    return policy.merged() if sampler.own_model else nullcontext()


def draw_seeds(generator: torch.Generator | None, n: int) -> list[int | None]:
    """Return n seeds for one turn of n conversations; all None without a generator."""
    if generator is None:
        return [None] * n
    return [int(s) for s in torch.randint(2**62, (n,), generator=generator, device=generator.device).tolist()]


__all__ = [
    "BACKENDS",
    "GenerationError",
    "Sample",
    "Sampler",
    "SingleSampler",
    "draw_seeds",
    "make_sampler",
    "speaking",
]
