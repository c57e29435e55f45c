"""Policy classes as mask matrices, and the credit of every action as one matrix product.

The partial policy gradient (arXiv 2603.06138) chooses for every action t a set of reward indices
R_t ⊆ {t, …, n}. A policy class therefore *is* a boolean matrix M[t, ℓ] = (ℓ ∈ R_t), and

    credit[b, t] = Σ_ℓ M[t, ℓ] · discount^(ℓ−t) · r[b, ℓ].

[P] marks what the paper states, "own" what this project defines. Numpy only: nothing here may know a
token, a model or a config.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Mask = NDArray[np.bool_]

POLICY_CLASSES = ("full", "greedy", "k-step", "segment")


def full(n: int) -> Mask:
    """Full planning [P]: R_t = {t, …, n}, the reward-to-go of REINFORCE.

    Args:
        n: Turns in a conversation.

    Returns:
        Mask [n, n].

    Raises:
        ValueError: ``n`` is not a positive integer.
    """
    return k_step(n, n)


def greedy(n: int) -> Mask:
    """Greedy [P]: R_t = {t}, one bandit problem per turn.

    Args:
        n: Turns in a conversation.

    Returns:
        Mask [n, n].

    Raises:
        ValueError: ``n`` is not a positive integer.
    """
    return k_step(n, 1)


def k_step(n: int, k: int) -> Mask:
    """K-step lookahead [P]: R_t = {t, …, min(t+K−1, n)}; K = 1 is greedy, K ≥ n is full planning.

    Args:
        n: Turns in a conversation.
        k: Rewards that count for an action, its own included.

    Returns:
        Mask [n, n].

    Raises:
        ValueError: ``n`` or ``k`` is not a positive integer.
    """
    _positive("n", n)
    _positive("k", k)
    steps = _steps(n)
    return (steps >= 0) & (steps < k)


def segment(n: int, lengths: Sequence[int]) -> Mask:
    """Segments (class [P], definition own): R_t = {ℓ ≥ t : ℓ in the same segment as t}.

    Args:
        n: Turns in a conversation.
        lengths: Turns in each segment, in order.

    Returns:
        Mask [n, n].

    Raises:
        ValueError: A length is not a positive integer, or the lengths do not sum to ``n``.
    """
    _positive("n", n)
    for i, length in enumerate(lengths):
        _positive(f"lengths[{i}]", length)
    if sum(lengths) != n:
        raise ValueError(
            f"expected segment lengths that sum to n = {n} turns, got {list(lengths)} = {sum(lengths)}; "
            "change the segments or the number of turns"
        )
    member = np.repeat(np.arange(len(lengths)), lengths)
    same: Mask = member[:, None] == member[None, :]
    return (_steps(n) >= 0) & same


def custom(matrix: ArrayLike, n: int | None = None) -> Mask:
    """Return any policy class (own), validated: boolean, square, upper triangular, of the right size.

    Args:
        matrix: M [n, n], M[t, ℓ] true when reward ℓ counts for action t.
        n: Turns expected; None takes the matrix's own size.

    Returns:
        A copy of the mask, [n, n].

    Raises:
        ValueError: The matrix is no policy class; the message says at which row and column.
    """
    if not isinstance(matrix, np.ndarray):
        _locate(matrix)
    mask = np.array(matrix)
    if mask.ndim != 2:
        raise ValueError(
            f"expected a mask of shape [n, n], got shape {list(mask.shape)}; pass one row per turn"
        )
    if mask.dtype != np.bool_:
        raise ValueError(
            f"expected a boolean mask, got dtype {mask.dtype} at row 0, column 0; use matrix.astype(bool)"
        )
    rows, columns = mask.shape
    if rows != columns or rows == 0:
        raise ValueError(
            f"expected a square mask, got {rows} rows of {columns} columns; pass one of each per turn"
        )
    if n is not None and rows != n:
        raise ValueError(
            f"expected a mask for n = {n} turns, got {rows} rows and columns; pass shape [{n}, {n}]"
        )
    below = np.argwhere(np.tril(mask, -1))
    if len(below):
        t, ell = below[0]
        raise ValueError(
            f"expected an upper triangular mask, got True at row {t}, column {ell} ({len(below)} below the "
            "diagonal): an action cannot be credited with an earlier reward; use numpy.triu(matrix)"
        )
    return mask


def policy_class(
    name: str, n: int, lookahead: int | None = None, segments: Sequence[int] | None = None
) -> Mask:
    """Return the policy class with this name.

    Args:
        name: One of ``POLICY_CLASSES``.
        n: Turns in a conversation.
        lookahead: K of ``k-step``; None for every other class.
        segments: Lengths of ``segment``; None for every other class.

    Returns:
        Mask [n, n].

    Raises:
        ValueError: An unknown name, or an argument that is missing, invalid or not taken by the class.
    """
    if name not in POLICY_CLASSES:
        nearest = difflib.get_close_matches(name, POLICY_CLASSES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"expected a policy class out of {', '.join(POLICY_CLASSES)}, got {name!r}; "
            f"did you mean {nearest!r}?"
        )
    for argument, value, taker in (("lookahead", lookahead, "k-step"), ("segments", segments, "segment")):
        if value is None and name == taker:
            raise ValueError(f"expected {argument} for policy class {taker!r}, got none; give {argument}")
        if value is not None and name != taker:
            raise ValueError(
                f"expected no {argument} for policy class {name!r}, got {value!r}; "
                f"leave it out or use {taker!r}"
            )
    if lookahead is not None:
        return k_step(n, lookahead)
    if segments is not None:
        return segment(n, segments)
    return full(n) if name == "full" else greedy(n)


def credit(
    rewards: NDArray[np.floating[Any]], mask: Mask, valid: Mask, discount: float = 1.0
) -> NDArray[np.float64]:
    """Return the credit of every action, Σ_{ℓ ∈ R_t} r_ℓ [P]; discount and validity are own.

    credit = ((rewards · valid) @ (mask · discount^(ℓ−t))ᵀ) · valid. With rewards in [0, 1], the credit of
    an action in K-step lookahead lies in [0, K].

    Args:
        rewards: r [B, n], the judge's score of every turn. Whatever stands at an invalid turn, NaN
            included, contributes nothing.
        mask: A policy class [n, n].
        valid: [B, n], true where the turn was played and judged. A conversation that is shorter than n
            is false after its end.
        discount: γ in [0, 1], per turn.

    Returns:
        Credit [B, n], in the reward's unit, 0 at invalid turns.

    Raises:
        ValueError: Shapes that do not fit, a mask that is no policy class, a discount outside [0, 1], or a
            reward at a valid turn that is not finite.
    """
    rewards, valid = np.asarray(rewards, dtype=np.float64), np.asarray(valid)
    if rewards.ndim != 2:
        raise ValueError(f"expected rewards of shape [B, n], got {list(rewards.shape)}; add the batch axis")
    if valid.shape != rewards.shape or valid.dtype != np.bool_:
        raise ValueError(
            f"expected boolean valid of shape {list(rewards.shape)}, got {valid.dtype} {list(valid.shape)}"
        )
    if not 0.0 <= discount <= 1.0:
        raise ValueError(f"expected a discount in [0, 1], got {discount}")
    broken = np.argwhere(valid & ~np.isfinite(rewards))
    if len(broken):
        b, t = broken[0]
        raise ValueError(
            f"expected a finite reward at every valid turn, got {rewards[b, t]} at [{b}, {t}] (conversation, "
            f"turn; {len(broken)} in all); set valid to False where the judge gave no score"
        )
    n = rewards.shape[1]
    weights = custom(mask, n) * discount ** np.maximum(_steps(n), 0)
    return np.asarray(np.where(valid, rewards, 0.0) @ weights.T * valid, dtype=np.float64)


def _steps(n: int) -> NDArray[np.int64]:
    """Return ℓ − t for every action t (row) and reward ℓ (column)."""
    turn = np.arange(n)
    return turn[None, :] - turn[:, None]


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"expected {name} to be an integer >= 1, got {value!r}")


def _locate(matrix: Any) -> None:
    """Raise where nested sequences are ragged or hold something that is not a boolean."""
    rows = [list(row) for row in matrix] if all(np.iterable(row) for row in matrix) else []
    for t, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(f"expected rows of {len(rows[0])} columns, got {len(row)} columns in row {t}")
        for ell, entry in enumerate(row):
            if not isinstance(entry, bool | np.bool_):
                raise ValueError(f"expected a boolean mask, got {entry!r} at row {t}, column {ell}")
