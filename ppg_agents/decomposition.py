"""Rewards per turn from a score of the conversation so far: Lemma 1 of arXiv 2603.06138.

Numpy only; nothing here may call a judge.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


def decompose(
    f: NDArray[np.floating[Any]], monotone: Literal["raise", "running_max"] = "raise"
) -> NDArray[np.float64]:
    """Split a terminal reward into rewards per turn [P, Lemma 1].

        r_t = f(x, τ_t) − f(x, τ_{t−1}),   for any f with 0 = f(x, τ_0) ≤ … ≤ f(x, τ_n) = r(x, τ_n)

    so that r_t ≥ 0 and Σ_t r_t = r(x, τ_n).

    An f that decreases somewhere violates the lemma. ``running_max`` puts max_{s ≤ t} f(x, τ_s) in its place
    (own choice). Then r_t ≥ 0 again, but **the terminal value is another one**: Σ_t r_t = max_t f(x, τ_t) ≥
    r(x, τ_n), so a conversation that ends badly after a good middle is rewarded for its middle. It is
    therefore never the default.

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
