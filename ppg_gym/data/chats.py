"""Chats between two personas, without a judge: Synthetic-Persona-Chat (CSV) and PersonaChat / ConvAI2 (text).

Each dialogue gives one `LoggedDialogue` per speaker whose persona is known; no reply has a verdict. A dialogue that
cannot be read is skipped and named with the reason. Nothing is guessed or repaired, with two exceptions: blank lines
are dropped, and lines that the same user says in a row are joined (and counted in the report).

Synthetic-Persona-Chat is described in arXiv 2312.10007, PersonaChat in arXiv 1801.07243.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ppg_gym.data.dialogues import NO_VERDICT, LoggedDialogue, LoggedTurn
from ppg_gym.data.files import Problem, RefusedError, shorten
from ppg_gym.data.report import Report, of_dialogues
from ppg_gym.domain.personas import persona_key, prose_persona

COLUMNS = ("user 1 personas", "user 2 personas", "Best Generated Conversation")
DOMAIN = "chatting"

_USER = re.compile(r"User ([12]):(.*)", re.DOTALL)
_PLACEHOLDER = re.compile(
    r"\[[^\]\n]*[A-Za-z][^\]\n]*\]"  # [User 1's name], [city, state]
    r"|\((?:[^()\n]*\bname|city|state|place|location|hometown)\)"  # (user 2 name), (name)
    r"|\buser ?[12]\b|\busername\b",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"(\d+) (.*)", re.DOTALL)
_PERSONA = re.compile(r"(your|partner's) persona:(.*)", re.DOTALL)
_SILENCE = "__SILENCE__"

Lines = list[tuple[int, str]]
"""(speaker, text), two speakers in turn."""


class _SkipError(Exception):
    """Why a dialogue is skipped, and what the file holds there."""


def read_synthetic_persona_chat(
    path: str | os.PathLike[str], text: str, domain: str | None
) -> tuple[list[LoggedDialogue], Report]:
    """Read a CSV file with the columns of Synthetic-Persona-Chat; further columns are not read.

    Rows count from 1 as in a spreadsheet, the header being row 1. A row is skipped when a persona is empty,
    a line is not one of ``User 1:`` or ``User 2:``, a line is empty, a placeholder such as ``[User 1's name]``
    is left in a text, or only one of the users speaks.

    Raises:
        RefusedError: The columns are missing, or a quote is never closed.
    """
    dialogues: list[LoggedDialogue] = []
    problems: list[Problem] = []
    joined: Counter[str] = Counter()
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = [name.strip().casefold() for name in next(rows, [])]
    try:
        columns = [header.index(name.casefold()) for name in COLUMNS]
    except ValueError as error:
        expected = f"expected the columns {', '.join(map(repr, COLUMNS))}"
        raise RefusedError(path, [Problem(1, "", expected, shorten(header))]) from error
    number, line = 1, rows.line_num + 1
    try:
        for row in rows:
            number += 1
            try:
                if len(row) != len(header):
                    raise _SkipError("another number of columns than the header", str(len(row)))
                first, second, conversation = (row[column] for column in columns)
                lines, extra = _conversation(conversation)
                personas = [_described(first, 1), _described(second, 2)]
                dialogues += _sides(lines, personas, domain or DOMAIN, Path(path).name, number - 2)
                joined[f"row {number}"] += extra
            except _SkipError as skip:
                problems.append(Problem(line, f"row {number}", *skip.args))
            line = rows.line_num + 1
    except csv.Error as error:
        raise RefusedError(path, [Problem(line, f"row {number + 1}", "expected a row of CSV", str(error))]) from error
    joined = +joined
    places = ", ".join(list(joined)[:5]) + (", …" if len(joined) > 5 else "")
    notes = [f"{joined.total()} lines joined to the same user's line before ({places})"] if joined else []
    return dialogues, of_dialogues(path, "synthetic-persona-chat", dialogues, problems, "row", notes)


def read_persona_chat(
    path: str | os.PathLike[str], text: str, domain: str | None
) -> tuple[list[LoggedDialogue], Report]:
    r"""Read PersonaChat / ConvAI2 text: numbered lines; each line 1 begins a dialogue.

    ``N your persona: …`` and ``N partner's persona: …`` come first, then ``N utterance\treply``. A third field
    (reward) and a fourth (candidate replies) are not read. The partner speaks first; where the utterance is
    ``__SILENCE__`` the persona does. Speaker 1 is "you", speaker 2 the partner. Where a file tells a dialogue from both
    sides with both personas, the repeated side is left out.

    Raises:
        RefusedError: The first line has no number.
    """
    dialogues: list[LoggedDialogue] = []
    problems: list[Problem] = []
    for index, block in enumerate(_blocks(path, text)):
        try:
            personas, lines = block.read()
            dialogues += _sides(lines, personas, domain or DOMAIN, Path(path).name, index)
        except _SkipError as skip:
            problems.append(Problem(block.line, f"line {block.line}", *skip.args))
    kept = _without_repeats(dialogues)
    repeats = len(dialogues) - len(kept)
    notes = [f"{repeats} sides left out: the dialogue is also there from the other side"] if repeats else []
    return kept, of_dialogues(path, "persona-chat", kept, problems, "dialogue", notes)


def _conversation(text: str) -> tuple[Lines, int]:
    """Return the lines of a CSV row, and how many were joined to the line before."""
    lines: Lines = []
    extra = 0
    for line in filter(None, map(str.strip, text.split("\n"))):
        match = _USER.match(line)
        if match is None:
            raise _SkipError("a line without 'User 1:' or 'User 2:'", shorten(line))
        user, words = int(match[1]), match[2].strip()
        if not words:
            raise _SkipError("an empty line", shorten(line))
        _no_placeholder(words)
        if lines and lines[-1][0] == user:
            lines[-1] = (user, f"{lines[-1][1]} {words}")
            extra += 1
        else:
            lines.append((user, words))
    if len(lines) < 2:
        raise _SkipError("fewer than two lines" if lines else "no conversation")
    return lines, extra


def _described(text: str, user: int) -> str:
    """Return a persona as one fact per line."""
    facts = [line.strip() for line in text.split("\n") if line.strip()]
    if not facts:
        raise _SkipError(f"the persona of user {user} is empty")
    _no_placeholder(text)
    return "\n".join(facts)


def _no_placeholder(text: str) -> None:
    residue = _PLACEHOLDER.search(text)
    if residue:
        raise _SkipError("a placeholder is left in a text", shorten(residue.group()))


@dataclass
class _Block:
    """The numbered lines of one dialogue; ``line`` is the first one's place in the file."""

    line: int
    texts: list[str] = field(default_factory=list)
    fault: tuple[str, ...] = ()

    def read(self) -> tuple[list[str], Lines]:
        """Return the personas of speakers 1 and 2 (empty where unknown), and what was said."""
        if self.fault:
            raise _SkipError(*self.fault)
        facts: dict[str, list[str]] = {"your": [], "partner's": []}
        lines: Lines = []
        for position, text in enumerate(self.texts, start=1):
            persona = _PERSONA.match(text)
            if persona is None:
                lines += self._exchange(text, opening=not lines, last=position == len(self.texts))
            elif lines:
                raise _SkipError("a persona line after the first utterance", shorten(text))
            elif not persona[2].strip():
                raise _SkipError("an empty persona line", shorten(text))
            else:
                facts[persona[1]].append(persona[2].strip())
        if not any(facts.values()):
            raise _SkipError("no persona line")
        if not lines:
            raise _SkipError("no utterance")
        return ["\n".join(told) for told in facts.values()], lines

    @staticmethod
    def _exchange(text: str, opening: bool, last: bool) -> Lines:
        fields = [part.strip() for part in text.split("\t")]
        utterance, reply = fields[0], fields[1] if len(fields) > 1 else ""
        if len(fields) > 4:
            raise _SkipError("more than four fields", str(len(fields)))
        if not utterance or (not reply and not (last and len(fields) == 1)):
            raise _SkipError("a line without an utterance and a reply", shorten(text))
        if "|" in reply:
            raise _SkipError("several replies to one utterance", shorten(reply))
        if utterance == _SILENCE and not opening:
            raise _SkipError("silence after the first utterance")
        before = [] if utterance == _SILENCE else [(2, utterance)]
        return [*before, (1, reply)] if reply else before


def _blocks(path: str | os.PathLike[str], text: str) -> Iterator[_Block]:
    block: _Block | None = None
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.rstrip("\r")
        if not line.strip():
            continue
        match = _NUMBERED.match(line)
        if match is None and block is None:
            expected = "expected a numbered line such as '1 your persona: …'"
            raise RefusedError(path, [Problem(number, "", expected, shorten(line))])
        if block is None or (match is not None and int(match[1]) == 1):
            if block is not None:
                yield block
            block = _Block(number)
        if match is None:
            block.fault = block.fault or ("a line without a number", shorten(line))
        elif int(match[1]) != len(block.texts) + 1:
            block.fault = block.fault or ("a line number is out of order", f"{match[1]} in line {number}")
        block.texts.append(match[2] if match else "")
    if block is not None:
        yield block


def _sides(lines: Lines, personas: Sequence[str], domain: str, source: str, index: int) -> list[LoggedDialogue]:
    """Return a dialogue from the side of each speaker with a persona."""
    if len({speaker for speaker, _ in lines}) < 2:
        raise _SkipError("only one of the two speaks")
    sides = []
    for speaker, persona in enumerate(personas, start=1):
        turns = tuple(
            LoggedTurn(lines[i - 1][1] if i else "", text, NO_VERDICT)
            for i, (who, text) in enumerate(lines)
            if who == speaker
        )
        if persona:
            sides.append(LoggedDialogue(domain, prose_persona(persona, domain), turns, source, index, speaker))
    return sides


def _without_repeats(dialogues: Sequence[LoggedDialogue]) -> list[LoggedDialogue]:
    """Return the dialogues without those that begin another one of the same persona, word for word."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, dialogue in enumerate(dialogues):
        groups[persona_key(dialogue.persona.instruction), dialogue.turns[0].reply].append(i)
    dropped: set[int] = set()
    for group in groups.values():
        longest_first = sorted(group, key=lambda i: (-len(dialogues[i].turns), i))
        for at, i in enumerate(longest_first):
            turns = dialogues[i].turns
            if any(j not in dropped and dialogues[j].turns[: len(turns)] == turns for j in longest_first[:at]):
                dropped.add(i)
    return [dialogue for i, dialogue in enumerate(dialogues) if i not in dropped]
