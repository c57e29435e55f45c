"""Policy classes and credit: golden values, equalities, and errors that say where."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ppg_agents import credit as c

ONE_CONVERSATION = np.array([[1.0, 2.0, 4.0, 8.0]])
ALL_VALID = np.ones((1, 4), dtype=bool)


def test_masks_by_hand() -> None:
    assert c.full(3).astype(int).tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]
    assert c.greedy(3).astype(int).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert c.k_step(4, 2).astype(int).tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 1]]
    assert c.segment(3, [2, 1]).astype(int).tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (c.full(4), [15, 14, 12, 8]),
        (c.greedy(4), [1, 2, 4, 8]),
        (c.k_step(4, 3), [7, 14, 12, 8]),
        (c.segment(4, [1, 3]), [1, 14, 12, 8]),
        (c.custom([[True, False, True, False]] + [[False] * 4] * 3), [5, 0, 0, 0]),
    ],
)
def test_credit_by_hand(mask: c.Mask, expected: list[float]) -> None:
    assert c.credit(ONE_CONVERSATION, mask, ALL_VALID).tolist() == [expected]


def test_discount_is_per_turn_of_delay() -> None:
    got = c.credit(ONE_CONVERSATION, c.k_step(4, 3), ALL_VALID, discount=0.5)
    assert got.tolist() == [[1 + 1 + 1, 2 + 2 + 2, 4 + 4, 8]]
    assert c.credit(ONE_CONVERSATION, c.full(4), ALL_VALID, discount=0.0).tolist() == [[1, 2, 4, 8]]


def test_invalid_turns_contribute_nothing_and_get_nothing() -> None:
    rewards = np.array([[1.0, np.nan, 4.0, 8.0], [1.0, 2.0, np.inf, np.nan]])
    valid = np.array([[True, False, True, True], [True, True, False, False]])
    assert c.credit(rewards, c.full(4), valid).tolist() == [[13, 0, 12, 8], [3, 2, 0, 0]]


@given(st.integers(1, 9), st.integers(1, 12))
def test_equal_classes(n: int, k: int) -> None:
    np.testing.assert_array_equal(c.k_step(n, 1), c.greedy(n))
    np.testing.assert_array_equal(c.k_step(n, n + k - 1), c.full(n))
    np.testing.assert_array_equal(c.segment(n, [n]), c.full(n))
    np.testing.assert_array_equal(c.segment(n, [1] * n), c.greedy(n))
    np.testing.assert_array_equal(c.custom(c.k_step(n, k), n), c.k_step(n, k))


@given(st.data(), st.integers(1, 8), st.integers(1, 9), st.floats(0, 1))
def test_k_step_credit_of_unit_rewards_lies_in_zero_to_k(
    data: st.DataObject, n: int, k: int, discount: float
) -> None:
    rewards = data.draw(hnp.arrays(float, (3, n), elements=st.floats(0, 1)))
    valid = data.draw(hnp.arrays(bool, (3, n)))
    got = c.credit(rewards, c.k_step(n, k), valid, discount)
    assert (got >= 0).all()
    assert (got <= k + 1e-12).all()
    assert not got[~valid].any()


@pytest.mark.parametrize(
    ("matrix", "n", "message"),
    [
        ([[1, 1], [0, 1]], None, r"boolean mask, got 1 at row 0, column 0"),
        ([[True, True], [False, 1]], None, r"boolean mask, got 1 at row 1, column 1"),
        ([[True, True], [True]], None, r"2 columns, got 1 columns in row 1"),
        (np.eye(2), None, r"boolean mask, got dtype float64 at row 0, column 0"),
        (np.ones((2, 3), bool), None, r"square mask, got 2 rows of 3 columns"),
        (np.ones((0, 0), bool), None, r"square mask, got 0 rows of 0 columns"),
        ([True, False], None, r"shape \[n, n\], got shape \[2\]"),
        (np.eye(3, dtype=bool), 4, r"n = 4 turns, got 3 rows and columns"),
        (np.eye(3, dtype=bool)[::-1], None, r"got True at row 2, column 0 \(1 below"),
    ],
)
def test_a_wrong_mask_is_refused_with_its_place(matrix: object, n: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        c.custom(matrix, n)  # type: ignore[arg-type]


def test_custom_returns_a_copy() -> None:
    matrix = np.eye(2, dtype=bool)
    c.custom(matrix)[0, 1] = True
    assert not matrix[0, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: c.k_step(4, 0), r"k to be an integer >= 1, got 0"),
        (lambda: c.k_step(4, True), r"k to be an integer >= 1, got True"),
        (lambda: c.full(0), r"n to be an integer >= 1, got 0"),
        (lambda: c.segment(4, [2, 1]), r"n = 4 turns, got \[2, 1\] = 3"),
        (lambda: c.segment(4, [4, 0]), r"lengths\[1\] to be an integer >= 1, got 0"),
        (lambda: c.policy_class("gredy", 4), r"got 'gredy'; did you mean 'greedy'"),
        (lambda: c.policy_class("k-step", 4), r"expected lookahead for policy class 'k-step', got none"),
        (lambda: c.policy_class("segment", 4), r"expected segments for policy class 'segment', got none"),
        (lambda: c.policy_class("full", 4, lookahead=2), r"no lookahead for policy class 'full', got 2"),
        (lambda: c.policy_class("k-step", 4, 2, [4]), r"no segments for policy class 'k-step', got \[4\]"),
    ],
)
def test_a_wrong_policy_class_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_policy_class_by_name() -> None:
    np.testing.assert_array_equal(c.policy_class("full", 4), c.full(4))
    np.testing.assert_array_equal(c.policy_class("greedy", 4), c.greedy(4))
    np.testing.assert_array_equal(c.policy_class("k-step", 4, lookahead=3), c.k_step(4, 3))
    np.testing.assert_array_equal(c.policy_class("segment", 4, segments=(1, 3)), c.segment(4, (1, 3)))


def test_credit_refuses_what_does_not_fit() -> None:
    valid = np.ones((2, 4), dtype=bool)
    rewards = np.zeros((2, 4))
    rewards[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"finite reward at every valid turn, got nan at \[1, 2\]"):
        c.credit(rewards, c.full(4), valid)
    for arguments, message in [
        ((rewards[0], c.full(4), valid), r"rewards of shape \[B, n\], got \[4\]"),
        ((rewards, c.full(4), valid[:1]), r"boolean valid of shape \[2, 4\], got bool \[1, 4\]"),
        ((rewards, c.full(4), valid.astype(int)), r"boolean valid of shape \[2, 4\], got int"),
        ((np.zeros((2, 4)), c.full(3), valid), r"n = 4 turns, got 3 rows"),
        ((np.zeros((2, 4)), c.full(4), valid, 1.5), r"discount in \[0, 1\], got 1.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            c.credit(*arguments)  # type: ignore[arg-type]
