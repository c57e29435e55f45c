"""A run that is killed again and again ends as if it had never been: the same bytes, the clock aside.

Run as a script, this file is the driver: it does the run once, then forks a process per attempt, which is killed at a
moment of its life. Kept apart from the test's own process, which has threads.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

KILLS = 20
HERE = Path(__file__).resolve().parent


class Moody(gym.Env[dict[str, str], str]):
    """Says and scores partly at random, so that the environment's randomness must come back too."""

    def __init__(self) -> None:
        text = gym.spaces.Text(500)
        self.observation_space, self.action_space = gym.spaces.Dict({"instruction": text, "message": text}), text

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, str], dict[str, Any]]:
        super().reset(seed=seed)
        self.turn, self.persona = 0, f"p{int(self.np_random.integers(4))}"
        return self.seen(), {"turn": 0, "persona": self.persona}

    def step(self, action: str) -> tuple[dict[str, str], float, bool, bool, dict[str, Any]]:
        self.turn += 1
        score = (sum("a" <= letter <= "m" for letter in action) + float(self.np_random.random())) / (len(action) + 1)
        verdict = {"status": "scored", "score": score}
        return self.seen(), score, self.turn == 2, False, {"turn": self.turn, "verdict": verdict}

    def seen(self) -> dict[str, str]:
        return {"instruction": f"Be {self.persona}.", "message": f"Tell me {int(self.np_random.integers(100))}."}


if "Moody-v0" not in gym.registry:
    gym.register("Moody-v0", entry_point=Moody)

SETTINGS: dict[str, Any] = {
    "iterations": 5,
    "batch": 4,
    "group": 2,
    "baseline": "moving-average",
    "schedule": "cosine",
    "learning_rate": 0.01,
    "checkpoint_every": 2,
    "keep_checkpoints": 1,
    "threads": 1,
    "env": {"id": "test_resume:Moody-v0", "max_turns": 2},
    "lora": {"rank": 4, "dropout": 0.1},
    "sampling": {"max_new_tokens": 4},
    "evaluation": {"conversations": 4},
}


def watch(folder: Path, at: int, torn: bool) -> Callable[[], int]:
    """Count what this process does to the files of a run; kill it before operation ``at``, as a crash would.

    Args:
        folder: The run folder.
        at: Counted from 0; a negative number kills nothing.
        torn: Leave half a line behind when a line was about to be appended.

    Returns:
        What returns the count so far.
    """
    count, prefix, inside = 0, str(folder), False
    changes = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}

    def moment(path: str = "", appends: bool = False) -> None:
        nonlocal count, inside
        if count == at:
            if torn and appends:
                inside = True
                descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                os.write(descriptor, b'{"half a li')
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if inside or not (event == "open" or event in changes):
            return
        path = os.fspath(args[0]) if isinstance(args[0], str | os.PathLike) else ""
        if path.startswith(prefix) and (event in changes or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
            moment(path, appends=path.endswith(".jsonl") and event == "open")

    def fsync(descriptor: Any) -> None:  # raises no audit event
        moment()
        original(descriptor)

    original, os.fsync = os.fsync, fsync
    sys.addaudithook(hook)
    return lambda: count


def attempt(root: Path, name: str, *, at: int = -1, after: float | None = None) -> tuple[bool, int, float]:
    """Begin or resume a run in a process of its own, and kill it.

    Args:
        root: Holds ``config.toml`` and the runs.
        name: Of the run.
        at: The file operation before which it is killed.
        after: Seconds after which it is killed.

    Returns:
        Whether it was killed; else how many file operations it needed, and seconds.
    """
    from ppg_agents import config, runs, train

    began, (reader, writer) = time.monotonic(), os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            log = os.open(root / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            done = watch(root / name, at, torn=at % 2 == 0)
            train.train(config.load(root / "config.toml"), root / name, resume=runs.is_run(root / name))
            os.write(writer, str(done()).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    os.close(writer)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with open(reader, "rb") as pipe:
        count = pipe.read()
    killed = os.WIFSIGNALED(status)
    if not killed and os.WEXITSTATUS(status):
        raise RuntimeError((root / f"{name}.log").read_text())
    return killed, int(count or 0), time.monotonic() - began


def drive(root: Path) -> None:
    """Do an uninterrupted run, which warms this process up, and killed ones in its children; print what was done."""
    from ppg_agents import config, train

    train.train(config.load(root / "config.toml"), root / "whole")
    _, operations, seconds = attempt(root, "again")
    rng, kills, names = np.random.default_rng(0), 0, ["again"]
    while kills < KILLS:
        name = f"killed-{len(names)}"
        names.append(name)
        share = (kills + rng.random()) / KILLS  # the first kills of all runs are spread over a whole life
        kills += attempt(root, name, at=int(share * operations))[0]
        for _ in range(2):
            kills += attempt(root, name, after=float(rng.uniform(0.1, 0.5)) * seconds)[0]
            kills += attempt(root, name, at=int(rng.uniform(0.0, 0.4) * operations))[0]
        attempt(root, name)
    if (root / "command-line").exists():
        attempt(root, "command-line")
        names.append("command-line")
    print(json.dumps({"kills": kills, "runs": names, "operations": operations, "seconds": seconds}))


def contents(run: Path) -> dict[str, Any]:
    """Return all that a finished run left, the clock aside."""
    files: dict[str, Any] = {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
    lines = [json.loads(line) for line in files.pop("metrics.jsonl").splitlines()]
    metrics = [{k: v for k, v in line.items() if not k.startswith("seconds_")} for line in lines]
    files = {name: data for name, data in files.items() if not name.endswith("state.json")}  # length of the metrics
    return {**files, "metrics": metrics}


@pytest.fixture
def root(policy: Any, tmp_path: Path) -> Path:
    """Return a folder with a tiny model and the settings of a run."""
    import tomli_w

    policy.model.unload().save_pretrained(tmp_path / "model")
    policy.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "config.toml").write_text(tomli_w.dumps({"model": str(tmp_path / "model"), **SETTINGS}))
    return tmp_path


def environment() -> dict[str, str]:
    path = f"{HERE}{os.pathsep}{HERE.parent.parent}"
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }


def until(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> None:
    """Kill a process when it has come so far."""
    while not reached():
        assert process.poll() is None, "ended before it was killed"
        time.sleep(0.002)
    process.kill()
    process.wait()


def kill_the_command_line(root: Path) -> Iterator[None]:
    """Kill ``ppg-agent train``, and what resumes it."""
    run = root / "command-line"
    command = [sys.executable, "-m", "ppg_agents.cli", "train", "--config", str(root / "config.toml")]
    moments = (("--out", run / "trajectories.jsonl"), ("--resume", run / "checkpoints" / "4"))
    for option, path in moments:
        with (root / "command-line.log").open("ab") as log:
            process = subprocess.Popen([*command, option, str(run)], env=environment(), stdout=log, stderr=log)
            until(process, path.exists)
        yield


def test_a_run_that_is_killed_at_any_moment_ends_as_an_uninterrupted_one(root: Path) -> None:
    for _ in kill_the_command_line(root):
        assert not (root / "command-line" / "curve.png").exists()
    done = subprocess.run(
        [sys.executable, __file__, str(root)], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["kills"] >= KILLS
    whole = contents(root / "whole")
    assert len(whole["metrics"]) == 5
    assert {"curve.png", "evaluation.json", "trajectories.jsonl", "checkpoints/5/optimizer.safetensors"} < set(whole)
    for name in report["runs"]:
        run = contents(root / name)
        assert set(run) == set(whole), name
        assert [key for key in whole if run[key] != whole[key]] == [], name
        shutil.rmtree(root / name)


if __name__ == "__main__":
    drive(Path(sys.argv[1]))
