"""Recipes: what the paper's says, and who overrides whom."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ppg_agents import config as configs
from ppg_agents.cli import main
from ppg_agents.config import ConfigError
from ppg_agents.recipes import recipe, recipes
from ppg_agents.runs.run import Run
from ppg_gym.judges.llm import JudgeOptions


def lesson(number: int) -> dict[str, object]:
    """Return a judged dialogue in the consistent-LLMs format; two have one student."""
    talk = [text for i in range(2) for text in (f"Teacher: Question {i}?\n", f"Student: Answer {i}.\n")]
    return {
        "task_name": "Education",
        "topic": "maps",
        "P1": "",
        "P2": f"As student {number // 2} I like maps.",
        "conversation": [list(pair) for pair in enumerate(talk)],
        "pturn": 1,
        "eval_prompt_consistency": [[1, "NO"], [3, "YES" if number % 3 else "NO"]],
        "P2_prompt_consistency_score": 0.5 if number % 3 else 1.0,
    }


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "talks.json").write_text(json.dumps([lesson(number) for number in range(8)]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_papers_recipe_says_what_the_paper_says() -> None:
    config = configs.load(recipe="paper", overrides={"offline.files": ["talks.json"]})
    assert (config.offline.epochs, config.offline.max_tokens, config.batch) == (3, 4096, 64)
    assert (config.optimizer, config.learning_rate, config.weight_decay) == ("adamw", 5e-6, 0.01)
    assert (config.schedule, config.warmup, config.max_grad_norm) == ("cosine", 0.03, 0)
    assert (config.baseline, config.standardise, config.importance, config.discount) == ("group", False, "none", 1)
    assert config.lora.rank == 0
    judge = JudgeOptions(**config.env.judge_options)
    assert config.env.judge == "llm"
    assert (judge.metric, judge.scale, judge.history, judge.temperature) == ("prompt-to-line", "binary", 0, 0)


def test_the_users_own_file_and_flags_override_it(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('batch = 8\n[lora]\nrank = 4\n[offline]\nfiles = ["a.json"]\n')
    config = configs.load(own, {"weight_decay": 0.5}, "paper")
    assert (config.batch, config.lora.rank, config.weight_decay, config.offline.epochs) == (8, 4, 0.5, 3)
    assert config.env.judge_options["history"] == 0
    own.write_text('[env]\njudge = "facts"\n')
    assert configs.load(own, {"offline.files": ["a.json"]}, "paper").env.judge_options == {}
    own.write_text('batch = 0\nbaseline = "none"\n[offline]\nfiles = ["a.json"]\n')
    with pytest.raises(ConfigError, match=r"own\.toml: batch: expected at least 1"):
        configs.load(own, recipe="paper")


def test_an_unknown_recipe_gets_the_nearest_name() -> None:
    assert set(recipes()) == {"paper"}
    with pytest.raises(ValueError, match="expected the recipe to be one of paper, got 'papr'; did you mean 'paper'"):
        recipe("papr")


def test_a_run_by_the_recipe_needs_no_judge_and_keeps_its_settings(place: Path, capsys: pytest.CaptureFixture) -> None:
    small = ("--batch", "3", "--set", "threads=1", "--set", "offline.epochs=1", "--set", "learning_rate=1e-4")
    assert main(["train", "--recipe", "paper", "--offline", "talks.json", *small, "--out", "run"]) == 0
    assert "advantage: 3 groups of one persona and topic, 0 of them" in capsys.readouterr().err
    run = Run.open(place / "run")
    assert (run.config.baseline, run.config.lora.rank, run.config.batch) == ("group", 0, 3)
    assert run.config.env.judge_options["history"] == 0
    assert [line["grad_clipped"] for line in run.metrics()] == [0, 0]
    capsys.readouterr()
    assert main(["evaluate", "run", "--conversations", "1"]) == 2
    assert "the judge llm asks an endpoint; give --judge-url URL and --judge-model NAME" in capsys.readouterr().err
    assert main(["train", "--resume", "run"]) == 0
    assert Run.open(place / "run").config == run.config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "paper"], "the recipe 'paper' learns from logged dialogues; give --offline FILES"),
        (["--recipe", "paper", "--resume"], "leave out --recipe"),
    ],
)
def test_what_a_recipe_does_not_go_with(
    place: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    (place / "runs").mkdir()
    assert main(["train", *arguments]) in (1, 2)
    assert message in " ".join(capsys.readouterr().err.split())
