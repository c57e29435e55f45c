"""How good a fitted judge is, on lines whose personas it has not seen, beside two judges that read nothing.

Numbers and a text table; nothing here fits anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppg_gym.judges.features import Floats
from ppg_gym.judges.lab.agreement import Estimate, compare

FEW_PERSONAS = 10
"""Below so many personas, intervals are drawn over dialogues, and say little about new personas."""

_BINS = 10
_CLIP = 1e-3


@dataclass(frozen=True)
class Figures:
    """How one way of scoring does.

    Attributes:
        auc: Chance that a consistent line scores higher than an inconsistent one, ties half. Scores of several folds
            are compared as log-odds against each fold's own base rate.
        brier: Mean squared difference of probability and label.
        ece: Expected calibration error: the lines in the order of their probabilities in 10 bins of equal size (lines
            of one probability share a bin); the mean over lines of |mean probability - share of consistent|.
        log_loss: Mean negative log-likelihood in nats, probabilities clipped to [0.001, 0.999].
        accuracy: Share of lines on the right side of 0.5.
    """

    auc: Estimate
    brier: float
    ece: float
    log_loss: float
    accuracy: float


@dataclass(frozen=True)
class Evaluation:
    """One set of lines, scored by the judge and by two constants.

    Attributes:
        lines: Lines with a label, scored by the model and not by rule.
        personas: Whose lines they are.
        dialogues: How many dialogues they come from.
        consistent: Share of the labels that say "consistent".
        clusters: What the bootstrap draws whole: ``persona``, or ``dialogue`` below 10 personas.
        judge: The fitted judge.
        always: Probability 1 for every line.
        base_rate: The training lines' share of "consistent" for every line.
        auc_within_files: The mean of the files' own AUCs, weighted by their pairs; None without a pair. Lower than
            ``judge.auc`` where part of that only tells files apart.
    """

    lines: int
    personas: int
    dialogues: int
    consistent: float
    clusters: str
    judge: Figures
    always: Figures
    base_rate: Figures
    auc_within_files: float | None


@dataclass(frozen=True)
class FileCheck:
    """One file of a domain that has several.

    Attributes:
        source: Its name.
        lines: Training lines in it.
        consistent: Their share of "consistent".
        auc: Within the file, cross-validated by persona.
        auc_left_out: The same lines, scored by regressions that saw neither their personas nor their file.
    """

    source: str
    lines: int
    consistent: float
    auc: Estimate
    auc_left_out: Estimate


@dataclass(frozen=True)
class DomainReport:
    """What a fit found out about one domain.

    Attributes:
        domain: Its name.
        lines: Training lines.
        personas: Training personas.
        held_out_personas: Ids of the personas that no part of the fit has seen.
        without_score: Logged lines that were left out, by the status of their verdict.
        by_rule: Lines left to the rules, by kind: how many, and the share that the log calls consistent.
        blocks: Features chosen by cross-validation on the training personas.
        strength: Inverse strength of the L2 penalty, chosen with them.
        slope: Of the calibration.
        cross_validated: Training personas, each scored by a whole fit without it.
        held_out: Held-out personas, scored once, by the model that is saved.
        auc_other_persona: The AUC on the held-out lines when each dialogue is scored with a training persona in the
            place of its own: as high as the real one where the judge goes by how a reply sounds.
        files: One entry per file where there are several.
        warnings: What speaks against using the judge.
    """

    domain: str
    lines: int
    personas: int
    held_out_personas: tuple[str, ...]
    without_score: Mapping[str, int]
    by_rule: Mapping[str, tuple[int, float]]
    blocks: tuple[str, ...]
    strength: float
    slope: float
    cross_validated: Evaluation
    held_out: Evaluation
    auc_other_persona: Estimate
    files: tuple[FileCheck, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class FitReport:
    """What a fit found out.

    Attributes:
        seed: Of the split, the folds and the bootstrap.
        held_out: Share of the personas held out.
        features: ``text`` or ``embeddings``.
        domains: One report per domain.
    """

    seed: int
    held_out: float
    features: str
    domains: tuple[DomainReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain dicts, ready for JSON."""
        return asdict(self)

    def table(self) -> str:
        """Return the figures as text: one block per domain."""
        return "\n\n".join(_block(domain) for domain in self.domains)


def evaluate(
    probabilities: Floats,
    scores: Floats,
    labels: NDArray[np.bool_],
    personas: Sequence[str],
    dialogues: Sequence[str],
    sources: Sequence[str],
    base_rate: float,
    seed: int,
) -> Evaluation:
    """Compare probabilities, and the scores that order the lines, with labels; and two constants beside them."""
    by_persona = len(set(personas)) >= FEW_PERSONAS
    clusters = personas if by_persona else dialogues
    same = np.zeros(len(labels))
    judge, always, base = (
        _figures(chances, order, labels, clusters, seed)
        for chances, order in ((probabilities, scores), (same + 1.0, same), (same + base_rate, same))
    )
    return Evaluation(
        lines=len(labels),
        personas=len(set(personas)),
        dialogues=len(set(dialogues)),
        consistent=float(labels.mean()),
        clusters="persona" if by_persona else "dialogue",
        judge=judge,
        always=always,
        base_rate=base,
        auc_within_files=_within(scores, labels, np.array(sources)),
    )


def calibration_error(probabilities: Floats, labels: NDArray[np.bool_]) -> float:
    """Return the expected calibration error over 10 bins of equal size; see `Figures`."""
    order = np.argsort(probabilities, kind="stable")
    ranked, actual = probabilities[order], labels[order]
    first = np.searchsorted(ranked, ranked)  # lines of one probability share the rank of the first of them
    bins = first * _BINS // len(ranked)
    gaps = [abs(float((ranked[bins == b] - actual[bins == b]).sum())) for b in np.unique(bins)]
    return sum(gaps) / len(ranked)


def auc(scores: Floats, labels: NDArray[np.bool_], clusters: Sequence[str], seed: int) -> Estimate:
    """Return the area under the ROC curve of scores of any size, with a 95% interval from a cluster bootstrap."""
    ranks = np.unique(scores, return_inverse=True)[1] / max(len(scores), 1)
    return compare(ranks.tolist(), labels.astype(float).tolist(), clusters, seed=seed).auc


def _figures(
    probabilities: Floats, scores: Floats, labels: NDArray[np.bool_], clusters: Sequence[str], seed: int
) -> Figures:
    clipped = np.clip(probabilities, _CLIP, 1 - _CLIP)
    return Figures(
        auc=auc(scores, labels, clusters, seed),
        brier=float(np.square(probabilities - labels).mean()),
        ece=calibration_error(probabilities, labels),
        log_loss=float(-np.log(np.where(labels, clipped, 1 - clipped)).mean()),
        accuracy=float(((probabilities >= 0.5) == labels).mean()),
    )


def _within(scores: Floats, labels: NDArray[np.bool_], sources: NDArray[np.str_]) -> float | None:
    """Return the share of ordered pairs of a consistent and an inconsistent line of one file, ties half."""
    won, pairs = 0.0, 0
    for source in np.unique(sources):
        inside = sources == source
        good, bad = scores[inside & labels], scores[inside & ~labels]
        won += float((good[:, None] > bad).sum()) + 0.5 * float((good[:, None] == bad).sum())
        pairs += good.size * bad.size
    return won / pairs if pairs else None


def _block(report: DomainReport) -> str:
    left = ", ".join(f"{count} {status}" for status, count in report.without_score.items()) or "none"
    ruled = ", ".join(f"{n} {kind} ({share:.2f} logged as consistent)" for kind, (n, share) in report.by_rule.items())
    lines = [
        f"{report.domain}: fitted on {report.lines} lines of {report.personas} personas"
        f" ({' + '.join(report.blocks)}, C = {report.strength:g}, calibration slope {report.slope:.2f})",
        f"  left out, no score: {left}; by rule: {ruled or 'none'}",
    ]
    evaluated = {"held-out personas": report.held_out, "training personas, cross-validated": report.cross_validated}
    for title, found in evaluated.items():
        within = "" if found.auc_within_files is None else f", AUC within files {found.auc_within_files:.3f}"
        lines.append(
            f"  {title}: {found.lines} lines, {found.personas} personas, {found.dialogues} dialogues,"
            f" {found.consistent:.3f} consistent{within}"
        )
        lines.append(f"    {'':18} {f'AUC [95% by {found.clusters}]':26}  Brier    ECE  logloss accuracy")
        rows = {"learned judge": found.judge, "always consistent": found.always, "base rate": found.base_rate}
        for name, f in rows.items():
            lines.append(
                f"    {name:18} {f.auc.text():26} {f.brier:6.3f} {f.ece:6.3f} {f.log_loss:8.3f} {f.accuracy:8.3f}"
            )
    lines.append(f"  held-out lines with another persona in place: AUC {report.auc_other_persona.text()}")
    for check in report.files:
        lines.append(
            f"  {check.source}: {check.lines} lines, {check.consistent:.3f} consistent,"
            f" AUC {check.auc.text()}, without its own file {check.auc_left_out.text()}"
        )
    return "\n".join(lines + [f"  ! {warning}" for warning in report.warnings])
