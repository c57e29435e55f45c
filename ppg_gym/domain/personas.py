"""Read and write personas: the project's own JSONL and the persona files of the consistent-LLMs benchmark.

One bad entry, and nothing of a file is used; every bad entry is named. Nothing here may invent a fact: a persona that
is prose only stays without structured facts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

from ppg_gym.conversation import Persona
from ppg_gym.nearest import did_you_mean

_ROLES = {
    "chatting": "You are the person described below, and you are getting to know somebody in a chat.",
    "education": "You are the student described below, and you are in a lesson with your teacher.",
    "therapy": "You are the patient described below, and you are in a session with your therapist.",
}
_KEYS = ("id", "domain", "name", "instruction", "facts")


class Fault(NamedTuple):
    """Something wrong with a persona file, in a numbered ``line`` or ``entry``, or (with place "") in the whole."""

    place: str
    number: int
    why: str

    def __str__(self) -> str:
        return f"{self.place} {self.number}: {self.why}" if self.place else self.why


class PersonaError(ValueError):
    """A persona file that is refused; the message names every bad entry and what was expected."""

    def __init__(self, message: str, faults: Sequence[Fault] = ()) -> None:
        super().__init__("\n  ".join([message, *map(str, faults)]))
        self.faults = tuple(faults)


def role_play_instruction(description: str, domain: str) -> str:
    """Wrap a persona's description into the instruction that the policy reads.

    The one place where prose becomes an instruction, so that a persona reads the same whether it comes from a persona
    file or from a logged dialogue. The benchmark stores some descriptions as a JSON string inside a string (quoted,
    with escapes); these are decoded first.

    Args:
        description: Who the persona is, as prose.
        domain: ``chatting``, ``education`` or ``therapy``; any other domain gets a neutral first sentence.

    Returns:
        The instruction: a sentence for the role, a sentence for the task, and the description.
    """
    text = description.strip()
    if len(text) > 1 and text[0] == text[-1] == '"':
        try:
            text = str(json.loads(text, strict=False)).strip()
        except json.JSONDecodeError:
            text = text[1:-1].strip()
    role = _ROLES.get(domain, "You are the person described below, and you are in a conversation.")
    task = "Speak only for yourself, briefly, and say nothing that contradicts the description."
    return f"{role} {task}\n\n{text}"


def persona_key(instruction: str) -> str:
    """Return what two spellings of one persona share: the instruction's words, lower case, in order."""
    return " ".join(re.findall(r"\w+", instruction.casefold()))


def persona_id(instruction: str, domain: str) -> str:
    """Return an id for a persona that comes without one: the domain and a digest of the instruction's words."""
    return f"{domain}-{hashlib.sha256(persona_key(instruction).encode()).hexdigest()[:12]}"


def prose_persona(description: str, domain: str, name: str = "") -> Persona:
    """Return the persona of a description; the same words give the same id, wherever they are read."""
    instruction = role_play_instruction(description, domain)
    return Persona(persona_id(instruction, domain), instruction, domain=domain, name=name)


def read_personas(path: str | os.PathLike[str] | Traversable, domain: str) -> list[Persona]:
    """Read a persona file: the project's JSONL, or the benchmark's ``personas.json``.

    JSONL: one object per line with ``id`` and ``instruction``, and optionally ``domain``, ``name`` and
    ``facts``. The benchmark's file is a JSON list (arXiv 2511.00222): chatting ``{"name", "persona"}``,
    education ``[topic, {"grade_level", "description"}]``, therapy ``{"description", "strategy"}``. Its personas have
    ids ``<domain>-<index>`` and no facts; the topic of a lesson belongs to the teacher, not to the persona.

    Args:
        path: A file, also one inside an installed package.
        domain: The domain that the personas are for.

    Returns:
        The personas in the file's order.

    Raises:
        PersonaError: Any entry is bad (missing key, wrong type, empty text, duplicate id, other domain), or the file
            is no persona file. Nothing of a refused file is returned.
    """
    text = _read_text(path)
    if text.lstrip().startswith("["):
        return _read_benchmark(text, str(path), domain)
    return _read_jsonl(text, str(path), domain)


def write_personas(path: str | os.PathLike[str], personas: Iterable[Persona]) -> None:
    """Write personas as JSONL, one object per line, in the given order.

    Args:
        path: The file to write; it is replaced.
        personas: At least one persona; ids must differ.

    Raises:
        PersonaError: No persona at all, or an id that is used twice; nothing is written then.
    """
    personas = list(personas)
    twice = [name for name, n in Counter(persona.id for persona in personas).items() if n > 1]
    if twice or not personas:
        got = f"the ids {twice} more than once" if twice else "no persona"
        raise PersonaError(f"{path}: expected at least one persona and every id once, got {got}")
    rows = ({key: getattr(p, key) for key in _KEYS} | {"facts": dict(p.facts)} for p in personas)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(path).write_text(lines, encoding="utf-8", newline="\n")


def _read_text(path: str | os.PathLike[str] | Traversable) -> str:
    source = Path(path) if isinstance(path, str | os.PathLike) else path
    try:
        return source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PersonaError(f"{path}: expected a readable UTF-8 file, got {error}") from error


def _read_jsonl(text: str, path: str, domain: str) -> list[Persona]:
    personas: list[Persona] = []
    problems: list[Fault] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            problems.append(Fault("line", number, f"expected a JSON object, got invalid JSON ({error})"))
            continue
        faults = _object_faults(entry, domain)
        if not faults and entry["id"] in first_line:
            faults = [f"duplicate id {entry['id']!r}, first used in line {first_line[entry['id']]}"]
        if isinstance(entry, dict) and isinstance(entry.get("id"), str):
            first_line.setdefault(entry["id"], number)
        if faults:
            problems += [Fault("line", number, fault) for fault in faults]
        else:
            personas.append(
                Persona(
                    id=entry["id"],
                    instruction=entry["instruction"],
                    facts=entry.get("facts", {}),
                    domain=domain,
                    name=entry.get("name", ""),
                )
            )
    return _all_or_nothing(personas, problems, path)


def _object_faults(entry: Any, domain: str) -> list[str]:
    if not isinstance(entry, dict):
        return [f"expected a JSON object, got {_kind(entry)}"]
    faults = [fault for key in ("id", "instruction") for fault in _text_faults(entry, key)]
    for key in ("domain", "name"):
        if key in entry and not isinstance(entry[key], str):
            faults.append(f"key {key!r}: expected a string, got {_kind(entry[key])}")
    if isinstance(entry.get("domain"), str) and entry["domain"] not in ("", domain):
        faults.append(f"key 'domain': expected {domain!r}, got {entry['domain']!r}")
    facts = entry.get("facts", {})
    if not isinstance(facts, dict):
        faults.append(f"key 'facts': expected an object of strings, got {_kind(facts)}")
    else:
        faults += [f"key 'facts': {fault}" for slot in facts for fault in _text_faults(facts, slot)]
    for key in sorted(entry.keys() - set(_KEYS)):
        faults.append(f"unknown key {key!r}" + did_you_mean(key, _KEYS, f"known keys are {', '.join(_KEYS)}"))
    return faults


def _read_benchmark(text: str, path: str, domain: str) -> list[Persona]:
    try:
        entries = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise PersonaError(f"{path}: expected a JSON list of personas, got invalid JSON ({error})") from error
    if any(isinstance(entry, dict) and "conversation" in entry for entry in entries):
        raise PersonaError(f"{path}: expected personas, got dialogues; train on them with --offline")
    shape = _SHAPES.get(domain)
    if shape is None:
        raise PersonaError(
            f"{path}: expected a domain out of {sorted(_SHAPES)} for a JSON list, got {domain!r}; "
            "write the personas as JSONL for another domain"
        )
    personas: list[Persona] = []
    problems: list[Fault] = []
    for index, entry in enumerate(entries):
        faults, name, description = shape(entry)
        problems += [Fault("entry", index, fault) for fault in faults]
        if not faults:
            instruction = role_play_instruction(description, domain)
            personas.append(Persona(f"{domain}-{index}", instruction, domain=domain, name=name))
    if problems and not personas:
        others = [name for name, other in _SHAPES.items() if not any(other(entry)[0] for entry in entries)]
        wrong = (f"all entries: expected those of domain {domain!r}, got those of {name!r}" for name in others)
        problems += [Fault("", 0, why) for why in wrong]
    return _all_or_nothing(personas, problems, path)


def _chatting(entry: Any) -> tuple[list[str], str, str]:
    faults = _entry_faults(entry, ("name", "persona"))
    return (faults, "", "") if faults else ([], entry["name"].strip(), entry["persona"])


def _education(entry: Any) -> tuple[list[str], str, str]:
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
        return [f"expected [topic, object], got {_kind(entry)}"], "", ""
    faults = _entry_faults(entry[1], ("grade_level", "description"))
    return (faults, "", "") if faults else ([], "", entry[1]["description"])


def _therapy(entry: Any) -> tuple[list[str], str, str]:
    faults = _entry_faults(entry, ("description", "strategy"))
    if faults:
        return faults, "", ""
    return [], "", f"{entry['description'].strip()}\n\nHow you are in a session: {entry['strategy'].strip()}"


_SHAPES: Mapping[str, Callable[[Any], tuple[list[str], str, str]]] = {
    "chatting": _chatting,
    "education": _education,
    "therapy": _therapy,
}


def _entry_faults(entry: Any, keys: tuple[str, ...]) -> list[str]:
    if not isinstance(entry, dict):
        return [f"expected an object with {' and '.join(map(repr, keys))}, got {_kind(entry)}"]
    return [fault for key in keys for fault in _text_faults(entry, key)]


def _text_faults(entry: Mapping[str, Any], key: str) -> list[str]:
    if key not in entry:
        return [f"missing key {key!r}"]
    value = entry[key]
    if not isinstance(value, str):
        return [f"key {key!r}: expected a string, got {_kind(value)}"]
    return [] if value.strip().strip('"').strip() else [f"key {key!r}: expected text, got an empty string"]


def _all_or_nothing(personas: list[Persona], problems: list[Fault], path: str) -> list[Persona]:
    if problems:
        raise PersonaError(f"{path}: expected no bad entry, got these; correct them:", problems)
    if not personas:
        raise PersonaError(f"{path}: expected at least one persona, got none")
    return personas


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), repr(value)[:40])
