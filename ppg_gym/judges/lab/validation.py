"""Does a judge agree with recorded labels? Any judge, against people or other judges, beside "always consistent".

The judge sees the conversation up to a reply and no label at all, not even of earlier replies. A reply that it gives no
score is counted and left out of the statistics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ppg_gym.columns import align
from ppg_gym.conversation import STATUSES, Verdict
from ppg_gym.data.dialogues import LoggedDialogue
from ppg_gym.judges.lab.agreement import THRESHOLD, Agreement, compare, failures
from ppg_gym.judges.lab.recorded import Labels, judge_all, prefixes

CONSTANT = "always consistent"


@dataclass(frozen=True)
class Part:
    """A judge against the labels of one domain, or of all.

    Attributes:
        name: ``all`` or a domain.
        lines: Labelled replies that the judge was asked about.
        statuses: Its verdicts, status -> replies; every status is a key.
        judge: Its agreement, on the replies that it scored.
        constant: The agreement of a judge that calls every line consistent, on the same replies.
    """

    name: str
    lines: int
    statuses: Mapping[str, int]
    judge: Agreement
    constant: Agreement

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain dicts, with the share of every status."""
        shares = {status: n / self.lines for status, n in self.statuses.items()}
        return {**asdict(self), "shares": shares}


@dataclass(frozen=True)
class Validation:
    """The result of a validation.

    Attributes:
        judge: The judge's name.
        unlabelled: Replies in the files that carry no label.
        left_out: Labelled replies that were not drawn, with a limit.
        parts: All lines first, then per domain.
    """

    judge: str
    unlabelled: int
    left_out: int
    parts: tuple[Part, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain dicts."""
        return {**asdict(self), "threshold": THRESHOLD, "parts": [part.to_dict() for part in self.parts]}

    def table(self) -> str:
        """Return the result as text: a line for the judge and one for the constant per part, then notes."""
        head = ("", "judge", "lines", "dialogues", "consistent", "agreement", "kappa", "ROC AUC", "without a score")
        rows: list[Sequence[str]] = [head]
        notes = []
        for part in self.parts:
            both = ((self.judge, part.judge, failures(part.statuses) or "0"), (CONSTANT, part.constant, ""))
            for name, same, lost in both:
                share = "-" if same.consistent is None else f"{same.consistent:.3f}"
                estimates = [estimate.text() for estimate in (same.agreement, same.kappa, same.auc)]
                title = part.name if same is part.judge else ""
                rows.append((title, name, str(same.lines), str(same.dialogues), share, *estimates, lost))
            named = {"agreement": part.judge.agreement, "kappa": part.judge.kappa, "ROC AUC": part.judge.auc}
            for statistic, estimate in named.items():
                if estimate.reason:
                    missing = "undefined" if estimate.value is None else "without an interval"
                    notes.append(f"{part.name}: {statistic} is {missing}: {estimate.reason}")
        notes.append(
            f"Scores and labels of at least {THRESHOLD} are read as consistent (for the AUC, only the labels are)."
            " In brackets: 95% over dialogues."
        )
        if self.unlabelled:
            notes.append(f"{self.unlabelled} replies in the files carry no label and were not judged.")
        if self.left_out:
            notes.append(f"{self.left_out} labelled replies were not drawn.")
        return "\n".join([*align(rows), *notes])


def validate(
    labels: Labels,
    judge: str,
    options: Mapping[str, Any],
    *,
    limit: int | None = None,
    seed: int = 0,
    done: Callable[[int], object] = lambda _: None,
) -> Validation:
    """Judge labelled replies and compare.

    Args:
        labels: From `read_labels`.
        judge: Name of a judge.
        options: The judge's options.
        limit: Judge at most this many replies, drawn at random.
        seed: Seed of the draw.
        done: Called with the number of replies judged so far.

    Raises:
        ValueError: An unknown judge, a wrong option, a persona that it cannot judge, or a limit below 1.
    """
    lines = [
        (dialogue, float(turn.verdict.score), conversation)
        for dialogue in labels.dialogues
        for turn, conversation in zip(dialogue.turns, prefixes(dialogue, verdicts=False), strict=True)
        if turn.verdict.score is not None
    ]
    total = len(lines)
    if limit is not None:
        if limit < 1:
            raise ValueError(f"expected a limit of at least 1, got {limit}")
        drawn = np.random.default_rng(seed).permutation(total)[:limit]
        lines = [lines[i] for i in sorted(drawn)]
    verdicts = judge_all(judge, options, [(dialogue.domain, c) for dialogue, _, c in lines], done)
    judged = [(dialogue, label, verdict) for (dialogue, label, _), verdict in zip(lines, verdicts, strict=True)]
    names = sorted({dialogue.domain for dialogue, _, _ in judged})
    parts = [_part("all", judged)] if len(names) > 1 else []
    parts += [_part(name, [row for row in judged if row[0].domain == name]) for name in names]
    return Validation(judge, labels.unlabelled, total - len(lines), tuple(parts))


def _part(name: str, judged: Sequence[tuple[LoggedDialogue, float, Verdict]]) -> Part:
    scored = [(d, label, verdict.score) for d, label, verdict in judged if verdict.score is not None]
    truth, scores = [label for _, label, _ in scored], [score for _, _, score in scored]
    dialogues = [(d.source, d.index) for d, _, _ in scored]
    statuses = Counter(dict.fromkeys(sorted(STATUSES), 0))
    statuses.update(verdict.status for _, _, verdict in judged)
    return Part(
        name=name,
        lines=len(judged),
        statuses=dict(statuses),
        judge=compare(scores, truth, dialogues),
        constant=compare([1.0] * len(truth), truth, dialogues),
    )
