"""How far ahead should it plan? The gradient's mean and variance for every policy class, from one batch.

With g_{b,t} = ∇ log π(y_{b,t} | …) and the credit c_{b,t}(M) of policy class M, less a baseline, conversation b's
contribution to the gradient is ĝ_b(M) = Σ_t A_{b,t}(M) g_{b,t}; a batch of B takes the mean. Let μ_M = E ĝ_b(M) and
tr Σ_M be its total variance. Full planning's μ is the gradient of the value J itself. A step η ĝ(M) on J, whose
curvature is at most L, gains

    E ΔJ ≥ η ⟨μ_full, μ_M⟩ − ½ L η² (‖μ_M‖² + tr Σ_M / B),

at the best η for this class ⟨μ_full, μ_M⟩² / (2L (‖μ_M‖² + tr Σ_M / B)). The square root, sign kept and without the
common factor, is what classes are ranked by:

    progress_M(B) = ⟨μ_full, μ_M⟩ / √(‖μ_M‖² + tr Σ_M / B) = ‖μ_full‖ · cos(μ_M, μ_full) · √(S / (1 + S)),

S = B ‖μ_M‖² / tr Σ_M the signal-to-noise ratio: the slope of J along the step, per unit of the step's root mean square
length. A class that leaves rewards out loses by the cosine (bias) and may gain by S (variance); with B → ∞ full
planning wins always. It is a statement about the next step from here, in plain gradient geometry (no AdamW), and not
about the value that a class reaches in the end.

All is own work, nothing of it in arXiv 2603.06138. Pure functions of sketches in numpy; nothing here may read a policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ppg_agents.credit import Mask, credit

if TYPE_CHECKING:
    from ppg_agents.sketch import Sketches

Array = NDArray[np.float64]
Baseline = Literal["leave-one-out", "none"]

FULL = "full"
RESAMPLES = 2000
MOST_LAGS = 20


def lag_mask(n: int, d: int) -> Mask:
    """Return the mask that credits an action with the reward d turns later, and no other; [n, n]."""
    mask: Mask = np.eye(n, k=d, dtype=np.bool_)
    return mask


def own_mean_removed(rewards: Array, valid: Mask) -> Array:
    """Subtract every conversation's own mean reward.

    What is left says which of a conversation's lines scored better, not which conversation did. The mean contains
    rewards that the actions brought about: a diagnosis, no objective.
    """
    kept = np.where(valid, rewards, 0.0)
    return np.asarray(np.where(valid, rewards - (kept.sum(1) / np.maximum(valid.sum(1), 1))[:, None], np.nan))


@dataclass(frozen=True)
class Products:
    """Inner products of what C masks make of a batch, added up over the conversations of P personas.

    A product of two conversations' contributions is kept only where their personas differ, so that its expectation is
    ⟨μ, μ'⟩: conversations with one persona are not independent of each other. Under ``leave-one-out`` the baselines
    of the two come from halves of the remaining personas, disjoint and without either's own; nothing that is multiplied
    is dependent then, and the expectation is exact whatever E g_{b,t} is.

    Attributes:
        with_full: [C, P, P], Σ ⟨ĝ_b(M), ĝ_j(full)⟩ over conversations b, j of two personas, symmetric, 0 where equal.
        with_self: [C, P, P], the same of ⟨ĝ_b(M), ĝ_j(M)⟩.
        squares: [C, P], Σ ‖ĝ_b(M)‖², the baseline being the mean over all conversations with other personas.
        counts: [P], conversations.
    """

    with_full: Array
    with_self: Array
    squares: Array
    counts: Array


def products(
    sketches: Sketches, masks: Sequence[Mask], *, discount: float = 1.0, baseline: Baseline = "leave-one-out"
) -> Products:
    """Combine per-turn gradients into every mask's; see `Products`.

    Args:
        sketches: B conversations with at least two personas.
        masks: C masks [n, n], the last of them full planning's.
        discount: γ, per turn.
        baseline: ``leave-one-out``: the mean credit of the turn over other conversations; or ``none``.

    Raises:
        ValueError: One persona only, an unknown baseline, or arrays that `credit` refuses.
    """
    if baseline not in get_args(Baseline):
        raise ValueError(f"expected a baseline out of {', '.join(get_args(Baseline))}, got {baseline!r}")
    names = sorted(set(sketches.personas))
    if len(names) < 2:
        raise ValueError(f"expected conversations with at least two personas, got {names}; play more")
    valid = sketches.valid
    size, n = valid.shape
    persona = np.array([names.index(name) for name in sketches.personas])
    member = np.eye(len(names))[persona]  # [B, P]
    credits = np.stack([credit(sketches.rewards, mask, valid, discount) for mask in masks])  # [C, B, n]
    vectors = sketches.vectors.astype(np.float64)
    flat = vectors.reshape(size * n, -1)
    half = np.stack([_per_persona(member * (np.arange(len(names)) % 2 == h), credits, valid) for h in (0, 1)])
    squares = np.zeros((len(masks), len(names)))
    with_full, with_self = (np.zeros((len(masks), len(names), len(names))) for _ in range(2))
    for b in range(size):
        gram = (vectors[b] @ flat.T).reshape(n, size, n).transpose(1, 0, 2)  # [B, n of b, n of j]
        p = persona[b]
        own = [h[..., p, :] for h in half]
        means = [_less(h, o, persona if baseline != "none" else None) for h, o in zip(half, own, strict=True)]
        ours = (credits[:, b, None] - means[0]) * valid[b]  # [C, B, n]: b's advantage beside each j
        theirs = (credits - means[1]) * valid
        left = np.einsum("cjt,jts->cjs", ours, gram, optimize=True)
        other = persona != p
        for found, right in ((with_full, theirs[-1:]), (with_self, theirs)):
            pair = (left * right).sum(-1) * other  # [C, B]
            found[:, p] += pair @ member
        alone = _mean(half[0].sum(2) + half[1].sum(2) - own[0] - own[1])  # [C, n]
        advantage = (credits[:, b] - (alone if baseline != "none" else 0.0)) * valid[b]
        squares[:, p] += np.einsum("ct,ts,cs->c", advantage, gram[b], advantage)
    with_full, with_self = ((x + x.transpose(0, 2, 1)) / 2 for x in (with_full, with_self))
    return Products(with_full, with_self, squares, member.sum(0))


def _per_persona(member: Array, credits: Array, valid: Mask) -> Array:
    """Return sum and count of credits per class, persona and turn, [2, C, P, n]."""
    total = np.einsum("bp,cbn->cpn", member, credits)
    count = np.broadcast_to(np.einsum("bp,bn->pn", member, valid), total.shape)
    return np.stack([total, count])


def _less(sums: Array, own: Array, persona: NDArray[np.intp] | None) -> Array:
    """Return the mean credit [C, B, n] over a half's conversations with neither b's persona nor j's."""
    if persona is None:
        return np.zeros((sums.shape[1], 1, sums.shape[3]))
    rest = np.asarray(sums.sum(2) - own)
    return _mean(rest[:, :, None] - sums[:, :, persona])


def _mean(sums: Array) -> Array:
    total, count = sums
    return np.asarray(np.where(count > 0.5, total / np.maximum(count, 1.0), 0.0), dtype=np.float64)


@dataclass(frozen=True)
class Estimates:
    """What products say of C masks, [..., C]; expectations, so the first two may come out negative."""

    mean_square: Array  # ‖μ_M‖²
    variance: Array  # tr Σ_M of one conversation
    alignment: Array  # ⟨μ_M, μ_full⟩

    def snr(self, batch: int) -> Array:
        """Return B ‖μ_M‖² / tr Σ_M."""
        return batch * _ratio(self.mean_square, self.variance)

    def cosine(self) -> Array:
        """Return cos(μ_M, μ_full), clipped to [−1, 1]; NaN where a squared norm is not estimated above 0."""
        length = np.sqrt(np.maximum(self.mean_square * self.mean_square[..., -1:], 0.0))
        cosine: Array = np.clip(_ratio(self.alignment, length), -1.0, 1.0)
        return cosine

    def rms(self, batch: int) -> Array:
        """Return √(‖μ_M‖² + tr Σ_M / B), the step's root mean square length."""
        square = np.maximum(self.mean_square, 0.0) + self.variance / batch
        return np.asarray(np.sqrt(np.maximum(square, 0.0)))

    def progress(self, batch: int) -> Array:
        """Return the slope of the full objective along a step of unit length (see the module)."""
        return _ratio(self.alignment, self.rms(batch))


def _ratio(a: Array, b: Array) -> Array:
    return np.asarray(np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=b > 0))


def estimate(found: Products, weights: Array | None = None) -> Estimates:
    """Return the unbiased estimates, U-statistics over pairs of conversations with different personas.

    Args:
        found: Of C masks.
        weights: How often each persona counts, [R, P]; default once.

    Returns:
        Estimates [R, C], or [C] without weights.
    """
    w = np.ones((1, len(found.counts))) if weights is None else weights
    heads = w @ found.counts
    pairs = heads**2 - (w**2) @ (found.counts**2)
    self_, full = ((np.matmul(w, x) * w).sum(-1).T / pairs[:, None] for x in (found.with_self, found.with_full))
    variance = w @ found.squares.T / heads[:, None] - self_
    result = Estimates(self_, variance, full)
    return result if weights is not None else Estimates(self_[0], variance[0], full[0])


def resample(found: Products, resamples: int, rng: np.random.Generator) -> Estimates:
    """Return bootstrap estimates [resamples, C], personas being drawn with replacement.

    Baselines stay those of the batch. Pairs of a persona with itself stay out. Where no mean gradient can be told from
    0 the intervals are up to √3 too wide, which is the safe side.
    """
    P = len(found.counts)
    weights = rng.multinomial(P, np.full(P, 1 / P), size=resamples).astype(np.float64)
    weights = weights[(weights > 0).sum(1) > 1]  # at least one pair
    return estimate(found, weights)


@dataclass(frozen=True)
class Value:
    """An estimate with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ClassReport:
    """What one batch says of a policy class; B is the batch size that the step is taken with.

    Attributes:
        label: The class.
        rewards: Rewards that it credits, Σ M.
        mean_square: ‖μ‖², unbiased.
        variance: tr Σ of one conversation's contribution.
        snr: B ‖μ‖² / tr Σ.
        cosine: Of μ with full planning's.
        progress: See the module; classes are ranked by it.
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
    """Which class to take at a batch size.

    Attributes:
        batch: B.
        recommended: The class with the most progress.
        undecided: Classes that can not be told from the best, it included, from few credited rewards to many: a
            95% confidence set of the best class.
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
        conversations: That were read.
        personas: Different ones.
        turns: n.
        parameters: Weights that the gradient is of.
        baseline: Subtracted from the credit.
        batch: B of the classes' figures.
        classes: From few credited rewards to many; full planning is one of them.
        lags: For d = 0, 1, …: the part of full planning's progress that comes of rewards d turns after the reply.
            They add up to it when there are n of them.
        reach: The least lookahead that holds every d whose part is shown to be positive, 95% simultaneously over d; 0
            where none is. What lies beyond is not shown to matter, which does not show that it does not.
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
    verdicts: tuple[Verdict, ...]

    @property
    def verdict(self) -> Verdict:
        """The verdict at ``batch``."""
        return self.verdicts[0]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON, with None for NaN."""
        from ppg_agents.runs import finite

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
    resamples: int = RESAMPLES,
    rng: np.random.Generator | None = None,
) -> Horizon:
    """Compare policy classes on one batch of conversations.

    Args:
        sketches: The batch.
        classes: Masks [n, n] by label, full planning's as ``full``.
        batch: Conversations per gradient step, B; default as many as were read.
        other_batches: More batch sizes to give a verdict for. The statistics are those of the batch that was read;
            only B changes.
        discount: γ, per turn.
        baseline: ``leave-one-out`` or ``none``.
        resamples: Of the bootstrap over personas.
        rng: Of the bootstrap.

    Raises:
        ValueError: Fewer than two personas, no class ``full``, or a mask that does not fit.
    """
    n = sketches.valid.shape[1]
    if FULL not in classes:
        raise ValueError(f"expected full planning, {FULL!r}, among the classes, got {', '.join(classes) or 'none'}")
    labels = sorted(classes, key=lambda label: (label == FULL, int(classes[label].sum())))
    masks = [classes[label] for label in labels]
    lags = [lag_mask(n, d) for d in range(min(n, MOST_LAGS))]
    found = products(sketches, [*lags, *masks], discount=discount, baseline=baseline)
    drawn = resample(found, resamples, rng or np.random.default_rng(0))
    point = estimate(found)
    size = batch or len(sketches.personas)
    part = slice(len(lags), None)
    verdicts = [_verdict(labels, point, drawn, part, b)[0] for b in dict.fromkeys((size, *other_batches))]
    behind = _verdict(labels, point, drawn, part, size)[1]
    of = {
        "mean_square": _values(point.mean_square, drawn.mean_square),
        "variance": _values(point.variance, drawn.variance),
        "snr": _values(point.snr(size), drawn.snr(size)),
        "cosine": _values(point.cosine(), drawn.cosine()),
        "progress": _values(point.progress(size), drawn.progress(size)),
    }
    of = {name: values[part] for name, values in of.items()} | {"behind": behind}
    reports = [
        ClassReport(label, int(mask.sum()), **{name: values[c] for name, values in of.items()})
        for c, (label, mask) in enumerate(zip(labels, masks, strict=True))
    ]
    ahead, ahead_drawn = ((e.alignment / e.rms(size)[..., -1:])[..., : len(lags)] for e in (point, drawn))
    return Horizon(
        conversations=len(sketches.personas),
        personas=len(set(sketches.personas)),
        turns=n,
        parameters=sketches.parameters,
        baseline=baseline,
        batch=size,
        classes=tuple(reports),
        lags=tuple(_values(ahead, ahead_drawn)),
        reach=_reach(ahead, ahead_drawn),
        verdicts=tuple(verdicts),
    )


def _values(point: Array, drawn: Array) -> list[Value]:
    low, high = (_quantiles(drawn, q) for q in (0.025, 0.975))
    return [Value(float(v), float(a), float(b)) for v, a, b in zip(point, low, high, strict=True)]


def _quantiles(drawn: Array, q: float) -> Array:
    """Return the quantile of every column over its finite entries, NaN where there is none."""
    columns = [column[np.isfinite(column)] for column in drawn.T]
    return np.array([np.quantile(column, q) if len(column) else np.nan for column in columns])


def _reach(value: Array, drawn: Array) -> int:
    """Return 1 + the last index whose value is above 0 by the simultaneous one-sided bootstrap error, 0 for none."""
    drawn = drawn[np.isfinite(drawn).all(1)]
    spread = drawn.std(0, ddof=1) if len(drawn) > 1 else np.zeros(len(value))
    some = spread > 0
    if not some.any():
        return 0
    q = float(np.quantile(((drawn - value)[:, some] / spread[some]).max(1), 0.95))
    return int(1 + np.flatnonzero(some & (value > q * spread)).max(initial=-1))


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
