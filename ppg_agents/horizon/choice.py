"""Policy classes to choose from, and the choice of one during training.

`horizon` compares masks; here they get names, and a rule says which of them to use. May read a policy, and
may not change it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ppg_agents.credit import Mask, policy_class
from ppg_agents.horizon.advice import ALIGNED, FULL, Horizon, advise
from ppg_agents.horizon.moments import Baseline

if TYPE_CHECKING:
    from ppg_agents.policy.policy import Policy
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
        cosines = {c.label: (c.cosine.value, c.cosine.low) for c in self.report.classes}
        return {
            "horizon_class": self.candidate.label,
            "horizon_switched": self.switched,
            "horizon_cosine": {k: [v if np.isfinite(v) else None for v in pair] for k, pair in cosines.items()},
        }


def choose(
    trajectories: Sequence[Trajectory],
    policy: Policy,
    classes: Sequence[Candidate],
    previous: Candidate,
    rng: np.random.Generator,
    *,
    cosine: float = ALIGNED,
    discount: float = 1.0,
    temperature: float = 1.0,
    baseline: Baseline = "leave-one-out",
) -> Choice:
    """Choose the policy class for the next steps: the shortest whose direction is shown to be full planning's.

    Shorter classes have less variance; an aligned one (see `horizon.advise`) loses at most 1 − ``cosine`` of the
    value's slope. What the conversations do not show is not taken for granted: few of them give full planning.

    Args:
        trajectories: Conversations of this policy, of one or several batches.
        policy: Who learns; its weights and gradients are left as they are.
        classes: What may be chosen beside full planning; empty for `default_candidates`.
        previous: The class in use.
        rng: Of the projection and the bootstrap.
        cosine: That a class has to keep with full planning's gradient.
        discount: γ, per turn.
        temperature: That the replies were sampled at.
        baseline: ``leave-one-out`` or ``none``.

    Raises:
        ValueError: Fewer than two personas, or a class that does not fit the conversations' length.
    """
    from ppg_agents.horizon.sketch import sketch

    found = sketch(policy, trajectories, seed=int(rng.integers(2**31)), temperature=temperature)
    n = found.valid.shape[1]
    kept = distinct(tuple(classes) or default_candidates(n), n)
    report = advise(found, masks(kept, n), cosine=cosine, discount=discount, baseline=baseline, rng=rng)
    new = kept[report.aligned[0]]
    switched = not np.array_equal(new.mask(n), previous.mask(n))
    reason = f"switching from {previous.label} to {new.label}" if switched else f"keeping {new.label}"
    why = "no shorter class is shown to point where full planning points"
    if new.label != FULL:
        why = f"the shortest class that is shown to point where full planning points (cosine at least {cosine:g})"
    return Choice(new, switched, f"{reason}, {why}", report)
