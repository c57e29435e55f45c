"""The examples run as they are copied, warnings being errors, and the documents show them as they are."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from ppg_agents.config import from_dict
from ppg_agents.train import train

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples"
DOCUMENTS = ["docs/other-trainers.md"]


def run(script: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run an example in this process, where torch has been imported already; return the lines it prints."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def run_alone(script: str, *arguments: str) -> list[str]:
    """Run an example where torch can not be imported."""
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.path.insert(0, sys.argv[1]); del sys.argv[:2]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(EXAMPLES), str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def number(line: str) -> float:
    """Return the last number of a line."""
    return float(re.findall(r"\d*\.\d+", line)[-1])


def test_gymnasium_loop() -> None:
    *talk, policy, bandit = run_alone("gymnasium_loop.py", "--turns", "400")
    assert sum(line.startswith("partner: ") for line in talk) == 8
    assert number(policy) == pytest.approx(0.44, abs=0.1)
    assert number(bandit) > 0.55


def test_chat_rollouts() -> None:
    rows = [json.loads(line) for line in run_alone("chat_rollouts.py", "--conversations", "2")]
    assert [row["seed"] for row in rows] == [0, 1]
    for row in rows:
        assert [m["role"] for m in row["messages"]] == ["system", *["user", "assistant"] * 4]
        assert len(row["rewards"]) == 4
        assert all(0 <= reward <= 1 for reward in row["rewards"])


def test_own_judge() -> None:
    lines = run_alone("own_judge.py")
    assert lines[-1] == "rewards: [1.0, 0.5, nan]"
    assert "    (refused) This judge reads plain English alone." in lines


def test_own_agent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run("own_agent.py", "--steps", "2", monkeypatch=monkeypatch, capsys=capsys)
    assert [line.partition(":")[0] for line in lines] == ["batch 1", "batch 2"]
    assert number(lines[0]) == pytest.approx(0.46, abs=0.1)


def test_own_agent_is_trained_by_the_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "site" / "mine-1.0.dist-info"  # as an installer lays it out
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ppg_agents.agents]\nmine = own_agent:Reinforce\n")
    monkeypatch.syspath_prepend(str(info.parent))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    short = {"iterations": 1, "batch": 4, "group": 2, "env": {"max_turns": 2}, "evaluation": {"conversations": 2}}
    run = train(from_dict({"agent": "mine", "learning_rate": 0.4, **short}), tmp_path / "run")
    (metrics,) = run.metrics()
    assert (metrics["policy_version"], 0 <= metrics["return"] <= 1) == (1, True)
    sys.modules.pop("own_agent")


def test_sb3_reply_selection(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("stable_baselines3", reason="needs the extra sb3")
    settings = ("--steps", "512", "--conversations", "4")
    before, after = run("sb3_reply_selection.py", *settings, monkeypatch=monkeypatch, capsys=capsys)
    assert 0 < number(before) < 1
    assert after.startswith("after 512 judged turns: ")


@pytest.mark.parametrize("credit", [(), ("--lookahead", "2")], ids=["by-conversation", "by-turn"])
def test_trl_grpo(
    credit: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("trl", reason="needs the extra trl")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # as the script sets it, but to be forgotten afterwards
    settings = ("--steps", "2", "--out", str(tmp_path), *credit)
    lines = run("trl_grpo.py", *settings, monkeypatch=monkeypatch, capsys=capsys)
    rewards = [float(word) for word in lines[-1].removeprefix("rewards: ").split()]
    assert len(rewards) == 2
    assert rewards[0] == pytest.approx(0.55, abs=0.15)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_show_the_examples_as_they_are(document: str) -> None:
    sources = [path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")]
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) > 1
    for block in blocks:
        assert any(block in source for source in sources), block


def test_every_example_is_tested_and_short() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert {name for name in names if f'"{name}"' not in Path(__file__).read_text(encoding="utf-8")} == set()
    lengths = {name: len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) for name in names}
    assert max(lengths.values()) <= 60, lengths
