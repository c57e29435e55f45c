"""An environment that shows plain text: it is wrapped automatically, played in lockstep and one by one, and trained."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from ppg_agents import config as configs
from ppg_agents import train as training
from ppg_agents.config import ConfigError, TrainConfig
from ppg_agents.generation import Sample
from ppg_agents.generation.hf import HFSampler
from ppg_agents.policy import Policy
from ppg_agents.rollout.environment import make_env, make_envs, planned_turns
from ppg_agents.rollout.text_observation import TextObservation, TextObservations
from ppg_agents.trajectory import read_jsonl


class Riddle(gym.Env[str, str]):
    """Shows a line of text, likes vowels, and ends after three turns."""

    metadata: dict[str, Any] = {"render_modes": [], "ended_may_step": True}  # noqa: RUF012 (Gymnasium's own)
    max_turns = 3

    def __init__(self, heard: gym.Space[Any] | None = None) -> None:
        self.observation_space = gym.spaces.Text(100, charset="I0123456789 ameol?h")
        self.action_space = heard or gym.spaces.Text(500)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.turn, self.who = 0, int(self.np_random.integers(100))
        return f"I am {self.who}", {"persona": f"p{self.who}"}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turn += 1
        vowels = sum(letter in "aeiou" for letter in action) / max(1, len(action))
        return f"{self.turn}?", vowels, self.turn == self.max_turns, False, {"persona": f"p{self.who}"}


def vector(num_envs: int, mode: AutoresetMode = AutoresetMode.DISABLED, **kwargs: Any) -> SyncVectorEnv:
    """Return a vector environment of the author's own."""
    return SyncVectorEnv([lambda: Riddle(**kwargs)] * num_envs, autoreset_mode=mode)


class Told(Riddle):
    """Gives its instruction itself."""

    def __init__(self) -> None:
        super().__init__()
        text = gym.spaces.Text(100)
        self.observation_space = gym.spaces.Dict({"instruction": text, "message": text})  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def registered() -> None:
    if "Riddle-v0" not in gym.registry:
        gym.register("Riddle-v0", entry_point=Riddle)
        gym.register("OwnVectorRiddle-v0", entry_point=Riddle, vector_entry_point=vector)
        gym.register("Told-v0", entry_point=Told)


@pytest.fixture
def config(policy: Policy, tmp_path: Path) -> TrainConfig:
    policy.model.unload().save_pretrained(tmp_path / "model")
    policy.tokenizer.save_pretrained(tmp_path / "model")
    settings = {
        "model": str(tmp_path / "model"),
        "iterations": 2,
        "batch": 4,
        "group": 2,
        "env": {"id": "Riddle-v0"},
        "lora": {"rank": 4},
        "sampling": {"max_new_tokens": 4},
        "evaluation": {"conversations": 3},
    }
    return configs.from_dict(settings)


def with_env(config: TrainConfig, **env: Any) -> TrainConfig:
    tables = configs.to_dict(config)
    return configs.from_dict({**tables, "env": {**tables["env"], **env}})


@pytest.mark.parametrize("name", ["Riddle-v0", "OwnVectorRiddle-v0"])
@pytest.mark.parametrize("instruction", ["", "Löse es."])
def test_the_text_is_the_message_below_the_instruction(config: TrainConfig, name: str, instruction: str) -> None:
    config = with_env(config, id=name, instruction=instruction)
    envs, env = make_envs(config, 2, "train"), make_env(config, "train")
    seen, _ = envs.reset(seed=[5, 6])
    assert envs.observation_space.contains(seen)
    assert seen["instruction"] == (instruction, instruction)
    for i, seed in enumerate((5, 6)):
        one, _ = env.reset(seed=seed)
        assert env.observation_space.contains(one)
        assert one == {"instruction": instruction, "message": seen["message"][i]}
    assert env.step("a")[0] == {"instruction": instruction, "message": "1?"}
    assert envs.step(("a", "b"))[0] == {"instruction": (instruction,) * 2, "message": ("1?", "1?")}
    assert (envs.metadata["autoreset_mode"], envs.metadata["ended_may_step"]) == (AutoresetMode.DISABLED, True)
    assert planned_turns(envs, config) == 3
    envs.close()
    env.close()


def test_a_wrapped_environment_can_be_made_again_from_its_spec() -> None:
    env = TextObservation(gym.make("Riddle-v0"), instruction="Solve it.")
    assert env.spec is not None
    again = gym.make(env.spec)
    assert again.reset(seed=1)[0] == env.reset(seed=1)[0] == {"instruction": "Solve it.", "message": "I am 47"}
    with pytest.raises(ValueError, match="expected an environment whose observations are strings, got Dict"):
        TextObservation(env)
    with pytest.raises(ValueError, match="Expected autoreset_mode to be NEXT_STEP or DISABLED"):
        TextObservations(vector(2, AutoresetMode.SAME_STEP))


class OneByOne(HFSampler):
    """Answers every conversation on its own, as servers do."""

    def start(self, n: int) -> None:
        super().start(n)
        self.lock = threading.Lock()
        self.alone = [HFSampler(self.policy, self.max_new_tokens, self.temperature) for _ in range(n)]
        for sampler in self.alone:
            sampler.start(1)

    def reply_one(self, conversation: int, prompt: Sequence[int], seed: int) -> Sample | None:
        with self.lock:
            return self.alone[conversation].reply([prompt], torch.Generator().manual_seed(seed))[0]

    def cancel(self) -> None:
        """Nothing waits."""


@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize("instruction", ["", "Solve it."])
def test_it_is_trained_on(
    config: TrainConfig, lockstep: bool, instruction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts: list[int] = []
    original = training.collect_each
    monkeypatch.setattr(training, "collect_each", lambda *args: rollouts.append(1) or original(*args))
    if not lockstep:
        monkeypatch.setattr(training, "make_sampler", lambda policy, *rest, **others: OneByOne(policy, 4, 1.0))
    run = training.train(with_env(config, instruction=instruction), tmp_path / "run")
    assert [line["judged_turns"] for line in run.metrics()] == [12, 12]
    assert len(rollouts) == (0 if lockstep else 2)
    assert run.evaluations()["after"]["conversations"] == 3
    learned_from = list(read_jsonl(run.trajectories_file))
    assert {t.instruction for t in learned_from} == {instruction}
    assert {t.domain for t in learned_from} == {"Riddle-v0"}
    assert all([turn.message for turn in t.turns] == [f"I am {t.persona[1:]}", "1?", "2?"] for t in learned_from)
    tokenizer = Policy.load(str(config.model)).tokenizer
    began = tokenizer.decode(learned_from[0].turns[0].prompt_ids)
    assert began.startswith("<|bos|><|system|>Solve it.<|end|><|user|>I am" if instruction else "<|bos|><|user|>I am")


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"id": "CartPole-v1"}, "observations are a text, or a dict with 'instruction' and 'message', got 'CartPole"),
        ({"kwargs": {"heard": gym.spaces.Discrete(3)}}, r"actions are strings, got 'Riddle-v0' with Discrete\(3\)"),
        ({"id": "Told-v0", "instruction": "Be."}, "env.instruction: .* 'Told-v0', which gives its own"),
        ({"id": "ppg_gym:PersonaChat-v0", "instruction": "Be."}, "env.instruction: .*PersonaChat-v0.*; leave it out"),
    ],
)
def test_what_is_no_text_is_refused(config: TrainConfig, env: dict[str, Any], message: str) -> None:
    wrong = with_env(config, **env)
    with pytest.raises(ConfigError, match=message):
        make_env(wrong, "train")
    with pytest.raises(ConfigError, match=message):
        make_envs(wrong, 2, "train")
