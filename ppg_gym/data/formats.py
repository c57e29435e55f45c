"""One way to read every format: the content tells which one it is, and a bad file is refused with the bad place.

The readers know their formats; this module tells which one a file is in, and what a file looks like that is in none.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from ppg_gym.conversation import Persona
from ppg_gym.data import chats, records
from ppg_gym.data.consistent_llms import read_consistent_llms
from ppg_gym.data.dialogues import LoggedDialogue
from ppg_gym.data.files import (
    DataError,
    Problem,
    RefusedError,
    broken_json,
    json_lines,
    list_items,
    read_text,
    shorten,
)
from ppg_gym.data.report import Report, of_personas
from ppg_gym.domain.personas import PersonaError, read_personas
from ppg_gym.nearest import did_you_mean, not_among

FORMATS: Mapping[str, str] = {
    "consistent-llms": "judged dialogues of the consistent-LLMs benchmark (a JSON list)",
    "consistent-llms-personas": "a persona file of the consistent-LLMs benchmark (a JSON list)",
    "synthetic-persona-chat": "a CSV file of Synthetic-Persona-Chat",
    "persona-chat": "a text file of PersonaChat or ConvAI2",
    "personas": "a persona file of this project (JSONL)",
    "dialogues": f"dialogues of this project (JSONL, {records.SCHEMA})",
    "trajectories": f"trajectories of this project (JSONL, {records.TRAJECTORY_SCHEMA})",
}
PERSONA_FORMATS = ("consistent-llms-personas", "personas")

_SCHEMAS = {records.SCHEMA: "dialogues", records.TRAJECTORY_SCHEMA: "trajectories"}
_Reader = Callable[[str, str, str | None], tuple[list[LoggedDialogue], Report]]


def read(
    path: str | os.PathLike[str], format: str = "auto", domain: str | None = None
) -> tuple[list[LoggedDialogue] | list[Persona], Report]:
    """Read a file of dialogues or of personas.

    Args:
        path: The file, UTF-8.
        format: One of `FORMATS`, or ``auto`` to tell it by the content.
        domain: The domain of a file that does not name one (default: ``chatting`` for chats between two personas);
            a file that names another is refused.

    Returns:
        The dialogues, or the personas, in the file's order, and the report; `PERSONA_FORMATS` names the formats that
        hold personas.

    Raises:
        DataError: The file is not of the format, or breaks its rules; the message says where, and what the file looks
            like instead.
        ValueError: No such format.
    """
    text = read_text(path)
    format = _settle(path, text, format)
    if format in PERSONA_FORMATS:
        return _personas(str(path), text, format, domain)
    return _READERS[format](str(path), text, domain)


def read_dialogues(
    path: str | os.PathLike[str], format: str = "auto", domain: str | None = None
) -> tuple[list[LoggedDialogue], Report]:
    """Read a file of dialogues; a persona file is refused. See `read`."""
    text = read_text(path)
    format = _settle(path, text, format)
    if format in PERSONA_FORMATS:
        got = f"{FORMATS[format]}, which has no dialogue in it; did you mean to give it as --personas?"
        raise RefusedError(path, [Problem(1, "", "expected dialogues", got)])
    return _READERS[format](str(path), text, domain)


def validate(path: str | os.PathLike[str], format: str = "auto", domain: str | None = None) -> list[Problem]:
    """Return everything in a file that cannot be used: why it is refused, or what is skipped in it.

    Raises:
        ValueError: No such format.
    """
    try:
        return list(read(path, format, domain)[1].problems)
    except RefusedError as refused:
        return list(refused.problems)
    except DataError as error:
        return [Problem(1, "", _without_path(error, path))]


def detect(path: str | os.PathLike[str], text: str) -> str:
    """Return the name of the format that a file's content shows.

    Raises:
        RefusedError: No format that can be read; the message says what the file looks like.
    """
    start = text.lstrip()
    if not start:
        raise RefusedError(path, [Problem(1, "", "expected dialogues or personas", "an empty file")])
    line = text.count("\n", 0, len(text) - len(start)) + 1
    if start.startswith("["):
        return _detect_list(path, text)
    if start.startswith("{"):
        return _detect_lines(path, text, line)
    if re.match(r"\d+ \S", start):
        return "persona-chat"
    header = _header(start)
    known = {name.casefold() for name in chats.COLUMNS}
    if known <= header:
        return "synthetic-persona-chat"
    if known & header:
        missing = [name for name in chats.COLUMNS if name.casefold() not in header]
        expected = f"looks like {FORMATS['synthetic-persona-chat']}: expected the columns"
        expected = f"{expected} {', '.join(chats.COLUMNS)}"
        raise RefusedError(path, [Problem(line, "", expected, f"none called {', '.join(missing)}")])
    raise _unknown(path, line, shorten(start.split("\n", 1)[0]))


def _settle(path: str | os.PathLike[str], text: str, format: str) -> str:
    if format not in ("auto", *FORMATS):
        raise ValueError(not_among("a format", format, ("auto", *FORMATS)))
    detected = detect(path, text)
    if format not in ("auto", detected):
        got = f"what looks like {FORMATS[detected]}; did you mean the format {detected!r}?"
        raise RefusedError(path, [Problem(1, "", f"expected {FORMATS[format]}", got)])
    return detected


def _header(text: str) -> set[str]:
    try:
        return {name.strip().casefold() for name in next(csv.reader(io.StringIO(text, newline="")))}
    except csv.Error:
        return set()


def _unknown(path: str | os.PathLike[str], line: int, got: str) -> RefusedError:
    return RefusedError(path, [Problem(line, "", f"expected a file in one of the formats {', '.join(FORMATS)}", got)])


def _detect_list(path: str | os.PathLike[str], text: str) -> str:
    first: tuple[int, Any] | None = None
    try:
        for line, item in list_items(text):
            first = first or (line, item)
            if isinstance(item, dict) and not item.keys().isdisjoint({"conversation", "pturn", "P1", "P2"}):
                return "consistent-llms"
            if _persona_domain(item) is not None:
                return "consistent-llms-personas"
    except json.JSONDecodeError as error:
        raise RefusedError(path, [broken_json(error)]) from error
    line, item = first or (1, [])
    got = f"a list of {shorten(item)}" if first else "an empty list"
    raise _unknown(path, line, got)


def _detect_lines(path: str | os.PathLike[str], text: str, line: int) -> str:
    number, record = next(json_lines(text))
    if isinstance(record, Problem):
        raise RefusedError(path, [record])
    if "schema" in record:
        schema = record["schema"]
        if isinstance(schema, str) and schema in _SCHEMAS:
            return _SCHEMAS[schema]
        got = f"{shorten(schema)}{did_you_mean(schema, _SCHEMAS)}"
        raise RefusedError(path, [Problem(number, "", f"expected the schema {' or '.join(_SCHEMAS)}", got)])
    if {"id", "instruction"} & record.keys():
        return "personas"
    if "messages" in record:
        got = "chat messages, which are written for trainers and not read back; give the file they were made from"
        raise _unknown(path, line, got)
    raise _unknown(path, line, f"an object with the keys {shorten(sorted(record))}")


def _persona_domain(entry: Any) -> str | None:
    """Return the domain whose persona files hold entries like this; the three shapes differ in their keys."""
    if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], dict):
        return "education"
    if not isinstance(entry, dict):
        return None
    return "chatting" if "persona" in entry else "therapy" if "description" in entry else None


def _personas(path: str, text: str, format: str, domain: str | None) -> tuple[list[Persona], Report]:
    lines: dict[int, int] = {}
    try:
        if format == "personas":
            first = next(record for _, record in json_lines(text) if isinstance(record, dict))
            stored = first["domain"] if isinstance(first.get("domain"), str) else ""
        else:
            entries = [(line, _persona_domain(entry)) for line, entry in list_items(text)]
            lines = {index: line for index, (line, _) in enumerate(entries)}
            stored = next(named for _, named in entries if named)
        personas = read_personas(path, stored if domain is None else domain)
    except json.JSONDecodeError as error:
        raise RefusedError(path, [broken_json(error)]) from error
    except PersonaError as error:
        problems = [
            Problem(lines.get(number, 1), f"entry {number}", why) if place == "entry" else Problem(number or 1, "", why)
            for place, number, why in error.faults
        ]
        raise RefusedError(path, problems or [Problem(1, "", _without_path(error, path))]) from error
    return personas, of_personas(path, format, personas)


def _without_path(error: Exception, path: str | os.PathLike[str]) -> str:
    return str(error).removeprefix(f"{path}: ")


_READERS: Mapping[str, _Reader] = {
    "consistent-llms": read_consistent_llms,
    "synthetic-persona-chat": chats.read_synthetic_persona_chat,
    "persona-chat": chats.read_persona_chat,
    "dialogues": records.read_records,
    "trajectories": records.read_trajectories,
}
