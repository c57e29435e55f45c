"""Which packages and extras are installed, from metadata alone; imports only the standard library."""

from __future__ import annotations

import re
from importlib import metadata

DISTRIBUTION = "ppg-gym"

_REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)[^;>]*(?:>=\s*(?P<oldest>[\d.]+))?[^;]*(?:;.*\bextra\s*==\s*['\"](?P<extra>[^'\"]+))?"
)


def requirements() -> dict[str, dict[str, str]]:
    """Return what the base ("") and every extra need: package -> the oldest version that works, "" for any.

    Empty if ppg-gym runs from source without being installed.
    """
    needed: dict[str, dict[str, str]] = {}
    lines = metadata.requires(DISTRIBUTION) or [] if version_of(DISTRIBUTION) else []
    for match in filter(None, map(_REQUIREMENT.match, lines)):
        needed.setdefault(match["extra"] or "", {})[match["name"]] = match["oldest"] or ""
    return needed


def version_of(package: str) -> str | None:
    """Return the version of an installed distribution, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def lacking(needed: dict[str, str]) -> list[str]:
    """Return which `requirements` are missing or too old: ``torch``, or ``torch 2.1 (2.7 or newer is needed)``."""
    versions = {package: version_of(package) for package in needed}
    return [
        f"{package} {version} ({needed[package]} or newer is needed)" if version else package
        for package, version in versions.items()
        if version is None or numbers(version) < numbers(needed[package])
    ]


def numbers(version: str) -> list[int]:
    """Return the leading numbers of a version: ``2.13.0+cpu`` is [2, 13, 0]."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return [int(part) for part in match[0].split(".")] if match else []
