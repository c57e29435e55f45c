"""Partners and judges by name: the shipped ones, and anybody's own as ``package.module:Class``.

A name is a string, so that an environment's spec serialises. Makes objects and nothing else.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from ppg_gym.nearest import did_you_mean

_METHODS = {"judge": ("check", "judge"), "partner": ("speak",)}


def make(what: str, name: object, known: Mapping[str, str], domain: str, options: Mapping[str, Any]) -> Any:
    """Return ``Class(domain, options)`` for a name.

    Args:
        what: ``judge`` or ``partner``, for messages.
        name: One of ``known``, or ``package.module:Class``.
        known: name -> ``package.module:Class``.
        domain: What `ppg_gym.domain.loading.load` takes.
        options: Plain options; the class checks them.

    Raises:
        ValueError: An unknown name (the nearest one is offered), no such class, one that is made of something else, or
            one that lacks a method.
    """
    target = known.get(name) if isinstance(name, str) else None
    if target is None and isinstance(name, str) and ":" in name:
        target = name
    if target is None:
        got = f"or your own as 'package.module:Class', got {name!r}{did_you_mean(name, known)}"
        raise ValueError(f"expected a {what} out of {', '.join(known)}, {got}")
    module, _, attribute = target.partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"expected a {what} at {name!r}, got {type(error).__name__}: {error}") from error
    try:
        inspect.signature(cls).bind(domain, options)
    except TypeError as error:
        raise ValueError(f"expected a {what} that is made as {attribute}(domain, options), got: {error}") from error
    made = cls(domain, options)
    if missing := [method for method in _METHODS[what] if not callable(getattr(made, method, None))]:
        needs = " and ".join(_METHODS[what])
        raise ValueError(f"expected a {what} with {needs}, got {name!r} without {' and '.join(missing)}; add it")
    return made


def refuse_options(whose: str, options: Mapping[str, Any] | None) -> None:
    """Raise a ValueError when something that takes no options is given some."""
    if options:
        raise ValueError(f"expected no {whose.split()[-1]}_options for the {whose}, got {sorted(options)}")
