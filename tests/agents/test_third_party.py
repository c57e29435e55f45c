"""Somebody else's agent: installed as a package of its own, found by its name, trained by the loop."""

from __future__ import annotations

import importlib
import io
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from safetensors.torch import load_file

from ppg_agents import config as configs
from ppg_agents import train as training
from ppg_agents.agents import Needs, agents, make_agent
from ppg_agents.cli import main as cli
from ppg_agents.config import ConfigError, TrainConfig
from ppg_agents.policy import Policy
from ppg_agents.rollout.speaker import PolicySpeaker, speaker_of
from ppg_agents.trajectory import read_jsonl

PACKAGE = '''\
"""REINFORCE with the batch's mean return as its baseline."""
import torch
from ppg_agents.agents import Agent
from ppg_agents.batch import batch

class Reinforce(Agent):
    def __init__(self, policy, mask, *, learning_rate, sampler, **others):
        self.policy, self.sampler = policy, sampler
        self.optimizer = torch.optim.SGD(policy.parameters(), lr=learning_rate(0))

    def learn(self, trajectories):
        data = batch(trajectories, self.policy.pad_id)
        returns = torch.tensor([sum(t.judged()) for t in trajectories])
        log_probs = self.policy.log_probs(data.ids, data.attention, data.token_mask).sum(1)
        loss = -((returns - returns.mean()).to(log_probs) * log_probs).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.policy.version += 1
        return {"loss": loss.item(), "policy_version": self.policy.version}

    def save(self, folder):
        self.policy.save(folder)
        (folder / "version").write_text(str(self.policy.version))

    def load(self, folder):
        self.policy.load_weights(folder)
        self.policy.version = int((folder / "version").read_text())
'''
PACKAGE += '''

class Parrot:
    """Says a word of its own as often as it has learned, and the partner's line after it."""

    needs = Needs()

    def __init__(self, policy, mask, **settings):
        self.policy, self.word, self.heard = policy, "a", []

    def start(self, n, seed=0):
        self.heard.append((n, seed))

    def act(self, observations):
        assert len(observations["instruction"]) == len(observations["message"])
        return [f"{self.word} {message}" for message in observations["message"]]

    def learn(self, trajectories):
        self.word += "e"
        self.policy.version += 1
        return {"policy_version": self.policy.version}

    def save(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "word").write_text(self.word)

    def load(self, folder):
        self.word = (folder / "word").read_text()
        self.policy.version = len(self.word) - 1
'''
PACKAGE = PACKAGE.replace("import Agent\n", "import Agent, Needs\n")
ENTRY_POINTS = "[ppg_agents.agents]\nreinforce-of-mine = my_agents:Reinforce\nparrot = my_agents:Parrot\n"


class Vowels(gym.Env[dict[str, str], str]):
    """Asks three times and likes vowels."""

    def __init__(self) -> None:
        text = gym.spaces.Text(500)
        self.observation_space = gym.spaces.Dict({"instruction": text, "message": text})
        self.action_space = text

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.turn = 0
        return self.seen(), {"persona": "p"}

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.turn += 1
        reward = sum(letter in "aeiou" for letter in action) / max(1, len(action))
        return self.seen(), reward, self.turn == 3, False, {"persona": "p"}

    def seen(self) -> dict[str, str]:
        return {"instruction": "Like vowels.", "message": f"{self.turn}?"}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lay the package out as an installer does."""
    site = tmp_path / "site-packages"
    info = site / "my_agents-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "my_agents.py").write_text(PACKAGE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-agents\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(site))
    yield
    monkeypatch.undo()
    importlib.invalidate_caches()
    sys.modules.pop("my_agents", None)


@pytest.fixture
def config(policy: Policy, tmp_path: Path) -> TrainConfig:
    if "Vowels-v0" not in gym.registry:
        gym.register("Vowels-v0", entry_point=Vowels)
    policy.model.unload().save_pretrained(tmp_path / "model")
    policy.tokenizer.save_pretrained(tmp_path / "model")
    settings = {
        "agent": "reinforce-of-mine",
        "model": str(tmp_path / "model"),
        "iterations": 2,
        "batch": 4,
        "group": 2,
        "learning_rate": 0.05,
        "env": {"id": "Vowels-v0", "max_turns": 3},
        "lora": {"rank": 4},
        "sampling": {"max_new_tokens": 4},
        "evaluation": {"conversations": 2},
    }
    return configs.from_dict(settings)


@pytest.mark.usefixtures("installed")
def test_an_installed_agent_is_found_and_trained(config: TrainConfig, tmp_path: Path) -> None:
    assert "reinforce-of-mine" in agents()
    run = training.train(config, tmp_path / "run")
    assert [m["iteration"] for m in run.metrics()] == [1, 2]
    assert [m["policy_version"] for m in run.metrics()] == [1, 2]
    weights = load_file(run.folder / "checkpoints" / "2" / "adapter_model.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in weights.items() if "lora_B" in name)  # zero before learning
    assert training.train(config, run.folder, resume=True).metrics() == run.metrics()


@pytest.mark.usefixtures("installed")
def test_an_agent_that_speaks_for_itself_is_heard_everywhere(config: TrainConfig, tmp_path: Path, capsys: Any) -> None:
    """In training, in evaluation before and after, by ``evaluate`` and ``rollout`` on the run, and when resumed."""
    config = replace(config, agent="parrot", checkpoint_every=1)
    run = training.train(config, tmp_path / "run")
    played = read_jsonl(run.trajectories_file)
    assert [[turn.reply for turn in talk.turns] for talk in played[:4]] == [["a 0?", "a 1?", "a 2?"]] * 4
    assert [[turn.reply for turn in talk.turns] for talk in played[4:]] == [["ae 0?", "ae 1?", "ae 2?"]] * 4
    assert {turn.sampler for talk in played for turn in talk.turns} == {"agent"}
    assert {turn.policy_version for turn in played[4].turns} == {1}
    assert all(math.isnan(p) for turn in played[0].turns for p in turn.log_probs)
    evaluations = run.evaluations()
    assert evaluations["before"]["persona_consistency"] == pytest.approx(1 / 4)
    assert evaluations["after"]["persona_consistency"] == pytest.approx(3 / 6)
    assert cli(["evaluate", str(run.folder), "--conversations", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["persona_consistency"] == pytest.approx(3 / 6)
    assert cli(["rollout", str(run.folder), "--conversations", "2", "--out", str(tmp_path / "talks.jsonl")]) == 0
    assert {turn.reply for talk in read_jsonl(tmp_path / "talks.jsonl") for turn in talk.turns} == {
        "aee 0?",
        "aee 1?",
        "aee 2?",
    }
    again = training.train(replace(config, iterations=3), run.folder, resume=True)
    assert read_jsonl(again.trajectories_file)[8].turns[0].reply == "aee 0?"


@pytest.mark.usefixtures("installed")
def test_an_agent_that_speaks_for_itself_is_heard_at_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello there.\n\n"))
    assert cli(["chat", "tiny", "--seed", "1", "--set", "agent=parrot"]) == 0
    assert "persona> a Hello there." in capsys.readouterr().out


@pytest.mark.usefixtures("installed")
def test_what_an_agent_answers_is_checked(policy: Policy) -> None:
    from ppg_agents.generation.hf import HFSampler

    sampler = HFSampler(policy, 4, 1.0)
    agent: Any = make_agent("parrot", policy, None)
    agent.act = lambda observations: [None]
    speaker = speaker_of(agent, policy, sampler)
    speaker.start(1, torch.Generator().manual_seed(3))
    assert agent.heard[0][0] == 1
    with pytest.raises(ValueError, match=r"expected 1 texts from Parrot.act, got 1 of NoneType"):
        speaker.reply(["i"], ["m"], [True], None)
    reinforce = make_agent("reinforce-of-mine", policy, None, learning_rate=lambda step: 0.1, sampler=sampler)
    assert isinstance(speaker_of(reinforce, policy, sampler), PolicySpeaker)
    assert reinforce.needs == Needs()


@pytest.mark.usefixtures("installed")
def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    points = tmp_path / "site-packages" / "my_agents-1.0.dist-info" / "entry_points.txt"
    points.write_text("[ppg_agents.agents]\ngrpo = my_agents:Reinforce\n")
    with pytest.raises(ValueError, match=r"one agent named 'grpo', got .*, an entry point of my-agents; rename it"):
        agents()


def test_without_the_package_the_nearest_name_is_offered(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected an agent out of .*, got 'reinforce-of-mine'"):
        training.train(config, tmp_path / "run")
