"""Partners and judges by name: the shipped ones, and anybody's own as ``package.module:Class``.

A name is a string, so that an environment's spec serialises. Makes objects and nothing else.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any


def make(what: str, name: object, known: Mapping[str, str], domain: str, options: Mapping[str, Any]) -> Any:
    """Return ``Class(domain, options)`` for a name.

    Args:
        what: ``judge`` or ``partner``, for messages.
        name: One of ``known``, or ``package.module:Class``.
        known: name -> ``package.module:Class``.
        domain: Name of the domain.
        options: Plain options; the class checks them.

    Raises:
        ValueError: An unknown name (the nearest one is offered), or no such class.
    """
    target = known.get(name) if isinstance(name, str) else None
    if target is None and isinstance(name, str) and ":" in name:
        target = name
    if target is None:
        near = get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        own = f"or your own as 'package.module:Class', got {name!r}{hint}"
        raise ValueError(f"expected a {what} out of {', '.join(known)}, {own}")
    module, _, attribute = target.partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"expected a {what} at {name!r}, got {type(error).__name__}: {error}") from error
    return cls(domain, options)


def refuse_options(whose: str, options: Mapping[str, Any] | None) -> None:
    """Raise a ValueError when something that takes no options is given some."""
    if options:
        raise ValueError(f"expected no {whose.split()[-1]}_options for the {whose}, got {sorted(options)}")
