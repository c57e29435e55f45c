"""Checks of plain options, with one form of message: ``judge_options['samples']: expected X, got Y``."""

from __future__ import annotations

from collections.abc import Collection

from ppg_gym.nearest import did_you_mean


def wrong(whose: str, name: str, expected: str, got: object, hint: str = "") -> ValueError:
    """Return the error for an option's value; ``whose`` is ``judge_options`` or ``partner_options``."""
    return ValueError(f"{whose}[{name!r}]: expected {expected}, got {got!r}{hint}")


def one_of(whose: str, name: str, value: object, known: Collection[str]) -> None:
    """Raise a ValueError unless an option's value is a known name; the message offers the nearest."""
    if value not in known:
        raise wrong(whose, name, f"one of {', '.join(known)}", value, did_you_mean(value, known))


def whole(whose: str, name: str, value: object, least: int = 1) -> None:
    """Raise a ValueError unless an option's value is a whole number of at least ``least``."""
    if type(value) is not int or value < least:
        raise wrong(whose, name, f"a whole number of at least {least}", value)


def number(whose: str, name: str, value: object, highest: float) -> None:
    """Raise a ValueError unless an option's value is a number from 0 to ``highest``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= highest:
        raise wrong(whose, name, f"a number in [0, {highest}]", value)
