"""``ppg-agent judge`` from outside: round trips on the embedded judge, one line per error, nothing heavy in help."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

import ppg_gym  # noqa: F401 (registers the environment)
from ppg_agents import cli
from ppg_agents.commands import judge as judge_commands
from ppg_agents.commands import main as commands
from ppg_gym.domain.cast import personas


@pytest.fixture(autouse=True)
def _included(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Have the group in the command line, and nothing but the test's files around."""
    monkeypatch.setitem(commands.cli.commands, "judge", judge_commands.judge)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run() -> Path:
    """Return a folder with two conversations that the facts judge has judged."""
    lines = []
    for seed in range(2):
        env = gym.make("ppg_gym:PersonaChat-v0", max_turns=3)
        observation, info = env.reset(seed=seed)
        facts = next(p for p in personas("chatting", "train") if p.id == info["persona"]).facts
        turns: list[dict[str, Any]] = []
        for reply in (f"I live in {facts['city']}.", "Hm.", f"I like {facts['food']}."):
            message = observation["message"]
            observation, reward, _, _, info = env.step(reply)
            said = {"message": message, "reply": reply, "reward": reward, "verdict": info["verdict"]}
            turns.append({**said, "prompt_ids": [], "token_ids": [], "log_probs": [], "policy_version": 0})
        whole = {"schema": "ppg-trajectory/1", "instruction": observation["instruction"], "persona": info["persona"]}
        ending = {"domain": "chatting", "seed": seed, "turns": turns, "terminated": True, "truncated": False}
        lines.append(json.dumps(whole | ending))
    folder = Path("run")
    folder.mkdir()
    (folder / "trajectories.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def call(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["judge", *map(str, arguments)])
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def test_rescore_then_validate(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capfd, "rescore", run)
    assert code == 0
    assert out.splitlines()[-1] == "run/rescored-facts.jsonl"
    assert "judging 6/6" in err
    rows = [json.loads(line) for line in Path("run/rescored-facts.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all(row["recorded"] == row["verdict"] for row in rows)
    assert call(capfd, "rescore", run)[0] == 0  # an earlier rescoring is replaced

    code, out, _ = call(capfd, "rescore", run, "--limit", 1, "--json", "--out", "new/one.jsonl")
    result = json.loads(out)
    assert (code, result["file"], result["parts"][0]["turns"]) == (0, "new/one.jsonl", 3)

    for source in (run, "run/rescored-facts.jsonl"):
        code, out, _ = call(capfd, "validate", "--labels", source, "--json")
        (part,) = json.loads(out)["parts"]
        assert (code, part["name"], part["lines"], part["judge"]["agreement"]["value"]) == (0, "chatting", 6, 1.0)
        assert part["shares"]["unparsed"] == 0


def test_validate_on_labels_by_people(capfd: pytest.CaptureFixture[str]) -> None:
    persona = personas("therapy", "held-out")[0]
    history = json.dumps(["What brings you here?"])
    with Path("labels.csv").open("w", newline="") as file:
        cells = ((persona.id, history, reply, label) for reply, label in (("", 0), ("", 0), ("Zzz qqq.", 1), ("", "")))
        csv.writer(file).writerows([("persona", "history", "reply", "label"), *cells])
    code, out, _ = call(capfd, "validate", "--labels", "labels.csv", "--domain", "therapy")
    assert code == 0
    assert "always consistent" in out
    assert "1 replies in the files carry no label" in out
    code, _, err = call(capfd, "validate", "--labels", "labels.csv")
    assert (code, err) == (1, err)
    assert "missing domain; or give --domain" in err


def test_attack(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = call(capfd, "attack", "--domain", "therapy", "--max-success", "0.05")
    assert code == 0
    assert out.splitlines()[-1].split()[0] == "total"
    Path("yes_judge.py").write_text(
        "from ppg_gym.conversation import Verdict\n"
        "class Yes:\n"
        "    def __init__(self, domain, options): self.status = options.get('status', 'scored')\n"
        "    def check(self, persona): pass\n"
        "    def judge(self, conversations):\n"
        "        score = 1.0 if self.status == 'scored' else None\n"
        "        return [Verdict(self.status, score) for _ in conversations]\n"
    )
    monkeypatch.syspath_prepend(".")
    code, out, err = call(capfd, "attack", "--judge", "yes_judge:Yes", "--max-success", "0.5")
    assert code == 1
    assert "expected a success rate of at most 0.5, got 1.000" in err
    assert out.count("scored at least 0.5: '") > 5
    fails = ("--judge-option", "status=timeout", "--json", "--max-success", "1")
    code, out, err = call(capfd, "attack", "--judge", "yes_judge:Yes", *fails)
    assert (code, json.loads(out)["total"]["rate"]) == (1, None)
    assert json.loads(out)["families"][0]["failures"] > 0
    assert "got no score at all" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attack", "--judge", "fact"], "did you mean 'facts'?"),
        (["attack", "--domain", "therapie"], "did you mean 'therapy'?"),
        (["attack", "--judge-option", "samples"], "expected KEY=VALUE such as samples=3, got 'samples'"),
        (["attack", "--judge-options", "{oops}"], "expected a JSON object, got '{oops}'"),
        (["attack", "--judge-options", '{"scale": 1}'], "expected no judge_options for the facts judge, got ['scale']"),
        (["attack", "--no-cache"], "expected a judge that asks an endpoint, got 'facts'"),
        (["attack", "--personas", "9999"], "--personas: expected at most 128, chatting's held-out personas"),
        (["rescore", "nowhere.jsonl"], "nowhere.jsonl: expected a readable file"),
        (["rescore", "run", "--out", "run/trajectories.jsonl"], "give another --out"),
        (["validate", "--labels", "nowhere.json"], "nowhere.json: expected a readable"),
        (["validate"], "Missing option '--labels'"),
    ],
)
def test_a_wrong_command_line_is_explained(
    arguments: list[str], message: str, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(Path().rglob("*"))
    code, _, err = call(capfd, *arguments)
    assert code in (1, 2)
    assert message in err
    assert sorted(Path().rglob("*")) == before


def test_options_are_read_as_toml_or_json() -> None:
    name, options = judge_commands.chosen(
        None, ("http://a/v1",), "m", ("samples=3", '{"scale": "graded"}', "api_key_env=KEY"), no_cache=True
    )
    expected = {"samples": 3, "scale": "graded", "api_key_env": "KEY", "base_url": ["http://a/v1"], "model": "m"}
    assert (name, options) == ("llm", {**expected, "cache": False})


def test_an_endpoint_that_is_not_there_is_one_line(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("lost_judge.py").write_text(
        "from ppg_gym.llm.chat import EndpointError\n"
        "class Lost:\n"
        "    def __init__(self, domain, options): pass\n"
        "    def check(self, persona): pass\n"
        "    def judge(self, conversations): raise EndpointError('nobody\\nthere')\n"
    )
    monkeypatch.syspath_prepend(".")
    for command in (("rescore", run), ("validate", "--labels", run), ("attack",)):
        code, _, err = call(capfd, *command, "--judge", "lost_judge:Lost")
        assert (code, err.splitlines()[-1]) == (1, "ppg-agent: nobody there")
    assert [path.name for path in run.iterdir()] == ["trajectories.jsonl"]


@pytest.mark.parametrize("command", ["validate", "rescore", "attack"])
def test_help_shows_an_example(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capfd, command, "--help")
    assert code == 0
    assert f"\n    ppg-agent judge {command} " in out


def test_importing_the_commands_imports_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "gymnasium", "scipy", "ppg_gym", "rich"}
    code = f"import sys, ppg_agents.commands.judge; print({heavy!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "set()\n", done.stdout + done.stderr
