"""Saved conversations, judged again by another judge, with both verdicts side by side.

The conversations stay as they are: nothing here plays a turn or changes a recorded verdict.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ppg_gym.columns import align
from ppg_gym.conversation import Verdict
from ppg_gym.data.dialogues import LoggedDialogue, LoggedTurn
from ppg_gym.judges.lab.agreement import Agreement, Estimate, compare, failures
from ppg_gym.judges.lab.recorded import RESCORED, judge_all, prefixes
from ppg_gym.simulator import UNOPENED


class Pair(NamedTuple):
    """A turn with both verdicts; ``number`` counts from 1."""

    dialogue: LoggedDialogue
    number: int
    turn: LoggedTurn
    verdict: Verdict


@dataclass(frozen=True)
class Part:
    """Two judges' verdicts on some of the turns.

    Attributes:
        name: ``all``, a domain, or ``turn 3``.
        turns: Turns in this part.
        recorded_mean: Mean recorded score of the turns that both judges scored; None without any.
        new_mean: Mean new score of the same turns.
        agreement: The new scores against the recorded ones as labels, on the same turns.
        spearman: Rank correlation of the two; without an interval.
        recorded: Recorded verdicts, status -> turns.
        new: New verdicts, status -> turns.
    """

    name: str
    turns: int
    recorded_mean: float | None
    new_mean: float | None
    agreement: Agreement
    spearman: Estimate
    recorded: Mapping[str, int]
    new: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain dicts."""
        return asdict(self)


@dataclass(frozen=True)
class Rescored:
    """Every turn of the dialogues with its new verdict.

    Attributes:
        judge: Name of the new judge.
        pairs: In the order of the dialogues and turns.
    """

    judge: str
    pairs: tuple[Pair, ...]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield one plain dict per turn: message and reply, the ``recorded`` verdict and the new ``verdict``."""
        for dialogue, number, turn, verdict in self.pairs:
            yield {
                "schema": RESCORED,
                "dialogue": dialogue.index,
                "domain": dialogue.domain,
                "persona": dialogue.persona.id,
                "instruction": dialogue.persona.instruction,
                "turn": number,
                "message": turn.message,
                "reply": turn.reply,
                "recorded": turn.verdict.to_dict(),
                "judge": self.judge,
                "verdict": verdict.to_dict(),
            }

    def parts(self) -> list[Part]:
        """Return the comparison of all turns, then per domain, then per turn of the conversation."""
        groups: dict[str, list[Pair]] = {"all": list(self.pairs)}
        for pair in self.pairs:
            groups.setdefault(pair.dialogue.domain, []).append(pair)
        for pair in sorted(self.pairs, key=lambda pair: pair.number):
            groups.setdefault(f"turn {pair.number}", []).append(pair)
        return [_part(name, group) for name, group in groups.items()]


def rescore(
    dialogues: Sequence[LoggedDialogue],
    judge: str,
    options: Mapping[str, Any],
    done: Callable[[int], object] = lambda _: None,
) -> Rescored:
    """Judge every turn again as it was played: after the conversation up to it, with its recorded verdicts.

    Where the partner gave no opening line, the reply is not judged, as in the environment.

    Args:
        dialogues: With recorded verdicts.
        judge: Name of the new judge.
        options: The judge's options.
        done: Called with the number of turns judged so far.

    Raises:
        ValueError: An unknown judge, a wrong option, or a persona that it cannot judge.
    """
    turns = [
        (dialogue, number, conversation)
        for dialogue in dialogues
        for number, conversation in enumerate(prefixes(dialogue, verdicts=True), start=1)
    ]
    given = iter(judge_all(judge, options, [(d.domain, c) for d, number, c in turns if _opened(d)], done))
    pairs = (Pair(d, number, d.turns[number - 1], next(given) if _opened(d) else UNOPENED) for d, number, _ in turns)
    return Rescored(judge, tuple(pairs))


def _opened(dialogue: LoggedDialogue) -> bool:
    first = dialogue.turns[0]
    return bool(first.message) or first.verdict.status != "error"


def _part(name: str, pairs: Sequence[Pair]) -> Part:
    both = [
        (pair.turn.verdict.score, pair.verdict.score, (pair.dialogue.source, pair.dialogue.index))
        for pair in pairs
        if pair.turn.verdict.score is not None and pair.verdict.score is not None
    ]
    before, after = [old for old, _, _ in both], [new for _, new, _ in both]
    return Part(
        name=name,
        turns=len(pairs),
        recorded_mean=float(np.mean(before)) if both else None,
        new_mean=float(np.mean(after)) if both else None,
        agreement=compare(after, before, [key for _, _, key in both]),
        spearman=_spearman(before, after),
        recorded=dict(Counter(pair.turn.verdict.status for pair in pairs)),
        new=dict(Counter(pair.verdict.status for pair in pairs)),
    )


def _spearman(before: Sequence[float], after: Sequence[float]) -> Estimate:
    for whose, scores in (("recorded", before), ("new", after)):
        if len(set(scores)) < 2:
            return Estimate(None, reason=f"the {whose} scores are all the same" if scores else "no turn has both")
    return Estimate(float(np.corrcoef(_ranks(before), _ranks(after))[0, 1]), reason="no interval")


def _ranks(scores: Sequence[float]) -> NDArray[np.float64]:
    """Return the rank of each score, equal scores sharing the mean of theirs."""
    _, place, times = np.unique(scores, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(times) - (times - 1) / 2)[place]
    return ranks


def table(parts: Sequence[Part]) -> str:
    """Return the comparison as text, a line per part, and a note on every statistic that is undefined."""
    rows: list[Sequence[str]] = [
        ("", "turns", "both", "recorded", "new", "agreement", "kappa", "Spearman", "without a new score")
    ]
    notes = []
    for part in parts:
        same = part.agreement
        means = ["-" if mean is None else f"{mean:.3f}" for mean in (part.recorded_mean, part.new_mean)]
        rank = "-" if part.spearman.value is None else f"{part.spearman.value:.3f}"
        estimates = (same.agreement.text(), same.kappa.text(), rank, failures(part.new) or "0")
        rows.append((part.name, str(part.turns), str(same.lines), *means, *estimates))
        if not same.lines:
            notes.append(f"{part.name}: nothing to compare: {same.agreement.reason}")
            continue
        for statistic, estimate in (("kappa", same.kappa), ("Spearman", part.spearman)):
            if estimate.value is None:
                notes.append(f"{part.name}: {statistic} is undefined: {estimate.reason}")
    return "\n".join([*align(rows), *notes])


def default_file(source: str | os.PathLike[str], judge: str) -> Path:
    """Return the default file for a judge's verdicts on a run: beside its trajectories."""
    name = re.sub(r"[^\w.-]+", "-", judge)
    path = Path(source)
    return path / f"rescored-{name}.jsonl" if path.is_dir() else path.with_name(f"{path.stem}-rescored-{name}.jsonl")


def check_target(path: Path) -> None:
    """Refuse to replace a file that holds anything but an earlier rescoring.

    Raises:
        ValueError: The path is a folder, or a file with something else in it.
    """
    if path.is_dir():
        raise ValueError(f"expected a file to write, got the folder {path}; give --out FILE.jsonl")
    if path.exists() and path.stat().st_size:
        with path.open(encoding="utf-8", errors="replace") as file:
            known = f'"{RESCORED}"' in file.readline()
        if not known:
            raise ValueError(f"expected a new file or an earlier {RESCORED} file, got {path}; give another --out")
