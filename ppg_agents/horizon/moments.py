"""Mean and variance of the gradient of every policy class, from one batch's per-turn gradients.

ĝ_b(M) = Σ_t A_{b,t}(M) g_{b,t} is the contribution of conversation b under policy class M (see `advice`). Its mean's
squared length, its total variance and its product with full planning's mean are sums of inner products; the estimates
here are unbiased, because the factors of every product are independent.

All own work, not in arXiv 2603.06138. Pure functions of sketches in numpy; nothing here may read a policy
or judge a class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ppg_agents.credit import Mask
from ppg_agents.missing import Credits

if TYPE_CHECKING:
    from ppg_agents.horizon.sketch import Sketches

Array = NDArray[np.float64]
Baseline = Literal["leave-one-out", "none"]


@dataclass(frozen=True)
class Products:
    """Inner products of conversations' contributions under C masks, added up per pair of P personas.

    A product of two conversations' contributions is kept only where their personas differ, so that its expectation is
    ⟨μ, μ'⟩: conversations with one persona are not independent. Under ``leave-one-out`` the two baselines come from
    disjoint halves of the other personas, so the factors are independent and the expectation is exact whatever
    E g_{b,t} is. Where faults took rewards away, others' means stand in, which ties the factors together a little.

    Attributes:
        with_full: [C, P, P], Σ ⟨ĝ_b(M), ĝ_j(full)⟩ over conversations b, j of two personas, symmetric, 0 where equal.
        with_self: [C, P, P], the same of ⟨ĝ_b(M), ĝ_j(M)⟩.
        squares: [C, P], Σ ‖ĝ_b(M)‖², with the mean over all conversations with other personas as baseline.
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
        ValueError: One persona only, an unknown baseline, or arrays that `Credits` refuses.
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
    missing = np.zeros_like(valid) if sketches.missing is None else sketches.missing
    arrays = (sketches.rewards, valid, missing)
    credits = np.stack([Credits(*arrays, mask, discount).filled() for mask in masks])  # [C, B, n]
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
        # A conversation times itself (or one with its persona) would add variance to ‖μ‖²: only other personas count.
        other = persona != p
        for sums, right in ((with_full, theirs[-1:]), (with_self, theirs)):
            pair = (left * right).sum(-1) * other  # [C, B]
            sums[:, p] += pair @ member
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
    """Unbiased estimates for C masks, [..., C]; so the first two may be negative."""

    mean_square: Array  # ‖μ_M‖²
    variance: Array  # tr Σ_M of one conversation
    alignment: Array  # ⟨μ_M, μ_full⟩

    def snr(self, batch: int) -> Array:
        """Return B ‖μ_M‖² / tr Σ_M."""
        return batch * _ratio(self.mean_square, self.variance)

    def cosine(self) -> Array:
        """Return cos(μ_M, μ_full), not clipped to [−1, 1]; NaN where a squared norm's estimate is not above 0."""
        square = np.maximum(self.mean_square, 0.0)
        return _ratio(self.alignment, np.sqrt(square * square[..., -1:]))

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
        found: For C masks.
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
    """Return bootstrap estimates [resamples, C], drawing personas with replacement.

    Baselines stay those of the batch; pairs of a persona with itself are left out. Where no mean gradient stands out
    from 0, the intervals are up to √3 times too wide, which errs on the safe side.
    """
    P = len(found.counts)
    weights = rng.multinomial(P, np.full(P, 1 / P), size=resamples).astype(np.float64)
    weights = weights[(weights > 0).sum(1) > 1]  # at least one pair
    return estimate(found, weights)


def jackknife(found: Products) -> Estimates:
    """Return the estimates without each persona in turn, [P, C]; NaN where no pair is left."""
    heads = found.counts.sum() - found.counts
    pairs = heads**2 - ((found.counts**2).sum() - found.counts**2)
    self_, full = (
        _ratio(np.asarray((x.sum((1, 2))[:, None] - 2 * x.sum(2)).T), pairs[:, None])
        for x in (found.with_self, found.with_full)
    )
    squares = (found.squares.sum(1)[:, None] - found.squares).T / heads[:, None]
    return Estimates(self_, squares - self_, full)
