"""Which packages and extras are installed, by their metadata alone: nothing is imported but the standard library.

What is needed is read from the installed distribution, or from ``pyproject.toml`` where this runs from its sources.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "ppg-gym"

_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[([^\]]*)\])?\s*([^;]*)(?:;(.*))?")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")


@dataclass(frozen=True)
class Requirement:
    """A package that is needed: its name, the oldest version that will do ("" for any), and which of its own extras."""

    name: str
    oldest: str = ""
    extras: tuple[str, ...] = ()


def requirements() -> dict[str, list[Requirement]]:
    """Return what the base ("") and every extra need, as the installed distribution or its source tree says."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        lines = _source_requirements()
    needed: dict[str, list[Requirement]] = {"": []}
    for line in lines:
        name, requirement, extra = parse_requirement(line)
        if name:
            needed.setdefault(extra, []).append(requirement)
    return needed


def parse_requirement(line: str) -> tuple[str, Requirement, str]:
    """Return the name in a line such as ``openai[aiohttp]>=3.50; extra == "llm"``, the requirement, and the extra."""
    match = _REQUIREMENT.match(line)
    if match is None:
        return "", Requirement(""), ""
    name, own, bounds, marker = match.groups()
    oldest = re.search(r">=\s*([0-9][0-9.]*)", bounds or "")
    extra = _EXTRA.search(marker or "")
    parts = tuple(part.strip() for part in (own or "").split(",") if part.strip())
    return name, Requirement(name, oldest[1] if oldest else "", parts), extra[1] if extra else ""


def _source_requirements() -> list[str]:
    import tomllib

    file = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if not file.is_file():
        return []
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"].items()
    return [*project["dependencies"], *(f'{line}; extra == "{extra}"' for extra, lines in optional for line in lines)]


def version_of(name: str) -> str | None:
    """Return the version of an installed distribution, None when it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def installed(needed: Mapping[str, Sequence[Requirement]]) -> dict[str, str | None]:
    """Return distribution -> version, None for what is not there."""
    names = [requirement.name for several in needed.values() for requirement in several]
    return {name: version_of(name) for name in dict.fromkeys(names)}


def lacking(requirement: Requirement, found: Mapping[str, str | None]) -> list[str]:
    """Return what is wrong with a requirement: ``torch``, or ``torch 2.1 (2.7 or newer is needed)``; empty: nothing."""
    version = found.get(requirement.name)
    if version is None:
        return [requirement.name]
    if requirement.oldest and numbers(version) < numbers(requirement.oldest):
        return [f"{requirement.name} {version} ({requirement.oldest} or newer is needed)"]
    parts = []
    for line in metadata.requires(requirement.name) or [] if requirement.extras else []:
        name, _, extra = parse_requirement(line)
        conditional = "python_version" in line or "sys_platform" in line
        if extra in requirement.extras and not conditional and version_of(name) is None:
            parts.append(name)
    return parts


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, without zeros at the end: ``2.13.0+cpu`` is (2, 13)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    parts = [int(part) for part in match[0].split(".")] if match else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)
