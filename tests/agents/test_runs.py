"""The run folder: whole checkpoints, rewinding, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ppg_agents.config import TrainConfig
from ppg_agents.runs import Run, RunError, default_folder, finite, newest_run, read_jsonl


def write(name: str) -> None:
    raise OSError(f"disk full: {name}")


def save(folder: Path) -> None:
    (folder / "weights").write_text("w")


def test_a_run_is_found_again_as_it_was_written(tmp_path: Path) -> None:
    config = TrainConfig(seed=5, policy_class="k-step", lookahead=3)
    run = Run.create(tmp_path / "run", config)
    run.append_metrics({"iteration": 1, "consistency": float("nan"), "reward_per_turn": [0.5, float("inf")]})
    run.write_evaluation("before", {"persona_consistency": 0.5})
    run.write_evaluation("after", {"persona_consistency": 0.75})
    again = Run.open(tmp_path / "run")
    assert again.config == config
    assert again.metrics() == [{"iteration": 1, "consistency": None, "reward_per_turn": [0.5, None]}]
    assert set(again.evaluations()) == {"before", "after"}


def test_a_folder_in_use_is_refused_and_the_way_on_is_named(tmp_path: Path) -> None:
    Run.create(tmp_path / "run", TrainConfig())
    with pytest.raises(RunError, match=r"go on with --resume .*run, or change --out"):
        Run.create(tmp_path / "run", TrainConfig())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="empty it, or change --out"):
        Run.create(tmp_path / "other", TrainConfig())
    with pytest.raises(RunError, match="expected a run folder"):
        Run.open(tmp_path / "other")


def test_checkpoints_are_whole_and_pruned(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", TrainConfig(keep_checkpoints=2))
    for step in (2, 4, 10):
        run.save_checkpoint(step, save)
    assert [step for step, _ in run.checkpoints()] == [4, 10]
    with pytest.raises(OSError, match="disk full"):
        run.save_checkpoint(12, lambda folder: (save(folder), write("optimizer"))[0])
    assert run.latest_checkpoint() == (10, run.folder / "checkpoints" / "10")
    run.save_checkpoint(12, save)  # the torn one is no obstacle
    run.save_checkpoint(12, save)
    latest = run.latest_checkpoint()
    assert latest is not None
    assert {path.name for path in latest[1].iterdir()} == {"weights", "state.json", "config.toml"}


def test_rewinding_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", TrainConfig())
    assert run.rewind() == (0, None)
    for iteration in range(1, 6):
        run.append_metrics({"iteration": iteration})
        with run.trajectories_file.open("a") as file:
            file.write(f"{iteration}\n{iteration}\n")
        if iteration == 3:
            run.save_checkpoint(iteration, save)
    assert run.rewind()[0] == 3
    assert [m["iteration"] for m in run.metrics()] == [1, 2, 3]
    assert run.trajectories_file.read_text().split() == ["1", "1", "2", "2", "3", "3"]


def test_a_torn_last_line_is_dropped_and_any_other_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iterat')
    assert read_jsonl(path) == [{"iteration": 1}]
    path.write_text('{"iterat\n{"iteration": 1}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl:1"):
        read_jsonl(path)


def test_folders_get_names_and_the_newest_is_found(tmp_path: Path) -> None:
    config = TrainConfig(policy_class="segment", segments=(3, 5), seed=1)
    first = default_folder(config, tmp_path)
    assert first.name == "chatting-segment-3-5-seed-1"
    Run.create(first, config)
    second = default_folder(config, tmp_path)
    assert second.name == "chatting-segment-3-5-seed-1-2"
    with pytest.raises(RunError, match="--resume FOLDER"):
        newest_run(tmp_path / "nothing")
    Run.create(second, replace(config, seed=2)).append_metrics({"iteration": 1})
    assert newest_run(tmp_path) == second


def test_finite_makes_plain_json() -> None:
    import numpy as np

    value = {
        "a": np.float64("nan"),
        "b": np.arange(2),
        "c": (1.0, float("-inf")),
        "d": np.int64(3),
        "e": True,
    }
    assert json.dumps(finite(value)) == '{"a": null, "b": [0, 1], "c": [1.0, null], "d": 3, "e": true}'
