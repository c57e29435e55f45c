"""Who speaks for the policy: the policy through its sampler, or an agent that speaks for itself.

Observations in, replies with their tokens out. Nothing here steps an environment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ppg_agents.agents.protocol import SpeakingAgent
from ppg_agents.generation import Sample, Sampler
from ppg_agents.policy.policy import Policy

AGENT = "agent"
"""A turn's ``sampler`` when an agent spoke for itself."""


@dataclass(frozen=True)
class Spoken:
    """A reply.

    Attributes:
        text: What the environment hears.
        prompt: Tokens between the previous reply's last one and this reply.
        sample: The reply's tokens.
    """

    text: str
    prompt: list[int]
    sample: Sample


class Side:
    """The policy's side of one conversation: its next prompt, and the tokens used so far."""

    def __init__(self, policy: Policy, sampler: Sampler) -> None:
        """Begin the conversation."""
        self._policy = policy
        self._room = min(policy.context_length, sampler.context_length) - sampler.max_new_tokens
        self._used = 0
        self._cut = False

    def prompt(self, instruction: str, message: str) -> list[int] | None:
        """Return the tokens since the last sampled one; a cut reply is closed first.

        Args:
            instruction: The role-play instruction; read at the first message.
            message: The partner's newest line.

        Returns:
            None when prompt and longest reply would not fit into the context.
        """
        if not self._used:
            tokens = self._policy.first_prompt(instruction, message)
        else:
            tokens = ([self._policy.end_of_turn_id] if self._cut else []) + self._policy.next_prompt(message)
        return tokens if len(tokens) <= self._room - self._used else None

    def said(self, prompt: list[int], sample: Sample) -> Spoken:
        """Record the sample after a prompt, and return it with the text that the environment hears."""
        self._cut = not sample.ended
        self._used += len(prompt) + len(sample.token_ids)
        return Spoken(self._policy.spoken(sample.token_ids), prompt, sample)


Prompts = list[list[int] | None]


class Sides:
    """The policy's sides of n conversations in lockstep."""

    def __init__(self, policy: Policy, sampler: Sampler, n: int) -> None:
        """Begin n conversations."""
        self._sides = [Side(policy, sampler) for _ in range(n)]

    def prompts(self, instructions: Sequence[str], messages: Sequence[str], active: Sequence[bool]) -> Prompts:
        """Return the prompt of every active conversation; None where it is not active, or too long."""
        rows = zip(self._sides, instructions, messages, active, strict=True)
        return [side.prompt(instruction, message) if speaks else None for side, instruction, message, speaks in rows]

    def said(self, prompts: Prompts, samples: Sequence[Sample | None]) -> list[Spoken | None]:
        """Record the samples after the prompts."""
        return [
            None if prompt is None or sample is None else side.said(prompt, sample)
            for side, prompt, sample in zip(self._sides, prompts, samples, strict=True)
        ]


class Speaker(Protocol):
    """Speaks in n conversations in lockstep."""

    def start(self, n: int, generator: torch.Generator | None) -> None:
        """Begin n new conversations."""

    def reply(
        self,
        instructions: Sequence[str],
        messages: Sequence[str],
        active: Sequence[bool],
        generator: torch.Generator | None,
    ) -> list[Spoken | None]:
        """Answer one message in every active conversation.

        Args:
            instructions: n role-play instructions; read at a conversation's first message.
            messages: n newest lines of the partners.
            active: n flags; a conversation that is not active is left alone.
            generator: Source of randomness.

        Returns:
            The reply of each conversation; None if it is not active, or if prompt and longest reply would not fit the
            context.
        """


class PolicySpeaker:
    """The policy speaks, through its sampler."""

    def __init__(self, policy: Policy, sampler: Sampler) -> None:
        """Set up; `start` begins conversations."""
        self._policy, self._sampler = policy, sampler

    def start(self, n: int, generator: torch.Generator | None = None) -> None:
        """Begin n new conversations."""
        self._sides = Sides(self._policy, self._sampler, n)
        self._sampler.start(n)

    def reply(
        self,
        instructions: Sequence[str],
        messages: Sequence[str],
        active: Sequence[bool],
        generator: torch.Generator | None,
    ) -> list[Spoken | None]:
        """Answer one message in every active conversation; see `Speaker`."""
        prompts = self._sides.prompts(instructions, messages, active)
        return self._sides.said(prompts, self._sampler.reply(prompts, generator))


class AgentSpeaker:
    """An agent speaks for itself, in words; the policy's tokenizer turns them into the ledger's tokens.

    Their log-probs are unknown, so NaN: the built-in learner refuses to compute ratios from them.
    """

    def __init__(self, agent: SpeakingAgent, policy: Policy, sampler: Sampler) -> None:
        """Set up; only the sampler's limits are used."""
        self._agent, self._policy, self._sampler = agent, policy, sampler

    def start(self, n: int, generator: torch.Generator | None) -> None:
        """Begin n new conversations; the agent's seed is drawn from the generator."""
        self._sides = Sides(self._policy, self._sampler, n)
        seed = 0
        if generator is not None:
            seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
        self._agent.start(n, seed)

    def reply(
        self,
        instructions: Sequence[str],
        messages: Sequence[str],
        active: Sequence[bool],
        generator: torch.Generator | None,
    ) -> list[Spoken | None]:
        """Answer one message in every active conversation; see `Speaker`.

        Raises:
            ValueError: The agent does not answer with one text for each conversation.
        """
        prompts = self._sides.prompts(instructions, messages, active)
        if not any(prompts):
            return [None] * len(prompts)
        heard = ["" if prompt is None else message for prompt, message in zip(prompts, messages, strict=True)]
        texts = self._agent.act({"instruction": list(instructions), "message": heard})
        if len(texts) != len(prompts) or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"expected {len(prompts)} texts from {type(self._agent).__name__}.act, got {len(texts)} of "
                f"{', '.join(sorted({type(text).__name__ for text in texts}))}"
            )
        # The environment hears the agent's own words, not the text decoded from their tokens.
        spoken = self._sides.said(prompts, [self._sample(text) for text in texts])
        return [None if reply is None else replace(reply, text=text) for reply, text in zip(spoken, texts, strict=True)]

    def _sample(self, text: str) -> Sample:
        tokens = tuple(self._policy.encode_reply(text))
        return Sample(tokens, (math.nan,) * len(tokens), True, self._policy.version, sampler=AGENT)


def speaker_of(agent: object, policy: Policy, sampler: Sampler) -> Speaker:
    """Return who speaks for an agent: the agent if it can, else the policy."""
    if isinstance(agent, SpeakingAgent):
        return AgentSpeaker(agent, policy, sampler)
    return PolicySpeaker(policy, sampler)
