"""The judged dialogues of the consistent-LLMs benchmark (Abdulhai et al., arXiv 2511.00222).

Nothing here guesses: a verdict without a clear answer is ``unparsed``, and a file whose scores do not explain its
verdicts is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppg_gym.conversation import Verdict
from ppg_gym.data.dialogues import NO_VERDICT, LoggedDialogue, LoggedTurn
from ppg_gym.data.files import DataError, Problem, RefusedError, broken_json, list_items
from ppg_gym.data.report import Report, different_personas, mean_score
from ppg_gym.domain.personas import prose_persona

_TOLERANCE = 0.02
"""Share of a file's verdicts that its stored scores may leave unexplained."""

_YES = re.compile(r"(?<![A-Za-z])YES(?![A-Za-z])")
_NO = re.compile(r"(?<![A-Za-z])NO(?![A-Za-z])")
_LEADING = re.compile(r"[^A-Za-z]*(YES|NO)(?![A-Za-z])(?!\W*(?:or\b|YES|NO))")
_ANSWER_AT_EDGE = re.compile(r"^\W*(?:YES|NO)\b\W*|[\s*_\[(\"]*\b(?:YES|NO)\b\W*$")
_SENTENCE = re.compile(r"(?:\d+\. )?((?:\"[^\"]*\"|[^\"])+?[.!?])(?=\s|$)")
_LABEL = re.compile(r"([^:\n]{1,80}):")
_DOMAINS = ("chatting", "education", "therapy")


def read_consistent_llms(
    path: str | os.PathLike[str], text: str, domain: str | None
) -> tuple[list[LoggedDialogue], Report]:
    """Read one file of judged dialogues.

    Every speaker with stored verdicts gives one `LoggedDialogue`: both in chatting, the student or patient in
    education and therapy. Whether YES means consistent or inconsistent is taken from the file: the stored score of
    every dialogue must be the share of verdicts without "YES" in them, or the share with it.

    Args:
        path: The file, for messages and as the dialogues' source.
        text: What it holds, a JSON list of dialogues.
        domain: Refuse dialogues of any other.

    Returns:
        The dialogues in the file's order (speaker 1 before speaker 2), and the report.

    Raises:
        RefusedError: A field is missing or of the wrong type, the stored scores fit neither polarity or both, or a
            dialogue is of another domain; every bad entry is named.
    """
    stored: list[_Stored] = []
    problems: list[Problem] = []
    try:
        for index, (line, entry) in enumerate(list_items(text)):
            try:
                stored.append(_Stored(entry, f"dialogue {index}"))
            except DataError as error:
                problems.append(Problem(line, "", str(error)))
    except json.JSONDecodeError as error:
        problems.append(broken_json(error))
    if problems:
        raise RefusedError(path, problems)
    polarity, mismatch = _polarity(path, stored)
    dialogues = [
        dialogue.side(speaker, polarity, Path(path).name, index)
        for index, dialogue in enumerate(stored)
        for speaker in dialogue.judged
    ]
    others = sorted({dialogue.domain for dialogue in dialogues} - {domain})
    if domain is not None and others:
        raise RefusedError(path, [Problem(1, "", f"expected dialogues of the domain {domain!r}", ", ".join(others))])
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
    return dialogues, Report(
        path=str(path),
        format="consistent-llms",
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
        personas=different_personas(dialogue.persona for dialogue in dialogues),
        consistent=mean_score(dialogues),
        left_out=len(places),
    )


class _Stored:
    """One checked entry of a file: who said what, and what the judge wrote about which line.

    Attributes:
        domain: Of the dialogue.
        topic: What it is about; empty if the file does not say.
        lines: What was said, without the speakers' labels.
        verdicts: Number of a line -> what the judge wrote about it.
        judged: The speakers with verdicts.
        scores: (stored score, share of verdicts with YES, number of verdicts) of each judged speaker.
    """

    def __init__(self, entry: Any, where: str) -> None:
        if not isinstance(entry, dict):
            raise DataError(f"{where}: expected an object, got {type(entry).__name__}")
        self._entry, self._where = entry, where
        task = self._field("task_name", str)
        self.domain = task.strip().lower()
        if self.domain not in _DOMAINS:
            raise DataError(f"{where}, key 'task_name': expected one of {_DOMAINS}, got {task!r}")
        # Not in every file; null or empty in some.
        self.topic = (self._field("topic", str) if entry.get("topic") is not None else "").strip()
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
        self.scores = [self._score(speaker) for speaker in self.judged]

    def _score(self, speaker: int) -> tuple[float, float, int]:
        texts = [text for line, text in self.verdicts.items() if self._speakers[line % 2] == speaker]
        key = f"P{speaker}_prompt_consistency_score"
        score = self._field(key, (int, float))
        if not 0 <= score <= 1:
            raise DataError(f"{self._where}, key {key!r}: expected a score in [0, 1], got {score}")
        return float(score), sum("YES" in text for text in texts) / len(texts), len(texts)

    def side(self, speaker: int, polarity: str, source: str, index: int) -> LoggedDialogue:
        """Return the dialogue from the given speaker's side."""
        first = self._speakers.index(speaker)
        name = self._labels[first].strip() if self.domain == "chatting" else ""
        persona = prose_persona(self._personas[speaker], self.domain, name)
        turns = tuple(
            LoggedTurn(self.lines[line - 1] if line else "", self.lines[line], self._verdict(line, polarity))
            for line in range(first, len(self.lines), 2)
        )
        return LoggedDialogue(self.domain, persona, turns, source, index, speaker, self.topic)

    def speaks_for_both(self, line: int) -> bool:
        """Return whether the line has a paragraph that starts with the other speaker's label."""
        speaker, other = self._labels[line % 2], self._labels[1 - line % 2]
        label = re.compile(rf"^[\s(\[\"*]*{re.escape(other)}(?:['’]s \w+|\s*\([^)\n]*\))?\s*:", re.MULTILINE)
        return speaker != other and label.search(self.lines[line]) is not None

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
            if not (isinstance(item, list) and [type(part) for part in item] == [int, str]):
                place = f"{self._where}, key {key!r}, item {position}"
                raise DataError(f"{place}: expected [line number, text], got {item!r:.60}")
            pairs.append((item[0], item[1]))
        return pairs


def _polarity(path: str | os.PathLike[str], stored: Sequence[_Stored]) -> tuple[str, float]:
    """Return what YES means in a file, and the share of verdicts that this leaves unexplained."""
    rows = [row for dialogue in stored for row in dialogue.scores]
    if not rows:
        why = "expected verdicts in 'eval_prompt_consistency', got none in any dialogue"
        raise RefusedError(path, [Problem(1, "", why)])
    score, yes, lines = np.array(rows).T
    mismatch = {
        "yes-is-inconsistent": float(np.abs(score - (1.0 - yes)) @ lines / lines.sum()),
        "yes-is-consistent": float(np.abs(score - yes) @ lines / lines.sum()),
    }
    fitting = [name for name, value in mismatch.items() if value <= _TOLERANCE]
    if len(fitting) != 1:
        got = ", ".join(f"{name} {value:.3f}" for name, value in mismatch.items())
        why = (
            "expected stored scores that fit exactly one polarity of the verdicts (mismatch at most "
            f"{_TOLERANCE:.2f} of the verdicts), got {got}; the file does not say what YES means"
        )
        raise RefusedError(path, [Problem(1, "", why)])
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
