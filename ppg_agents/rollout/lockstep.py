"""Conversations between a policy and a Gymnasium vector environment, to their end.

Works for any vector environment with observation ``{"instruction": str, "message": str}`` and ``str``
actions. Nothing here learns, and nothing here knows what the conversation is about.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from ppg_agents.generation import Sample, Sampler, SingleSampler, speaking
from ppg_agents.policy.policy import Policy
from ppg_agents.trajectory import Trajectory, Turn

log = logging.getLogger(__name__)


class Side:
    """The policy's side of one conversation: what its next prompt is, and how many tokens it has."""

    def __init__(self, policy: Policy, sampler: Sampler | SingleSampler) -> None:
        """Begin the conversation."""
        self._policy = policy
        self._room = min(policy.context_length, getattr(sampler, "context_length", policy.context_length))
        self._room -= sampler.max_new_tokens
        self._used = 0
        self._cut = False

    def prompt(self, instruction: str, message: str) -> list[int] | None:
        """Return the tokens since the last sampled one; a reply that was cut is closed first.

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

    def said(self, prompt: Sequence[int], sample: Sample) -> None:
        """Note what was sampled after a prompt."""
        self._cut = not sample.ended
        self._used += len(prompt) + len(sample.token_ids)


class Speaker:
    """Holds up the policy's end of n conversations in lockstep: observations in, sampled replies out."""

    def __init__(self, policy: Policy, sampler: Sampler, n: int) -> None:
        """Begin n conversations."""
        self.sampler = sampler
        self.sides = [Side(policy, sampler) for _ in range(n)]
        sampler.start(n)

    def reply(
        self,
        instructions: Sequence[str],
        messages: Sequence[str],
        active: Sequence[bool],
        generator: torch.Generator | None,
    ) -> list[tuple[list[int], Sample] | None]:
        """Answer one message in every active conversation.

        Args:
            instructions: n role-play instructions; read at a conversation's first message.
            messages: n newest lines of the partners.
            active: n flags; a conversation that is not active is left alone.
            generator: Source of randomness of the sampler.

        Returns:
            Per conversation the prompt tokens and the sample; None when it is not active, or when prompt
            and longest reply would not fit into the context.
        """
        sides = zip(self.sides, instructions, messages, active, strict=True)
        prompts = [side.prompt(what, said) if speaks else None for side, what, said, speaks in sides]
        samples = self.sampler.reply(prompts, generator)
        replies: list[tuple[list[int], Sample] | None] = []
        for side, prompt, sample in zip(self.sides, prompts, samples, strict=True):
            if prompt is None or sample is None:
                replies.append(None)
                continue
            side.said(prompt, sample)
            replies.append((prompt, sample))
        return replies


def collect(
    envs: gym.vector.VectorEnv[Any, Any, Any],
    policy: Policy,
    sampler: Sampler,
    seeds: Sequence[int | None],
    generator: torch.Generator | None = None,
    domain: str = "",
) -> list[Trajectory]:
    """Hold one conversation per sub-environment, all of them to their end.

    A sub-environment that has ended is left out of sampling. With autoreset disabled it is reset before the
    next step (Gymnasium refuses to step it otherwise), unless ``envs.metadata["ended_may_step"]`` says that
    stepping it is harmless.

    Args:
        envs: N sub-environments.
        policy: Who speaks; its LoRA is merged while its own model samples.
        sampler: How replies are drawn from `policy`.
        seeds: N seeds of the episodes; equal seeds share a persona.
        generator: Source of randomness of the sampler.
        domain: Written into the trajectories.

    Returns:
        N trajectories, in the order of `seeds`. A NaN reward is an unjudged turn. A conversation whose next
        reply might not fit into the policy's context ends truncated.

    Raises:
        ValueError: Not one seed per sub-environment, or observations of another form.
    """
    n = envs.num_envs
    if len(seeds) != n:
        raise ValueError(f"expected one seed for each of {n} sub-environments, got {len(seeds)}")
    mode = envs.metadata.get("autoreset_mode")
    observations, infos = envs.reset(seed=list(seeds))  # type: ignore[arg-type]
    instructions, messages = _texts(observations, n)
    personas = [str(_info(infos, i).get("persona", "")) for i in range(n)]
    turns: list[list[Turn]] = [[] for _ in range(n)]
    active, terminated, truncated = [True] * n, [False] * n, [False] * n
    partners = ["ok"] * n
    speaker = Speaker(policy, sampler, n)
    with speaking(policy, sampler):
        while True:
            replies = speaker.reply(instructions, messages, active, generator)
            for i in range(n):
                if active[i] and replies[i] is None:
                    log.warning("conversation %d truncated: no room for another reply in the context", i)
                    active[i], truncated[i] = False, True
            if not any(active):
                break
            texts = tuple("" if r is None else policy.spoken(r[1].token_ids) for r in replies)
            observations, rewards, ends, cuts, infos = envs.step(texts)
            for i, reply in enumerate(replies):
                if reply is None:
                    continue
                info = _info(infos, i)
                info = info.get("final_info", info)  # autoreset in the same step keeps the episode's own info there
                turns[i].append(record(messages[i], texts[i], *reply, float(rewards[i]), info))
                partners[i] = partner_status(info)
                terminated[i], truncated[i] = bool(ends[i]), bool(cuts[i])
                active[i] = not (terminated[i] or truncated[i])
            if not any(active):
                break
            ended = np.logical_or(ends, cuts)
            if mode == AutoresetMode.DISABLED and ended.any() and not envs.metadata.get("ended_may_step"):
                observations, _ = envs.reset(options={"reset_mask": ended})
            _, messages = _texts(observations, n)
    return [
        Trajectory(
            instruction=instructions[i],
            persona=personas[i],
            domain=domain,
            seed=None if seed is None else int(seed),
            turns=tuple(turns[i]),
            terminated=terminated[i],
            truncated=truncated[i],
            partner_status=partners[i],
        )
        for i, seed in enumerate(seeds)
    ]


def record(
    message: str, reply: str, prompt: Sequence[int], sample: Sample, reward: float, info: Mapping[str, Any]
) -> Turn:
    """Return one exchange as the ledger keeps it.

    Args:
        message: The partner's line.
        reply: What the environment heard.
        prompt: The tokens before the reply.
        sample: The reply as it was sampled.
        reward: The environment's; anything but a finite number is an unjudged turn.
        info: The environment's, of the step that heard the reply.
    """
    return Turn(
        message=message,
        reply=reply,
        prompt_ids=tuple(prompt),
        token_ids=sample.token_ids,
        log_probs=sample.log_probs,
        reward=reward if math.isfinite(reward) else math.nan,
        verdict=dict(info.get("verdict") or {}),
        policy_version=sample.policy_version,
        sampler=sample.sampler,
        temperature=sample.temperature,
    )


def partner_status(info: Mapping[str, Any]) -> str:
    """Return the partner's fault in a step's info, ``ok`` without one."""
    return str((info.get("partner") or {}).get("status", "ok"))


def _texts(observations: Any, n: int) -> tuple[list[str], list[str]]:
    """Return instructions and messages of a batched observation."""
    try:
        instructions, messages = list(observations["instruction"]), list(observations["message"])
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError(
            "expected observations with 'instruction' and 'message' (a Dict space of texts), got "
            f"{type(observations).__name__}; wrap the environment"
        ) from error
    if len(instructions) != n or len(messages) != n:
        raise ValueError(f"expected {n} texts of each kind, got {len(instructions)} and {len(messages)}")
    return [str(text) for text in instructions], [str(text) for text in messages]


def _info(infos: Mapping[str, Any], i: int) -> dict[str, Any]:
    """Return sub-environment i's own info out of Gymnasium's dict of arrays with ``_key`` masks."""
    own: dict[str, Any] = {}
    for key, values in infos.items():
        mask = infos.get(f"_{key}")
        if key.startswith("_") or (mask is not None and not mask[i]):
            continue
        if isinstance(values, Mapping):
            own[key] = _info(values, i)
        elif mask is not None or isinstance(values, np.ndarray | list | tuple):
            value = values[i]
            value = value.item() if isinstance(value, np.generic) else value
            own[key] = None if isinstance(value, float) and math.isnan(value) else value
    return own
