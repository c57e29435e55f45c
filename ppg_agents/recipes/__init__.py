"""Settings that ship with the package, by name: ``ppg-agent train --recipe paper``. Imports nothing heavy.

A recipe is a settings file that is read first: a run's own file, ``--set`` and flags override it.
"""

from __future__ import annotations

from pathlib import Path

from ppg_agents.nearest import not_one_of

FOLDER = Path(__file__).resolve().parent


def recipes() -> dict[str, Path]:
    """Return every recipe's name and file."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def recipe(name: str) -> Path:
    """Return a recipe's file.

    Raises:
        ValueError: No recipe has that name.
    """
    known = recipes()
    if name not in known:
        raise ValueError(not_one_of("the recipe", name, known))
    return known[name]
