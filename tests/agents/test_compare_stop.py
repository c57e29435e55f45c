"""A comparison that is stopped, in whatever way, leaves no run behind that goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ppg_agents import cli
from ppg_agents.commands import main as commands

RUN = """
import os, sys, time
from pathlib import Path

folder = Path(sys.argv[2])
folder.with_suffix(".pid").write_text(str(os.getpid()))
folder.with_suffix(".up").touch()
try:
    time.sleep(60)
except KeyboardInterrupt:
    folder.with_suffix(".saved").touch()
    sys.exit(130)
"""

PARENT = """
import sys
from pathlib import Path
from ppg_agents.compare import engine
from ppg_agents.compare.plan import Job

class Sleeper(Job):
    module = "sleeping_run"

job = Sleeper("ppg", "greedy", "chatting", 0, (2,), {"schedule": "constant"})
engine.run_here([job], Path(sys.argv[1]), 1, lambda job, why: None)
"""


def test_the_command_says_how_to_go_on(capfd: pytest.CaptureFixture[str]) -> None:
    @commands.cli.command("stopping")
    def stopping() -> None:
        raise KeyboardInterrupt("stopped; go on with: ppg-agent compare plan.toml --out runs/plan")

    try:
        assert cli.main(["stopping"]) == 130
    finally:
        del commands.cli.commands["stopping"]
    assert capfd.readouterr().err.endswith("go on with: ppg-agent compare plan.toml --out runs/plan\n")


def until(true: Callable[[], bool], what: str) -> None:
    for _ in range(600):
        if true():
            return
        time.sleep(0.05)
    pytest.fail(f"waited in vain for {what}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_runs_stop_and_save_when_the_comparison_is_stopped_or_killed(
    number: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / "sleeping_run.py").write_text(RUN)
    (tmp_path / "parent.py").write_text(PARENT)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    parent = subprocess.Popen(
        [sys.executable, "parent.py", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        until(lambda: any((tmp_path / "cells").glob("*.up")), "the run")
        parent.send_signal(number)
        until(lambda: any((tmp_path / "cells").glob("*.saved")), "the run to save")
        _, said = parent.communicate(timeout=20)
    finally:
        parent.kill()
    assert parent.returncode != 0
    assert ("stopping 1 run; once more to stop at once" in said) == (number != signal.SIGKILL)
    pid = int(next((tmp_path / "cells").glob("*.pid")).read_text())
    until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text(), "its end")
