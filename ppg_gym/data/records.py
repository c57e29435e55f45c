"""The project's own dialogue files: ``ppg-dialogue/1``, and trajectories ``ppg-trajectory/1`` read as dialogues.

A line of ``ppg-dialogue/1`` is one judged speaker's side of a dialogue::

    {"schema": "ppg-dialogue/1", "domain": "chatting",
     "persona": {"id": "…", "name": "…", "instruction": "…", "facts": {}},
     "source": "file.json", "index": 0, "speaker": 2, "topic": "…",
     "turns": [{"message": "…", "reply": "…",
                "verdict": {"status": "scored", "score": 1.0, "rationale": "…", "kind": "", "raw": "…"}}]}

``schema``, ``domain``, ``persona.id``, ``persona.instruction`` and ``turns`` are needed; a turn needs ``message``
and ``reply``, a verdict ``status`` and ``score``. A turn without a verdict (or with null) was not judged; ``topic`` is
written where one is known. What is written can be read back unchanged. One bad line, and nothing of the file is used.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ppg_gym.conversation import Persona, Verdict
from ppg_gym.data.dialogues import NO_VERDICT, LoggedDialogue, LoggedTurn
from ppg_gym.data.files import Problem, RefusedError, json_lines, replacing, shorten, write_lines
from ppg_gym.data.report import Report, of_dialogues
from ppg_gym.domain.personas import persona_id, write_personas
from ppg_gym.nearest import did_you_mean

SCHEMA = "ppg-dialogue/1"
TRAJECTORY_SCHEMA = "ppg-trajectory/1"


class _FaultError(ValueError):
    """What is wrong with one line."""


def to_record(dialogue: LoggedDialogue) -> dict[str, Any]:
    """Return a dialogue as one object of ``ppg-dialogue/1``."""
    persona = dialogue.persona
    return {
        "schema": SCHEMA,
        "domain": dialogue.domain,
        "persona": {
            "id": persona.id,
            "name": persona.name,
            "instruction": persona.instruction,
            "facts": dict(persona.facts),
        },
        "source": dialogue.source,
        "index": dialogue.index,
        "speaker": dialogue.speaker,
        **({"topic": dialogue.topic} if dialogue.topic else {}),
        "turns": [
            {
                "message": turn.message,
                "reply": turn.reply,
                "verdict": {**turn.verdict.to_dict(), "raw": turn.verdict.raw},
            }
            for turn in dialogue.turns
        ],
    }


def from_record(
    record: Mapping[str, Any], source: str = "", index: int = 0, domain: str | None = None
) -> LoggedDialogue:
    """Return the dialogue of an object of ``ppg-dialogue/1``.

    Args:
        record: The object.
        source: Used where the record has no ``source``.
        index: Used where the record has no ``index``.
        domain: Refuse any other; fills in an empty one.

    Raises:
        ValueError: A key is missing, unknown, or of the wrong type.
    """
    _keys(record, "", ("schema", "domain", "persona", "turns"), ("source", "index", "speaker", "topic"))
    if record["schema"] != SCHEMA:
        raise _FaultError(f"key 'schema': expected {SCHEMA!r}, got {shorten(record['schema'])}")
    entry = _object(record, "persona", "")
    _keys(entry, "persona.", ("id", "instruction"), ("name", "facts"))
    facts = _object(entry, "facts", "persona.") if "facts" in entry else {}
    spoken_in = _domain(record, domain)
    persona = Persona(
        id=_text(entry, "id", "persona."),
        instruction=_text(entry, "instruction", "persona."),
        facts={slot: _take(facts, slot, str, "persona.facts.") for slot in facts},
        domain=spoken_in,
        name=_take(entry, "name", str, "persona.") if "name" in entry else "",
    )
    turns = _take(record, "turns", list, "")
    if not turns:
        raise _FaultError("key 'turns': expected at least one turn, got none")
    speaker = _take(record, "speaker", int, "") if "speaker" in record else 2
    if speaker not in (1, 2):
        raise _FaultError(f"key 'speaker': expected 1 or 2, got {speaker}")
    return LoggedDialogue(
        domain=spoken_in,
        persona=persona,
        turns=tuple(_turn(turn, f"turns[{i}]") for i, turn in enumerate(turns)),
        source=_take(record, "source", str, "") if "source" in record else source,
        index=_take(record, "index", int, "") if "index" in record else index,
        speaker=speaker,
        topic=_take(record, "topic", str, "") if "topic" in record else "",
    )


def write_dialogues(path: str | os.PathLike[str], dialogues: Iterable[LoggedDialogue]) -> None:
    """Write dialogues as ``ppg-dialogue/1``, one per line; the file is replaced in one step."""
    write_lines(path, map(to_record, dialogues))


def save_personas(path: str | os.PathLike[str], personas: Sequence[Persona]) -> None:
    """Write a persona file; it is replaced in one step."""
    with replacing(path) as temporary:
        write_personas(temporary, personas)


def read_records(path: str | os.PathLike[str], text: str, domain: str | None) -> tuple[list[LoggedDialogue], Report]:
    """Read ``ppg-dialogue/1``.

    Raises:
        RefusedError: Any line is bad; every bad line is named.
    """
    dialogues: list[LoggedDialogue] = []
    problems: list[Problem] = []
    for number, record in json_lines(text):
        if isinstance(record, Problem):
            problems.append(record)
            continue
        try:
            dialogues.append(from_record(record, Path(path).name, number - 1, domain))
        except ValueError as fault:
            problems.append(Problem(number, "", str(fault)))
    if problems:
        raise RefusedError(path, problems)
    return dialogues, of_dialogues(path, "dialogues", dialogues)


def read_trajectories(
    path: str | os.PathLike[str], text: str, domain: str | None
) -> tuple[list[LoggedDialogue], Report]:
    """Read ``ppg-trajectory/1`` as dialogues: what was said and judged, without tokens.

    Skipped are conversations without a turn or an instruction, and a last line that a crash cut short. Where a turn
    has no verdict, its reward is the score if it lies in [0, 1].

    Raises:
        RefusedError: Any other line is bad; every bad line is named.
    """
    dialogues: list[LoggedDialogue] = []
    problems: list[Problem] = []
    skipped: list[Problem] = []
    last = text.count("\n") + 1
    for number, record in json_lines(text):
        if isinstance(record, Problem):
            torn = number == last and record.detail.startswith("invalid JSON")
            (skipped if torn else problems).append(
                Problem(number, f"line {number}", "the last line is torn off") if torn else record
            )
            continue
        try:
            dialogue = _trajectory(record, Path(path).name, number - 1, domain)
        except ValueError as fault:
            problems.append(Problem(number, "", str(fault)))
            continue
        if isinstance(dialogue, str):
            skipped.append(Problem(number, f"line {number}", dialogue))
        else:
            dialogues.append(dialogue)
    if problems:
        raise RefusedError(path, problems)
    return dialogues, of_dialogues(path, "trajectories", dialogues, skipped, "conversation")


def _trajectory(record: Mapping[str, Any], source: str, index: int, domain: str | None) -> LoggedDialogue | str:
    """Return the dialogue of a trajectory, or why it holds none."""
    if record.get("schema") != TRAJECTORY_SCHEMA:
        raise _FaultError(f"key 'schema': expected {TRAJECTORY_SCHEMA!r}, got {shorten(record.get('schema'))}")
    instruction = _take(record, "instruction", str, "")
    spoken_in = _domain(record, domain)
    name = _take(record, "persona", str, "")
    turns = tuple(_played(turn, f"turns[{i}]") for i, turn in enumerate(_take(record, "turns", list, "")))
    if not turns:
        return "no turn was played"
    if not instruction.strip():
        return "no instruction"
    persona = Persona(name or persona_id(instruction, spoken_in), instruction, domain=spoken_in)
    topic = _take(record, "topic", str, "") if "topic" in record else ""
    return LoggedDialogue(spoken_in, persona, turns, source, index, speaker=2, topic=topic)


def _played(turn: Any, where: str) -> LoggedTurn:
    if not isinstance(turn, Mapping):
        raise _FaultError(f"{where}: expected an object, got {shorten(turn)}")
    judged = _object(turn, "verdict", f"{where}.") if turn.get("verdict") else {}
    reward = turn.get("reward")
    if reward is not None and (isinstance(reward, bool) or not isinstance(reward, int | float)):
        raise _FaultError(f"{where}.reward: expected a number or null, got {shorten(reward)}")
    if judged:
        texts = {key: judged[key] for key in ("rationale", "kind", "raw") if key in judged}
        verdict = _verdict({"status": judged.get("status"), "score": judged.get("score"), **texts}, f"{where}.verdict")
    elif reward is None or not math.isfinite(reward):
        verdict = NO_VERDICT
    elif 0.0 <= reward <= 1.0:
        verdict = Verdict("scored", float(reward))
    else:
        verdict = Verdict("error", None, f"The reward {reward} is no score in [0, 1].")
    return LoggedTurn(_take(turn, "message", str, f"{where}."), _take(turn, "reply", str, f"{where}."), verdict)


def _turn(turn: Any, where: str) -> LoggedTurn:
    if not isinstance(turn, Mapping):
        raise _FaultError(f"{where}: expected an object, got {shorten(turn)}")
    _keys(turn, f"{where}.", ("message", "reply"), ("verdict",))
    verdict = NO_VERDICT
    if turn.get("verdict") is not None:
        verdict = _verdict(_object(turn, "verdict", f"{where}."), f"{where}.verdict")
    return LoggedTurn(_take(turn, "message", str, f"{where}."), _take(turn, "reply", str, f"{where}."), verdict)


def _verdict(entry: Mapping[str, Any], where: str) -> Verdict:
    _keys(entry, f"{where}.", ("status", "score"), ("rationale", "kind", "raw"))
    score = entry["score"]
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise _FaultError(f"{where}.score: expected a number or null, got {shorten(score)}")
    texts = {key: _take(entry, key, str, f"{where}.") for key in ("rationale", "kind", "raw") if key in entry}
    status = _take(entry, "status", str, f"{where}.")
    try:
        return Verdict(status, None if score is None else float(score), **texts)
    except ValueError as error:
        raise _FaultError(f"{where}: {error}") from error


def _domain(record: Mapping[str, Any], wanted: str | None) -> str:
    """Return the domain of a record; the wanted one fills in an empty one, and any other is refused."""
    stored: str = _take(record, "domain", str, "")
    if wanted is not None and stored not in ("", wanted):
        raise _FaultError(f"key 'domain': expected {wanted!r}, got {stored!r}")
    return stored or wanted or ""


def _keys(entry: Mapping[str, Any], where: str, needed: tuple[str, ...], optional: tuple[str, ...]) -> None:
    for key in needed:
        if key not in entry:
            raise _FaultError(f"missing key '{where}{key}'")
    known = (*needed, *optional)
    for key in entry:
        if key not in known:
            hint = did_you_mean(key, known, f"known keys are {', '.join(known)}")
            raise _FaultError(f"unknown key '{where}{key}'{hint}")


def _take(entry: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    if key not in entry:
        raise _FaultError(f"missing key '{where}{key}'")
    value = entry[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        names = {str: "a string", int: "a whole number", list: "a list"}
        raise _FaultError(f"key '{where}{key}': expected {names[kind]}, got {shorten(value)}")
    return value


def _text(entry: Mapping[str, Any], key: str, where: str) -> str:
    value: str = _take(entry, key, str, where)
    if not value.strip():
        raise _FaultError(f"key '{where}{key}': expected text, got an empty string")
    return value


def _object(entry: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = entry[key]
    if not isinstance(value, Mapping):
        raise _FaultError(f"key '{where}{key}': expected an object, got {shorten(value)}")
    return value
