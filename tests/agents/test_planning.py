"""Which policy class a run plans with, and that a choice is made when it is time, and remembered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppg_agents.config import ConfigError, TrainConfig, from_dict
from ppg_agents.credit import PolicyClass, full, greedy, k_step
from ppg_agents.horizon import planner as planning
from ppg_agents.horizon.choice import Choice
from ppg_agents.horizon.planner import Planner
from ppg_agents.train import train

AUTO = {
    "domain": "chatting",
    "policy_class": "auto",
    "auto": {"every": 2, "classes": ["greedy", "2"]},
    "batch": 3,
    "checkpoint_every": 1,
    "env": {"max_turns": 3},
    "lora": {"rank": 2},
    "sampling": {"max_new_tokens": 6},
    "evaluation": {"conversations": 0},
}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_named_class_is_never_chosen_anew() -> None:
    planner = Planner(TrainConfig(policy_class=PolicyClass("k-step", 2)), 4)
    np.testing.assert_array_equal(planner.mask(4), k_step(4, 2))
    assert planner.review([], None, 0) == {}  # type: ignore[arg-type]


def test_auto_begins_with_full_planning_and_remembers_what_a_run_had_come_to() -> None:
    planner = Planner(from_dict(AUTO), 3)
    np.testing.assert_array_equal(planner.mask(3), full(3))
    planner.remember([{"iteration": 1, "horizon_class": "2-step"}, {"iteration": 2}])
    np.testing.assert_array_equal(planner.mask(3), k_step(3, 2))


def test_auto_remembers_a_matrix_by_its_name() -> None:
    matrix = [[1, 0.5, 0], [0, 1, 0.5], [0, 0, 1]]
    planner = Planner(from_dict({**AUTO, "auto": {"classes": ["greedy", matrix]}}), 3)
    planner.remember([{"iteration": 1, "horizon_class": "custom 3x3"}])
    np.testing.assert_array_equal(planner.mask(3), matrix)


@pytest.mark.parametrize(
    ("auto", "message"),
    [
        ({"classes": ["grady"]}, r"auto.classes\[0\]: expected full, .*got 'grady'; did you mean 'greedy'"),
        ({"classes": ["segment:5,5"]}, r"auto.classes: .*sum to"),
        ({"classes": [[[1, 0], [0, 1]]]}, r"auto.classes: expected a matrix for n = 3 turns, got 2 rows"),
        ({"classes": [np.eye(3).tolist(), np.diag([1, 1, 0.5]).tolist()]}, r"auto.classes: .*got two custom 3x3"),
        ({"every": 0}, "auto.every: expected at least 1"),
        ({"cosine": 1.2}, r"auto.cosine: expected a number in \(0, 1\], got 1.2"),
    ],
)
def test_candidates_that_do_not_fit_are_named_before_a_model_is_loaded(auto: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Planner(from_dict({**AUTO, "auto": auto}), 3)


def test_logged_dialogues_have_no_policy_to_ask() -> None:
    with pytest.raises(ConfigError, match="policy class 'auto' needs conversations of the policy itself"):
        from_dict({**AUTO, "offline": {"files": ["a.json"]}})


def test_a_run_asks_when_it_is_time_and_one_that_is_resumed_plans_as_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    chosen = iter([PolicyClass("greedy"), PolicyClass("k-step", 2)])

    class Said(Choice):
        def metrics(self) -> dict[str, Any]:
            return {"horizon_class": self.policy_class.label, "horizon_switched": self.switched}

    def choose(trajectories: Any, policy: Any, classes: Any, previous: PolicyClass, *_: Any, **__: Any) -> Choice:
        asked.append((previous.label, len(trajectories)))
        return Said(next(chosen), True, "because", None)  # type: ignore[arg-type]

    monkeypatch.setattr(planning, "choose", choose)
    config = from_dict({**AUTO, "iterations": 1})
    train(config, tmp_path / "run")
    train(from_dict({**AUTO, "iterations": 3}), tmp_path / "run", resume=True)
    assert asked == [("full", 3), ("greedy", 3)]
    assert [line.get("horizon_class") for line in lines(tmp_path / "run")] == ["greedy", None, "2-step"]
    planner = Planner(config, 3)
    planner.remember(lines(tmp_path / "run")[:2])
    np.testing.assert_array_equal(planner.mask(3), greedy(3))


def test_the_real_choice_is_logged_and_leaves_the_policy_alone(tmp_path: Path) -> None:
    train(from_dict({**AUTO, "iterations": 1}), tmp_path / "auto")
    plain = {key: value for key, value in AUTO.items() if key != "auto"} | {"policy_class": "full", "iterations": 1}
    train(from_dict(plain), tmp_path / "full")
    auto, fixed = lines(tmp_path / "auto")[0], lines(tmp_path / "full")[0]
    assert auto["horizon_class"] in ("full", "greedy", "2-step")
    assert set(auto["horizon_cosine"]) == {"full", "greedy", "2-step"}
    if auto["horizon_class"] == "full":
        assert auto["grad_norm"] == fixed["grad_norm"]
