"""The run folder: whole checkpoints, rewinding, locks, and faults of the disk, which are named and cost nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ppg_agents.config import TrainConfig
from ppg_agents.credit import PolicyClass
from ppg_agents.runs import Run, RunError, default_folder, finite, is_run, lock, newest_run, read_jsonl


def save(folder: Path) -> None:
    (folder / "weights").write_text("w" * 100)


def started(folder: Path, steps: tuple[int, ...] = (2, 4), **settings: Any) -> Run:
    """Return a run with checkpoints, and a line per iteration up to one after the last of them."""
    run = Run.create(folder, TrainConfig(**settings))
    for iteration in range(1, max(steps) + 2):
        run.append_metrics({"iteration": iteration})
        if iteration in steps:
            run.save_checkpoint(iteration, save)
    return run


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_is_found_again_as_it_was_written(tmp_path: Path) -> None:
    config = TrainConfig(seed=5, policy_class=PolicyClass("k-step", 3))
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
    with pytest.raises(ZeroDivisionError):
        run.save_checkpoint(12, lambda folder: (save(folder), 1 / 0)[0])
    assert listing(run.folder / "checkpoints") == {"4", "10"}
    assert run.latest_checkpoint() == (10, run.folder / "checkpoints" / "10")
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
        if iteration in (3, 5):
            run.write_evaluation(f"iteration {iteration}", {"iteration": iteration})
            run.write_held_out(iteration, [])
        if iteration == 3:
            run.save_checkpoint(iteration, save)
    (run.folder / "held_out" / ".5.jsonl.tmp").write_text("{")
    assert run.rewind()[0] == 3
    assert set(run.evaluations()) == {"iteration 3"}
    assert run.held_out() == {3: run.folder / "held_out" / "3.jsonl"}
    assert listing(run.folder / "held_out") == {"3.jsonl"}
    assert [m["iteration"] for m in run.metrics()] == [1, 2, 3]
    assert run.trajectories_file.read_text().split() == ["1", "1", "2", "2", "3", "3"]


@pytest.mark.parametrize("killed", range(1, 4))
def test_replacing_a_checkpoint_keeps_one_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: int
) -> None:
    run = started(tmp_path / "run")
    calls = iter(range(1, 100))

    def crash(function: Any) -> Any:
        def maybe(*args: Any, **kwargs: Any) -> Any:
            if next(calls) >= killed:
                raise KeyboardInterrupt  # nothing after it happens, as in a kill
            return function(*args, **kwargs)

        return maybe

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", crash(os.rename))
        patch.setattr(shutil, "rmtree", crash(shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            run.save_checkpoint(4, lambda folder: (save(folder), (folder / "new").write_text("n"))[0])
    step, folder = run.rewind()
    assert (step, listing(run.folder / "checkpoints")) == (4, {"2", "4"})
    assert folder is not None
    assert (folder / "new").exists() == (killed > 2)  # the second rename is what counts


def test_what_a_killed_process_left_is_cleaned_up(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    checkpoints = run.folder / "checkpoints"
    for name in (".6.tmp", ".1.removed", ".4.replaced"):
        shutil.copytree(checkpoints / "4", checkpoints / name)
    (run.folder / ".evaluation.json.tmp").write_text("{")
    with run.metrics_file.open("a") as file:
        file.write('{"iterat')
    assert [m["iteration"] for m in run.metrics()] == [1, 2, 3, 4, 5]
    assert Run.open(run.folder).latest_checkpoint() == (4, checkpoints / "4")
    assert len(listing(checkpoints)) == 5  # whoever only reads changes nothing
    assert run.rewind() == (4, checkpoints / "4")
    assert listing(checkpoints) == {"2", "4"}
    assert listing(run.folder) == {"config.toml", "metrics.jsonl", "checkpoints"}
    assert [m["iteration"] for m in run.metrics()] == [1, 2, 3, 4]


def test_a_kill_before_the_oldest_checkpoint_is_removed_leaves_it_to_the_next_start(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    checkpoints = run.folder / "checkpoints"
    fewer = replace(run, config=replace(run.config, keep_checkpoints=1))
    assert fewer.rewind() == (4, checkpoints / "4")
    assert listing(checkpoints) == {"4"}


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lambda folder: (folder / "weights").write_text("w"), "weights: expected 100 bytes, got 1"),
        (lambda folder: (folder / "weights").unlink(), "weights: missing"),
        (lambda folder: (folder / "state.json").write_text('{"iter'), "state.json: .* expected JSON, got: "),
        (lambda folder: (folder / "state.json").write_text("{}"), "state.json: expected the tables"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Any, named: str
) -> None:
    run = started(tmp_path / "run")
    checkpoints = run.folder / "checkpoints"
    harm(checkpoints / "4")
    assert run.latest_checkpoint() == (2, checkpoints / "2")
    assert "taking the checkpoint before it, 2" in capsys.readouterr().err
    assert run.rewind() == (2, checkpoints / "2")
    said = capsys.readouterr().err
    assert re.search(named, said)
    assert "set aside as 4.damaged, going on from checkpoint 2" in said
    assert listing(checkpoints) == {"2", "4.damaged"}
    assert [m["iteration"] for m in run.metrics()] == [1, 2]
    harm(checkpoints / "2")
    with pytest.raises(RunError, match=rf"expected a whole checkpoint, got .*2: {named}.*; put the files back"):
        run.rewind()


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run = started(tmp_path / "run")
    with pytest.raises(RunError, match=r"can be read in .*4, got SafetensorError: .*; put its files back, or move it"):
        run.load_checkpoint(run.folder / "checkpoints" / "4", lambda folder: load_file(folder / "weights"))


def test_lines_that_went_missing_are_named(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    os.truncate(run.metrics_file, 20)
    with pytest.raises(RunError, match=r"metrics\.jsonl: expected at least 68 bytes, as when checkpoint 4 .* got 20"):
        run.rewind()
    assert run.metrics_file.stat().st_size == 20


def test_a_damaged_evaluation_is_named(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    for text, got in (('{"before": {"iter', "expected JSON, got: "), ("[]", "expected a JSON object, got list")):
        (run.folder / "evaluation.json").write_text(text)
        with pytest.raises(RunError, match=rf"evaluation\.json: {got}.*; put a whole copy back, or delete it"):
            run.evaluations()


def test_a_full_disk_is_named_and_costs_nothing(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    run = started(tmp_path / "run")
    again = rf"No space left on device.*; make room on the disk, then go on with: .* --resume {run.folder}"
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=rf"expected to write .*checkpoints/6, got: {again}"):
        run.save_checkpoint(6, lambda folder: (save(folder), full.write_text("w"))[0])
    with pytest.raises(RunError, match=f"got: {again}"):  # as safetensors and tokenizers say it
        run.save_checkpoint(6, lambda folder: _raise(Exception("I/O error: No space left (os error 28)")))
    (run.folder / "trajectories.jsonl").symlink_to(full)
    run.metrics_file.rename(tmp_path / "metrics.jsonl")
    run.metrics_file.symlink_to(full)
    with pytest.raises(RunError, match=rf"expected to write .*metrics\.jsonl, got: {again}"):
        run.append_metrics({"iteration": 6})
    run.metrics_file.unlink()
    run.trajectories_file.unlink()
    (tmp_path / "metrics.jsonl").rename(run.metrics_file)
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


def _raise(error: Exception) -> None:
    raise error


def test_a_limit_on_file_sizes_is_named_by_the_real_writers(policy: Any, tmp_path: Path) -> None:
    import resource

    run = started(tmp_path / "run")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(
            RunError, match=r"expected to write .*6, got: File too large.*raise the limit on file sizes"
        ):
            run.save_checkpoint(6, policy.save)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert listing(run.folder / "checkpoints") == {"2", "4"}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"expected to write .*run, got: Not a directory.*; change --out"):
        Run.create(tmp_path / "file" / "run", TrainConfig())
    run = started(tmp_path / "run")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", "there")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        RunError, match=r"expected to write .*6, got: Permission denied \(there\); make the folder writ"
    ):
        run.save_checkpoint(6, save)
    with pytest.raises(RunError, match=r"Permission denied.*; change --out, or make the folder writable"):
        Run.create(tmp_path / "other", TrainConfig())


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    code = f"from ppg_agents.runs import lock\nwith lock({str(run.folder)!r}):\n print('in', flush=True); input()"
    command = [sys.executable, "-c", code]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "in\n"
    with (
        pytest.raises(RunError, match=rf"nobody trains in, got .*run, in use by process {other.pid} on .*; wait"),
        lock(run.folder),
    ):
        pass
    other.kill()  # a process that dies lets go
    other.communicate()
    with lock(run.folder), pytest.raises(RunError, match="in use by this process"), lock(run.folder):
        pass
    assert ".lock" not in listing(run.folder)


def test_a_run_that_died_while_it_was_made_can_be_made(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for name in (".lock", ".config.toml.tmp"):
        (folder / name).write_text("x")
    assert not is_run(folder)
    Run.create(folder, TrainConfig())
    assert is_run(folder)


def test_a_torn_last_line_is_dropped_and_any_other_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iterat')
    assert read_jsonl(path) == [{"iteration": 1}]
    path.write_text('{"iterat\n{"iteration": 1}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl:1: expected one JSON object, got '\{\"iterat'; mend the line"):
        read_jsonl(path)
    path.write_text('{"iteration": 1}\n3\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl:2"):
        read_jsonl(path)
    path.write_bytes(b'{"iteration": 1}\n{"caf\xc3')
    assert read_jsonl(path) == [{"iteration": 1}]


def test_folders_get_names_and_the_newest_is_found(tmp_path: Path) -> None:
    config = TrainConfig(policy_class=PolicyClass("segment", segments=(3, 5)), seed=1)
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
