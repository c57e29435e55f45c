"""The embedded partner: it follows the domain's rule table and speaks the domain's lines.

It reads the policy's replies (through :mod:`ppg_gym.domain.reading`), never the judge's verdicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppg_gym.conversation import Conversation, Line
from ppg_gym.domain.files import FRESH
from ppg_gym.domain.reading import Track, reader
from ppg_gym.partners import Said
from ppg_gym.plugins import refuse_options


def pick(options: Sequence[str], rng: np.random.Generator) -> str:
    """Return one of the options, all equally likely."""
    return options[int(rng.random() * len(options))]


class ScriptedPartner:
    """Asks about every fact (or makes every point of the lesson) in turn, in a new random order each round.

    Args:
        domain: Name of an embedded domain, or the path of your own.
        options: None are taken.
    """

    def __init__(self, domain: str, options: Mapping[str, Any] | None = None) -> None:
        refuse_options("scripted partner", options)
        self._reader = reader(domain)
        self._domain = self._reader.domain
        rules = self._domain.options
        self._recall_chance = float(rules.get("recall_chance", 0.0))
        self._recalled = frozenset(rules.get("recalled", ()))
        self._disputes: Mapping[str, str] = rules.get("disputes", {})

    def speak(self, conversations: Sequence[Conversation], rngs: Sequence[np.random.Generator]) -> list[Said]:
        """Return the next line of every conversation."""
        return [Said(self._line(c, rng)) for c, rng in zip(conversations, rngs, strict=True)]

    def _line(self, conversation: Conversation, rng: np.random.Generator) -> str:
        track = self._reader.track(conversation)
        facts = conversation.persona.facts
        lines = self._domain.lines
        opening = lines["start"].get(track.state) if not track.readings else None
        prefix = pick(opening or lines["prefix"][track.state], rng)
        quoted = ""
        if "points" in lines:
            points = lines["points"][facts[self._domain.options["topic"]]]
            core = points[self._next(tuple(points), track, rng)]
        else:
            core, quoted = self._question(track, facts, rng)
        line = f"{prefix} {core}".strip()
        if "{" in line:
            line = line.format(said=quoted, **facts)
        if Line("partner", line) in conversation.lines[-2 * FRESH :]:  # said lately: draw again
            return self._line(conversation, rng)
        return line

    def _question(self, track: Track, facts: object, rng: np.random.Generator) -> tuple[str, str]:
        """Return a question and, when the last reply is disputed, the value that it claimed."""
        lines = self._domain.lines
        recall = lines.get("recall", {})
        if track.state in self._disputes:
            slip = next(reading for reading in reversed(track.readings) if reading.kind == "slip")
            question = pick(lines[self._disputes[track.state]][slip.slot], rng)
            return question.replace("{value}", "{" + slip.slot + "}"), slip.claimed or "otherwise"
        told = [r.slot for r in track.readings[:-1] if r.kind in self._recalled]
        if recall and len(told) >= 2 and rng.random() < self._recall_chance:
            slot = pick(told, rng)
            return pick(recall[slot], rng).replace("{value}", "{" + slot + "}"), ""
        slot = self._next(tuple(lines["ask"]), track, rng)
        return pick(lines["ask"][slot], rng), ""

    @staticmethod
    def _next(topics: tuple[str, ...], track: Track, rng: np.random.Generator) -> str:
        """Return one of the topics that have come up least often so far."""
        if not track.asked:
            return pick(topics, rng)
        times = [track.asked.count(topic) for topic in topics]
        least = min(times)
        return pick([topic for topic, count in zip(topics, times, strict=True) if count == least], rng)
