"""Partners and judges by name: the shipped ones, and your own as ``package.module:Class``.

Names are strings, so that an environment's spec serialises.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from ppg_gym.nearest import did_you_mean

_METHODS = {"judge": ("check", "judge"), "partner": ("speak",)}


def make(role: str, name: object, known: Mapping[str, str], domain: str, options: Mapping[str, Any]) -> Any:
    """Return ``Class(domain, options)`` for a name.

    Args:
        role: ``judge`` or ``partner``, for messages.
        name: One of ``known``, or ``package.module:Class``.
        known: name -> ``package.module:Class``.
        domain: What `ppg_gym.domain.loading.load` takes.
        options: Plain options; the class checks them.

    Raises:
        ValueError: An unknown name (the message offers the nearest one), no such class, one whose constructor takes
            other arguments, or one that lacks a method.
    """
    target = known.get(name) if isinstance(name, str) else None
    if target is None and isinstance(name, str) and ":" in name:
        target = name
    if target is None:
        got = f"or your own as 'package.module:Class', got {name!r}{did_you_mean(name, known)}"
        raise ValueError(f"expected a {role} out of {', '.join(known)}, {got}")
    module, _, attribute = target.partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"expected a {role} at {name!r}, got {type(error).__name__}: {error}") from error
    try:
        inspect.signature(cls).bind(domain, options)
    except TypeError as error:
        raise ValueError(f"expected a {role} that is made as {attribute}(domain, options), got: {error}") from error
    made = cls(domain, options)
    if missing := [method for method in _METHODS[role] if not callable(getattr(made, method, None))]:
        needs = " and ".join(_METHODS[role])
        raise ValueError(f"expected a {role} with {needs}, got {name!r} without {' and '.join(missing)}; add it")
    return made


def refuse_options(whose: str, options: Mapping[str, Any] | None) -> None:
    """Raise a ValueError when something that takes no options is given some."""
    if options:
        raise ValueError(f"expected no {whose.split()[-1]}_options for the {whose}, got {sorted(options)}")
