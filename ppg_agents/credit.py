"""Policy classes as matrices, and the credit of every action as one matrix product.

The partial policy gradient (arXiv 2603.06138) chooses for every action t a set of reward indices
R_t ⊆ {t, …, n}. A policy class therefore *is* a boolean matrix M[t, ℓ] = (ℓ ∈ R_t), and

    credit[b, t] = Σ_ℓ M[t, ℓ] · discount^(ℓ−t) · r[b, ℓ].

Nothing in the product needs M to be boolean: any finite upper triangular matrix weighs the rewards.

[P] marks what the paper states, "own" what this project defines. Numpy only: nothing here may know a token, a model
or a config.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ppg_agents.nearest import nearest

Mask = NDArray[np.bool_] | NDArray[np.float64]
"""A policy class [n, n]: M[t, ℓ] is whether, or with what weight, reward ℓ counts for action t."""

_EXAMPLES = {"full": "full", "greedy": "greedy", "k-step": "k-step 3", "segment": "segment 3,3,2", "auto": "auto"}
_EXPECTED = "full, greedy, k-step 3, segment 3,3,2, a matrix or module:function (for a run also auto)"
_FUNCTION = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")


# The paper's classes, for conversations of n turns: boolean [n, n], or a ValueError that names the wrong argument.


def full(n: int) -> NDArray[np.bool_]:
    """Full planning [P]: R_t = {t, …, n}, the reward-to-go of REINFORCE."""
    return k_step(n, n)


def greedy(n: int) -> NDArray[np.bool_]:
    """Greedy [P]: R_t = {t}, one bandit problem per turn."""
    return k_step(n, 1)


def k_step(n: int, k: int) -> NDArray[np.bool_]:
    """K-step lookahead [P]: R_t = {t, …, min(t+K−1, n)}; K = 1 is greedy, K ≥ n is full planning."""
    _positive("n", n)
    _positive("k", k)
    steps = _steps(n)
    return (steps >= 0) & (steps < k)


def segment(n: int, lengths: Sequence[int]) -> NDArray[np.bool_]:
    """Segments [P, appendix A.5]: R_t = {ℓ ≥ t : ℓ in the same segment as t}; lengths in turns, in order."""
    _positive("n", n)
    for i, length in enumerate(lengths):
        _positive(f"lengths[{i}]", length)
    if sum(lengths) != n:
        raise ValueError(
            f"expected segment lengths that sum to n = {n} turns, got {list(lengths)} = {sum(lengths)}; "
            "change the segments or the number of turns"
        )
    member = np.repeat(np.arange(len(lengths)), lengths)
    same: NDArray[np.bool_] = member[:, None] == member[None, :]
    return (_steps(n) >= 0) & same


@dataclass(frozen=True)
class PolicyClass:
    """Which rewards count for an action, for conversations of any length.

    Attributes:
        name: ``full``, ``greedy``, ``k-step``, ``segment``, ``custom`` (a matrix), or ``module:function``, a function
            n -> M [n, n] that is imported when the first mask is asked for.
        lookahead: K of ``k-step``.
        segments: Lengths of ``segment``.
        matrix: M of ``custom``, row by row.

    Raises:
        ValueError: An unknown name, an argument that is missing or belongs to another name, or an invalid matrix.
    """

    name: str = "full"
    lookahead: int | None = None
    segments: tuple[int, ...] | None = None
    matrix: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.name not in ("full", "greedy", "k-step", "segment", "custom") and not _FUNCTION.fullmatch(self.name):
            raise ValueError(f"expected {_EXPECTED}, got {self.name!r}{_near(self.name)}")
        for argument, owner in (("lookahead", "k-step"), ("segments", "segment"), ("matrix", "custom")):
            value = getattr(self, argument)
            if value is None and self.name == owner:
                raise ValueError(f"{owner} needs {argument}; write {_EXAMPLES.get(owner, '[[1, 0.5], [0, 1]]')!r}")
            if value is not None and self.name != owner:
                raise ValueError(f"{argument} belongs to {owner}, got {self.name!r} and {argument} {value!r}; drop one")
        if self.lookahead is not None:
            _positive("lookahead", self.lookahead)
        if self.segments is not None:
            _positive("the number of segments", len(self.segments))
            for i, length in enumerate(self.segments):
                _positive(f"segments[{i}]", length)
        if self.matrix is not None:
            checked = tuple(map(tuple, _checked(self.matrix).tolist()))
            object.__setattr__(self, "matrix", checked)

    @classmethod
    def parse(cls, value: object) -> PolicyClass:
        """Read a policy class as settings, flags and Python write it.

        Args:
            value: ``full``, ``greedy``, ``k-step 3`` (also ``3-step``, ``3``), ``segment 3,3,2`` (also
                ``segment:3,3,2``), ``module:function``, a matrix [n, n] (rows of numbers, an array, or such a list as
                text), or a policy class.

        Raises:
            ValueError: Anything else; for a matrix, the message names the row and column.
        """
        if isinstance(value, PolicyClass):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, list | tuple | np.ndarray):
            return cls("custom", matrix=value)  # type: ignore[arg-type]  # __post_init__ checks it and makes tuples
        if not isinstance(value, str):
            raise ValueError(f"expected {_EXPECTED}, got {value!r}")
        text = value.strip()
        if text.startswith("["):
            try:
                return cls("custom", matrix=json.loads(text))
            except json.JSONDecodeError as error:
                raise ValueError(f"expected a matrix such as [[1, 0.5], [0, 1]], got {text!r}: {error}") from error
        if match := re.fullmatch(r"(?:k-step[ :]\s*)(-?\d+)|(-?\d+)(?:-step)?", text):
            k = int(match[1] or match[2])
            return cls("greedy") if match[2] and k == 1 else cls("k-step", lookahead=k)
        if match := re.fullmatch(r"segment[ :]\s*(-?\d+(?:\s*,\s*-?\d+)*)", text):
            return cls("segment", segments=tuple(map(int, match[1].split(","))))
        if ":" in text and text.partition(":")[0] in _EXAMPLES:  # segment:x is no function x of a module segment
            raise ValueError(f"expected {_EXPECTED}, got {value!r}{_near(text)}")
        return cls(text)

    def __str__(self) -> str:
        return self.label

    @property
    def label(self) -> str:
        """The class in words, for titles and names: ``full``, ``3-step``, ``segment 3,3,2``, ``custom 8x8``."""
        if self.lookahead is not None:
            return f"{self.lookahead}-step"
        if self.matrix is not None:
            return f"custom {len(self.matrix)}x{len(self.matrix)}"
        return str(self.spec)

    @property
    def spec(self) -> str | list[list[float]]:
        """The class as `parse` reads it, for TOML and JSON: text, or the matrix as lists."""
        if self.matrix is not None:
            return [list(row) for row in self.matrix]
        if self.segments is not None:
            return "segment " + ",".join(map(str, self.segments))
        return self.name if self.lookahead is None else f"k-step {self.lookahead}"

    @property
    def turns(self) -> int | None:
        """The number of turns it is made for, None if it fits any."""
        if self.segments is not None:
            return sum(self.segments)
        return None if self.matrix is None else len(self.matrix)

    def steps(self, n: int) -> int | None:
        """Return its K in conversations of n turns: 1 for greedy, n for full; None for other classes."""
        return {"full": n, "greedy": 1}.get(self.name, self.lookahead)

    def mask(self, n: int) -> Mask:
        """Return M for conversations of n turns.

        Returns:
            [n, n], boolean where every entry is 0 or 1.

        Raises:
            ValueError: It is made for another number of turns, or its function cannot be imported, fails or returns
                no policy class; the message names the row and column.
        """
        k = self.steps(n)
        if k is not None:
            return k_step(n, k)
        if self.segments is not None:
            return segment(n, self.segments)
        if self.matrix is not None:
            return _checked(self.matrix, n)
        function = self._function()
        try:
            matrix = function(n)
        except Exception as error:  # the user's code may raise anything; say whose it is
            raise ValueError(f"{self.name}: expected a matrix for n = {n} turns, got {_words(error)}") from error
        try:
            return _checked(matrix, n)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def check(self, n: int | None) -> None:
        """Raise unless it fits conversations of n turns; None if their length is open.

        Raises:
            ValueError: As `mask`.
        """
        if n is None and ":" in self.name:
            self._function()
        elif n is not None and (self.turns or ":" in self.name):
            self.mask(n)

    def _function(self) -> Any:
        try:
            function = EntryPoint(self.name, self.name, "").load()
        except (ImportError, AttributeError) as error:
            todo = "fix the name, or put its folder on PYTHONPATH"
            raise ValueError(f"expected a function at {self.name!r}, got {_words(error)}; {todo}") from error
        if not callable(function):
            raise ValueError(f"expected a function n -> matrix at {self.name!r}, got {function!r}")
        return function


def credit(
    rewards: NDArray[np.floating[Any]], mask: Mask, valid: NDArray[np.bool_], discount: float = 1.0
) -> NDArray[np.float64]:
    """Return the credit of every action, Σ_{ℓ ∈ R_t} r_ℓ [P]; discount and validity are own.

    credit = ((rewards · valid) @ (mask · discount^(ℓ−t))ᵀ) · valid. With rewards in [0, 1], the credit of
    an action in K-step lookahead lies in [0, K].

    Args:
        rewards: r [B, n], the judge's score of every turn; values at invalid turns, NaN included, do not count.
        mask: A policy class [n, n]: boolean, or finite weights; 0 below the diagonal.
        valid: [B, n], true where the turn was played and judged; false after the end of a shorter conversation.
        discount: γ in [0, 1], per turn.

    Returns:
        Credit [B, n], in the reward's unit, 0 at invalid turns.

    Raises:
        ValueError: Shapes that do not fit, an invalid mask, a discount outside [0, 1], or a reward at a valid turn
            that is not finite.
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
    weights = _checked(mask, n) * discount ** np.maximum(_steps(n), 0)
    return np.asarray(np.where(valid, rewards, 0.0) @ weights.T * valid, dtype=np.float64)


def decompose(f: NDArray[np.floating[Any]], monotone: Literal["raise", "running_max"] = "raise") -> NDArray[np.float64]:
    """Split a terminal reward into rewards per turn [P, Lemma 1].

        r_t = f(x, τ_t) − f(x, τ_{t−1}),   for any f with 0 = f(x, τ_0) ≤ … ≤ f(x, τ_n) = r(x, τ_n)

    so that r_t ≥ 0 and Σ_t r_t = r(x, τ_n).

    An f that decreases somewhere violates the lemma. ``running_max`` puts max_{s ≤ t} f(x, τ_s) in its place, as the
    paper does, which calls it no loss of generality. Then r_t ≥ 0 again, but **the terminal value changes**:
    Σ_t r_t = max_t f(x, τ_t) ≥ r(x, τ_n), so a conversation that ends badly after a good middle is rewarded for its
    middle. So it is not the default.

    Args:
        f: [B, n+1], the score of every prefix τ_0 … τ_n, finite, f[:, 0] = 0.
        monotone: What to do with an f that decreases.

    Returns:
        Rewards [B, n], ≥ 0, in the unit of f; ``rewards[b, t]`` is that of turn t+1 in the formula.

    Raises:
        ValueError: A shape without turns, an f that is not finite or does not start at 0, an unknown
            ``monotone``, or a decrease under ``"raise"``; the message names [b, t].
    """
    f = np.asarray(f, dtype=np.float64)
    if f.ndim != 2 or f.shape[1] < 2:
        raise ValueError(f"expected f of shape [B, n+1] with n >= 1 turns, got {list(f.shape)}")
    if monotone not in ("raise", "running_max"):
        raise ValueError(f"expected monotone to be 'raise' or 'running_max', got {monotone!r}")
    broken = np.argwhere(~np.isfinite(f))
    if len(broken):
        b, t = broken[0]
        raise ValueError(f"expected finite f, got {f[b, t]} at [{b}, {t}] (conversation, prefix)")
    if f[:, 0].any():
        b = np.flatnonzero(f[:, 0])[0]
        raise ValueError(f"expected f = 0 before the first turn, got {f[b, 0]} at [{b}, 0]; subtract it")
    if monotone == "running_max":
        f = np.maximum.accumulate(f, axis=1)
    rewards = np.diff(f, axis=1)
    if (rewards < 0).any():
        b, t = np.argwhere(rewards < 0)[0]
        raise ValueError(
            f"expected f that never decreases, got {f[b, t]} then {f[b, t + 1]} at [{b}, {t + 1}] "
            "(conversation, prefix); use another f, or monotone='running_max', which changes the final value"
        )
    return rewards


def _steps(n: int) -> NDArray[np.int64]:
    """Return ℓ − t for every action t (row) and reward ℓ (column)."""
    turn = np.arange(n)
    return turn[None, :] - turn[:, None]


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"expected {name} to be an integer >= 1, got {value!r}")


def _checked(matrix: Any, n: int | None = None) -> Mask:
    """Return a copy of a policy class: boolean where every entry is 0 or 1, else float64.

    Args:
        matrix: M [n, n], an array or rows of numbers.
        n: Turns expected; None takes the matrix's own size.

    Raises:
        ValueError: It is no policy class; the message names the row and column, counted from 0.
    """
    if not isinstance(matrix, np.ndarray):
        _locate(matrix)
    weights = np.asarray(matrix)
    if weights.ndim != 2:
        raise ValueError(f"expected a matrix [n, n], got shape {list(weights.shape)}; pass one row per turn")
    rows, columns = weights.shape
    if rows != columns or rows == 0:
        raise ValueError(f"expected a square matrix, got {rows} rows of {columns} columns; pass one of each per turn")
    if weights.dtype.kind not in "biuf":
        raise ValueError(f"expected a matrix of booleans or real numbers, got dtype {weights.dtype}")
    if n is not None and rows != n:
        raise ValueError(f"expected a matrix for n = {n} turns, got {rows} rows and columns; pass shape [{n}, {n}]")
    broken = np.argwhere(~np.isfinite(weights))
    if len(broken):
        t, ell = broken[0]
        raise ValueError(f"expected finite weights, got {weights[t, ell]} at row {t}, column {ell}")
    below = np.argwhere(np.tril(weights, -1))
    if len(below):
        t, ell = below[0]
        raise ValueError(
            f"expected an upper triangular matrix, got {weights[t, ell]} at row {t}, column {ell} ({len(below)} below "
            "the diagonal): an action cannot be credited with an earlier reward; use numpy.triu(matrix)"
        )
    boolean = ((weights == 0) | (weights == 1)).all()
    return weights.astype(np.bool_) if boolean else weights.astype(np.float64)


def _locate(matrix: Any) -> None:
    """Raise for ragged rows or entries that are not numbers, which numpy would not point to."""
    rows = [list(row) for row in matrix] if np.iterable(matrix) and all(np.iterable(row) for row in matrix) else []
    for t, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(f"expected rows of {len(rows[0])} columns, got {len(row)} columns in row {t}")
        for ell, entry in enumerate(row):
            if not isinstance(entry, bool | np.bool_ | int | np.integer | float | np.floating):
                raise ValueError(f"expected a number or a boolean, got {entry!r} at row {t}, column {ell}")


def _near(text: str) -> str:
    meant = _EXAMPLES.get(nearest(re.split("[ :]", text)[0].replace("_", "-"), _EXAMPLES) or "", text)
    return "" if meant == text else f"; did you mean {meant!r}?"


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
