"""Baselines by hand, their invariants, and the state of the moving average."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ppg_agents import baselines

CREDIT = np.array([[1.0, 4.0], [3.0, 0.0], [5.0, 6.0], [7.0, 8.0]])
VALID = np.array([[True, True], [True, False], [True, True], [True, True]])
GROUPS = ["nurse", "nurse", "nurse", "baker"]


def test_leave_one_out_by_hand() -> None:
    # (1, 1) is invalid: it enters nobody's mean. The baker is alone in its group, so the others stand in.
    assert baselines.leave_one_out(CREDIT, VALID, GROUPS).tolist() == [[4, 6], [3, 5], [2, 4], [3, 5]]
    assert baselines.mean_of_others(CREDIT, VALID, GROUPS).tolist() == [[7, 8]] * 3 + [[3, 5]]
    assert baselines.group_mean(CREDIT, VALID, GROUPS).tolist() == [[3, 5]] * 3 + [[7, 8]]
    assert baselines.leave_one_out(CREDIT[:1], VALID[:1], ["nurse"]).tolist() == [[0, 0]]


def test_alone_in_its_group_a_conversation_is_compared_with_the_others() -> None:
    # Groups of two with one unjudged turn each: without a baseline, its partner's credit would be its advantage.
    credit = np.random.default_rng(0).normal(5, 0.5, size=(40, 1))
    valid = (np.arange(40) % 2 == 0)[:, None]
    groups = [b // 2 for b in range(40)]
    advantage = np.where(valid, credit - baselines.leave_one_out(credit, valid, groups), 0.0)
    assert np.square(advantage[valid]).mean() < 0.5  # 25 without the mend


def test_batch_mean_by_hand() -> None:
    assert baselines.batch_mean(CREDIT, VALID).tolist() == [[4, 6]] * 4
    assert baselines.batch_mean(CREDIT, np.zeros_like(VALID)).tolist() == [[0, 0]] * 4


@given(st.data(), st.integers(1, 6), st.integers(1, 4))
def test_leave_one_out_ignores_the_own_credit_and_equals_the_naive_mean(data: st.DataObject, size: int, n: int) -> None:
    credit = data.draw(hnp.arrays(float, (size, n), elements=st.floats(-4, 4, width=16)))
    valid = data.draw(hnp.arrays(bool, (size, n)))
    groups = data.draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
    got = baselines.leave_one_out(credit, valid, groups)
    for b in range(size):
        for t in range(n):
            others = [credit[j, t] for j in range(size) if j != b and groups[j] == groups[b] and valid[j, t]]
            others = others or [credit[j, t] for j in range(size) if groups[j] != groups[b] and valid[j, t]]
            assert got[b, t] == pytest.approx(np.mean(others) if others else 0.0, abs=1e-12)


def test_what_stands_at_invalid_turns_is_never_read() -> None:
    poisoned = np.where(VALID, CREDIT, np.nan)
    for clean, dirty in [
        (baselines.leave_one_out(CREDIT, VALID, GROUPS), baselines.leave_one_out(poisoned, VALID, GROUPS)),
        (baselines.batch_mean(CREDIT, VALID), baselines.batch_mean(poisoned, VALID)),
        (baselines.standardise(CREDIT, VALID), baselines.standardise(poisoned, VALID)),
    ]:
        np.testing.assert_array_equal(clean, dirty)


def test_moving_average_uses_earlier_batches_only() -> None:
    average = baselines.MovingAverage(2, decay=0.75)
    first_turn_only = VALID & np.array([True, False])
    assert average(CREDIT, first_turn_only).tolist() == [[0, 0]] * 4
    assert average(CREDIT + 4, VALID).tolist() == [[4, 0]] * 4  # turn 1 has no history yet
    assert average(CREDIT, np.zeros_like(VALID)).tolist() == [[5, 10]] * 4  # .75·4 + .25·8; first mean of turn 1
    assert average(CREDIT, VALID).tolist() == [[5, 10]] * 4  # a batch without valid turns left it alone


def test_moving_average_survives_json() -> None:
    average = baselines.MovingAverage(2, decay=0.5)
    average(CREDIT, VALID)
    restored = baselines.MovingAverage(2)
    restored.load_state_dict(json.loads(json.dumps(average.state_dict())))
    for _ in range(2):
        np.testing.assert_array_equal(restored(CREDIT - 1, VALID), average(CREDIT - 1, VALID))


def test_standardise_by_hand() -> None:
    adv = baselines.standardise(CREDIT, VALID, eps=0.0)
    assert adv[VALID].mean() == pytest.approx(0.0, abs=1e-15)
    assert adv[VALID].std() == pytest.approx(1.0, abs=1e-15)
    assert adv[1, 1] == 0
    assert not baselines.standardise(np.full((4, 2), 0.1), VALID).round(6).any()
    assert not baselines.standardise(CREDIT, np.zeros_like(VALID)).any()


def test_refusals() -> None:
    average = baselines.MovingAverage(2)
    for call, message in [
        (lambda: baselines.batch_mean(CREDIT, VALID[:2]), r"boolean valid of the same shape, got \[4, 2\]"),
        (lambda: baselines.batch_mean(CREDIT, VALID.astype(int)), r"boolean valid"),
        (lambda: baselines.leave_one_out(CREDIT, VALID, GROUPS[:3]), r"each of 4 conversations, got 3"),
        (lambda: average(CREDIT[:, :1], VALID[:, :1]), r"expected 2 turns as in earlier batches, got 1"),
        (lambda: baselines.MovingAverage(2, decay=1.0), r"decay in \[0, 1\)"),
        (lambda: average.load_state_dict({"mean": [0.0]}), r"keys decay, mean, seen, got mean"),
        (
            lambda: average.load_state_dict(baselines.MovingAverage(3).state_dict()),
            r"state of 2 turns, got 3",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
