"""The space of utterances: any Unicode string up to a length. Checks type and length, nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from gymnasium import Space

_SAMPLED = "abcdefghijklmnopqrstuvwxyz ABC .,!?'éß日本語🙂\n"


class Utterance(Space[str]):
    """Strings of at most ``max_length`` characters.

    ``gymnasium.spaces.Text`` takes a fixed set of characters only; a partner's line may hold any.

    Args:
        max_length: Most characters of a string.
        seed: Seed for :meth:`sample`.

    Raises:
        ValueError: ``max_length`` is not a positive integer.
    """

    def __init__(self, max_length: int = 4096, seed: int | np.random.Generator | None = None) -> None:
        if not isinstance(max_length, int) or max_length < 1:
            raise ValueError(f"expected max_length to be a positive integer, got {max_length!r}")
        self.max_length = max_length
        super().__init__(dtype=str, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        """Always False: strings do not flatten into an array."""
        return False

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """Return a random string of up to 40 characters; masks are not supported."""
        if mask is not None or probability is not None:
            raise ValueError("expected no mask and no probability for an Utterance space, got one")
        length = int(self.np_random.integers(0, min(self.max_length, 40) + 1))
        return "".join(_SAMPLED[int(i)] for i in self.np_random.integers(0, len(_SAMPLED), size=length))

    def contains(self, x: Any) -> bool:
        """Return whether ``x`` is a string of at most ``max_length`` characters."""
        return isinstance(x, str) and len(x) <= self.max_length

    def to_jsonable(self, sample_n: Iterable[str]) -> list[str]:
        """Return the samples as they are: strings serialise."""
        return list(sample_n)

    def from_jsonable(self, sample_n: list[Any]) -> list[str]:
        """Return the samples as they are."""
        return [str(item) for item in sample_n]

    def __repr__(self) -> str:
        return f"Utterance({self.max_length})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Utterance) and self.max_length == other.max_length

    def __hash__(self) -> int:
        return hash(("Utterance", self.max_length))
