"""Checking of the plain dict that a judge on this machine is made from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any


def check_options(
    judge: str, options: Mapping[str, Any], known: Collection[str], required: Collection[str] = ()
) -> None:
    """Refuse options that a judge does not take, and missing ones that it needs.

    Raises:
        ValueError: The message names the options; the nearest one is offered for an unknown one.
    """
    for name in options:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
            raise ValueError(f"unknown judge_options key {name!r} for the {judge} judge; {hint}")
    missing = [name for name in required if not isinstance(options.get(name), str) or not options[name]]
    if missing:
        found = options.get(missing[0])
        raise ValueError(f"expected judge_options[{missing[0]!r}] of the {judge} judge to be a text, got {found!r}")


def one_of(judge: str, name: str, value: Any, known: Collection[str]) -> str:
    """Return an option's value when it is one of the known names.

    Raises:
        ValueError: It is not; the nearest one is offered.
    """
    if isinstance(value, str) and value in known:
        return value
    near = get_close_matches(str(value), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    allowed = ", ".join(known)
    raise ValueError(f"expected judge_options[{name!r}] of the {judge} judge out of {allowed}, got {value!r}{hint}")


def positive(judge: str, name: str, value: Any) -> int:
    """Return an option's value when it is a positive integer.

    Raises:
        ValueError: It is not.
    """
    if type(value) is int and value > 0:
        return value
    raise ValueError(f"expected judge_options[{name!r}] of the {judge} judge to be a positive integer, got {value!r}")
