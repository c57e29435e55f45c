"""Picks the conversations worth showing, and the pairs to show side by side. Pure functions over indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FAILED_SHARE, PAIRED_SHARE = 0.25, 0.25
"""At most this share of what is shown has a failed verdict, or a persona met early and late."""


@dataclass(frozen=True)
class Row:
    """A conversation's place in its file, and what the sample is chosen by."""

    offset: int
    number: int
    order: int
    persona: str
    failed: bool


def sample(rows: Sequence[Row], most: int) -> list[int]:
    """Return the indices of at most ``most`` conversations to show, in order.

    If there are more: up to a quarter with a failed verdict, evenly spread; up to a quarter that are the first and last
    conversation of personas met early and late; the rest from both ends of the file in equal parts.
    """
    if len(rows) <= most:
        return list(range(len(rows)))
    failed = [i for i, row in enumerate(rows) if row.failed]
    chosen = set(_spread(failed, int(most * FAILED_SHARE)))
    for early, late in pairs([(row.persona, row.order) for row in rows])[: int(most * PAIRED_SHARE / 2)]:
        chosen |= {early, late}
    for i in range(len(rows)):
        for j in (i, len(rows) - 1 - i):
            if len(chosen) < most:
                chosen.add(j)
    return sorted(chosen)


def pairs(met: Sequence[tuple[str, int]]) -> list[tuple[int, int]]:
    """Return the first and last conversation of every persona met at different times, farthest apart first.

    Args:
        met: (persona, order) of every conversation.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for i, (persona, order) in enumerate(met):
        if persona and (persona not in first or order < met[first[persona]][1]):
            first[persona] = i
        if persona and (persona not in last or order >= met[last[persona]][1]):
            last[persona] = i
    apart = {p: met[last[p]][1] - met[first[p]][1] for p in first}
    return [(first[p], last[p]) for p in sorted(first, key=lambda p: -apart[p]) if apart[p] > 0]


def _spread(indices: Sequence[int], most: int) -> list[int]:
    """Return at most ``most`` of the indices, evenly spread."""
    if len(indices) <= most:
        return list(indices)
    return [indices[i * len(indices) // most] for i in range(most)]
