"""Recorded conversations for judges: from files to one conversation per reply, and its verdict.

Logged dialogues and a run's trajectories come from the readers in `ppg_gym.data`; the export of a rescoring and a CSV
of human labels are read here. Nothing changes a conversation or computes an agreement.

The CSV has a header and one row per judged reply:

- ``persona``: the id of a persona that comes with the domain, or a description in prose.
- ``history``: the lines before the reply, a JSON list of strings, oldest first. The speakers take turns, and the last
  line is the partner's; ``[]`` where the persona opens.
- ``reply``: the reply.
- ``label``: a number in [0, 1], 1 for consistent, 0 for inconsistent; empty where nobody labelled it.
- ``domain``: optional when a domain is given.
- ``dialogue``: optional; rows with the same value are one dialogue. Without it, conversations of one persona that open
  alike count as one.
"""

from __future__ import annotations

import csv
import functools
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ppg_gym import judges
from ppg_gym.conversation import Conversation, Persona, Verdict
from ppg_gym.data.dialogues import LoggedDialogue, LoggedTurn
from ppg_gym.data.files import DataError, Problem, RefusedError, json_lines, read_text
from ppg_gym.data.formats import read_dialogues
from ppg_gym.domain.cast import personas
from ppg_gym.domain.loading import DOMAINS, SPLITS, is_path
from ppg_gym.domain.personas import persona_id
from ppg_gym.nearest import did_you_mean, nearest

RESCORED = "ppg-rescored/1"
BATCH = 256
"""Most conversations that a judge gets at once."""

_NEEDED = ("persona", "history", "reply", "label")
_COLUMNS = (*_NEEDED, "domain", "dialogue")
_SHOWN = 10  # most bad rows that a message names
_UNLABELLED = Verdict("error", None, "There is no label for this reply.")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labels:
    """Labelled replies: the turns whose verdict has a score.

    Attributes:
        dialogues: The conversations with these replies; the statistics take the same source and index for one dialogue.
        unlabelled: Replies that should have a label and have none, such as an unparsed stored verdict.
    """

    dialogues: tuple[LoggedDialogue, ...]
    unlabelled: int


def read_labels(paths: Sequence[str | os.PathLike[str]], domain: str | None = None) -> Labels:
    """Read labelled replies from any number of files.

    Args:
        paths: Judged dialogues or trajectories in any format of `ppg_gym.data`, the export of a rescoring (JSONL), or
            human labels (CSV). A run folder stands for its trajectories.
        domain: Only this domain; the domain of a CSV without that column.

    Raises:
        DataError: A file is refused or given twice, or there is no label (in this domain).
    """
    dialogues: list[LoggedDialogue] = []
    unlabelled = 0
    seen: set[Path] = set()
    names = Counter(Path(path).name for path in paths)
    for path in map(Path, paths):
        if path.resolve() in seen:
            raise DataError(f"{path}: expected every file once, got it twice")
        seen.add(path.resolve())
        if path.suffix.lower() == ".csv":
            logged, without = _read_csv(path, domain)
        else:
            logged = read_recorded(path)
            without = sum(t.verdict.score is None for d in logged if domain in (None, d.domain) for t in d.turns)
        source = path.name if names[path.name] == 1 else str(path)
        dialogues += [replace(dialogue, source=source) for dialogue in logged]
        unlabelled += without
    kept = tuple(dialogue for dialogue in dialogues if domain in (None, dialogue.domain))
    if not any(turn.verdict.score is not None for dialogue in kept for turn in dialogue.turns):
        there = ", ".join(sorted({dialogue.domain for dialogue in dialogues}))
        of = f" of domain {domain!r}; these files hold {there or 'nothing'}" if domain else ""
        raise DataError(f"{', '.join(map(str, paths))}: expected at least one labelled reply, got none{of}")
    return Labels(kept, unlabelled)


def read_recorded(path: str | os.PathLike[str], domain: str | None = None) -> list[LoggedDialogue]:
    """Read conversations with their recorded verdicts.

    A persona that comes with its domain and has the same instruction gets its facts. What a reader skips is logged as a
    warning.

    Args:
        path: A run folder, or a file of judged dialogues, of trajectories or of a rescoring.
        domain: The domain to judge in; None for the recorded one.

    Raises:
        DataError: The file is refused, or names no domain.
    """
    file = Path(path)
    if file.is_dir():
        file /= "trajectories.jsonl"
    dialogues = _read_rescored(file)
    if dialogues is None:
        dialogues, report = read_dialogues(file)
        if file.suffix.lower() == ".jsonl":
            for note in report.skipped:
                log.warning("%s: %s", file, note)
    if not dialogues:
        raise DataError(f"{file}: expected at least one conversation with a reply, got none")
    completed = []
    for dialogue in dialogues:
        named = domain or dialogue.domain
        if not named:
            raise DataError(f"{file}: expected every conversation to name its domain, got ''; give --domain")
        persona = _with_facts(replace(dialogue.persona, domain=named))
        completed.append(replace(dialogue, domain=named, persona=persona))
    return completed


def _read_rescored(file: Path) -> list[LoggedDialogue] | None:
    """Return the conversations of a rescoring's export, None for any other file.

    A key ``label`` in any row (a number in [0, 1], or null) means that somebody labelled the file: then the labels are
    the verdicts in all rows.
    """
    text = read_text(file)
    if f'"{RESCORED}"' not in text.partition("\n")[0]:
        return None
    problems: list[Problem] = []
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, row in json_lines(text):
        if isinstance(row, Problem):
            problems.append(row)
        else:
            rows.append((number, row))
    labelled = any("label" in row for _, row in rows)
    dialogues: dict[int, tuple[str, Persona, list[LoggedTurn]]] = {}
    for number, row in rows:
        try:
            if row["schema"] != RESCORED:
                raise ValueError(f"expected schema {RESCORED!r}, got {row['schema']!r}")
            persona = Persona(row["persona"], row["instruction"], domain=row["domain"])
            turns = dialogues.setdefault(row["dialogue"], (row["domain"], persona, []))[2]
            turns.append(LoggedTurn(str(row["message"]), str(row["reply"]), _row_verdict(row, labelled)))
            if row["turn"] != len(turns):
                raise ValueError(
                    f"expected turn {len(turns)} of dialogue {row['dialogue']}, got {row['turn']!r}; keep all rows of a"
                    " dialogue, in order: the judge reads what was said before"
                )
        except (KeyError, TypeError, AttributeError) as error:
            problems.append(Problem(number, "", f"expected a row of {RESCORED}", f"{type(error).__name__}: {error}"))
        except ValueError as error:
            problems.append(Problem(number, "", str(error)))
    if problems:
        raise RefusedError(file, problems)
    return [LoggedDialogue(d, p, tuple(turns), file.name, i, 2) for i, (d, p, turns) in dialogues.items()]


def _row_verdict(row: Mapping[str, Any], labelled: bool) -> Verdict:
    if not labelled:
        recorded = row["recorded"]
        return Verdict(recorded["status"], recorded["score"], recorded.get("rationale", ""), recorded.get("kind", ""))
    label = row.get("label")
    return _UNLABELLED if label is None else _label(str(label))


@functools.cache
def _embedded(domain: str) -> Mapping[str, Persona]:
    if domain not in DOMAINS and not is_path(domain):
        return {}
    return {persona.id: persona for split in SPLITS for persona in personas(domain, split)}


def _with_facts(persona: Persona) -> Persona:
    known = _embedded(persona.domain).get(persona.id)
    return known if known is not None and known.instruction == persona.instruction else persona


def _read_csv(path: Path, domain: str | None) -> tuple[list[LoggedDialogue], int]:
    """Return one dialogue per labelled row of a domain, and how many rows carry no label."""
    dialogues: list[LoggedDialogue] = []
    problems: list[str] = []
    numbers: dict[tuple[str, ...], int] = {}
    unlabelled = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            _check_columns(path, list(reader.fieldnames or ()), domain)
            for number, row in enumerate(reader, start=2):
                try:
                    dialogue, key = _row(row, domain)
                except ValueError as error:
                    problems.append(f"row {number}: {error}")
                    continue
                unlabelled += dialogue.turns[-1].verdict.score is None and domain in (None, dialogue.domain)
                index = numbers.setdefault(key, len(numbers))
                dialogues.append(replace(dialogue, index=index))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: expected a readable UTF-8 CSV file, got {error}") from error
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DataError(f"{path} (row 1 is the header): {'; '.join(problems[:_SHOWN])}{more}")
    return [dialogue for dialogue in dialogues if dialogue.turns[-1].verdict.score is not None], unlabelled


def _check_columns(path: Path, names: Sequence[str], domain: str | None) -> None:
    missing = [name for name in (*_NEEDED, *(() if domain else ("domain",))) if name not in names]
    if missing:
        todo = "; or give --domain" if missing == ["domain"] else ""
        raise DataError(f"{path}: expected the columns {', '.join(_COLUMNS)}, missing {', '.join(missing)}{todo}")
    for name in names:
        meant = "" if name in _COLUMNS else nearest(name, _COLUMNS, likeness=0.8)
        if meant and meant not in names:  # further columns are fine, but a mistyped one would be ignored
            columns = ", ".join(_COLUMNS)
            raise DataError(f"{path}: expected the columns {columns}, got {name!r}; did you mean {meant!r}?")


def _row(row: Mapping[str | None, Any], domain: str | None) -> tuple[LoggedDialogue, tuple[str, ...]]:
    """Return a row as a dialogue whose last turn carries the label, and the key of the dialogue it comes from."""
    if None in row or None in row.values():
        raise ValueError("expected as many cells as the header, got more or fewer; quote cells with commas in them")
    named, who, reply = str(row.get("domain") or domain or "").strip(), str(row["persona"]).strip(), str(row["reply"])
    if named not in DOMAINS and not is_path(named):
        raise ValueError(f"domain: expected one of {', '.join(DOMAINS)}, or the path of your own, got {named!r}")
    if not who:
        raise ValueError("persona: expected an id or a description, got nothing")
    try:
        history = json.loads(row["history"])
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"history: expected a JSON list of strings, got invalid JSON ({error})") from error
    if not isinstance(history, list) or not all(isinstance(line, str) and line.strip() for line in history):
        raise ValueError(f"history: expected a JSON list of strings that say something, got {row['history'][:60]!r}")
    lines = ["", *history] if len(history) % 2 == 0 else history
    before = [LoggedTurn(m, r, _UNLABELLED) for m, r in zip(lines[:-1:2], lines[1::2], strict=True)]
    persona = _embedded(named).get(who)
    if persona is None and not any(map(str.isspace, who)):
        hint = did_you_mean(who, _embedded(named))
        raise ValueError(f"persona: expected the id of an embedded persona, or a description, got {who!r}{hint}")
    persona = persona or Persona(persona_id(who, named), who, domain=named)
    turns = (*before, LoggedTurn(lines[-1], reply, _label(row["label"])))
    marked = str(row.get("dialogue") or "").strip()
    key = (marked,) if marked else (named, who, [*history, reply][0])
    return LoggedDialogue(named, persona, turns, "", 0, 2), key


def _label(text: str) -> Verdict:
    if not text.strip():
        return _UNLABELLED
    try:
        return Verdict("scored", float(text), "The label.")
    except ValueError:
        raise ValueError(f"label: expected a number in [0, 1] or nothing, got {text!r}") from None


def prefixes(dialogue: LoggedDialogue, *, verdicts: bool) -> list[Conversation]:
    """Return the conversation up to each reply, with or without the verdicts on the replies before."""
    conversation = Conversation(dialogue.persona)
    conversations = []
    for turn in dialogue.turns:
        if turn.message:
            conversation = conversation.add("partner", turn.message)
        conversation = conversation.add("policy", turn.reply)
        conversations.append(conversation)
        if verdicts:
            conversation = conversation.judged(turn.verdict)
    return conversations


def judge_all(
    name: str,
    options: Mapping[str, Any],
    conversations: Sequence[tuple[str, Conversation]],
    done: Callable[[int], object] = lambda _: None,
) -> list[Verdict]:
    """Return a verdict per (domain, conversation), judged in batches; first of all, every persona is checked.

    Args:
        name: Name of a judge.
        options: The judge's options.
        conversations: Each ends with a line of the policy.
        done: Called with the number of conversations judged so far.

    Raises:
        ValueError: An unknown judge, a wrong option, or a persona that it cannot judge.
    """
    made = {domain: judges.make(name, domain, options) for domain in sorted({d for d, _ in conversations})}
    verdicts: dict[int, Verdict] = {}
    try:
        personas = {(domain, id(c.persona)): c.persona for domain, c in conversations}
        for (domain, _), persona in personas.items():
            made[domain].check(persona)
        for domain, judge in made.items():
            places = [i for i, (of, _) in enumerate(conversations) if of == domain]
            for at in range(0, len(places), BATCH):
                batch = places[at : at + BATCH]
                verdicts |= zip(batch, judge.judge([conversations[i][1] for i in batch]), strict=True)
                done(len(verdicts))
    finally:
        for judge in made.values():
            if callable(close := getattr(judge, "close", None)):
                close()
    return [verdicts[i] for i in range(len(conversations))]
