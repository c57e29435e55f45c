"""Policy classes to choose from, and the choice of one during training.

`horizon.advice` compares masks; here a rule says which of them to use. May read a policy, and may not change it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ppg_agents.credit import Mask, PolicyClass
from ppg_agents.horizon.advice import ALIGNED, FULL, Horizon, advise
from ppg_agents.horizon.moments import Baseline

if TYPE_CHECKING:
    from ppg_agents.policy.policy import Policy
    from ppg_agents.trajectory import Trajectory

MOST_CLASSES = 12


def default_candidates(n: int) -> tuple[PolicyClass, ...]:
    """Return greedy, K = 2, 3, … and full planning; with many turns K grows by factors, at most 12 classes."""
    steps = np.arange(2, n) if n <= MOST_CLASSES else np.unique(np.geomspace(2, n - 1, MOST_CLASSES - 2).round())
    return (PolicyClass("greedy"), *(PolicyClass("k-step", int(k)) for k in steps), PolicyClass(FULL))


def distinct(classes: Sequence[PolicyClass], n: int) -> dict[str, PolicyClass]:
    """Return classes by label, each mask once and full planning among them, from few credited rewards to many.

    Raises:
        ValueError: A class that does not serve n turns, or two that have one label.
    """
    kept: dict[bytes, PolicyClass] = {}
    for one in (PolicyClass(FULL), *classes):
        kept.setdefault(one.mask(n).tobytes(), one)
    return by_label(sorted(kept.values(), key=lambda c: np.count_nonzero(c.mask(n))))


def masks(classes: Mapping[str, PolicyClass], n: int) -> dict[str, Mask]:
    """Return the masks [n, n] of `distinct` classes, for `horizon.advise`."""
    return {label: one.mask(n) for label, one in classes.items()}


def by_label(classes: Iterable[PolicyClass]) -> dict[str, PolicyClass]:
    """Return classes by label, in the same order.

    Raises:
        ValueError: Two different ones have one label, as two matrices of one size do.
    """
    labelled: dict[str, PolicyClass] = {}
    for one in classes:
        if labelled.setdefault(one.label, one) != one:
            raise ValueError(f"expected classes that differ by name, got two {one.label}; write one as module:function")
    return labelled


def named(label: str, classes: Iterable[PolicyClass]) -> PolicyClass:
    """Return the class that a run's metrics name: one of its candidates, or one of `default_candidates`.

    Raises:
        ValueError: There is no such class.
    """
    return by_label(classes).get(label) or PolicyClass.parse(label)


@dataclass(frozen=True)
class Choice:
    """The policy class to go on with.

    Attributes:
        policy_class: The class.
        switched: Whether it is another one than before.
        reason: In words, for the log.
        report: What it was chosen by.
    """

    policy_class: PolicyClass
    switched: bool
    reason: str
    report: Horizon

    def metrics(self) -> Mapping[str, Any]:
        """Return what a run logs of it, plain JSON."""
        cosines = {c.label: (c.cosine.value, c.cosine.low) for c in self.report.classes}
        return {
            "horizon_class": self.policy_class.label,
            "horizon_switched": self.switched,
            "horizon_cosine": {k: [v if np.isfinite(v) else None for v in pair] for k, pair in cosines.items()},
        }


def choose(
    trajectories: Sequence[Trajectory],
    policy: Policy,
    classes: Sequence[PolicyClass],
    previous: PolicyClass,
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
