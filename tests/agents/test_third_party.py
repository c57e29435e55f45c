"""Somebody else's agent: installed as a package of its own, found by its name, trained by the loop."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from safetensors.torch import load_file

from ppg_agents import config as configs
from ppg_agents import train as training
from ppg_agents.agents import agents, make_agent
from ppg_agents.config import ConfigError, TrainConfig
from ppg_agents.policy import Policy

PACKAGE = '''\
"""REINFORCE with the batch's mean return as its baseline."""
import torch
from ppg_agents.rollout import Speaker
from ppg_agents.trajectory import batch

class Reinforce:
    def __init__(self, policy, mask, *, learning_rate, sampler, **others):
        self.policy, self.sampler = policy, sampler
        self.optimizer = torch.optim.SGD(policy.parameters(), lr=learning_rate(0))

    def start(self, n, seed=0):
        self.speaker = Speaker(self.policy, self.sampler, n)
        self.generator = torch.Generator(self.policy.device).manual_seed(seed)

    def act(self, observations):
        lines = observations["message"]
        said = self.speaker.reply(observations["instruction"], lines, [True] * len(lines), self.generator)
        return [self.policy.decode(reply[1].token_ids) if reply else "" for reply in said]

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
ENTRY_POINTS = "[ppg_agents.agents]\nreinforce-of-mine = my_agents:Reinforce\n"


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
def test_it_speaks(policy: Policy) -> None:
    from ppg_agents.generation.hf import HFSampler

    sampler = HFSampler(policy, 4, 1.0)
    agent = make_agent("reinforce-of-mine", policy, lambda n: None, learning_rate=lambda step: 0.1, sampler=sampler)
    assert type(agent).__name__ == "Reinforce"
    agent.start(2)
    replies = agent.act({"instruction": ["Be kind."] * 2, "message": ["Hello."] * 2})
    assert [type(reply) for reply in replies] == [str, str]


@pytest.mark.usefixtures("installed")
def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    points = tmp_path / "site-packages" / "my_agents-1.0.dist-info" / "entry_points.txt"
    points.write_text("[ppg_agents.agents]\ngrpo = my_agents:Reinforce\n")
    with pytest.raises(ValueError, match=r"one agent named 'grpo', got .*, an entry point of my-agents; rename it"):
        agents()


def test_without_the_package_the_nearest_name_is_offered(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected an agent out of .*, got 'reinforce-of-mine'"):
        training.train(config, tmp_path / "run")
