"""Read logged, judged dialogues of the consistent-LLMs benchmark, and split them by persona.

A logged dialogue is what an offline learner reads: one judged speaker's replies, what the other speaker said
before each, and the stored verdicts. Nothing in this module may guess: a verdict without a clear answer is
``unparsed``, and a file whose scores do not explain its verdicts is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ppg_gym.conversation import Persona, Verdict
from ppg_gym.domain.personas import persona_key, role_play_instruction

_TOLERANCE = 0.02
"""Share of a file's verdicts that its stored scores may leave unexplained."""

_YES = re.compile(r"(?<![A-Za-z])YES(?![A-Za-z])")
_NO = re.compile(r"(?<![A-Za-z])NO(?![A-Za-z])")
_LEADING = re.compile(r"[^A-Za-z]*(YES|NO)(?![A-Za-z])(?!\W*(?:or\b|YES|NO))")
_ANSWER_AT_EDGE = re.compile(r"^\W*(?:YES|NO)\b\W*|[\s*_\[(\"]*\b(?:YES|NO)\b\W*$")
_SENTENCE = re.compile(r"(?:\d+\. )?((?:\"[^\"]*\"|[^\"])+?[.!?])(?=\s|$)")
_LABEL = re.compile(r"([^:\n]{1,80}):")
_DOMAINS = ("chatting", "education", "therapy")


NO_VERDICT = Verdict("error", None, "No verdict is stored for this line.")


class DataError(ValueError):
    """A dialogue file that is refused; the message names the file, the place and what was expected."""


@dataclass(frozen=True)
class LoggedTurn:
    """One reply of the judged speaker.

    Attributes:
        message: What the other speaker said since the last reply; empty when the judged speaker opens.
        reply: The stored line without the speaker's label, as the judge read it.
        verdict: The stored verdict. ``unparsed`` when the judge's text has no clear answer, ``error`` when
            the line has no verdict or speaks for both speakers, so that the verdict is not about one reply.
    """

    message: str
    reply: str
    verdict: Verdict


@dataclass(frozen=True)
class LoggedDialogue:
    """One judged speaker's side of a stored dialogue.

    Attributes:
        domain: ``chatting``, ``education`` or ``therapy``.
        persona: The judged speaker; the id is the same wherever the same persona is read.
        turns: One per reply, in order.
        source: Name of the file.
        index: Position of the dialogue in the file.
        speaker: 1 or 2, as in the file.
    """

    domain: str
    persona: Persona
    turns: tuple[LoggedTurn, ...]
    source: str
    index: int
    speaker: int


@dataclass(frozen=True)
class FileReport:
    """What was read from one file.

    ``judged_lines`` = ``scored`` + ``unparsed`` + ``both_speakers``, and ``unparsed`` = ``neither`` + the
    verdicts that name both answers without leading with one.

    Attributes:
        path: The file.
        dialogues: Stored dialogues; a dialogue with two judged speakers counts once.
        judged_lines: Lines with a stored verdict.
        scored: Lines with a usable score.
        unparsed: Lines whose verdict has no clear answer.
        polarity: ``yes-is-inconsistent`` or ``yes-is-consistent``, from the stored scores.
        skipped: Why judged lines with a clear answer carry no score: one sentence per reason, with places.
        yes_share: Share of the judged lines whose verdict has "YES" in it, as the released scorer counts.
        neither: Verdicts with neither answer in them.
        both_speakers: Judged lines with a clear answer that speak for both speakers.
        mismatch: Share of the verdicts that the stored scores leave unexplained under ``polarity``.
        lines: Stored lines of all dialogues, both speakers.
    """

    path: str
    dialogues: int
    judged_lines: int
    scored: int
    unparsed: int
    polarity: str
    skipped: tuple[str, ...] = ()
    yes_share: float = 0.0
    neither: int = 0
    both_speakers: int = 0
    mismatch: float = 0.0
    lines: int = 0


def read_dialogues(path: str | os.PathLike[str]) -> tuple[list[LoggedDialogue], FileReport]:
    """Read a file of dialogues in any format that `ppg_gym.data` knows; the format is told by the content.

    Raises:
        DataError: The file is refused; the message says where and why.
    """
    from ppg_gym.data import read_dialogues as read  # the readers build on this module

    return read(path)


def prose_persona(description: str, domain: str, name: str = "") -> Persona:
    """Return the persona of a description; the same words give the same id, wherever they are read."""
    instruction = role_play_instruction(description, domain)
    return Persona(persona_id(instruction, domain), instruction, domain=domain, name=name)


def persona_id(instruction: str, domain: str) -> str:
    """Return the id of a persona that has none of its own: the domain and a digest of the instruction's words."""
    return f"{domain}-{hashlib.sha256(persona_key(instruction).encode()).hexdigest()[:12]}"


def check_entry(entry: Any, where: str) -> None:
    """Raise a `DataError` that begins with ``where`` when an entry of a file is no judged dialogue."""
    _Stored(entry, where).scores()


def read_consistent_llms(path: str | os.PathLike[str]) -> tuple[list[LoggedDialogue], FileReport]:
    """Read one file of judged dialogues (Abdulhai et al., arXiv 2511.00222).

    Every speaker with stored verdicts gives one `LoggedDialogue`: both in chatting, the student or patient in
    education and therapy. Whether YES means consistent or inconsistent is taken from the file: the stored
    score of every dialogue must be the share of verdicts without "YES" in them, or the share with it.

    Args:
        path: A JSON file, a list of dialogues.

    Returns:
        The dialogues in the file's order (speaker 1 before speaker 2), and the report of what was read.

    Raises:
        DataError: Not a file of judged dialogues (a persona file among them), a field that is missing or of
            the wrong type, or stored scores that fit neither polarity or both.
    """
    entries = _load(path)
    stored = [_Stored(entry, f"{path}: dialogue {index}") for index, entry in enumerate(entries)]
    polarity, mismatch = _polarity(stored, str(path))
    dialogues = [
        dialogue.side(speaker, polarity, Path(path).name, index)
        for index, dialogue in enumerate(stored)
        for speaker in dialogue.judged
    ]
    texts = [text for dialogue in stored for text in dialogue.verdicts.values()]
    statuses = Counter(turn.verdict.status for dialogue in dialogues for turn in dialogue.turns)
    places = [
        f"{index}:{line}"
        for index, dialogue in enumerate(stored)
        for line, text in dialogue.verdicts.items()
        if dialogue.speaks_for_both(line) and _answer(text)
    ]
    skipped = []
    if places:
        shown = ", ".join(places[:5]) + (", …" if len(places) > 5 else "")
        skipped.append(f"{len(places)} judged lines speak for both: not scored (dialogue:line {shown})")
    report = FileReport(
        path=str(path),
        dialogues=len(stored),
        judged_lines=len(texts),
        scored=statuses["scored"],
        unparsed=statuses["unparsed"],
        polarity=polarity,
        skipped=tuple(skipped),
        yes_share=sum("YES" in text for text in texts) / len(texts),
        neither=sum(not _YES.search(text) and not _NO.search(text) for text in texts),
        both_speakers=len(places),
        mismatch=mismatch,
        lines=sum(len(dialogue.lines) for dialogue in stored),
    )
    return dialogues, report


def split_by_persona(
    dialogues: Sequence[LoggedDialogue], held_out: float = 0.2, seed: int = 0
) -> tuple[list[LoggedDialogue], list[LoggedDialogue]]:
    """Split so that no persona is on both sides.

    Personas are told apart by the words of their instruction. Where both speakers of a dialogue are judged,
    the other side of a held-out persona's dialogue may be among the training dialogues: its lines are then
    messages there, never replies to learn from.

    Args:
        dialogues: Dialogues of at least two personas.
        held_out: Share of the personas to hold out, in (0, 1); at least one persona goes to each side.
        seed: The split depends on the set of personas and on this alone.

    Returns:
        Training and held-out dialogues, each in the given order.

    Raises:
        ValueError: Fewer than two personas, or a share outside (0, 1).
    """
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"expected held_out in (0, 1), got {held_out!r}")
    keys = [persona_key(dialogue.persona.instruction) for dialogue in dialogues]
    unique = sorted(set(keys))
    if len(unique) < 2:
        raise ValueError(
            f"expected at least 2 personas to hold one out, got {len(unique)} in {len(dialogues)} dialogues; "
            "add files with other personas"
        )
    size = min(max(round(held_out * len(unique)), 1), len(unique) - 1)
    order = np.random.default_rng(seed).permutation(len(unique))
    chosen = {unique[i] for i in order[:size]}
    train = [dialogue for dialogue, key in zip(dialogues, keys, strict=True) if key not in chosen]
    test = [dialogue for dialogue, key in zip(dialogues, keys, strict=True) if key in chosen]
    return train, test


class _Stored:
    """One validated entry of a file: who said what, and what the judge wrote about which line."""

    def __init__(self, entry: Any, where: str) -> None:
        if not isinstance(entry, dict):
            raise DataError(f"{where}: expected an object, got {type(entry).__name__}")
        self._entry, self._where = entry, where
        task = self._field("task_name", str)
        self.domain = task.strip().lower()
        if self.domain not in _DOMAINS:
            raise DataError(f"{where}, key 'task_name': expected one of {_DOMAINS}, got {task!r}")
        opener = self._field("pturn", int)
        if opener not in (1, 2):
            raise DataError(f"{where}, key 'pturn': expected 1 or 2 (who speaks first), got {opener}")
        self._speakers = (opener, 3 - opener)
        self._personas = {speaker: self._field(f"P{speaker}", str) for speaker in (1, 2)}
        lines = self._pairs("conversation")
        if [number for number, _ in lines] != list(range(len(lines))):
            raise DataError(f"{where}, key 'conversation': expected lines numbered 0, 1, 2, … in order")
        labels = [_LABEL.match(text) for _, text in lines[:2]]
        self._labels = [label.group(1) if label else "Speaker" for label in labels]
        for number, text in lines:
            label = self._labels[number % 2] + ":"
            if not text.startswith(label):
                place = f"{where}, key 'conversation', line {number}"
                raise DataError(f"{place}: expected a text that starts with {label!r}, got {text[:40]!r}")
        self.lines = [text.partition(":")[2].strip() for _, text in lines]
        judged = self._pairs("eval_prompt_consistency")
        self.verdicts = dict(judged)
        if len(self.verdicts) < len(judged) or not self.verdicts.keys() <= set(range(len(lines))):
            raise DataError(
                f"{where}, key 'eval_prompt_consistency': expected one verdict at most for each of the "
                f"{len(lines)} lines, got verdicts for lines {[number for number, _ in judged]}"
            )
        self.judged = sorted({self._speakers[line % 2] for line in self.verdicts})
        for speaker in self.judged:
            if not self._personas[speaker].strip():
                raise DataError(f"{where}, key 'P{speaker}': expected the persona of a judged speaker, got ''")

    def scores(self) -> list[tuple[float, float, int]]:
        """Return (stored score, share of verdicts with YES, verdicts) per judged speaker."""
        rows = []
        for speaker in self.judged:
            texts = [text for line, text in self.verdicts.items() if self._speakers[line % 2] == speaker]
            key = f"P{speaker}_prompt_consistency_score"
            score = self._field(key, (int, float))
            if not 0 <= score <= 1:
                raise DataError(f"{self._where}, key {key!r}: expected a score in [0, 1], got {score}")
            rows.append((float(score), sum("YES" in text for text in texts) / len(texts), len(texts)))
        return rows

    def side(self, speaker: int, polarity: str, source: str, index: int) -> LoggedDialogue:
        """Return the dialogue as the given speaker lived it."""
        own = self._speakers.index(speaker)
        name = self._labels[own].strip() if self.domain == "chatting" else ""
        persona = prose_persona(self._personas[speaker], self.domain, name)
        turns = tuple(
            LoggedTurn(self.lines[line - 1] if line else "", self.lines[line], self._verdict(line, polarity))
            for line in range(own, len(self.lines), 2)
        )
        return LoggedDialogue(self.domain, persona, turns, source, index, speaker)

    def speaks_for_both(self, line: int) -> bool:
        """Return whether the line has a paragraph that starts with the other speaker's label."""
        own, other = self._labels[line % 2], self._labels[1 - line % 2]
        label = re.compile(rf"^[\s(\[\"*]*{re.escape(other)}(?:['’]s \w+|\s*\([^)\n]*\))?\s*:", re.MULTILINE)
        return own != other and label.search(self.lines[line]) is not None

    def _verdict(self, line: int, polarity: str) -> Verdict:
        raw = self.verdicts.get(line)
        if raw is None:
            return NO_VERDICT
        answer = _answer(raw)
        if not answer:
            return Verdict("unparsed", None, _rationale(raw, answer), raw=raw)
        if self.speaks_for_both(line):
            reason = "The stored line speaks for both speakers, so the verdict is not about one reply."
            return Verdict("error", None, reason, raw=raw)
        consistent = (answer == "YES") == (polarity == "yes-is-consistent")
        return Verdict("scored", float(consistent), _rationale(raw, answer), raw=raw)

    def _field(self, key: str, kind: type | tuple[type, ...]) -> Any:
        if key not in self._entry:
            raise DataError(f"{self._where}: missing key {key!r}")
        value = self._entry[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise DataError(f"{self._where}, key {key!r}: expected {names}, got {type(value).__name__}")
        return value

    def _pairs(self, key: str) -> list[tuple[int, str]]:
        pairs = []
        for position, item in enumerate(self._field(key, list)):
            if not (
                isinstance(item, list)
                and len(item) == 2
                and isinstance(item[0], int)
                and not isinstance(item[0], bool)
                and isinstance(item[1], str)
            ):
                place = f"{self._where}, key {key!r}, item {position}"
                raise DataError(f"{place}: expected [line number, text], got {item!r:.60}")
            pairs.append((item[0], item[1]))
        return pairs


def _load(path: str | os.PathLike[str]) -> list[Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a readable UTF-8 file, got {error}") from error
    try:
        entries = json.loads(text)
    except RecursionError as error:
        raise DataError(f"{path}: expected a JSON list of dialogues, got JSON nested too deeply") from error
    except json.JSONDecodeError as error:
        try:
            entries = json.loads(text.partition("\n")[0])
        except json.JSONDecodeError:
            entries = None
        if not _is_persona(entries):
            place = f"line {error.lineno} column {error.colno}"
            expected = "expected a JSON list of dialogues"
            raise DataError(f"{path}: {expected}, got invalid JSON at {place}: {error.msg}") from error
    first = entries[0] if isinstance(entries, list) and entries else entries
    if _is_persona(first):
        raise DataError(
            f"{path}: expected judged dialogues, got a persona file, which has no dialogue to learn from; "
            "give it as --personas"
        )
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: expected a non-empty JSON list of dialogues, got {type(entries).__name__}")
    return entries


def _is_persona(entry: Any) -> bool:
    if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str):
        entry = entry[1]
    return (
        isinstance(entry, dict)
        and "conversation" not in entry
        and not entry.keys().isdisjoint({"persona", "description", "instruction"})
    )


def _polarity(stored: Sequence[_Stored], path: str) -> tuple[str, float]:
    rows = [row for dialogue in stored for row in dialogue.scores()]
    if not rows:
        raise DataError(f"{path}: expected verdicts in 'eval_prompt_consistency', got none in any dialogue")
    score, yes, lines = np.array(rows).T
    mismatch = {
        "yes-is-inconsistent": float(np.abs(score - (1.0 - yes)) @ lines / lines.sum()),
        "yes-is-consistent": float(np.abs(score - yes) @ lines / lines.sum()),
    }
    fitting = [name for name, value in mismatch.items() if value <= _TOLERANCE]
    if len(fitting) != 1:
        found = ", ".join(f"{name} {value:.3f}" for name, value in mismatch.items())
        raise DataError(
            f"{path}: expected stored scores that fit exactly one polarity of the verdicts (mismatch at most "
            f"{_TOLERANCE:.2f} of the verdicts), got {found}; the file does not say what YES means"
        )
    return fitting[0], mismatch[fitting[0]]


def _answer(text: str) -> str:
    """Return "YES" or "NO", or "" when the text names neither, or both without leading with one."""
    yes, no = bool(_YES.search(text)), bool(_NO.search(text))
    if yes and no:
        leading = _LEADING.match(text)
        return leading.group(1) if leading else ""
    return "YES" if yes else "NO" if no else ""


def _rationale(text: str, answer: str) -> str:
    """Return the first sentence of the judge's text, without the bare answer when it has a clear one."""
    flat = " ".join(text.split())
    if answer:
        flat = _ANSWER_AT_EDGE.sub("", flat)
    sentence = _SENTENCE.match(flat)
    return sentence.group(1) if sentence else flat or f"The judge answered {text.strip()!r} without a reason."
