"""Short seeded runs of every agent and policy class give the numbers that were recorded.

A change that only moves code leaves them the same to the last bit on the kind of machine they were recorded on
(`machine`). Elsewhere floating point differs, and metrics are compared within a tolerance. Metrics that came later are
not compared. To change numbers on purpose, record them again in a commit of its own:
python tests/agents/test_same_numbers.py [CASE ...]
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

RECORDED = Path(__file__).with_name("same_numbers.json")
SMALL = (
    *("--iterations", "2", "--batch", "4", "--seed", "3"),
    *("--set", "env.max_turns=4", "--set", "sampling.max_new_tokens=16", "--set", "threads=1"),
    *("--set", "checkpoint_every=1", "--set", "evaluation.conversations=2", "--set", "micro_batch_tokens=600"),
)
PAIRED = ("--set", "group=2")
LOGGED = ("--offline", "dialogues.jsonl", "--set", "offline.epochs=2")
CASES: dict[str, tuple[str, ...]] = {
    "ppg full": (),
    "ppg greedy": ("--policy-class", "greedy", "--set", "baseline=none"),
    "ppg 2-step": ("--policy-class", "k-step", "--lookahead", "2", "--domain", "therapy", "--set", "discount=0.9"),
    "ppg segment": ("--policy-class", "segment", "--segments", "3,1", "--domain", "education"),
    "ppg auto": ("--policy-class", "auto", "--set", "auto.every=1"),
    "ppg leave-one-out": (*PAIRED, "--set", "baseline=leave-one-out", "--set", "aggregation=turn_mean"),
    "ppg moving-average": ("--set", "baseline=moving-average", "--set", "standardise=true"),
    "ppg importance": ("--set", "importance=token", "--set", "steps_per_batch=2", "--set", "aggregation=token_mean"),
    "ppg kl": ("--set", "kl_coefficient=0.1", "--set", "lora.dropout=0.1"),
    "ppg all weights": ("--set", "lora.rank=0", "--set", "learning_rate=0.0001", "--iterations", "1"),
    "grpo": (*PAIRED, "--agent", "grpo", "--set", "kl_coefficient=0.1", "--set", "steps_per_batch=2"),
    "dr-grpo": (*PAIRED, "--agent", "dr-grpo", "--set", "agent_options.aggregation_of_source=true"),
    "dapo": (*PAIRED, "--agent", "dapo", "--set", "agent_options.dynamic_sampling=true"),
    "rloo": (*PAIRED, "--agent", "rloo", "--set", "kl_coefficient=0.1"),
    "reinforce++": ("--agent", "reinforce++", "--set", "agent_options.whiten=tokens"),
    "cispo": ("--agent", "cispo", "--policy-class", "greedy"),
    "rpg": ("--agent", "rpg", "--set", "agent_options.divergence=forward", "--set", "steps_per_batch=2"),
    "sapo": ("--agent", "sapo"),
    "dispo": ("--agent", "dispo"),
    "empg": ("--agent", "empg"),
    "rebn": ("--agent", "rebn", "--policy-class", "k-step", "--lookahead", "2"),
    "ppo": ("--agent", "ppo", "--set", "steps_per_batch=2"),
    "ppo class": ("--agent", "ppo", "--set", "agent_options.credit=class", "--policy-class", "greedy"),
    "bi-level-gae": ("--agent", "bi-level-gae"),
    "a-lol": ("--agent", "a-lol", "--set", "agent_options.value=head"),
    "p3o": (*PAIRED, "--agent", "p3o", "--set", "kl_coefficient=0.1"),
    "copg": (*PAIRED, "--agent", "copg"),
    "refuel": (*PAIRED, "--agent", "refuel", "--policy-class", "greedy"),
    "sft": ("--agent", "sft"),
    "base": ("--agent", "base", "--iterations", "1"),
    "best-of-n": ("--agent", "best-of-n", "--set", "agent_options.n=2", "--iterations", "1"),
    "offline ppg": (*LOGGED, "--policy-class", "k-step", "--lookahead", "2"),
    "offline standardised": (*LOGGED, "--set", "standardise=true", "--policy-class", "greedy"),
    "offline a-lol": (*LOGGED, "--agent", "a-lol"),
    "offline sft": (*LOGGED, "--agent", "sft"),
}
RESUMED = {"ppg full": ("ppg resumed", ()), "ppo": ("ppo resumed", ())}
"""Runs that are stopped after one iteration and continued to two, and then are to be like those that were not."""
TWO = "two processes"


def machine() -> list[str]:
    """Return what the last bit of a floating-point sum depends on."""
    return [platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.__version__]


def digest(path: Path) -> str:
    """Return a file's first 16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    """Return metrics less what a clock or a server says."""
    return {key: value for key, value in record.items() if not key.startswith("seconds") and key != "usage"}


def outcome(run: Path) -> dict[str, Any]:
    """Return what a run left behind."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    newest = max((run / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    weights = [file for file in sorted(newest.iterdir()) if file.suffix == ".safetensors"]
    found: dict[str, Any] = {
        "metrics": [without_times(json.loads(line)) for line in lines],
        "evaluation": digest(run / "evaluation.json"),
        "weights": {file.name: digest(file) for file in weights},
    }
    if (run / "trajectories.jsonl").exists():
        found["trajectories"] = digest(run / "trajectories.jsonl")
    return found


def command(arguments: Sequence[str], folder: Path) -> None:
    """Run ``ppg-agent`` in this process, in a folder of its own."""
    from ppg_agents.cli import main

    before, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(folder)
    try:
        assert main(list(arguments)) == 0
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)


def dialogues(folder: Path) -> None:
    """Write logged dialogues of the untrained model."""
    settings = ("--set", "env.max_turns=4", "--set", "sampling.max_new_tokens=16", "--set", "batch=8")
    command(("rollout", "tiny", "--conversations", "8", "--seed", "5", *settings, "--out", "dialogues.jsonl"), folder)


def play(name: str, folder: Path) -> dict[str, Any]:
    """Run a case and return its outcome."""
    if name == TWO:
        return two_processes(folder)
    resumed = {again: case for case, (again, _) in RESUMED.items()}
    arguments = CASES[resumed.get(name, name)]
    if "--offline" in arguments:
        dialogues(folder)
    if name not in resumed:
        command(("train", *SMALL, *arguments, "--out", "run"), folder)
        return outcome(folder / "run")
    constant = ("--set", "schedule=constant")
    command(("train", *SMALL, *arguments, *constant, "--iterations", "1", "--out", "run"), folder)
    command(("train", "--resume", "run", "--iterations", "2"), folder)
    return outcome(folder / "run")


def two_processes(folder: Path) -> dict[str, Any]:
    """Run GRPO in two gloo processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = ("train", *SMALL, *CASES["grpo"], "--out", str(folder / "run"))
    code = "import sys; from ppg_agents.cli import main; sys.exit(main(sys.argv[1:]))"
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return outcome(folder / "run")


def every_case() -> list[str]:
    """Return the names of all cases."""
    return [*CASES, *(again for again, _ in RESUMED.values()), TWO]


def since_recorded(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Return an outcome less the metrics that were added since it was recorded."""
    lines = zip(found["metrics"], expected["metrics"], strict=True)
    kept = [{key: value for key, value in line.items() if key in known} for line, known in lines]
    return {**found, "metrics": kept}


def near(found: Any, expected: Any) -> bool:
    """Return whether plain data are equal, numbers within a thousandth."""
    if isinstance(expected, dict):
        same = isinstance(found, dict) and found.keys() == expected.keys()
        return same and all(near(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(near, found, expected))
    if isinstance(expected, float) and isinstance(found, float | int):
        return math.isclose(found, expected, rel_tol=1e-3, abs_tol=1e-3)
    return bool(found == expected)


@pytest.mark.parametrize("name", every_case())
@pytest.mark.filterwarnings("default")
def test_a_run_gives_the_numbers_that_were_recorded(name: str, tmp_path: Path) -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    expected = recorded["runs"][name]
    found = since_recorded(json.loads(json.dumps(play(name, tmp_path))), expected)
    if machine() == recorded["machine"]:
        assert found == expected
    else:
        assert near(found["metrics"], expected["metrics"])


def record(names: Sequence[str]) -> None:
    """Run cases and write down their outcomes; all of them unless some are named."""
    stored = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {"runs": {}}
    runs = stored["runs"] if stored.get("machine") == machine() and names else {}
    for name in names or every_case():
        with TemporaryDirectory() as folder:
            runs[name] = play(name, Path(folder))
        print(name, flush=True)
    text = json.dumps({"machine": machine(), "runs": runs}, indent=1, sort_keys=True)
    RECORDED.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    record(sys.argv[1:])
