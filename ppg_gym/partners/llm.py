"""A language model behind an OpenAI-compatible endpoint plays the partner.

It meets the persona as a stranger: it is told its role and what has been said, never the persona's instruction, facts
or verdicts. Every line is audited; a line with a fault is sampled again. If no sample is free of faults, or the call
fails, there is no line. Nothing here may make up, cut or repair a line; thoughts in front of one are no part of it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import dropwhile, groupby
from typing import Any

import numpy as np

from ppg_gym.conversation import Conversation, Line
from ppg_gym.llm.background import run
from ppg_gym.llm.chat import Chat, Request
from ppg_gym.llm.client import ChatClient
from ppg_gym.llm.settings import ClientSettings
from ppg_gym.llm.sharing import lease, release
from ppg_gym.options import number, whole, wrong
from ppg_gym.partners import Said
from ppg_gym.partners.audit import audit, own_words
from ppg_gym.partners.scenes import Scene, scene
from ppg_gym.sanitise import after_reasoning, plain, without_reasoning

HEARD = 4_000  # characters of a reply that reach the partner
REASON = 200  # characters kept of why there is no line
_SEEDS = 2**31
_WHOSE = "partner_options"

_RULES = """\
Rules of this conversation:
- You are {role} and nobody else. Never write what {counterpart} says, does or thinks.
- Say one turn of spoken words, of {words} words at most, and stop. No name or label in front, no stage directions, no \
lists, no remarks on these rules.
- Go on from what was said last. Do not say again what was said before.
- The conversation goes on until somebody else ends it: never say goodbye and never close it."""


@dataclass(frozen=True)
class Style:
    """How the partner speaks.

    Attributes:
        temperature: Of sampling.
        max_tokens: Most tokens of an answer. One that is cut off is asked for once more with more room
            (``ClientSettings.headroom``); a line that is cut off there too has a fault.
        max_words: Most words of a line.
        history: Most lines of the conversation that the model sees; None for all.
        retries: Most new samples for a line with a fault.

    Raises:
        ValueError: A value of the wrong type or range, or retries at temperature 0, where every sample is the same.
    """

    temperature: float = 0.7
    max_tokens: int = 200
    max_words: int = 120
    history: int | None = 40
    retries: int = 3

    def __post_init__(self) -> None:
        number(_WHOSE, "temperature", self.temperature, 2)
        for name, least in (("max_tokens", 1), ("max_words", 1), ("history", 1), ("retries", 0)):
            if name != "history" or self.history is not None:
                whole(_WHOSE, name, getattr(self, name), least)
        if self.retries and not self.temperature:
            raise wrong(_WHOSE, "retries", "0 at temperature 0, where every sample is the same", self.retries)


class LLMPartner:
    """Plays the other speaker of a domain's scenario through a chat model.

    Every line draws one integer from its conversation's generator, no matter how many samples it takes; the samples'
    seeds come from it. With a cache, or a server that honours seeds, the same generators give the same lines.

    Args:
        domain: Name of an embedded domain.
        options: The client's settings and those of :class:`Style`.
        chat: The chat model to ask; None for a client made from the settings.

    Attributes:
        lines: Lines asked for.
        faults: Why there was no line: the fault of the last sample, or how the call failed -> how often.
        retried: Faults of samples that were followed by a good line.

    Raises:
        ValueError: An option is not what it should be.
    """

    waits = True
    hears_verdicts = False

    def __init__(self, domain: str, options: Mapping[str, Any], chat: Chat | None = None) -> None:
        settings, style = ClientSettings.take(options, _WHOSE, [field.name for field in fields(Style)])
        self.style = Style(**style)
        self._scene = scene(domain)
        self._client: ChatClient | None = None
        if chat is None:
            chat = self._client = lease(settings)
        self.chat = chat
        self._asking: set[asyncio.Task[Said]] = set()
        self.lines = 0
        self.faults: Counter[str] = Counter()
        self.retried: Counter[str] = Counter()

    def speak(self, conversations: Sequence[Conversation], rngs: Sequence[np.random.Generator]) -> list[Said]:
        """Return one line per conversation; all are asked for at once.

        Raises:
            BudgetError: The budget is used up.
            EndpointError: No endpoint can serve the model.
        """
        pairs = zip(conversations, rngs, strict=True)
        seeded = [(conversation, int(rng.integers(_SEEDS))) for conversation, rng in pairs]
        return run(self._all(seeded)) if seeded else []

    def close(self) -> None:
        """Give the client back, once; a chat that was passed in is left to its owner."""
        client, self._client = self._client, None
        if client is not None:
            release(client)

    def abandon(self) -> None:
        """End a ``speak`` that is waiting in another thread; it raises ``CancelledError`` there."""
        for task in list(self._asking):
            task.get_loop().call_soon_threadsafe(task.cancel)

    async def _all(self, seeded: Sequence[tuple[Conversation, int]]) -> list[Said]:
        tasks = [asyncio.ensure_future(self._say(conversation, seed)) for conversation, seed in seeded]
        self._asking.update(tasks)
        try:
            return await asyncio.gather(*tasks)
        finally:  # when one call raises, the others are no longer wanted
            self._asking.difference_update(tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _say(self, conversation: Conversation, seed: int) -> Said:
        self.lines += 1
        asked = messages(conversation, self._scene, self.style)
        roles = self._scene.roles(conversation.persona)
        faults: list[str] = []
        for sample in range(self.style.retries + 1):
            request = Request(
                messages=asked,
                temperature=self.style.temperature,
                max_tokens=self.style.max_tokens,
                seed=(seed + sample) % _SEEDS,
                sample=sample,
            )
            answer = await self.chat.ask(request)
            if answer.status != "ok":
                self.faults[answer.status] += 1
                return Said("", answer.status, plain(answer.reason, REASON))
            line = after_reasoning(answer.text)  # a model without a reasoning parser thinks in front of its line
            if answer.finish == "length":  # the client has given it all the room there is
                self.faults["too_long"] += 1
                return Said("", "too_long", "cut off at max_tokens")
            fault = audit(line, conversation, roles, self.style.max_words)
            if fault == "ok":
                self.retried.update(faults)
                return Said(own_words(line, roles))
            faults.append(fault)
        self.faults[faults[-1]] += 1
        return Said("", faults[-1], f"it said {plain(line, REASON)!r}")


def messages(conversation: Conversation, played: Scene, style: Style) -> tuple[Mapping[str, str], ...]:
    """Return the prompt: the model's role, then its own lines as ``assistant`` and the policy's as ``user``.

    Chat templates want a user's message first and then strict turns, so lines of one speaker in a row are joined.

    Args:
        conversation: The conversation so far.
        played: The role that the model plays.
        style: How many lines are shown, and how long a new one may be.
    """
    rules = _RULES.format(role=f"the {played.role}", counterpart=played.counterpart, words=style.max_words)
    parts = (played.brief, played.known(conversation.persona), rules)
    turns = [("user", played.opening), *(_heard(line, played) for line in conversation.lines)]
    if style.history is not None and len(conversation.lines) > style.history:
        shown = turns[-style.history :]
        turns = list(dropwhile(lambda turn: turn[0] == "assistant", shown)) or turns[:1]
    joined = ((role, "\n".join(text for _, text in run)) for role, run in groupby(turns, key=lambda turn: turn[0]))
    prompt = [("system", "\n\n".join(part for part in parts if part)), *joined]
    return tuple({"role": role, "content": text} for role, text in prompt)


def _heard(line: Line, played: Scene) -> tuple[str, str]:
    if line.speaker == "partner":
        return "assistant", line.text
    return "user", plain(without_reasoning(line.text), HEARD) or played.silence
