"""Policy classes to choose from, and the choice of one during training.

`horizon.advice` compares masks; a rule here picks one. Nothing here may change a policy.
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
    """Return classes by label, one per mask, with full planning, from few credited rewards to many.

    Raises:
        ValueError: A class that does not fit n turns, or two with the same label.
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
        ValueError: Two different classes have the same label, as two matrices of one size do.
    """
    labelled: dict[str, PolicyClass] = {}
    for one in classes:
        if labelled.setdefault(one.label, one) != one:
            raise ValueError(f"expected classes that differ by name, got two {one.label}; write one as module:function")
    return labelled


def named(label: str, classes: Iterable[PolicyClass]) -> PolicyClass:
    """Return the class that a run's metrics name: one of its candidates, or one of `default_candidates`.

    Raises:
        ValueError: No such class.
    """
    return by_label(classes).get(label) or PolicyClass.parse(label)


@dataclass(frozen=True)
class Choice:
    """The policy class for the next steps.

    Attributes:
        policy_class: The class.
        switched: Whether it differs from the one before.
        reason: In words, for the log.
        report: The measurements behind the choice.
    """

    policy_class: PolicyClass
    switched: bool
    reason: str
    report: Horizon

    def metrics(self) -> Mapping[str, Any]:
        """Return the choice as a run logs it, plain JSON."""
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
    """Choose the policy class for the next steps: the shortest shown to point where full planning points.

    Shorter classes have less variance; an aligned one (see `horizon.advise`) loses at most 1 − ``cosine`` of the
    value's slope. With too few conversations to show alignment, full planning is chosen.

    Args:
        trajectories: Conversations of this policy, of one or several batches.
        policy: The policy that learns; its weights and gradients stay as they are.
        classes: Candidates besides full planning; empty for `default_candidates`.
        previous: The class in use.
        rng: Random numbers for the projection and the bootstrap.
        cosine: Least cosine with full planning's gradient.
        discount: γ, per turn.
        temperature: At which the replies were sampled.
        baseline: ``leave-one-out`` or ``none``.

    Raises:
        ValueError: Fewer than two personas, or a class that does not fit the conversations' length.
    """
    from ppg_agents.horizon.sketch import sketch

    sketches = sketch(policy, trajectories, seed=int(rng.integers(2**31)), temperature=temperature)
    n = sketches.valid.shape[1]
    kept = distinct(tuple(classes) or default_candidates(n), n)
    report = advise(sketches, masks(kept, n), cosine=cosine, discount=discount, baseline=baseline, rng=rng)
    new = kept[report.aligned[0]]
    switched = not np.array_equal(new.mask(n), previous.mask(n))
    reason = f"switching from {previous.label} to {new.label}" if switched else f"keeping {new.label}"
    why = "no shorter class is shown to point where full planning points"
    if new.label != FULL:
        why = f"the shortest class that is shown to point where full planning points (cosine at least {cosine:g})"
    return Choice(new, switched, f"{reason}, {why}", report)
