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
        (c.PolicyClass.parse([[1, 0, 1, 0]] + [[0] * 4] * 3).mask(4), [5, 0, 0, 0]),
        (np.diag([1, 0.5, -1, 0]) + np.eye(4, k=1) / 4, [1.5, 2, -2, 0]),
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


@given(st.data(), st.integers(1, 8), st.integers(1, 9), st.floats(0, 1))
def test_k_step_credit_of_unit_rewards_lies_in_zero_to_k(data: st.DataObject, n: int, k: int, discount: float) -> None:
    rewards = data.draw(hnp.arrays(float, (3, n), elements=st.floats(0, 1)))
    valid = data.draw(hnp.arrays(bool, (3, n)))
    got = c.credit(rewards, c.k_step(n, k), valid, discount)
    assert (got >= 0).all()
    assert (got <= k + 1e-12).all()
    assert not got[~valid].any()


@given(st.integers(1, 6), st.floats(0, 1), st.data())
def test_weights_that_discount_give_the_credit_of_the_discount_to_the_last_bit(
    n: int, discount: float, data: st.DataObject
) -> None:
    rewards = data.draw(hnp.arrays(float, (3, n), elements=st.floats(-1, 1)))
    valid = data.draw(hnp.arrays(bool, (3, n)))
    weights = np.triu(discount ** np.maximum(np.arange(n) - np.arange(n)[:, None], 0))
    for matrix, whole in ((weights, discount), (np.triu(np.ones((n, n))), 1.0)):
        got = c.credit(rewards, c.PolicyClass.parse(matrix).mask(n), valid)
        assert got.tobytes() == c.credit(rewards, c.full(n), valid, whole).tobytes()


@pytest.mark.parametrize(
    ("matrix", "n", "message"),
    [
        ([[1, "x"], [0, 1]], 2, r"a number or a boolean, got 'x' at row 0, column 1"),
        ([[1, 1], [0, None]], 2, r"a number or a boolean, got None at row 1, column 1"),
        ([[True, True], [True]], 2, r"2 columns, got 1 columns in row 1"),
        (np.eye(2) * 1j, 2, r"booleans or real numbers, got dtype complex128"),
        (np.ones((2, 3), bool), 2, r"square matrix, got 2 rows of 3 columns"),
        (np.ones((0, 0), bool), 0, r"square matrix, got 0 rows of 0 columns"),
        ([True, False], 2, r"matrix \[n, n\], got shape \[2\]"),
        (np.eye(3, dtype=bool), 4, r"n = 4 turns, got 3 rows and columns"),
        (np.eye(3, dtype=bool)[::-1], 3, r"got True at row 2, column 0 \(1 below"),
        ([[1, 1], [-0.5, 1]], 2, r"got -0.5 at row 1, column 0 \(1 below"),
        ([[1, np.nan], [0, 1]], 2, r"finite weights, got nan at row 0, column 1"),
        ([[1, 0], [-np.inf, 1]], 2, r"finite weights, got -inf at row 1, column 0"),
    ],
)
def test_a_wrong_matrix_is_refused_with_its_place(matrix: object, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        c.PolicyClass.parse(matrix).mask(n)
    if isinstance(matrix, np.ndarray):
        with pytest.raises(ValueError, match=message):
            c.credit(np.zeros((1, n)), matrix, np.ones((1, n), dtype=bool))


def test_a_matrix_of_zeros_and_ones_is_boolean_and_a_copy() -> None:
    matrix = np.eye(2)
    mask = c.PolicyClass.parse(matrix).mask(2)
    assert mask.dtype == np.bool_
    mask[0, 1] = True
    matrix[0, 1] = 0.5
    assert c.PolicyClass.parse(matrix).mask(2).tolist() == [[1, 0.5], [0, 1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: c.k_step(4, 0), r"k to be an integer >= 1, got 0"),
        (lambda: c.k_step(4, True), r"k to be an integer >= 1, got True"),
        (lambda: c.full(0), r"n to be an integer >= 1, got 0"),
        (lambda: c.segment(4, [2, 1]), r"n = 4 turns, got \[2, 1\] = 3"),
        (lambda: c.segment(4, [4, 0]), r"lengths\[1\] to be an integer >= 1, got 0"),
        (lambda: c.PolicyClass("k-step"), r"k-step needs lookahead; write 'k-step 3'"),
        (lambda: c.PolicyClass("full", 2), r"lookahead belongs to k-step, got 'full' and lookahead 2; drop one"),
        (lambda: c.PolicyClass("segment", segments=()), r"the number of segments to be an integer >= 1, got 0"),
        (lambda: c.PolicyClass("segment", segments=(4, 0)), r"segments\[1\] to be an integer >= 1, got 0"),
        (lambda: c.PolicyClass("segment", segments=(4, 1)).check(8), r"n = 8 turns, got \[4, 1\] = 5"),
        (lambda: c.PolicyClass("os:nothing").check(None), r"a function at 'os:nothing', got AttributeError"),
        (lambda: c.PolicyClass("os:sep").check(None), r"function n -> matrix at 'os:sep', got '/'"),
        (lambda: c.PolicyClass("math:sqrt").check(4), r"math:sqrt: expected a matrix \[n, n\], got shape \[\]"),
        (lambda: c.PolicyClass("math:nextafter").check(4), r"math:nextafter: expected a matrix for n = 4 .*TypeError"),
    ],
)
def test_a_wrong_policy_class_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("written", "mask", "label", "spec", "turns"),
    [
        ("full", c.full(5), "full", "full", None),
        (" greedy ", c.greedy(5), "greedy", "greedy", None),
        ("k-step 3", c.k_step(5, 3), "3-step", "k-step 3", None),
        ("k-step:3", c.k_step(5, 3), "3-step", "k-step 3", None),
        ("3-step", c.k_step(5, 3), "3-step", "k-step 3", None),
        ("3", c.k_step(5, 3), "3-step", "k-step 3", None),
        (3, c.k_step(5, 3), "3-step", "k-step 3", None),
        ("1", c.greedy(5), "greedy", "greedy", None),
        ("k-step 1", c.greedy(5), "1-step", "k-step 1", None),
        ("segment 3,2", c.segment(5, [3, 2]), "segment 3,2", "segment 3,2", 5),
        ("segment:3, 2", c.segment(5, [3, 2]), "segment 3,2", "segment 3,2", 5),
        ("numpy:eye", np.eye(5), "numpy:eye", "numpy:eye", None),
        ("[[1, 0.5], [0, 1]]", np.array([[1, 0.5], [0, 1]]), "custom 2x2", [[1.0, 0.5], [0.0, 1.0]], 2),
        (np.eye(2), np.eye(2), "custom 2x2", [[True, False], [False, True]], 2),
    ],
)
def test_a_policy_class_is_read_named_and_written(
    written: object, mask: c.Mask, label: str, spec: object, turns: int | None
) -> None:
    planning = c.PolicyClass.parse(written)
    np.testing.assert_array_equal(planning.mask(len(mask)), mask)
    assert (str(planning), planning.label, planning.spec, planning.turns) == (label, label, spec, turns)
    assert c.PolicyClass.parse(planning.spec) == c.PolicyClass.parse(planning) == planning
    planning.check(len(mask))
    planning.check(None)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("gredy", r"got 'gredy'; did you mean 'greedy'\?"),
        ("k_step", r"got 'k_step'; did you mean 'k-step 3'\?"),
        ("segments 3,3", r"did you mean 'segment 3,3,2'\?"),
        ("segment:x", r"got 'segment:x'; did you mean 'segment 3,3,2'\?"),
        ("greedy 2", r"got 'greedy 2'; did you mean 'greedy'\?"),
        ("auto", r"\(for a run also auto\), got 'auto'$"),
        ("k-step 0", r"lookahead to be an integer >= 1, got 0"),
        ("-2", r"lookahead to be an integer >= 1, got -2"),
        ("segment 3,0", r"segments\[1\] to be an integer >= 1, got 0"),
        ("custom", r"custom needs matrix; write '\[\[1, 0.5\], \[0, 1\]\]'"),
        ("[[1, 2], ", r"expected a matrix such as \[\[1, 0.5\], \[0, 1\]\], got '\[\[1, 2\],'"),
        (True, r"got True"),
        (None, r"got None"),
    ],
)
def test_what_is_no_policy_class_is_refused(written: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        c.PolicyClass.parse(written)


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
