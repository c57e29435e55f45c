"""The files of a domain: read, and checked before a domain is made of them.

A domain is one TOML file, or a folder with ``domain.toml`` and, for tables that are not in it, ``facts.toml``
(``[slots]``), ``lines.toml`` and ``replies.toml``. Every fault is one line with file and key. What the words mean is
checked in :mod:`ppg_gym.domain.lint`.
"""

from __future__ import annotations

import re
import string
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from importlib.resources.abc import Traversable
from typing import Any

from ppg_gym.nearest import did_you_mean

SHOWN = ("fact", "cue", "other_fact", "question", "point")
"""What a reply can show besides markers; ``[[read]]`` rules may ask for these."""
FRESH = 4
"""Turns within which the scripted partner never says the same line twice."""
_TABLES = {"slots": "facts.toml", "lines": "lines.toml", "replies": "replies.toml"}
_KEYS = {
    "turns": int, "scenario": str, "instruction": str, "states": dict, "read": list, "slots": dict, "lines": dict,
    "replies": dict,
}  # fmt: skip
_OPTIONAL = {
    "options": dict, "tricks": dict, "mix": dict, "markers": dict, "tilt": dict, "partner": dict, "why": dict,
    "persona_seed": int,
}  # fmt: skip
_OPTIONS = {
    "default_slot": str, "topic": str, "questions_claim": bool, "yes_claims": bool, "recall_chance": float,
    "recalled": list, "disputes": dict, "english": bool,
}  # fmt: skip
_SLOT = {"cues": list, "statement": str, "values": dict}
_PLACES = ("value", "key", "text", "points", "statement", "previous")  # what a reply's template may have filled in
_NAMES = {int: "an integer", str: "a string", dict: "a table", list: "a list", bool: "true or false", float: "a number"}
Where = Mapping[str, str]
"""Name of a table (``domain`` for everything that has no file of its own) -> the file that holds it."""


def toml(path: Traversable, shown: str) -> dict[str, Any]:
    """Return what a TOML file holds.

    Args:
        path: The file.
        shown: Its name in messages.

    Raises:
        ValueError: There is no such file, or it is not TOML; the message names the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", "") or str(error)
        raise ValueError(f"{shown}: expected a readable file of a domain, got: {why}; add it") from error
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"line (\d+)", str(error))
        at = f":{line[1]}" if line else ""
        raise ValueError(f"{shown}{at}: expected TOML, got: {error}; quote a key that is not a plain word") from error


def read(source: Traversable, shown: str = "") -> tuple[dict[str, Any], dict[str, str]]:
    """Return a domain's data as one table, and the file that holds each part.

    Args:
        source: A TOML file, or a folder with ``domain.toml``.
        shown: The source in messages; empty for its path.

    Raises:
        ValueError: A file is missing or not TOML.
    """
    if not source.is_dir():
        file = shown or str(source)
        return toml(source, file), dict.fromkeys(("domain", *_TABLES), file)
    shown = shown or str(source)
    where = {"domain": f"{shown}/domain.toml"}
    data = toml(source / "domain.toml", where["domain"])
    for key, name in _TABLES.items():
        where[key] = where["domain"]
        if key not in data:
            where[key] = f"{shown}/{name}"
            held = toml(source / name, where[key])
            if key == "slots" and list(held) != ["slots"]:
                got = ", ".join(held) or "nothing"
                raise ValueError(f"{where[key]}: expected tables [slots.NAME] alone, got {got}")
            data[key] = held["slots"] if key == "slots" else held
    return data, where


def check_shape(data: Mapping[str, Any], where: Where) -> None:
    """Refuse keys that are missing, unknown or of the wrong type.

    Raises:
        ValueError: One line per fault.
    """
    faults = list(_keys(data, _KEYS, _OPTIONAL, where["domain"]))
    if not faults:
        faults += _keys(data.get("options", {}), {}, _OPTIONS, where["domain"], "options.")
        for number, rule in enumerate(data["read"], start=1):
            fields = {"kind": str, "needs": list}
            faults += _keys(rule, fields, {"without": list}, where["domain"], f"read, rule {number}: ")
        for slot, entry in data["slots"].items():
            faults += _keys(entry, _SLOT, {"asked_only": bool, "claims": list}, where["slots"], f"slots.{slot}.")
        for table, file in (("states", "domain"), ("replies", "replies"), ("lines", "lines")):
            faults += [
                f"{where[file]}: {table}.{key}: expected a table, got {value!r}"
                for key, value in data[table].items()
                if not isinstance(value, dict)
            ]
        for key in ("tricks", "mix"):
            faults += [
                f"{where['domain']}: {key}.{kind}: expected a number that is not negative, got {value!r}"
                for kind, value in data.get(key, {}).items()
                if type(value) not in (int, float) or not 0 <= value < float("inf")
            ]
    _refuse(faults)


def check(data: Mapping[str, Any], where: Where, kinds: Collection[str], markers: Mapping[str, Any]) -> None:
    """Refuse files that contradict one another.

    Args:
        data: Of a shape that `check_shape` accepts.
        where: The files.
        kinds: Those of the rule table.
        markers: Those of the domain, and those that all domains share.

    Raises:
        ValueError: One line per fault.
    """
    _refuse(
        [
            *_kinds(data, where, kinds, markers),
            *_slots(data, where, markers),
            *_lines(data, where),
            *_replies(data, where, kinds),
        ]
    )


def _refuse(faults: list[str]) -> None:
    if faults:
        raise ValueError("\n".join(faults))


def _keys(
    given: Any, needed: Mapping[str, type], optional: Mapping[str, type], file: str, at: str = ""
) -> Iterator[str]:
    """Yield what is wrong with the keys of a table and the types of its values."""
    known = {**needed, **optional}
    if not isinstance(given, dict):
        yield f"{file}: {at.rstrip('.: ')}: expected a table, got {given!r}"
        return
    for key, value in given.items():
        if key not in known:
            yield f"{file}: unknown key {at}{key}" + did_you_mean(key, known, f"known keys are {', '.join(known)}")
        elif not (isinstance(value, known[key]) or (known[key] is float and type(value) is int)):
            yield f"{file}: {at}{key}: expected {_NAMES[known[key]]}, got {value!r}"
    for key in needed:
        if key not in given:
            beside = f" (or the file {_TABLES[key]} in a domain's folder)" if key in _TABLES else ""
            yield f"{file}: expected {_NAMES[needed[key]]} {at}{key}{beside}, got none; add it"


def _kinds(data: Mapping[str, Any], where: Where, kinds: Collection[str], markers: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the kinds of reply: how they are read, how often they occur, where they lead."""
    file, states, options = where["domain"], data["states"], data.get("options", {})
    named = {rule["kind"] for rule in data["read"]}
    tilted = {kind for factors in data.get("tilt", {}).values() for kind in factors}
    unknown = named.union(data["mix"], tilted, data.get("why", ()), options.get("recalled", ())) - {*kinds}
    if unknown:
        yield f"{file}: kinds that no state has an entry for: {sorted(unknown)}; known are {', '.join(kinds)}"
    if unread := [kind for kind in kinds if kind not in named and kind not in data["tricks"]]:
        yield f"{file}: expected a [[read]] rule for every kind of its own, got none for {', '.join(unread)}"
    if missing := [kind for kind in kinds if kind not in data["mix"]]:
        yield f"{file}: mix: expected a weight for every kind, missing {', '.join(missing)}"
    elif abs(sum(data["mix"].values()) - 1.0) > 1e-6:
        yield f"{file}: mix: expected weights that sum to 1, got {sum(data['mix'].values()):.6g}"
    for number, rule in enumerate(data["read"], start=1):
        for key in ("needs", "without"):
            for word in rule.get(key, ()):
                if word not in SHOWN and word not in markers:
                    hint = did_you_mean(word, (*SHOWN, *markers), "add it to [markers]")
                    yield f"{file}: read, rule {number}, {key}: no marker is called {word!r}{hint}"
    disputes = options.get("disputes", {})
    strange = [s for s in (*data.get("tilt", {}), *disputes) if s not in states]
    if strange:
        yield f"{file}: tilt and options.disputes: expected states out of {', '.join(states)}, got {strange}"
    for kind, text in data.get("why", {}).items():
        yield from _fields(text, ("slot", "fact"), f"{file}: why.{kind}")
    yield from _disputes(states, disputes, file)


def _disputes(states: Mapping[str, Any], disputes: Mapping[str, Any], file: str) -> Iterator[str]:
    """Yield where a state that disputes a slip can be reached without one."""
    for state, lines in disputes.items():
        if lines not in ("ask", "recall"):
            yield f"{file}: options.disputes.{state}: expected 'ask' or 'recall', the lines to use, got {lines!r}"
    if next(iter(states), None) in disputes:
        yield f"{file}: options.disputes: a conversation cannot begin in a dispute; put another state first"
    for state, entries in states.items():
        for kind, entry in entries.items():
            after = entry if kind == "otherwise" else entry[1]
            if state not in disputes and after in disputes and kind != "slip":
                yield f"{file}: states.{state}.{kind}: leads to {after!r}, a dispute, which only a slip may do"


def _slots(data: Mapping[str, Any], where: Where, markers: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the facts and the phrases by which they are recognised."""
    file, slots, options = where["slots"], data["slots"], data.get("options", {})
    for key in ("default_slot", "topic"):
        if options.get(key, next(iter(slots), None)) not in slots:
            got = f"got {options.get(key)!r}"
            yield f"{where['domain']}: options.{key}: expected one of the slots {', '.join(slots)}, {got}"
    yield from _fields(data["instruction"], ("name", "facts"), f"{where['domain']}: instruction", all_of=True)
    phrases: list[str] = []
    for slot, entry in slots.items():
        yield from _fields(entry["statement"], (slot,), f"{file}: slots.{slot}.statement", all_of=True)
        lists = {f"slots.{slot}.cues": entry["cues"]}
        if not _texts(claims := entry.get("claims", [])) or any(text != text.lower() for text in claims):
            yield f"{file}: slots.{slot}.claims: expected a list of phrases in lower case, got {claims!r}"
        lists |= {f"slots.{slot}.values.{value}": texts for value, texts in entry["values"].items()}
        for at, texts in lists.items():
            if not _texts(texts):
                yield f"{file}: {at}: expected a list of phrases, got {texts!r}"
                continue
            phrases += texts
            if loud := [text for text in texts if text != text.lower()]:
                yield f"{file}: {at}: expected phrases in lower case, got {loud}"
    if twice := [phrase for phrase, times in Counter(phrases).items() if times > 1]:
        yield f"{file}: expected every phrase to name one thing, got twice: {twice}"
    for mark, texts in markers.items():
        if not _texts(texts):
            yield f"{where['domain']}: markers.{mark}: expected a list of phrases, got {texts!r}"
        elif mark == "ordinary" and (stray := sorted(set(texts) - {*phrases})):
            yield f"{where['domain']}: markers.ordinary: expected phrases of a fact, got {stray}"
        elif mark != "ordinary" and (both := sorted(set(texts) & {*phrases})):
            yield f"{file}: expected no phrase that is a marker ({mark}) too, got {both}"


def _place(where: Where, key: str) -> str:
    """Return how messages about a table's keys begin: it has its own file, or stands under its name in another."""
    return f"{where[key]}: {key}." if where[key] == where["domain"] else f"{where[key]}: "


def _lines(data: Mapping[str, Any], where: Where) -> Iterator[str]:
    """Yield what is wrong with the partner's lines: what is missing, and where the partner would run out of words."""
    place, lines, states, slots = _place(where, "lines"), data["lines"], data["states"], data["slots"]
    options = data.get("options", {})
    for key in ("prefix", "start", *(() if "points" in lines else ("ask",))):
        if key not in lines:
            each = "slot" if key == "ask" else "state"
            yield f"{where['lines']}: lines: expected a table {key}, got none; add it, a list for every {each}"
    prefix, start = lines.get("prefix", {}), lines.get("start", {})
    for state in states:
        if not _texts(prefix.get(state), least=1):
            yield f"{place}prefix.{state}: expected a list of openings for the state, got {prefix.get(state)!r}"
    for key, table in (("prefix", prefix), ("start", start)):
        if stray := [state for state in table if state not in states]:
            yield f"{place}{key}: expected states out of {', '.join(states)}, got {stray}"
    least = min((len(prefix.get(state) or ()) for state in states), default=0)
    if "points" in lines:
        values = slots.get(options.get("topic"), {}).get("values", {})
        if set(values) != set(lines["points"]) or not options.get("default_slot"):
            yield (
                f"{place}points: expected options.topic to name the slot whose values they are for, every value once, "
                f"and options.default_slot, got topic {options.get('topic')!r} and points for {sorted(lines['points'])}"
            )
        topics = {f"points.{value}": (1, len(points)) for value, points in lines["points"].items()}
    else:
        topics = {}
        tables = {"ask", *(("recall",) if "recall" in lines else ()), *options.get("disputes", {}).values()}
        if options.get("recall_chance") or options.get("recalled"):
            tables.add("recall")
        for table in sorted(tables):
            for slot in lines.get("ask", {}) | lines.get(table, {}):
                texts = lines.get(table, {}).get(slot)
                if slot not in slots:
                    yield f"{place}{table}.{slot}: expected one of the slots {', '.join(slots)}"
                elif not _texts(texts, least=1):
                    yield f"{place}{table}.{slot}: expected a list of questions, got {texts!r}"
                elif not slots[slot]["cues"] or len(slots[slot]["values"]) < 2:
                    yield f"{where['slots']}: slots.{slot}: expected cues and two values or more, as it is asked about"
                else:
                    alone = table in options.get("disputes", {}).values()
                    topics[f"{table}.{slot}"] = (len(texts), 1 if alone or table != "ask" else len(lines["ask"]))
    # A line is an opening and a question. The partner never repeats one within FRESH turns, and draws until it has a
    # fresh one: a topic that comes round sooner than it has lines would make it draw for ever.
    for at, (ways, together) in topics.items():
        needed = 1 + min(FRESH, -(-FRESH // max(together, 1)) + 1)
        if 0 < least * ways < needed:
            short = f"{least} openings x {ways} lines run out of words"
            yield f"{place}{at}: {short}; expected {needed} ways to say it or more"


def _replies(data: Mapping[str, Any], where: Where, kinds: Collection[str]) -> Iterator[str]:
    """Yield which kinds of reply have no template, or one that cannot be filled in."""
    place, replies, slots = _place(where, "replies"), data["replies"], data["slots"]
    if missing := [kind for kind in kinds if kind not in replies]:
        example = f'{missing[0]}.any = ["…"]'
        got = f"got none for {', '.join(missing)}; add {example}"
        yield f"{where['replies']}: replies: expected templates for every kind, {got}"
    if stray := [kind for kind in replies if kind not in kinds]:
        yield f"{where['replies']}: replies: expected kinds out of {', '.join(kinds)}, got {', '.join(stray)}"
    asked = list(data["lines"].get("ask", ())) or [data.get("options", {}).get("default_slot", "")]
    for kind, entry in replies.items():
        if kind == "slip":
            if entry.get("like") not in replies or entry["like"] == "slip":
                yield f"{place}slip.like: expected another kind, whose words it uses, got {entry.get('like')!r}"
            continue
        tables = {kind: entry} if "ask" not in entry else {f"{kind}.{key}": entry[key] for key in entry}
        if "ask" in entry and "recall" not in entry:
            yield f"{place}{kind}: expected [{kind}.recall] beside [{kind}.ask], got none; add it"
        for at, table in tables.items():
            if lacking := [slot for slot in asked if slot not in table and "any" not in table]:
                yield f"{place}{at}: expected templates for {', '.join(lacking)}, or any, got none"
            for key, texts in table.items():
                if not _texts(texts, least=1):
                    yield f"{place}{at}.{key}: expected a list of templates, got {texts!r}"
                    continue
                if key != "any" and key not in slots:
                    yield f"{place}{at}.{key}: expected any, or one of the slots {', '.join(slots)}"
                for text in texts:
                    yield from _fields(text, (*_PLACES, *slots), f"{place}{at}.{key}")


def _texts(value: Any, least: int = 0) -> bool:
    return isinstance(value, list) and len(value) >= least and all(isinstance(text, str) for text in value)


def _fields(text: Any, known: Collection[str], at: str, *, all_of: bool = False) -> Iterator[str]:
    """Yield what is wrong with the places in a template."""
    try:
        named = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except (ValueError, TypeError) as error:
        yield f"{at}: expected text with {{{'}, {'.join(known)}}}, got {text!r} ({error})"
        return
    if stray := sorted(named - {*known}):
        yield f"{at}: expected {{{'}, {'.join(known)}}}, got {{{'}, {'.join(stray)}}}"
    if all_of and (missing := [name for name in known if name not in named]):
        yield f"{at}: expected {{{'} and {'.join(missing)}}} in it, got {text!r}"
