"""The command line from outside: help is quick, errors are one line, results are where they should be."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from ppg_agents import cli
from ppg_agents.commands.options import settings
from ppg_agents.policy import Policy

TOY = """
import gymnasium as gym

class Toy(gym.Env):
    def __init__(self, turns=2):
        text = gym.spaces.Text(500)
        self.observation_space = gym.spaces.Dict({"instruction": text, "message": text})
        self.action_space, self.turns = text, turns

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.turn, self.persona = 0, f"p{self.np_random.integers(3)}"
        return {"instruction": "Be.", "message": "hi"}, {"turn": 0, "persona": self.persona}

    def step(self, action):
        self.turn += 1
        info = {"turn": self.turn, "persona": self.persona, "verdict": {"status": "scored", "score": 0.5}}
        return {"instruction": "Be.", "message": "and?"}, 0.5, self.turn >= self.turns, False, info

gym.register("CliToy-v0", entry_point=Toy)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: Policy) -> list[str]:
    """Return flags for a small run on a toy environment that lives in a module of its own."""
    (tmp_path / "cli_toy.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    policy.model.unload().save_pretrained("model")
    policy.tokenizer.save_pretrained("model")
    text = """
        batch = 4
        model = "model"
        [env]
        id = "cli_toy:CliToy-v0"
        [sampling]
        max_new_tokens = 3
        [evaluation]
        conversations = 4
    """
    Path("toy.toml").write_text(textwrap.dedent(text))
    return ["--config", "toy.toml"]


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time; from ppg_agents.cli import main; main(['--help']); "
        "assert time.process_time() < 1.0, time.process_time(); "
        "heavy = {'torch', 'transformers', 'matplotlib', 'rich', 'numpy', 'gymnasium'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"train", "evaluate", "rollout", "chat"} <= set(done.stdout.split())


@pytest.mark.parametrize("module", ["click", "torch"])
def test_a_missing_extra_is_one_line_with_the_install_command(module: str) -> None:
    code = (
        f"import sys; sys.modules['{module}'] = None; from ppg_agents.cli import main; "
        "sys.exit(main(['evaluate', 'tiny']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f'ppg-agent: {module} is not installed; run: pip install "ppg-gym[agents]"\n'


def test_doctor_without_click_stops_in_silence_when_its_reader_has_gone() -> None:
    code = "import sys; sys.modules['click'] = None; from ppg_agents.cli import main; sys.exit(main(['doctor']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert (process.communicate()[1], process.returncode) == ("", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--policy-class", "k-step"], "policy_class: k-step needs lookahead; write 'k-step 3'"),
        (["train", "--policy-class", "gredy"], "got 'gredy'; did you mean 'greedy'?"),
        (["train", "--policy-class", "full", "--lookahead", "3"], "got full; drop --lookahead or use k-step"),
        (["train", "--policy-class", "[[1, 0.5], [0]]"], "expected rows of 2 columns, got 1 columns in row 1"),
        (["train", "--policy-class", "[[1, NaN], [0, 1]]"], "expected finite weights, got nan at row 0, column 1"),
        (["train", "--policy-class", "[[1, 0.5], [2, 1]]"], "got 2.0 at row 1, column 0 (1 below the diagonal)"),
        (["train", "--policy-class", "[[1, 0.5], [0, 1]]"], "expected a matrix for n = 8 turns, got 2 rows"),
        (["train", "--policy-class", "nowhere:masks"], "expected a function at 'nowhere:masks', got ModuleNotFound"),
        (["train", "--set", "lora.rnk=8"], "unknown setting 'lora.rnk'; did you mean lora.rank?"),
        (["train", "--set", "batch=x"], "batch: expected int, got 'x'"),
        (["train", "--config", "nothing.toml"], "nothing.toml"),
        (["train", "--resume"], "got none; give its folder"),
        (["train", "--resume", "nowhere"], "expected a run folder"),
        (["train", "a.json"], "dialogue files go after --offline"),
        (["train", "--segments", "3;3"], "expected turns per segment such as 3,3,2"),
        (["evaluate"], "Missing argument 'RUN_OR_MODEL'"),
    ],
)
def test_a_wrong_command_line_is_explained(
    arguments: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) in (1, 2)
    captured = capfd.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())


def test_train_resume_evaluate_rollout(toy: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--policy-class",
        "segment",
        "--segments",
        "1,1",
        "--iterations",
        "2",
        "--set",
        "env.max_turns=2",
    ]
    assert cli.main(["train", *toy, *flags, "--seed", "3"]) == 0
    folder = Path("runs/CliToy-v0-segment-1-1-seed-3")
    captured = capfd.readouterr()
    assert captured.out == f"{folder}/curve.png\n"
    assert "CliToy-v0, segment 1,1: 4 conversations of 2 turns per iteration" in captured.err

    assert cli.main(["train", *toy, *flags, "--seed", "3", "--out", str(folder)]) == 1
    assert f"go on with --resume {folder}" in capfd.readouterr().err
    assert cli.main(["train", "--resume", str(folder), "--seed", "4"]) == 1
    assert "seed: was 3, got 4" in capfd.readouterr().err
    assert cli.main(["train", "--iterations", "3", "--resume"]) == 0  # the newest run
    metrics = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in metrics] == [1, 2, 3]
    assert "iterations are done" not in capfd.readouterr().err
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert "all 3 iterations are done; to go further, raise --iterations" in capfd.readouterr().err

    results = []
    for target, extra in ((str(folder), []), ("model", [*("--set", "env.id=cli_toy:CliToy-v0")])):
        assert cli.main(["evaluate", target, "--json", "--conversations", "6", *extra]) == 0
        results.append(json.loads(capfd.readouterr().out))
    expected = {"persona_consistency", "ci95", "per_turn", "n_personas", "reachable", "judge_failures"}
    assert all(expected <= set(result) for result in results)
    assert results[0]["persona_consistency"] == 0.5
    assert results[0]["ci95"] == [None, None]  # CliToy-v0 has three personas: too few to say
    assert results[0]["reachable"] is None
    assert results[0]["conversations"] == 6
    assert [result["domain"] for result in results] == ["CliToy-v0", "CliToy-v0"]

    assert cli.main(["evaluate", str(folder)]) == 0
    assert "persona consistency  0.500  (too few to say)" in capfd.readouterr().out
    assert cli.main(["rollout", str(folder), "--conversations", "3"]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [len(line["turns"]) for line in lines] == [2, 2, 2]
    assert {line["domain"] for line in lines} == {"CliToy-v0"}


OWN_CLASSES = """
import numpy as np

def discounted(n):
    return np.triu(0.5 ** np.maximum(np.arange(n) - np.arange(n)[:, None], 0))

def backwards(n):
    return np.tril(np.ones((n, n)))

def broken(n):
    return [1, 2][n]
"""


def learned(folder: Path) -> list[dict[str, object]]:
    """Return what a run has logged, less the time it took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("seconds")} for line in lines]


def test_greedy_decoding_is_for_what_does_not_learn(toy: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    greedy, where = ["--set", "sampling.temperature=0"], ["--set", "env.id=cli_toy:CliToy-v0"]
    played = []
    for seed in ("3", "3"):
        arguments = [*greedy, *where, "--conversations", "3", "--seed", seed]
        assert cli.main(["rollout", "model", *arguments]) == 0
        played.append([json.loads(line) for line in capfd.readouterr().out.splitlines()])
        assert cli.main(["evaluate", "model", "--json", *arguments]) == 0
        played.append(json.loads(capfd.readouterr().out)["persona_consistency"])
    assert played[:2] == played[2:]
    turns = [turn for conversation in played[0] for turn in conversation["turns"]]
    assert {turn["temperature"] for turn in turns} == {0.0}
    by_context: dict[str, set[str]] = {}
    for conversation in played[0]:
        first = conversation["turns"][0]
        by_context.setdefault(json.dumps(first["prompt_ids"]), set()).add(first["reply"])
    assert all(len(replies) == 1 for replies in by_context.values())
    for command in (["train", *toy, *greedy], ["horizon", "model", *greedy, *where]):
        assert cli.main(command) == 1
        assert "sampling.temperature: expected a number above 0 for learning, got 0" in capfd.readouterr().err


def test_a_matrix_and_a_function_of_one_s_own_train(toy: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    Path("own_classes.py").write_text(OWN_CLASSES)
    settings = Path("toy.toml").read_text()
    Path("own.toml").write_text(f'policy_class = "own_classes:discounted"\n{settings}')
    Path("matrix.toml").write_text(f"policy_class = [[1, 0.5], [0, 1]]\n{settings}")
    small = ["--iterations", "1", "--set", "env.max_turns=2", "--set", "evaluation.conversations=0"]
    runs = {
        "discount": [*toy, "--set", "discount=0.5"],
        "flag": [*toy, "--policy-class", "[[1, 0.5], [0, 1]]"],
        "file": ["--config", "matrix.toml"],
        "function": ["--config", "own.toml"],
        "full": toy,
        "ones": [*toy, "--policy-class", "[[1, 1], [0, 1]]"],
    }
    for name, flags in runs.items():
        assert cli.main(["train", *flags, *small, "--out", name]) == 0
    for name in runs:
        same = Path("full" if name in ("full", "ones") else "discount")
        assert learned(Path(name)) == learned(same)
        weights = "checkpoints/1/adapter_model.safetensors"
        assert (Path(name) / weights).read_bytes() == (same / weights).read_bytes()
    assert learned(Path("full")) != learned(Path("discount"))
    assert cli.main(["train", "--resume", "flag", "--iterations", "2"]) == 0
    assert cli.main(["inspect", "function"]) == 0
    capfd.readouterr()
    for name, message in {
        "backwards": "own_classes:backwards: expected an upper triangular matrix, got 1.0 at row 1, column 0",
        "broken": "own_classes:broken: expected a matrix for n = 2 turns, got IndexError",
        "nothing": "expected a function at 'own_classes:nothing', got AttributeError",
    }.items():
        assert cli.main(["train", *toy, *small, "--policy-class", f"own_classes:{name}", "--out", "wrong"]) == 1
        assert f"policy_class: {message}" in capfd.readouterr().err
        assert not Path("wrong").exists()


def test_a_run_of_an_older_version_goes_on(toy: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    small = ["--iterations", "1", "--set", "env.max_turns=2", "--set", "evaluation.conversations=0"]
    assert cli.main(["train", *toy, *small, "--policy-class", "k-step", "--lookahead", "2", "--out", "run"]) == 0
    written = Path("run/config.toml").read_text()
    assert 'policy_class = "k-step 2"' in written
    Path("run/config.toml").write_text(written.replace('"k-step 2"', '"k-step"\nlookahead = 2'))
    assert cli.main(["train", "--resume", "run", "--iterations", "2"]) == 0
    assert Path("run/config.toml").read_text() == written.replace("iterations = 1", "iterations = 2")
    assert cli.main(["train", "--resume", "run", "--lookahead", "1"]) == 1
    assert "policy_class: was 'k-step 2', got 'k-step 1'" in capfd.readouterr().err


def test_ctrl_c_says_how_to_go_on(
    toy: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    from ppg_agents import train

    original = train.collect

    def collect(*args: Any, **named: Any) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **named)

    monkeypatch.setattr(train, "collect", collect)
    assert cli.main(["train", *toy, "--out", "run"]) == 130
    assert capfd.readouterr().err.splitlines()[-1].endswith("go on with: ppg-agent train --resume run")


def test_chat_asks_for_the_persona_chat_environment(toy: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "model", "--set", "env.id=CliToy-v0"]) == 1
    assert "expected ppg_gym:PersonaChat-v0 to chat, got 'CliToy-v0'" in capfd.readouterr().err


def test_a_person_talks_to_the_persona_until_an_empty_line(
    toy: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["Where do you live?", "And what do you drink?", ""])
    shown: list[Any] = []

    def type_in(prompt: str = "") -> str:
        shown.append(capfd.readouterr())
        return next(lines)

    monkeypatch.setattr("builtins.input", type_in)
    flags = ["--set", "sampling.max_new_tokens=3", "--seed", "1", "--persona", "chatting-held-out-007"]
    assert cli.main(["chat", "model", *flags]) == 0
    shown.append(capfd.readouterr())
    assert sum(captured.out.count("persona> ") for captured in shown) == 2
    assert "[chatting-held-out-007] Play Rosa in a chat." in shown[0].err, "before the first line is asked for"
    assert sum(captured.err.count("[chatting-held-out-007]") for captured in shown) == 1
    assert "over 2 replies" in shown[-1].err


def test_the_end_of_input_ends_the_line_too(
    toy: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert cli.main(["chat", "model", "--seed", "1"]) == 0
    assert capfd.readouterr().out == "you> \n"


def test_an_endpoint_implies_the_llm_judge_and_another_judge_begins_without_options(tmp_path: Path) -> None:
    flags = {"judge_url": ("http://a/v1", "http://b/v1"), "judge_model": "m", "no_cache": True, "domain": None}
    config = settings(None, ("env.judge_options.timeout=5",), flags)
    urls = ["http://a/v1", "http://b/v1"]
    assert config.env.judge == "llm"
    assert config.env.judge_options == {"base_url": urls, "model": "m", "timeout": 5, "cache": False}
    assert (config.env.partner, config.env.partner_options) == ("scripted", {})
    file = tmp_path / "config.toml"
    file.write_text('[env]\njudge = "llm"\njudge_options = {base_url = "http://a/v1", model = "m"}\n', encoding="utf-8")
    assert settings(file, (), {"judge": "facts"}).env.judge_options == {}
    assert settings(file, (), {"no_cache": True}).env.judge_options["cache"] is False
