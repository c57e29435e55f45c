"""What was read from a file, in numbers and sentences, as JSON and as a table.

Counts what the readers hand over; reads no file.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ppg_gym.columns import align
from ppg_gym.conversation import Persona
from ppg_gym.data.dialogues import NO_VERDICT, LoggedDialogue
from ppg_gym.data.files import Problem, first_places
from ppg_gym.domain.personas import persona_key


@dataclass(frozen=True)
class Report:
    """What was read from one file of any format.

    ``judged_lines`` = ``scored`` + ``unparsed`` + judged lines without a score for another reason. ``polarity`` is
    empty in a file without YES and NO; ``yes_share``, ``neither`` and ``mismatch`` then count nothing.

    Attributes:
        path: The file.
        format: Name of its format.
        dialogues: Stored dialogues; a dialogue with two judged speakers counts once.
        judged_lines: Lines with a stored verdict.
        scored: Lines with a usable score.
        unparsed: Lines whose verdict has no clear answer.
        polarity: ``yes-is-inconsistent`` or ``yes-is-consistent``, from the stored scores.
        skipped: What was skipped and why: one sentence per reason, with places.
        yes_share: Share of the judged lines whose verdict has "YES" in it, as the benchmark's released scorer counts.
        neither: Verdicts with neither answer in them.
        both_speakers: Judged lines with a clear answer that speak for both speakers.
        mismatch: Share of the verdicts that the stored scores leave unexplained under ``polarity``.
        lines: Lines of all dialogues, both speakers.
        personas: Different personas, told apart by the words of their instruction.
        consistent: Mean of the scores; None when nothing is scored.
        left_out: Rows or dialogues that are skipped, and judged lines without a score for another reason than
            ``unparsed``.
        problems: What is skipped, one by one.
        notes: What was changed while reading, one sentence each.
    """

    path: str
    format: str
    dialogues: int = 0
    judged_lines: int = 0
    scored: int = 0
    unparsed: int = 0
    polarity: str = ""
    skipped: tuple[str, ...] = ()
    yes_share: float = 0.0
    neither: int = 0
    both_speakers: int = 0
    mismatch: float = 0.0
    lines: int = 0
    personas: int = 0
    consistent: float | None = None
    left_out: int = 0
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON; what does not apply to the format is None."""
        answers = bool(self.polarity)
        return {
            "path": self.path,
            "format": self.format,
            "dialogues": self.dialogues,
            "lines": self.lines,
            "judged_lines": self.judged_lines,
            "scored": self.scored,
            "unparsed": self.unparsed,
            "consistent": self.consistent,
            "personas": self.personas,
            "polarity": self.polarity or None,
            "yes_share": self.yes_share if answers else None,
            "neither": self.neither if answers else None,
            "skipped": self.left_out,
            "notes": [*self.skipped, *self.notes],
        }


def of_dialogues(
    path: str | os.PathLike[str],
    format: str,
    dialogues: Sequence[LoggedDialogue],
    problems: Sequence[Problem] = (),
    unit: str = "dialogue",
    notes: Sequence[str] = (),
) -> Report:
    """Return the report of dialogues whose verdicts are scores, or that have none.

    Args:
        path: The file.
        format: Name of its format.
        dialogues: What was read.
        problems: What was skipped.
        unit: What a problem is about: ``row``, ``dialogue`` or ``line``.
        notes: What was changed.
    """
    verdicts = [turn.verdict for dialogue in dialogues for turn in dialogue.turns if turn.verdict != NO_VERDICT]
    statuses = Counter(verdict.status for verdict in verdicts)
    failed = {status: n for status, n in sorted(statuses.items()) if status not in ("scored", "unparsed")}
    skipped = list(sentences(problems, unit))
    if failed:
        which = ", ".join(f"{status} {n}" for status, n in failed.items())
        skipped.append(f"{sum(failed.values())} judged lines carry no score: {which}")
    return Report(
        path=str(path),
        dialogues=len({(dialogue.source, dialogue.index) for dialogue in dialogues}),
        judged_lines=len(verdicts),
        scored=statuses["scored"],
        unparsed=statuses["unparsed"],
        skipped=tuple(skipped),
        lines=_lines(dialogues),
        format=format,
        personas=different_personas(dialogue.persona for dialogue in dialogues),
        consistent=mean_score(dialogues),
        left_out=len(problems) + sum(failed.values()),
        problems=tuple(problems),
        notes=tuple(notes),
    )


def of_personas(path: str | os.PathLike[str], format: str, personas: Sequence[Persona]) -> Report:
    """Return the report of a persona file."""
    different = different_personas(personas)
    notes = (f"{len(personas)} entries, {different} of them different",) if different < len(personas) else ()
    return Report(str(path), format, personas=different, notes=notes)


def different_personas(personas: Iterable[Persona]) -> int:
    """Return how many personas there are, told apart by the words of their instruction."""
    return len({persona_key(persona.instruction) for persona in personas})


def mean_score(dialogues: Sequence[LoggedDialogue]) -> float | None:
    """Return the mean score of the scored replies, None when there is none."""
    verdicts = (turn.verdict for dialogue in dialogues for turn in dialogue.turns)
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    return sum(scores) / len(scores) if scores else None


def sentences(problems: Sequence[Problem], unit: str) -> tuple[str, ...]:
    """Return one sentence per reason: how many, why, and the first places."""
    by_reason: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        by_reason[problem.why].append(problem)
    return tuple(
        f"{len(alike)} {unit}{'s' if len(alike) > 1 else ''} skipped: {why} ({first_places(alike)})"
        for why, alike in by_reason.items()
    )


def table(reports: Sequence[Report]) -> str:
    """Return the reports as a plain table, one line per file, and their sentences below it."""
    head = ("file", "format", "dialogues", "lines", "judged", "scored", "unparsed", "consistent", "personas", "skipped")
    rows: list[tuple[str, ...]] = [(*head, "polarity")]
    for report in reports:
        share = "-" if report.consistent is None else f"{report.consistent:.3f}"
        counts = (report.dialogues, report.lines, report.judged_lines, report.scored, report.unparsed)
        ending = (share, str(report.personas), str(report.left_out), report.polarity or "-")
        rows.append((_name(report.path), report.format, *map(str, counts), *ending))
    notes = [f"{_name(report.path)}: {note}" for report in reports for note in (*report.skipped, *report.notes)]
    return "\n".join([*align(rows, left=(0, 1, len(head))), *notes])


def _lines(dialogues: Sequence[LoggedDialogue]) -> int:
    """Return how many lines were said: the replies of both sides, or one side's replies and the lines they answer."""
    sides: dict[tuple[str, int], list[LoggedDialogue]] = defaultdict(list)
    for dialogue in dialogues:
        sides[dialogue.source, dialogue.index].append(dialogue)
    total = 0
    for both in sides.values():
        total += sum(len(side.turns) for side in both)
        if len(both) == 1:
            turns = both[0].turns
            total += len(turns) - (not turns[0].message)
    return total


def _name(path: str) -> str:
    return "/".join(path.replace(os.sep, "/").split("/")[-2:])
