"""Trackers take every number, and whatever they do, the run does not notice."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ppg_agents import config as configs
from ppg_agents.config import ConfigError, TrainConfig
from ppg_agents.runs import tracking
from ppg_agents.runs.tracking import TRACKERS, flat, make_trackers, require

METRICS = {
    "consistency": 0.5,
    "reward_per_turn": [0.25, None],
    "partner_failures": {"timeout": 2},
    "loss": float("nan"),
}
FLAT = {"consistency": 0.5, "reward_per_turn/1": 0.25, "partner_failures/timeout": 2.0}
STEPS = range(1, 4)


class Fake:
    """A tracker's library: notes what it is told, and misbehaves at a chosen call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.misbehave: dict[str, Callable[[], None]] = {}

    def note(self, name: str, *what: Any) -> Any:
        self.calls.append((name, what))
        self.misbehave.get(name, lambda: None)()
        return self

    def of(self, name: str) -> list[Any]:
        return [what for called, what in self.calls if called == name]


class Writer:
    """In place of TensorBoard's SummaryWriter."""

    def __init__(self, fake: Fake, folder: str, purge_step: int) -> None:
        self.fake = fake
        fake.note("init", {"id": folder, "step": purge_step})

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.fake.note("log", {name: value}, step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.fake.note("finish")


class Session:
    """In place of a run of wandb or trackio."""

    def __init__(self, fake: Fake, **options: Any) -> None:
        self.fake = fake
        print("welcome")  # as they do, on stdout
        fake.note("init", options)

    def define_metric(self, name: str, step_metric: str) -> None:
        self.fake.note("define", name, step_metric)

    def log(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = dict(metrics)
        self.fake.note("log", row, row.pop("iteration", None) if step is None else step)

    def finish(self) -> None:
        self.fake.note("finish")


@pytest.fixture(params=sorted(TRACKERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def fake(name: str, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Return the library of the tracker, which is in place of the real one."""
    library, module = Fake(), ModuleType(TRACKERS[name].module)
    module.SummaryWriter = lambda *args, **kwargs: Writer(library, *args, **kwargs)  # type: ignore[attr-defined]
    module.init = lambda **options: Session(library, **options)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delenv("RANK", raising=False)
    return library


def track(name: str, folder: Path, step: int = 0) -> None:
    with make_trackers([name], folder, TrainConfig(), step=step) as trackers:
        for at in STEPS:
            trackers.log(METRICS, step + at)


def fail(error: BaseException) -> Callable[[], None]:
    def failing() -> None:
        raise error

    return failing


def test_a_tracker_takes_every_number_and_a_resumed_run_goes_on_in_it(
    name: str, fake: Fake, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    track(name, tmp_path)
    numbers: dict[int, dict[str, float]] = {}
    for row, step in fake.of("log"):
        numbers.setdefault(step, {}).update(row)
    assert numbers == dict.fromkeys(STEPS, FLAT)
    assert fake.calls[-1] == ("finish", ())
    track(name, tmp_path, step=3)
    (first,), (second,) = fake.of("init")
    assert first == second or name == "tensorboard"
    assert first["id" if name != "trackio" else "name"] == second["id" if name != "trackio" else "name"]
    if name == "tensorboard":
        assert (first["step"], second["step"]) == (1, 4)  # what comes after the checkpoint is hidden
    else:
        assert first["resume"] == "allow"
        assert first["config"] == configs.to_dict(TrainConfig())
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "left out" not in captured.err


@pytest.mark.parametrize("when", ["init", "log", "finish"])
@pytest.mark.parametrize("error", [ConnectionError("no such host"), SystemExit(1)])
def test_a_tracker_that_fails_is_left_out_with_one_line(
    name: str, fake: Fake, when: str, error: BaseException, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fake.misbehave[when] = fail(error)
    track(name, tmp_path)
    said = capfd.readouterr().err
    reason = re.escape(f"{type(error).__name__}: {error}")
    assert len(re.findall(rf"{name} is left out from here on \({reason}\); metrics.jsonl has every number", said)) == 1
    assert len(fake.of(when)) == 1


@pytest.mark.parametrize("when", ["init", "log"])
def test_a_tracker_that_hangs_is_left_out(
    name: str,
    fake: Fake,
    when: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    release = threading.Event()
    fake.misbehave[when] = lambda: (release.wait(20), None)[1]
    monkeypatch.setattr(tracking, "START", 0.05)
    monkeypatch.setattr(tracking, "FINISH", 0.05)
    monkeypatch.setattr(tracking, "WAITING", 2)
    with make_trackers([name], tmp_path, TrainConfig()) as trackers:
        for at in range(1, 9):
            trackers.log(METRICS, at)
    said = capfd.readouterr().err
    release.set()
    assert said.count(f"{name} is left out") == 1
    assert re.search(r"no answer within 0 s" if when == "init" else r"not taken the last 2 steps", said)


def test_only_the_first_process_tracks(name: str, fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    track(name, tmp_path)
    assert fake.calls == []
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_id_begins_a_new_run(
    name: str, fake: Fake, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tracking.json").write_text('{"i')
    track(name, tmp_path)
    assert re.search(r"tracking\.json cannot be read .* start a new run", capfd.readouterr().err)
    assert len(json.loads((tmp_path / "tracking.json").read_text())["id"]) == 12


def test_unknown_and_missing_trackers_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"report_to to be one of .* got 'tensorbord'; did you mean 'tensorboard'"):
        make_trackers(["tensorbord"], tmp_path, TrainConfig())
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match="wandb"):
        require(["wandb"])


def test_nothing_is_imported_that_is_not_named(tmp_path: Path) -> None:
    before = set(sys.modules)
    with make_trackers([], tmp_path, TrainConfig()) as trackers:
        trackers.log(METRICS, 1)
    assert set(sys.modules) == before
    assert list(tmp_path.iterdir()) == []


def test_flat_names_what_is_a_number() -> None:
    nested = {"held_out": {"ci95": [0.25, 0.5], "reachable": None}, "note": "text", "ended": True}
    assert flat(METRICS) == FLAT
    assert flat(nested) == {"held_out/ci95/1": 0.25, "held_out/ci95/2": 0.5, "ended": 1.0}


def test_the_real_tensorboard_holds_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.delenv("RANK", raising=False)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track("tensorboard", tmp_path)
    track("tensorboard", tmp_path, step=2)
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(FLAT)
    assert [e.step for e in events.Scalars("consistency")] == [1, 2, 3, 4, 5]  # 3 was logged twice


def documented(section: str) -> set[str]:
    """Return the names in the first column of a section's table in docs/metrics.md."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| `(\w+)` \|", text.split(f"## `{section}`")[1].split("\n## ")[0], re.MULTILINE))


def logged(folder: Path) -> list[str]:
    """Write four judged dialogues of two lines; return the file."""
    lines = [[0, "Therapist: How are you?\n"], [1, "Patient: I am sad today.\n"]]
    entry = {"task_name": "Therapy", "topic": "", "grade": "", "P1": "", "pturn": 1, "rounds": 2, "conversation": lines}
    verdicts = {"eval_prompt_consistency": [[1, "NO, it fits."]], "P2_prompt_consistency_score": 1.0}
    path = folder / "therapy" / "logged.json"
    path.parent.mkdir()
    path.write_text(json.dumps([{**entry, **verdicts, "P2": f"You are patient {i}, who is sad."} for i in range(4)]))
    return [str(path)]


@pytest.mark.parametrize("offline", [False, True])
def test_every_metric_that_a_run_writes_is_documented(policy: Any, tmp_path: Path, offline: bool) -> None:
    from ppg_agents.train import train

    policy.model.unload().save_pretrained(tmp_path / "model")
    policy.tokenizer.save_pretrained(tmp_path / "model")
    config = configs.from_dict(
        {
            "model": str(tmp_path / "model"),
            "iterations": 1,
            "batch": 2,
            "lora": {"rank": 2},
            "sampling": {"max_new_tokens": 2},
            "env": {"id": "ppg_gym:PersonaChat-v0", "max_turns": 2},
            "evaluation": {"conversations": 2},
            "offline": {"files": logged(tmp_path) if offline else []},
        }
    )
    run = train(config, tmp_path / "run")
    assert documented("metrics.jsonl") >= set(run.metrics()[0]) > {"loss", "iteration"}
    assert documented("evaluation.json") >= set(run.evaluations()["after"]) > {"iteration"}
