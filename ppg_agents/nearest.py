"""Error messages for an unknown name: which names exist, and which one was probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: object, known: Iterable[str]) -> str | None:
    """Return the most similar known name, None if none is close."""
    return next(iter(get_close_matches(str(name), list(known), n=1)), None)


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return the end of an error message: ``; did you mean 'ppo'?``, or "" if no known name is close."""
    meant = nearest(name, known)
    return "" if meant is None else f"; did you mean {meant!r}?"


def not_one_of(what: str, name: object, known: Iterable[str]) -> str:
    """Return the whole message: ``expected WHAT to be one of a, b, c, got 'd'; did you mean 'c'?``."""
    names = list(known)
    return f"expected {what} to be one of {', '.join(names)}, got {name!r}{did_you_mean(name, names)}"
