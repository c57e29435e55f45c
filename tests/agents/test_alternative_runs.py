"""Whole runs of every alternative: trained by the loop, resumed, evaluated, or told which settings they need."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from ppg_agents import config as configs
from ppg_agents import train as training
from ppg_agents.agents.methods import METHODS
from ppg_agents.config import ConfigError
from ppg_agents.policy import Policy
from ppg_agents.trajectory import read_jsonl

FULL = {"sft", "ppo", "bi-level-gae"}  # take no policy class but full planning, or another only when told to


class Vowels(gym.Env[dict[str, str], str]):
    """Asks twice and likes vowels; what it says next depends on what it drew."""

    def __init__(self) -> None:
        text = gym.spaces.Text(500)
        self.observation_space = gym.spaces.Dict({"instruction": text, "message": text})
        self.action_space = text

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.turn, self.persona = 0, f"p{int(self.np_random.integers(3))}"
        return self.seen(), {"persona": self.persona}

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.turn += 1
        reward = (sum(letter in "aeiou" for letter in action) + float(self.np_random.random())) / (len(action) + 1)
        return self.seen(), reward, self.turn == 2, False, {"persona": self.persona}

    def seen(self) -> dict[str, str]:
        return {"instruction": f"Be {self.persona}.", "message": f"{int(self.np_random.integers(100))}?"}


@pytest.fixture
def settings(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the settings of a small run; the model comes from memory, and nothing is drawn."""
    if "AlternativeVowels-v0" not in gym.registry:
        gym.register("AlternativeVowels-v0", entry_point=Vowels)
    monkeypatch.setattr(training, "curve", lambda run: None)
    monkeypatch.setattr(training, "load_policy", lambda config: deepcopy(policy))
    return {
        "policy_class": "greedy",
        "iterations": 2,
        "batch": 4,
        "group": 2,
        "schedule": "constant",
        "learning_rate": 0.01,
        "env": {"id": "AlternativeVowels-v0", "max_turns": 2},
        "sampling": {"max_new_tokens": 3},
        "evaluation": {"conversations": 0},
    }


def test_every_agent_trains_or_says_why_not(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "save_checkpoint", lambda *unused: None)
    for name in METHODS:
        config = configs.from_dict({**settings, "agent": name})
        if name in FULL:  # takes no other class, or only when it is told to
            with pytest.raises(ConfigError, match=r"expected the policy class 'full'.*(credit=class|--policy-class)"):
                training.train(config, tmp_path / name)
            options = {"credit": "class"} if METHODS[name].credit else {}
            changed = {"agent_options": options} if options else {"policy_class": "full"}
            config = configs.from_dict({**settings, "agent": name, **changed})
        run = training.train(config, tmp_path / name)
        versions = [m["policy_version"] for m in run.metrics()]
        assert versions == ([1, 2] if METHODS[name].learns else [0, 0]), name


@pytest.mark.parametrize("agent", ["ppo", "refuel"])
def test_a_run_that_is_resumed_ends_as_one_that_was_not(agent: str, settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"agent": agent, "policy_class": "full", "steps_per_batch": 2}
    whole = training.train(configs.from_dict(settings), tmp_path / "whole")
    training.train(configs.from_dict({**settings, "iterations": 1}), tmp_path / "parts")
    parts = training.train(configs.from_dict(settings), tmp_path / "parts", resume=True)
    assert parts.trajectories_file.read_text() == whole.trajectories_file.read_text()
    for line, expected in zip(parts.metrics(), whole.metrics(), strict=True):
        assert {k: v for k, v in line.items() if "seconds" not in k} == {
            k: v for k, v in expected.items() if "seconds" not in k
        }
    files = ["adapter_model.safetensors", "optimizer.safetensors", *(["value_head.safetensors"] * (agent == "ppo"))]
    for file in files:
        one, other = (run.folder / "checkpoints" / "2" / file for run in (parts, whole))
        assert one.read_bytes() == other.read_bytes()
    assert len(read_jsonl(whole.trajectories_file)) == 8


def test_the_best_of_several_conversations_counts(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"iterations": 1, "evaluation": {"conversations": 6}}
    scores = [
        training.train(configs.from_dict({**settings, "agent": name}), tmp_path / name).evaluations()["after"]
        for name in ("base", "best-of-n")
    ]
    assert scores[1]["persona_consistency"] > scores[0]["persona_consistency"] + 0.02
    assert scores[0]["n_personas"] == scores[1]["n_personas"]


def test_settings_that_do_not_suit_an_agent_are_named(settings: dict[str, Any], tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"agent": "grpo", "group": 1}, r"expected group >= 2, got 1; add --set group=4"),
        ({"agent": "gppo"}, r"expected an agent out of .*, got 'gppo'; did you mean"),
        ({"agent": "sft", "policy_class": "auto"}, "got 'auto'"),
        ({"agent": "ppg", "agent_options": {"clip_low": 0.1}}, r"expected an option of 'ppg' \(none\), got 'clip_low'"),
        ({"agent": "grpo", "agent_options": {"discount": 0.1}}, "set discount without the prefix"),
    ]
    for changed, message in wrong:
        with pytest.raises(ConfigError, match=message):
            training.train(configs.from_dict({**settings, **changed}), tmp_path / "run")
