"""Policy classes to choose from, and the choice of one during training.

`horizon` compares masks; here they get names, and a rule says when to leave the class in use. May read a policy, and
may not change it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ppg_agents.credit import Mask, policy_class
from ppg_agents.horizon import FULL, Baseline, Horizon, advise

if TYPE_CHECKING:
    from ppg_agents.policy import Policy
    from ppg_agents.trajectory import Trajectory

MOST_CLASSES = 12


@dataclass(frozen=True)
class Candidate:
    """A policy class that could be chosen; the fields are those of a run's settings."""

    policy_class: str
    lookahead: int | None = None
    segments: tuple[int, ...] | None = None

    @property
    def label(self) -> str:
        """The class in words: ``full``, ``3-step``, ``segment 5,5``."""
        if self.policy_class == "k-step":
            return f"{self.lookahead}-step"
        return "segment " + ",".join(map(str, self.segments)) if self.segments else self.policy_class

    def mask(self, n: int) -> Mask:
        """Return the policy class for conversations of n turns, [n, n].

        Raises:
            ValueError: Segments that do not sum to n, or fields that contradict one another.
        """
        return policy_class(self.policy_class, n, self.lookahead, self.segments)


def parse(text: str) -> Candidate:
    """Read ``full``, ``greedy``, ``3``, ``3-step`` or ``segment:5,5``.

    Raises:
        ValueError: Anything else.
    """
    name, _, rest = text.strip().replace(" ", ":").partition(":")
    number = name.removesuffix("-step")
    try:
        if number.isdecimal() and not rest:
            found = Candidate("greedy") if int(number) == 1 else Candidate("k-step", lookahead=int(number))
        else:
            found = Candidate(name, segments=tuple(map(int, rest.split(","))) if rest else None)
        found.mask(sum(found.segments or (1,)))
    except ValueError as error:
        raise ValueError(f"expected classes such as greedy, 3, full or segment:5,5, got {text!r}: {error}") from error
    return found


def default_candidates(n: int) -> tuple[Candidate, ...]:
    """Return greedy, K = 2, 3, … and full planning; with many turns K grows by factors, at most 12 classes."""
    steps = np.arange(2, n) if n <= MOST_CLASSES else np.unique(np.geomspace(2, n - 1, MOST_CLASSES - 2).round())
    return (Candidate("greedy"), *(Candidate("k-step", lookahead=int(k)) for k in steps), Candidate(FULL))


def distinct(candidates: Sequence[Candidate], n: int) -> dict[str, Candidate]:
    """Return candidates by label, each mask once and full planning among them, from few credited rewards to many."""
    kept: dict[bytes, Candidate] = {Candidate(FULL).mask(n).tobytes(): Candidate(FULL)}
    for candidate in candidates:
        kept.setdefault(candidate.mask(n).tobytes(), candidate)
    return {c.label: c for c in sorted(kept.values(), key=lambda c: int(c.mask(n).sum()))}


def masks(candidates: Mapping[str, Candidate], n: int) -> dict[str, Mask]:
    """Return the masks [n, n] of `distinct` candidates, for `horizon.advise`."""
    return {label: candidate.mask(n) for label, candidate in candidates.items()}


@dataclass(frozen=True)
class Choice:
    """The policy class to go on with.

    Attributes:
        candidate: The class.
        switched: Whether it is another one than before.
        reason: In words, for the log.
        report: What it was chosen by.
    """

    candidate: Candidate
    switched: bool
    reason: str
    report: Horizon

    def metrics(self) -> Mapping[str, Any]:
        """Return what a run logs of it, plain JSON."""
        progress = {c.label: c.progress.value for c in self.report.classes}
        return {
            "horizon_class": self.candidate.label,
            "horizon_switched": self.switched,
            "horizon_undecided": list(self.report.verdict.undecided),
            "horizon_progress": {k: v if np.isfinite(v) else None for k, v in progress.items()},
        }


def choose(
    trajectories: Sequence[Trajectory],
    policy: Policy,
    classes: Sequence[Candidate],
    previous: Candidate | None,
    rng: np.random.Generator,
    *,
    batch: int | None = None,
    discount: float = 1.0,
    temperature: float = 1.0,
    baseline: Baseline = "leave-one-out",
) -> Choice:
    """Choose the policy class for the next steps, with hysteresis.

    The class in use is kept until another one makes more progress by more than the comparison's error: it is left only
    when it is outside the verdict's confidence set. Noise alone therefore switches in at most about 5% of the calls.
    Without a class in use the recommended one is taken.

    Args:
        trajectories: Conversations of this policy, of one or several batches.
        policy: Who learns; its weights and gradients are left as they are.
        classes: What may be chosen; empty for `default_candidates`.
        previous: The class in use, None for none.
        rng: Of the projection and the bootstrap.
        batch: Conversations per gradient step; default as many as are given.
        discount: γ, per turn.
        temperature: That the replies were sampled at.
        baseline: ``leave-one-out`` or ``none``.

    Raises:
        ValueError: Fewer than two personas, or a class that does not fit the conversations' length.
    """
    from ppg_agents.sketch import sketch

    found = sketch(policy, trajectories, seed=int(rng.integers(2**31)), temperature=temperature)
    n = found.valid.shape[1]
    allowed = tuple(classes) or default_candidates(n)
    compared = (*allowed, previous) if previous is not None else allowed
    kept = distinct(compared, n)
    report = advise(found, masks(kept, n), batch=batch, discount=discount, baseline=baseline, rng=rng)
    return decide(report, kept, None if previous is None else _named(previous, kept, n))


def decide(report: Horizon, candidates: Mapping[str, Candidate], previous: str | None) -> Choice:
    """Apply the hysteresis of `choose` to a report.

    Args:
        report: Of the candidates.
        candidates: By label.
        previous: Label of the class in use, None for none.
    """
    verdict = report.verdict
    if previous is not None and previous in verdict.undecided:
        if previous == verdict.recommended:
            return Choice(candidates[previous], False, f"keeping {previous}, which makes the most progress", report)
        reason = f"keeping {previous}: {verdict.recommended} makes no more progress beyond the error"
        return Choice(candidates[previous], False, reason, report)
    new = verdict.recommended
    reason = f"taking {new}" if previous is None else f"switching from {previous} to {new}"
    return Choice(candidates[new], previous is not None, f"{reason}: {verdict.words()}", report)


def _named(candidate: Candidate, among: Mapping[str, Candidate], n: int) -> str:
    """Return the label under which `distinct` keeps a candidate."""
    mask = candidate.mask(n)
    return next(label for label, one in among.items() if np.array_equal(one.mask(n), mask))
