"""Frozen dataclasses from nested tables and back: checks types, and suggests the nearest name for an unknown key.

Knows no particular setting; those are in ``config.settings``.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ppg_agents.credit import PolicyClass
from ppg_agents.nearest import did_you_mean, nearest

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type or out of range; the message names it."""


def flatten(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one table with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def build(cls: type[T], table: Mapping[str, Any], prefix: str = "") -> T:
    """Return the dataclass that a table describes; ``prefix`` is the table's dotted path, for messages.

    Raises:
        ConfigError: An unknown key (with the nearest name) or a wrong type; whatever the dataclass raises.
    """
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            raise ConfigError(_unknown(prefix + key, key, known, prefix, cls))
    return cls(**{key: _convert(value, hints[key], prefix + key) for key, value in table.items()})


def _unknown(path: str, key: str, known: list[str], prefix: str, cls: type[Any]) -> str:
    everywhere = [*known, *(flatten(tables(cls())) if not prefix else ())]
    elsewhere = [name for name in everywhere if name.split(".")[-1] == key]  # rank -> lora.rank
    meant = nearest(key, everywhere) or next(iter(elsewhere), None)
    hint = f"; did you mean {prefix}{meant}?" if meant else f"; known: {', '.join(known)}"
    return f"unknown setting {path!r}{hint}"


def _convert(value: Any, hint: Any, path: str) -> Any:
    """Return ``value`` as the annotated type, widening int to float and list to tuple."""
    if get_origin(hint) in (Union, types.UnionType):
        arms = [arm for arm in get_args(hint) if arm is not type(None)]
        if value is None and len(arms) < len(get_args(hint)):
            return None
        return _convert(value, next((arm for arm in arms if _fits(value, arm)), arms[0]), path)
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        choices = ", ".join(map(repr, get_args(hint)))
        hint_text = did_you_mean(value, get_args(hint))
        raise ConfigError(f"{path}: expected one of {choices}, got {value!r}{hint_text}")
    if hint is PolicyClass:
        try:
            return PolicyClass.parse(value)
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected a table, got {value!r}; set {path}.<name>")
        return build(hint, value, path + ".")  # type: ignore[arg-type]
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path}: expected a list of {get_args(hint)[0].__name__}, got {value!r}")
        return tuple(_convert(item, get_args(hint)[0], f"{path}[{i}]") for i, item in enumerate(value))
    if get_origin(hint) is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected a table, got {value!r}")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{path}: expected {hint.__name__}, got {value!r}")
    return value


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if hint is PolicyClass:
        return True  # parsing it reports what is wrong
    return isinstance(value, list | tuple) if get_origin(hint) is tuple else isinstance(value, hint)


def put(tables: dict[str, Any], key: str, value: Any) -> None:
    """Set a value by its dotted key.

    Raises:
        ConfigError: The key passes through something that is not a table.
    """
    *parents, last = key.split(".")
    table = tables
    for depth, name in enumerate(parents):
        inner = table.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{'.'.join(parents[: depth + 1])}: expected a table, got {inner!r}")
        table = inner
    table[last] = value


def tables(settings: Any) -> dict[str, Any]:
    """Return a dataclass as nested tables; a policy class is one value."""
    whole = {f.name: getattr(settings, f.name) for f in fields(settings)}
    nested = (key for key, value in whole.items() if is_dataclass(value) and not isinstance(value, PolicyClass))
    return whole | {key: tables(whole[key]) for key in nested}


def plain(value: Any) -> Any:
    """Return lists, tables and policy classes as plain TOML and JSON values; None is left out of tables."""
    if isinstance(value, PolicyClass):
        return value.spec
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
