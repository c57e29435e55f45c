"""Sampled replies and what can make them. No sampler here decides what a conversation is about."""

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
    """No reply was to be had, or not the one that was asked for; the message says what to do."""


@dataclass(frozen=True)
class Sample:
    """A reply as it was sampled.

    Attributes:
        token_ids: The sampled tokens, end-of-turn included when it was sampled.
        log_probs: Their log-probabilities under the distribution that was sampled from, temperature applied;
            for a greedy reply (temperature 0) those at temperature 1.
        ended: Whether end-of-turn was sampled, rather than the length limit reached.
        policy_version: Optimiser steps that the policy which spoke had taken.
        temperature: Of the distribution that was sampled from.
        sampler: What sampled: ``hf`` or ``vllm``.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    ended: bool
    policy_version: int = 0
    temperature: float = 1.0
    sampler: str = "hf"


class Sampler(Protocol):
    """Speaks for n conversations in lockstep, and remembers their tokens from turn to turn.

    One whose conversations need not be in lockstep is a `SingleSampler` too.
    """

    @property
    def own_model(self) -> bool:
        """Whether the policy's own model samples, so that its LoRA is worth merging meanwhile."""

    @property
    def max_new_tokens(self) -> int:
        """Most tokens in a reply."""

    @property
    def context_length(self) -> int:
        """Most tokens of a conversation, prompt and reply; may be less than the policy's."""

    @property
    def temperature(self) -> float:
        """Of sampling; 0 takes the most likely token."""

    def start(self, n: int) -> None:
        """Begin n new conversations and forget the old ones."""

    def reply(self, prompts: Sequence[Sequence[int] | None], generator: torch.Generator | None) -> list[Sample | None]:
        """Return one reply per conversation; None in, None out.

        Args:
            prompts: The tokens since the conversation's last sampled token; None when it is finished.
            generator: Source of randomness; None only for greedy sampling.
        """

    def sync(self, policy: Policy | None = None) -> None:
        """Speak as the policy is now; nothing to do where the policy's own model samples."""

    def close(self) -> None:
        """Let go of what is held: servers, engines, files."""


@runtime_checkable
class SingleSampler(Protocol):
    """Speaks for n conversations, each at its own pace; `reply_one` may be called from several threads at once."""

    @property
    def max_new_tokens(self) -> int:
        """Most tokens in a reply."""

    @property
    def context_length(self) -> int:
        """Most tokens of a conversation, prompt and reply."""

    @property
    def temperature(self) -> float:
        """Of sampling; 0 takes the most likely token."""

    @property
    def own_model(self) -> bool:
        """Whether the policy's own model samples."""

    def start(self, n: int) -> None:
        """Begin n new conversations and forget the old ones."""

    def reply_one(self, conversation: int, prompt: Sequence[int], seed: int | None) -> Sample:
        """Return a conversation's next reply.

        Args:
            conversation: Its number; only one thread at a time speaks for it.
            prompt: The tokens since its last sampled token.
            seed: Of this reply; None only for greedy sampling.
        """

    def cancel(self) -> None:
        """Make every `reply_one` under way raise a GenerationError."""


BACKENDS = ("hf", "vllm")


def make_sampler(
    policy: Policy, settings: SamplingSettings, folder: str | Path, *, run: str | None = None, write: bool = True
) -> Sampler:
    """Return the sampler that the settings name.

    Args:
        policy: Who speaks.
        settings: ``backend`` ``hf`` samples with the policy's own model, ``vllm`` with an engine in this process,
            or with servers when there are ``endpoints``.
        folder: Where a sampler with weights of its own may write them; for nothing else.
        run: With servers and several learner processes: the same word in all of them.
        write: With servers and several learner processes: True in exactly one of them.

    Raises:
        ValueError: Settings that contradict one another or do not suit the policy.
        ModuleNotFoundError: The backend's library is not installed.
        GenerationError: A server is not there, or not what it should be.
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


def speaking(policy: Policy, sampler: Sampler | SingleSampler) -> AbstractContextManager[None]:
    """Return the context to sample in: LoRA merged where the policy's own model samples, else nothing."""
    return policy.merged() if sampler.own_model else nullcontext()


def draw_seeds(generator: torch.Generator | None, n: int) -> list[int | None]:
    """Return n seeds for one turn of n conversations; None each without a generator."""
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
