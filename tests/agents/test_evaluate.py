"""The summary of an evaluation: masks, intervals over personas, degenerate data."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ppg_agents.evaluate import summarise
from ppg_agents.trajectory import Trajectory, Turn

NAN = math.nan


def played(persona: str, *rewards: float) -> Trajectory:
    turns = tuple(Turn("hi", "yo", (1,), (2,), (-0.5,), reward) for reward in rewards)
    return Trajectory("Be.", persona, "toy", 0, turns, terminated=True, truncated=False)


def test_means_leave_unjudged_turns_out_and_count_them() -> None:
    trajectories = [
        played("a", 1.0, NAN, 0.0),
        played("a", 0.5),
        played("b", NAN, 0.25, 0.5),
        played("c", NAN),
    ]
    result = summarise(trajectories, np.array([0.8, NAN, 0.9, NAN]))
    assert result.persona_consistency == pytest.approx((1.0 + 0.0 + 0.5 + 0.25 + 0.5) / 5)
    assert result.per_turn == pytest.approx((0.75, 0.25, 0.25))
    assert (result.n_personas, result.conversations, result.judge_failures) == (2, 4, 3)
    assert result.reachable == pytest.approx(0.85)
    assert all(map(math.isnan, result.ci95))  # two personas are too few to say


def test_the_interval_is_over_personas_not_turns() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random(200)
    once = summarise([played(str(i), score) for i, score in enumerate(scores)])
    often = summarise([played(str(i), *[score] * 8) for i, score in enumerate(scores)])
    half = 1.96 * scores.std() / math.sqrt(200)
    assert once.ci95 == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.01)
    assert often.ci95 == pytest.approx(once.ci95)
    assert all(one == pytest.approx(once.ci95) for one in often.per_turn_ci95)
    assert len(often.per_turn_ci95) == 8


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([[NAN]], (NAN, NAN)),
        ([[0.5, 1.0]], (NAN, NAN)),
        ([[1.0]] * 3 + [[NAN]] * 5, (NAN, NAN)),
        ([[1.0]] * 4, (5 / 6 - 2.5706 / 6, 1.0)),  # t with 5 degrees of freedom, √(5/6 · 1/6 / 5) = 1/6
    ],
)
def test_degenerate_data_has_an_honest_interval(rewards: list[list[float]], expected: tuple[float, float]) -> None:
    result = summarise([played(str(i), *row) for i, row in enumerate(rewards)])
    assert result.ci95 == pytest.approx(expected, nan_ok=True, abs=1e-4)
    assert result.to_dict()["reachable"] is None
    assert result.to_dict()["ci95"] == [None if math.isnan(x) else x for x in result.ci95]


def test_nothing_to_summarise_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one conversation"):
        summarise([])
