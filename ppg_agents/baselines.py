"""Baselines b [B, n], subtracted from the credit where a turn is valid.

Each is a mean per column, so it can be taken of the credit or, as `ppg_agents.missing` does, of the rewards that make
it up: b is linear in them.

All are own choices; that of arXiv 2603.06138, which also scales, is in `ppg_agents.group_advantage`. Every docstring
states the bias with respect to the policy class's own gradient: E[∇ log π(y_t | …) · b] = 0 as long as b does not
depend on y_t. Faults that depend on the reply are another matter: leaving those turns out changes the objective itself,
with any baseline.

Numpy only; nothing here may know a token or a model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def leave_one_out(credit: Array, valid: Mask, groups: Sequence[Hashable]) -> Array:
    """Mean credit of turn t over the *other* conversations of the group: RLOO (2402.14740), per turn.

        b_{b,t} = mean{ credit_{j,t} : j ≠ b, groups_j = groups_b, valid_{j,t} }

    Where the group has no other, it is the mean over the other groups (own), and 0 if they have none either. Unbiased
    if the conversations of a batch are sampled independently, even when the policy decides when a conversation ends.

    Args:
        credit: [B, n].
        valid: [B, n] bool.
        groups: B labels; conversations that share a persona have equal labels.

    Returns:
        [B, n].

    Raises:
        ValueError: Shapes that differ, ``valid`` not boolean, or not one label per conversation.
    """
    counted, totals, counts, group = _per_group(credit, valid, groups)
    others = counts[group] - valid
    mean = (totals[group] - counted) / np.maximum(others, 1)
    return np.where(others > 0, mean, mean_of_others(credit, valid, groups))


def mean_of_others(credit: Array, valid: Mask, groups: Sequence[Hashable]) -> Array:
    """Mean credit of turn t over the conversations of *other* groups, 0 if they have none. Unbiased, as above.

    Args:
        credit: [B, n].
        valid: [B, n] bool.
        groups: B labels.

    Returns:
        [B, n], equal within a group.

    Raises:
        ValueError: Shapes that differ, ``valid`` not boolean, or not one label per conversation.
    """
    _, totals, counts, group = _per_group(credit, valid, groups)
    others = counts.sum(0) - counts
    mean = np.where(others > 0, (totals.sum(0) - totals) / np.maximum(others, 1), 0.0)
    return np.asarray(mean[group], dtype=np.float64)


def batch_mean(credit: Array, valid: Mask) -> Array:
    """Mean credit of turn t over the batch, including the conversation itself.

        b_t = Σ_b valid_{b,t} · credit_{b,t} / N_t,   N_t = Σ_b valid_{b,t},   0 if N_t = 0

    Biased: the mean includes the conversation's own credit, which shrinks the expected gradient of turn t by a
    factor 1 − 1/N_t. With N_t fixed that is only a smaller step. If the policy decides when a conversation ends,
    N_t depends on its actions, late turns shrink more than early ones, and the *direction* is biased too;
    ``leave_one_out`` is not.

    Args:
        credit: [B, n].
        valid: [B, n] bool.

    Returns:
        [B, n], rows equal.

    Raises:
        ValueError: Shapes that differ, or ``valid`` not boolean.
    """
    _check(credit, valid)
    return np.broadcast_to(_mean(credit, valid), credit.shape).copy()


def group_mean(credit: Array, valid: Mask, groups: Sequence[Hashable]) -> Array:
    """Mean credit of turn t over the group, including the conversation itself: GRPO (2402.03300), per turn.

    Biased, as `batch_mean` is; N_t counts the group's conversations.

    Args:
        credit: [B, n].
        valid: [B, n] bool.
        groups: B labels; conversations that share a persona have equal labels.

    Returns:
        [B, n], equal within a group; 0 where no conversation of it is valid.

    Raises:
        ValueError: Shapes that differ, ``valid`` not boolean, or not one label per conversation.
    """
    _, totals, counts, group = _per_group(credit, valid, groups)
    return np.asarray((totals / np.maximum(counts, 1))[group], dtype=np.float64)


class MovingAverage:
    """Exponential moving average of the earlier batches' mean credit, per turn.

        b_t ← decay · b_t + (1 − decay) · mean_b credit_{b,t},   starting from the first mean seen

    Unbiased: a batch's baseline comes from earlier batches only. A turn that was never valid before has b = 0; a
    turn without a valid entry keeps its average. It lags behind an improving policy, which only costs variance.
    """

    def __init__(self, n: int, decay: float = 0.9) -> None:
        """Start without history.

        Args:
            n: Turns in a conversation.
            decay: Weight of the past, in [0, 1).

        Raises:
            ValueError: ``n`` < 1, or ``decay`` outside [0, 1).
        """
        if n < 1 or not 0.0 <= decay < 1.0:
            raise ValueError(f"expected n >= 1 and decay in [0, 1), got n = {n}, decay = {decay}")
        self.decay = decay
        self.mean: Array = np.zeros(n)
        self.seen: Mask = np.zeros(n, dtype=np.bool_)

    def __call__(self, credit: Array, valid: Mask) -> Array:
        """Return the baseline from *earlier* batches, then add this batch to the average.

        Args:
            credit: [B, n].
            valid: [B, n] bool.

        Returns:
            [B, n], rows equal.

        Raises:
            ValueError: Shapes that differ or have another number of turns, or ``valid`` not boolean.
        """
        _check(credit, valid)
        if credit.shape[1] != len(self.mean):
            raise ValueError(f"expected {len(self.mean)} turns as in earlier batches, got {credit.shape[1]}")
        baseline = np.broadcast_to(self.mean, credit.shape).copy()
        decay = np.where(self.seen, self.decay, 0.0)
        updated = decay * self.mean + (1.0 - decay) * _mean(credit, valid)
        self.mean = np.where(valid.any(0), updated, self.mean)
        self.seen = self.seen | valid.any(0)
        return baseline

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON types."""
        return {"decay": self.decay, "mean": self.mean.tolist(), "seen": self.seen.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Args:
            state: ``decay``, ``mean`` and ``seen``.

        Raises:
            ValueError: Missing or unknown keys, or another number of turns.
        """
        if set(state) != {"decay", "mean", "seen"}:
            raise ValueError(f"expected the keys decay, mean, seen, got {', '.join(sorted(state))}")
        n = len(self.mean)
        if len(state["mean"]) != n or len(state["seen"]) != n:
            raise ValueError(f"expected the state of {n} turns, got {len(state['mean'])}; use the run's own n")
        self.decay = float(state["decay"])
        self.mean = np.array(state["mean"], dtype=np.float64)
        self.seen = np.array(state["seen"], dtype=np.bool_)


def named(
    name: str | None, groups: Sequence[Hashable], average: MovingAverage
) -> Callable[[Array, Mask], Array] | None:
    """Return the baseline of a name as a function of credit and valid; None for none."""
    if name == "leave-one-out":
        return partial(leave_one_out, groups=groups)
    if name == "batch-mean":
        return batch_mean
    return average if name == "moving-average" else None


def standardise(adv: Array, valid: Mask, eps: float = 1e-8) -> Array:
    """Shift and scale the advantages of a batch: (A − mean) / (std + eps) over all valid turns, 0 elsewhere.

    Biased: mean and (biased) std include the turn's own credit, and the mean mixes turn indices. The scale of the
    gradient changes from batch to batch.

    Args:
        adv: A [B, n].
        valid: [B, n] bool.
        eps: Added to the standard deviation; in the unit of A.

    Returns:
        [B, n]; all 0 if the valid entries are equal or there are none.

    Raises:
        ValueError: Shapes that differ, or ``valid`` not boolean.
    """
    _check(adv, valid)
    if not valid.any():
        return np.zeros(adv.shape)
    entries = adv[valid]
    return np.where(valid, (adv - entries.mean()) / (entries.std() + eps), 0.0)


def _mean(credit: Array, valid: Mask) -> Array:
    """Return the mean over valid conversations per turn, [n]; 0 where there is none."""
    total = np.where(valid, credit, 0.0).sum(0)
    return np.asarray(total / np.maximum(valid.sum(0), 1), dtype=np.float64)


def _per_group(credit: Array, valid: Mask, groups: Sequence[Hashable]) -> tuple[Array, Array, Array, NDArray[np.intp]]:
    """Return the credit with 0 at invalid turns, its sums and counts per group [G, n], and each row's group [B]."""
    _check(credit, valid)
    if len(groups) != len(credit):
        raise ValueError(f"expected one group label for each of {len(credit)} conversations, got {len(groups)}")
    first: dict[Hashable, int] = {}
    group = np.array([first.setdefault(label, len(first)) for label in groups], dtype=np.intp)
    counted = np.where(valid, credit, 0.0)
    totals, counts = np.zeros((len(first), credit.shape[1])), np.zeros((len(first), credit.shape[1]))
    np.add.at(totals, group, counted)
    np.add.at(counts, group, valid)
    return counted, totals, counts, group


def _check(credit: Array, valid: Mask) -> None:
    if credit.ndim != 2 or valid.shape != credit.shape or valid.dtype != np.bool_:
        raise ValueError(
            f"expected credit [B, n] and boolean valid of the same shape, got {list(credit.shape)} and "
            f"{valid.dtype} {list(valid.shape)}"
        )
