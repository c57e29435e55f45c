"""Lemma 1: rewards are non-negative and sum to the terminal reward, unless the running maximum is chosen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ppg_agents.credit import decompose


def test_by_hand() -> None:
    assert decompose(np.array([[0.0, 0.25, 0.25, 1.0]])).tolist() == [[0.25, 0.0, 0.75]]


@given(hnp.arrays(float, (3, 6), elements=st.floats(0, 1)))
def test_lemma(steps: np.ndarray) -> None:
    f = np.concatenate([np.zeros((3, 1)), steps.cumsum(1)], axis=1)
    rewards = decompose(f)
    assert (rewards >= 0).all()
    np.testing.assert_allclose(rewards.sum(1), f[:, -1], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(decompose(f, "running_max"), rewards)


def test_running_maximum_changes_the_terminal_value() -> None:
    f = np.array([[0.0, 0.75, 0.25, 0.5]])
    rewards = decompose(f, "running_max")
    assert rewards.tolist() == [[0.75, 0.0, 0.0]]
    assert rewards.sum() == f.max()
    assert rewards.sum() != f[0, -1]


@pytest.mark.parametrize(
    ("f", "monotone", "message"),
    [
        ([[0, 1, 1], [0, 0.5, 0.25]], "raise", r"got 0.5 then 0.25 at \[1, 2\]"),
        ([[0, 1, 1], [0.5, 0.5, 1]], "running_max", r"f = 0 before the first turn, got 0.5 at \[1, 0\]"),
        ([[0, np.inf, 1]], "running_max", r"finite f, got inf at \[0, 1\]"),
        ([0, 1], "raise", r"shape \[B, n\+1\] with n >= 1 turns, got \[2\]"),
        ([[0]], "raise", r"shape \[B, n\+1\]"),
        ([[0, 1]], "clip", r"'raise' or 'running_max', got 'clip'"),
    ],
)
def test_refusals(f: list[list[float]], monotone: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decompose(np.array(f, dtype=float), monotone)  # type: ignore[arg-type]
