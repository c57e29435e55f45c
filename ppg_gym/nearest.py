"""What to say about a name nobody knows: which names there are, and which one was probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: object, known: Iterable[str], likeness: float = 0.6) -> str:
    """Return the known name most like this one, or "" when none reaches the likeness (0 to 1)."""
    return next(iter(get_close_matches(str(name), list(known), n=1, cutoff=likeness)), "")


def did_you_mean(name: object, known: Iterable[str], otherwise: str = "") -> str:
    """Return the end of a message: ``; did you mean 'therapy'?``, or ``; OTHERWISE`` when no known name is near."""
    meant = nearest(name, known)
    if meant:
        return f"; did you mean {meant!r}?"
    return f"; {otherwise}" if otherwise else ""


def not_among(what: str, name: object, known: Iterable[str]) -> str:
    """Return a whole message: ``expected WHAT out of a, b, got 'c'; did you mean 'b'?``."""
    names = list(known)
    return f"expected {what} out of {', '.join(names)}, got {name!r}{did_you_mean(name, names)}"


def refuse_unknown(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a ValueError for the first name that is not a known one, with the nearest that is."""
    names = list(known)
    for name in given:
        if name not in names:
            raise ValueError(not_among(what, name, names))
