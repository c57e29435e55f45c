"""How far ahead should it plan? The gradient's mean and variance for every policy class, from one batch.

With g_{b,t} = ∇ log π(y_{b,t} | …) and the credit c_{b,t}(M) of policy class M, less a baseline, conversation b's
contribution to the gradient is ĝ_b(M) = Σ_t A_{b,t}(M) g_{b,t}; a batch of B takes the mean. Let μ_M = E ĝ_b(M) and
tr Σ_M be its total variance. Full planning's μ is the gradient of the value J itself. A step η ĝ(M) on J, whose
curvature is at most L, gains

    E ΔJ ≥ η ⟨μ_full, μ_M⟩ − ½ L η² (‖μ_M‖² + tr Σ_M / B),

at the best η for this class ⟨μ_full, μ_M⟩² / (2L (‖μ_M‖² + tr Σ_M / B)). The square root, sign kept and without the
common factor, ranks the classes:

    progress_M(B) = ⟨μ_full, μ_M⟩ / √(‖μ_M‖² + tr Σ_M / B) = ‖μ_full‖ · cos(μ_M, μ_full) · √(S / (1 + S)),

S = B ‖μ_M‖² / tr Σ_M the signal-to-noise ratio: the slope of J along the step, per unit of the step's root mean square
length. A class that leaves rewards out loses by the cosine (bias) and may gain by S (variance); as B → ∞ full planning
always wins. This is about the next step from here, in plain gradient geometry (no AdamW), not about the value that a
class reaches in the end.

All own work, not in arXiv 2603.06138. Pure functions of sketches in numpy; nothing here may read a policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ppg_agents.credit import Mask
from ppg_agents.horizon.moments import Baseline, Estimates, estimate, jackknife, products, resample
from ppg_agents.intervals import Array, resampled_interval

if TYPE_CHECKING:
    from ppg_agents.horizon.sketch import Sketches

FULL = "full"
ALIGNED = 0.9
RESAMPLES = 2000
MOST_LAGS = 20


def lag_mask(n: int, d: int) -> Mask:
    """Return the mask [n, n] that credits an action only with the reward d turns later."""
    mask: Mask = np.eye(n, k=d, dtype=np.bool_)
    return mask


def own_mean_removed(rewards: Array, valid: Mask) -> Array:
    """Subtract every conversation's own mean reward.

    The rest shows which of a conversation's lines scored better, not which conversation did. The mean contains rewards
    that the actions caused, so this is a diagnosis, not an objective.
    """
    kept = np.where(valid, rewards, 0.0)
    return np.asarray(np.where(valid, rewards - (kept.sum(1) / np.maximum(valid.sum(1), 1))[:, None], np.nan))


@dataclass(frozen=True)
class Value:
    """An estimate with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ClassReport:
    """One policy class as measured on a batch; B is the batch size of the step.

    Attributes:
        label: The class.
        rewards: How many rewards it credits, with any weight.
        mean_square: ‖μ‖², unbiased.
        variance: tr Σ of one conversation's contribution.
        snr: B ‖μ‖² / tr Σ.
        cosine: Of μ with full planning's; the interval is [−1, 1] where no direction is seen.
        progress: Ranks the classes; see the module.
        behind: progress of the best class less this one's; its interval holds simultaneously for all pairs.
    """

    label: str
    rewards: int
    mean_square: Value
    variance: Value
    snr: Value
    cosine: Value
    progress: Value
    behind: Value


@dataclass(frozen=True)
class Verdict:
    """Which class to use at a batch size.

    Attributes:
        batch: B.
        recommended: The class with the most progress.
        undecided: A 95% confidence set of the best class (itself included), from few credited rewards to many.
    """

    batch: int
    recommended: str
    undecided: tuple[str, ...]

    @property
    def decided(self) -> bool:
        """Whether one class alone is left."""
        return len(self.undecided) == 1

    def words(self) -> str:
        """Return the verdict as a sentence."""
        if self.decided:
            return self.recommended
        return f"undecided between {', '.join(self.undecided)} (most progress: {self.recommended})"


@dataclass(frozen=True)
class Horizon:
    """The advisor's report.

    Attributes:
        conversations: How many were read.
        personas: How many different ones.
        turns: n.
        parameters: How many weights the gradient covers.
        baseline: Subtracted from the credit.
        batch: B of the classes' figures.
        classes: From few credited rewards to many; full planning is one of them.
        lags: For d = 0, 1, …: the part of full planning's progress that comes from rewards d turns after the
            reply; n of them add up to it.
        reach: The least lookahead that covers every d whose part is shown to be positive, 95% simultaneously over d; 0
            if none is. Rewards beyond it may still matter; the batch does not show it.
        aligned: Classes shown to point where full planning points, from few credited rewards to many; full planning
            always comes last (see `advise`).
        verdicts: At several batch sizes, that of ``batch`` first.
    """

    conversations: int
    personas: int
    turns: int
    parameters: int
    baseline: str
    batch: int
    classes: tuple[ClassReport, ...]
    lags: tuple[Value, ...]
    reach: int
    aligned: tuple[str, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def verdict(self) -> Verdict:
        """The verdict at ``batch``."""
        return self.verdicts[0]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON, with None for NaN."""
        from ppg_agents.runs.run import finite

        result: dict[str, Any] = finite(asdict(self))
        return result


def advise(
    sketches: Sketches,
    classes: Mapping[str, Mask],
    *,
    batch: int | None = None,
    other_batches: Sequence[int] = (),
    discount: float = 1.0,
    baseline: Baseline = "leave-one-out",
    cosine: float = ALIGNED,
    resamples: int = RESAMPLES,
    rng: np.random.Generator | None = None,
) -> Horizon:
    """Compare policy classes on one batch of conversations.

    A class is *aligned* when cos(μ_M, μ_full) is shown to be at least ``cosine`` (the lower end of its 95% interval
    is), and so is every given class that credits all that it credits: tested from long to short, so the chance of a
    wrong one is that of one test along every chain of nested classes, 2.5% (in simulations at most about that, see
    docs/horizon.md). Ascent along directions whose cosine with the gradient stays above a constant > 0 ends where full
    planning's does, at a stationary point of J (the angle condition, Nocedal & Wright 2006, § 3.2); it must hold at
    every step, not just the first.

    Args:
        sketches: The batch.
        classes: Masks [n, n] by label, full planning's as ``full``.
        batch: Conversations per gradient step, B; default as many as were read.
        other_batches: More batch sizes to give a verdict for; only B changes, the statistics stay the same.
        discount: γ, per turn.
        baseline: ``leave-one-out`` or ``none``.
        cosine: In (0, 1]; see above.
        resamples: Size of the bootstrap over personas.
        rng: Random numbers for the bootstrap.

    Raises:
        ValueError: Fewer than two personas, no class ``full``, a mask that does not fit, or a cosine outside (0, 1].
    """
    if not 0 < cosine <= 1:
        raise ValueError(f"expected a cosine in (0, 1], got {cosine}")
    n = sketches.valid.shape[1]
    if FULL not in classes:
        raise ValueError(f"expected full planning, {FULL!r}, among the classes, got {', '.join(classes) or 'none'}")
    labels = sorted(classes, key=lambda label: (label == FULL, np.count_nonzero(classes[label])))
    masks = [classes[label] for label in labels]
    lags = [lag_mask(n, d) for d in range(min(n, MOST_LAGS))]
    sums = products(sketches, [*lags, *masks], discount=discount, baseline=baseline)
    drawn = resample(sums, resamples, rng or np.random.default_rng(0))
    point, left_out = estimate(sums), jackknife(sums)
    size = batch or len(sketches.personas)
    part = slice(len(lags), None)
    verdicts = [_verdict(labels, point, drawn, part, b)[0] for b in dict.fromkeys((size, *other_batches))]
    behind = _verdict(labels, point, drawn, part, size)[1]
    three = (point, drawn, left_out)
    figures = {
        "mean_square": _values(*(e.mean_square for e in three)),
        "variance": _values(*(e.variance for e in three)),
        "snr": _values(*(e.snr(size) for e in three)),
        "cosine": _cosines(*(e.cosine() for e in three)),
        "progress": _values(*(e.progress(size) for e in three)),
    }
    figures = {name: values[part] for name, values in figures.items()} | {"behind": behind}
    reports = [
        ClassReport(label, int(np.count_nonzero(mask)), **{name: values[c] for name, values in figures.items()})
        for c, (label, mask) in enumerate(zip(labels, masks, strict=True))
    ]
    ahead, ahead_drawn, ahead_left = ((e.alignment / e.rms(size)[..., -1:])[..., : len(lags)] for e in three)
    return Horizon(
        conversations=len(sketches.personas),
        personas=len(set(sketches.personas)),
        turns=n,
        parameters=sketches.parameters,
        baseline=baseline,
        batch=size,
        classes=tuple(reports),
        lags=tuple(_values(ahead, ahead_drawn, ahead_left)),
        reach=_reach(ahead, ahead_drawn),
        aligned=_aligned(labels, masks, np.array([c.cosine.low for c in reports]), cosine),
        verdicts=tuple(verdicts),
    )


def _values(point: Array, drawn: Array, left_out: Array) -> list[Value]:
    """Return estimates [C] with intervals, from their resamples [R, C] and those without one persona [P, C]."""
    ends = [resampled_interval(*one) for one in zip(point, drawn.T, left_out.T, strict=True)]
    return [Value(float(value), low, high) for value, (low, high) in zip(point, ends, strict=True)]


def _cosines(point: Array, drawn: Array, left_out: Array) -> list[Value]:
    """Return cosines, clipped to [−1, 1], with intervals; a resample without a direction allows every cosine."""
    made = []
    for value, resamples, others in zip(point, drawn.T, left_out.T, strict=True):
        low, high = (
            resampled_interval(value, np.nan_to_num(resamples, nan=anything), others)[end]
            for end, anything in ((0, -math.inf), (1, math.inf))
        )
        seen = math.isfinite(value)
        ends = (max(-1.0, min(low, 1.0)), min(1.0, max(high, -1.0))) if seen else (-1.0, 1.0)
        made.append(Value(float(np.clip(value, -1.0, 1.0)), *ends))
    return made


def _reach(value: Array, drawn: Array) -> int:
    """Return 1 + the last index whose value is above 0 by the simultaneous one-sided bootstrap error, 0 for none."""
    drawn = drawn[np.isfinite(drawn).all(1)]
    spread = drawn.std(0, ddof=1) if len(drawn) > 1 else np.zeros(len(value))
    some = spread > 0
    if not some.any():
        return 0
    q = float(np.quantile(((drawn - value)[:, some] / spread[some]).max(1), 0.95))
    return int(1 + np.flatnonzero(some & (value > q * spread)).max(initial=-1))


def _aligned(labels: Sequence[str], masks: Sequence[Mask], low: Array, least: float) -> tuple[str, ...]:
    """Return the aligned classes.

    Args:
        labels: C classes, from few credited rewards to many, full planning last.
        masks: Their masks.
        low: [C], lower ends of the cosines' intervals.
        least: The required cosine.
    """
    passed = {len(labels) - 1}
    counts = [mask != 0 for mask in masks]
    for c in reversed(range(len(labels) - 1)):
        wider = {d for d, other in enumerate(counts) if (other >= counts[c]).all() and (other != counts[c]).any()}
        if low[c] >= least and wider <= passed:
            passed.add(c)
    return tuple(labels[c] for c in sorted(passed))


def _verdict(
    labels: Sequence[str], point: Estimates, drawn: Estimates, part: slice, batch: int
) -> tuple[Verdict, list[Value]]:
    """Return the verdict, and how far each class is behind the best.

    Multiple comparisons with the best (Hsu 1981) by bootstrap: with D_ij = progress_j − progress_i and its standard
    error s_ij, q is the 95% quantile of max_ij (D*_ij − D_ij) / s_ij; class i is out when D_ij > q s_ij for some j.
    """
    value, samples = point.progress(batch)[part], drawn.progress(batch)[:, part]
    best = int(np.nanargmax(value)) if np.isfinite(value).any() else len(value) - 1
    samples = samples[np.isfinite(samples).all(1)]
    gap, gaps = value[None, :] - value[:, None], samples[:, None, :] - samples[:, :, None]  # [i, j] = j less i
    spread = gaps.std(0, ddof=1) if len(gaps) > 1 else np.full(gap.shape, np.inf)
    apart = np.isfinite(spread) & (spread > 1e-12 * (1e-300 + np.abs(value).max()))
    largest = np.where(apart, (gaps - gap) / np.where(apart, spread, 1.0), -np.inf).max((1, 2), initial=-np.inf)
    q = float(np.quantile(largest, 0.95)) if apart.any() else 0.0
    out = (apart & (gap > q * spread)).any(1)
    margin = q * np.where(apart, spread, 0.0)[:, best]
    behind = [Value(float(g), float(g - m), float(g + m)) for g, m in zip(gap[:, best], margin, strict=True)]
    left = tuple(label for label, gone in zip(labels, out, strict=True) if not gone)
    return Verdict(batch, labels[best], left), behind
