"""What samplers with their own weights share: histories, seeds, versions, checks.

Such a sampler speaks as the policy version it was last synced to, and every sample says which. It samples from the
policy's distribution at the temperature and nothing else: no top-p, top-k, min-p or penalty, whatever the model's
generation config says, and a reply ends only at the policy's end-of-turn token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ppg_agents.generation import GenerationError, Sample, draw_seeds
from ppg_agents.generation.versions import Sync, Version, Versions
from ppg_agents.policy.policy import Policy

_HOTTEST = 2.0


@dataclass(frozen=True)
class Job:
    """One reply to sample.

    Attributes:
        conversation: Number of the conversation.
        tokens: The conversation so far, up to and including the prompt.
        seed: Seed of this reply; None for greedy sampling.
    """

    conversation: int
    tokens: list[int]
    seed: int | None


@dataclass(frozen=True)
class Reply:
    """What came back: the sampled tokens, and their log-probs under the distribution sampled from."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]


class SyncedSampler(ABC):
    """Samples replies with its own weights, which `sync` keeps equal to the policy's.

    Attributes:
        own_model: False: the policy's own model takes no part in sampling.
        context_length: Longest conversation, prompt and reply, in tokens.
    """

    own_model = False

    def __init__(
        self,
        policy: Policy,
        folder: str | Path,
        max_new_tokens: int,
        temperature: float,
        sync: Sync,
        *,
        run: str | None = None,
        write: bool = True,
    ) -> None:
        """Keep what every such sampler needs; see `Versions` for ``folder``, ``sync``, ``run`` and ``write``.

        Raises:
            ValueError: A limit is out of range, or ``sync`` does not suit the policy.
        """
        if max_new_tokens < 1 or not 0 <= temperature <= _HOTTEST:
            raise ValueError(
                f"expected max_new_tokens >= 1 and a temperature in [0, {_HOTTEST:g}], the range vLLM takes, "
                f"got {max_new_tokens} and {temperature}"
            )
        self.policy = policy
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.context_length = policy.context_length
        self._versions = Versions(policy, folder, sync, run=run, write=write)
        self._version: Version | None = None
        self._histories: list[list[int]] = []

    def sync(self, policy: Policy | None = None) -> None:
        """Take over the policy's current weights; does nothing when they have not changed.

        Args:
            policy: The policy the sampler was made for, or None.

        Raises:
            ValueError: Another policy was given.
            RuntimeError: Called inside ``policy.merged()``.
            GenerationError: The new weights could not be loaded.
        """
        if policy is not None and policy is not self.policy:
            raise ValueError("expected the policy the sampler was made for, got another; make a sampler for it")
        version = self._versions.publish()
        if version != self._version:
            # No version while loading: if that fails, `reply` must refuse rather than speak with half-loaded weights.
            # The former version's files and adapter go only once the new one is in place.
            former, self._version = self._version, None
            self._load(version, former)
            self._version = version
            self._versions.prune()

    def start(self, n: int) -> None:
        """Start n new conversations and forget the old ones."""
        self._histories = [[] for _ in range(n)]

    def reply(
        self, prompts: Sequence[Sequence[int] | None], generator: torch.Generator | None = None
    ) -> list[Sample | None]:
        """Return one sampled reply per conversation; None in, None out.

        Args:
            prompts: n token lists: what was added since the conversation's last sampled token; None when the
                conversation is finished.
            generator: Draws a seed for every reply; may be None at temperature 0.

        Raises:
            ValueError: Not n prompts, an empty prompt, or no generator.
            RuntimeError: The policy has learned since the last `sync`.
            GenerationError: No reply came back.
        """
        if len(prompts) != len(self._histories):
            raise ValueError(f"expected {len(self._histories)} prompts, as started, got {len(prompts)}")
        if generator is None and self.temperature > 0:
            raise ValueError("expected a generator for sampling, got None; pass one or use temperature 0")
        version = self._synced()
        seeds = draw_seeds(generator if self.temperature > 0 else None, len(prompts))
        jobs = [self._job(i, prompt, seeds[i]) for i, prompt in enumerate(prompts) if prompt is not None]
        result: list[Sample | None] = [None] * len(prompts)
        if jobs:
            for job, reply in zip(jobs, self._generate(jobs, version), strict=True):
                result[job.conversation] = self._sample(job, reply, version)
        return result

    def _job(self, conversation: int, prompt: Sequence[int], seed: int | None) -> Job:
        if not prompt:
            raise ValueError("expected at least one token in every prompt, got an empty one")
        return Job(conversation, [*self._histories[conversation], *prompt], seed)

    def _sample(self, job: Job, reply: Reply, version: Version) -> Sample:
        """Check a reply, add it to the history, and return it as a sample."""
        ended = bool(reply.token_ids) and reply.token_ids[-1] == self.policy.end_of_turn_id
        if len(reply.log_probs) != len(reply.token_ids):
            raise GenerationError(
                f"expected one log-prob per sampled token, got {len(reply.log_probs)} for {len(reply.token_ids)}"
            )
        if not ended and len(reply.token_ids) != self.max_new_tokens:
            raise GenerationError(
                f"expected a reply that ends with token {self.policy.end_of_turn_id} or has {self.max_new_tokens} "
                f"tokens, got {len(reply.token_ids)} tokens ending with {list(reply.token_ids[-1:])}; the model's "
                f"generation config limits the reply: start the server with --generation-config vllm"
            )
        self._histories[job.conversation] = [*job.tokens, *reply.token_ids]
        return Sample(reply.token_ids, reply.log_probs, ended, version.number, self.temperature, "vllm")

    def _synced(self) -> Version:
        """Return the version that speaks.

        Raises:
            RuntimeError: It is not the policy's current version.
        """
        if self._version is None or self._version.number != self.policy.version:
            got = "none" if self._version is None else f"version {self._version.number}"
            raise RuntimeError(
                f"expected the sampler to speak as the policy's version {self.policy.version}, got {got}; "
                "call sync(policy) after learning"
            )
        return self._version

    def _parameters(self, seed: int | None) -> dict[str, Any]:
        """Return vLLM's sampling parameters, including all that a generation config could set."""
        return {
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": seed,
            "logprobs": 0,
            "stop_token_ids": [self.policy.end_of_turn_id],
            "ignore_eos": True,
        }

    @abstractmethod
    def _load(self, version: Version, former: Version | None) -> None:
        """Load a published version in place of the former one."""

    @abstractmethod
    def _generate(self, jobs: Sequence[Job], version: Version) -> list[Reply]:
        """Return one reply per job."""

    @abstractmethod
    def close(self) -> None:
        """Release what the sampler holds."""
