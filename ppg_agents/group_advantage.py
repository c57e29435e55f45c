"""The paper's advantage, eq. (9) of arXiv 2603.06138 [P]: partial sums standardised over their group.

    A_{b,t} = (c_{b,t} − μ_G) / σ_G,      c_{b,t} = Σ_{ℓ ∈ R_t} r_{b,ℓ}

G are the conversations with the same persona and topic as b; μ_G and σ_G are the mean and the standard deviation of
their partial sums c_{j,t}, **jointly over all j in G and all turns t**.

A partial sum has the fewer terms the later its turn. So under full planning (and in the last K − 1 turns of K-step
lookahead) early replies get positive and late ones negative advantages, whatever was said: with a reward of 1 in each
of n turns, A_t = ((n + 1)/2 − t) / √((n² − 1)/12). Standardised per turn index (own) they all get 0.

Own, where the paper is silent: the standard deviation divides by the number of sums, not by one less; nothing is added
to it; a group whose sums are all equal gets 0; a turn without a score is in no mean. A conversation is in its own
mean, so the expected gradient is not that of the policy class; and with statistics per turn index the bias of
`baselines.batch_mean` applies too.

Numpy only; nothing here may know a token or a model.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

EQUAL = 1e-8
"""Partial sums with a smaller standard deviation, in the reward's unit, count as equal (own)."""
PER_TURN: Mapping[str, bool] = {"group": False, "group-turn": True}
"""The names of the two forms as settings, and whether the statistics are taken per turn index."""


class GroupAdvantage:
    """μ_G and σ_G of every group, taken once; the advantage of any of its conversations."""

    def __init__(self, credit: Array, valid: Flags, groups: Sequence[Hashable], *, per_turn: bool) -> None:
        """Take the statistics.

        Args:
            credit: Partial sums c [B, n], in the reward's unit.
            valid: [B, n], played and judged.
            groups: B labels; conversations with the same persona and topic have equal labels.
            per_turn: Take them for every turn index alone (own), not jointly over all turns (the paper).

        Raises:
            ValueError: Shapes that differ, or not one label per conversation.
        """
        _check(credit, valid, groups)
        self._per_turn, self._n = per_turn, credit.shape[1]
        rows: dict[Hashable, list[int]] = {}
        for b, label in enumerate(groups):
            rows.setdefault(label, []).append(b)
        self._spread = {label: self._measure(credit[own], valid[own]) for label, own in rows.items()}

    def _measure(self, credit: Array, valid: Flags) -> tuple[Array, Array]:
        """Return μ and σ of one group, [n] each; σ is infinite where the sums are equal, which makes A zero."""
        axis = 0 if self._per_turn else None
        count = np.maximum(valid.sum(axis), 1)
        mean = np.where(valid, credit, 0.0).sum(axis) / count
        std = np.sqrt(np.square(np.where(valid, credit - mean, 0.0)).sum(axis) / count)
        std = np.where(std > EQUAL, std, np.inf)
        return np.broadcast_to(mean, self._n), np.broadcast_to(std, self._n)

    def __call__(self, credit: Array, valid: Flags, groups: Sequence[Hashable]) -> Array:
        """Return A [B, n] of conversations of known groups; 0 at invalid turns.

        Raises:
            ValueError: As above, more turns than the statistics have, or a group that they do not have.
        """
        _check(credit, valid, groups)
        if credit.shape[1] > self._n:
            raise ValueError(f"expected at most {self._n} turns, as in the training set, got {credit.shape[1]}")
        unknown = next((label for label in groups if label not in self._spread), None)
        if unknown is not None:
            raise ValueError(f"expected conversations of the training set, got another group: {str(unknown)[:60]!r}")
        mean, std = (
            np.array([self._spread[label][which][: credit.shape[1]] for label in groups]).reshape(credit.shape)
            for which in (0, 1)
        )
        return np.where(valid, (np.where(valid, credit, 0.0) - mean) / std, 0.0)


def _check(credit: Array, valid: Flags, groups: Sequence[Hashable]) -> None:
    if credit.ndim != 2 or valid.shape != credit.shape or len(groups) != len(credit):
        raise ValueError(
            f"expected credit [B, n], valid of the same shape and B labels, got {list(credit.shape)}, "
            f"{list(valid.shape)} and {len(groups)}"
        )
