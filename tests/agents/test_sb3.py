"""Agents of stable-baselines3: the library takes the environment, learns, repeats itself, and comes back from disk."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3", reason="needs the extra sb3")

from stable_baselines3.common.env_checker import check_env

from ppg_agents.agents.sb3 import (
    ALGORITHMS,
    ENVIRONMENT,
    CandidateScorer,
    Uniform,
    evaluate_sb3,
    load_sb3,
    play_sb3,
    train_sb3,
)
from ppg_gym.conversation import Conversation, Verdict
from ppg_gym.judges.facts import FactsJudge

SMALL = {"domain": "chatting", "candidates": 3, "features_options": {"buckets": 16}}


def choices(model: Any, conversations: int = 2) -> list[str]:
    """Return every reply that an agent chooses on a few held-out personas."""
    played, _ = play_sb3(model, SMALL, conversations=conversations)
    return [turn.reply for trajectory in played for turn in trajectory.turns]


@pytest.mark.parametrize("domain", ["chatting", "education", "therapy"])
def test_the_library_takes_the_environment(domain: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(ENVIRONMENT, domain=domain, disable_env_checker=True), warn=True)


def test_ppo_learns_to_choose(tmp_path: Path) -> None:
    before = evaluate_sb3(Uniform(3), SMALL, conversations=24)
    trained = train_sb3("sb3-ppo", SMALL, timesteps=1536, out=tmp_path)
    after = evaluate_sb3(tmp_path, conversations=24, deterministic=True)
    assert trained.judged_turns == 1536
    assert trained.curve[-1][1] > trained.curve[0][1]
    assert after.ci95[0] > before.ci95[1] + 0.1
    assert (after.judge_failures, after.reachable, len(after.per_turn)) == (0, 1.0, 8)


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("sb3-ppo", {"n_steps": 16}),
        ("sb3-a2c", {}),
        ("sb3-dqn", {"learning_starts": 32, "buffer_size": 1000}),
    ],
)
def test_seed_and_round_trip(algorithm: str, options: dict[str, Any], tmp_path: Path) -> None:
    def run(name: str, seed: int) -> Any:
        trained = train_sb3(algorithm, SMALL, timesteps=128, out=tmp_path / name, seed=seed, **options)
        assert trained.judged_turns == 128
        return load_sb3(trained.folder)[0]

    one, again, other = run("one", 3), run("again", 3), run("other", 4)
    assert isinstance(one, ALGORITHMS[algorithm])
    pairs = list(zip(one.policy.parameters(), again.policy.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(one.policy.parameters(), other.policy.parameters(), strict=True))
    one.save(tmp_path / "copy.zip")
    copy = ALGORITHMS[algorithm].load(tmp_path / "copy.zip")
    assert choices(copy) == choices(one) == choices(tmp_path / "one")
    record = json.loads((tmp_path / "one" / "sb3.json").read_text())
    assert (record["seed"], record["env_kwargs"]["personas"]) == (3, "train")


def test_it_is_evaluated_as_it_speaks_with_the_discount_of_the_run(tmp_path: Path) -> None:
    """The same draws every time, whatever else was drawn; not always the best candidate."""
    options: dict[str, dict[str, Any]] = {"sb3-ppo": {"n_steps": 16}, "sb3-dqn": {"learning_starts": 32}}
    for name, extra in options.items():
        train_sb3(name, SMALL, timesteps=128, out=tmp_path / name, discount=0.9, **extra)
        assert load_sb3(tmp_path / name)[0].gamma == 0.9
        drawn = choices(tmp_path / name, 8)
        torch.manual_seed(7)
        np.random.seed(7)
        assert choices(tmp_path / name, 8) == drawn
        best, _ = play_sb3(tmp_path / name, SMALL, conversations=8, deterministic=True)
        assert [turn.reply for trajectory in best for turn in trajectory.turns] != drawn
    train_sb3("sb3-dqn", SMALL, timesteps=40, out=tmp_path / "plain", learning_starts=32)
    assert load_sb3(tmp_path / "plain")[0].gamma == 1.0
    with pytest.raises(ValueError, match="got 'gamma'; set discount"):
        train_sb3("sb3-dqn", SMALL, timesteps=8, out=tmp_path / "other", gamma=0.5)


def test_a_candidate_s_place_means_nothing(tmp_path: Path) -> None:
    options = {"learning_starts": 32, "buffer_size": 1000}
    for algorithm, extra in (("sb3-ppo", {"n_steps": 16}), ("sb3-dqn", options)):
        train_sb3(algorithm, SMALL, timesteps=128, out=tmp_path / algorithm, **extra)
        model, _ = load_sb3(tmp_path / algorithm)
        assert not all(parameter.requires_grad for parameter in model.policy.parameters())
        env = gym.make(ENVIRONMENT, **SMALL)
        shared, n, each = env.get_wrapper_attr("layout")
        row = env.reset(seed=1)[0]
        order = np.array([2, 0, 1])
        turned = np.concatenate([row[:shared], row[shared:].reshape(n, each)[order].ravel()])
        chosen, after = (int(model.predict(x, deterministic=True)[0]) for x in (row, turned))
        assert order[after] == chosen


def test_the_scorer_reads_the_layout() -> None:
    scorer = CandidateScorer(gym.spaces.Box(0, 1, (2 + 3 * 4,)), (2, 3, 4), width=5)
    rows = torch.rand(6, 14)
    expected = [scorer.net(torch.cat([rows[:, :2], rows[:, 2 + 4 * i : 6 + 4 * i]], 1)) for i in range(3)]
    torch.testing.assert_close(scorer(rows), torch.cat(expected, 1))


def test_held_out_conversations_are_those_of_every_other_agent() -> None:
    played, reachable = play_sb3(Uniform(3), SMALL, conversations=5, seed=9)
    seeds = [int(s) for s in np.random.SeedSequence(9).generate_state(5)]
    envs = gym.make_vec("ppg_gym:PersonaChat-v0", 5, domain="chatting", personas="held-out")
    observations, info = envs.reset(seed=seeds)
    assert [t.persona for t in played] == list(info["persona"])
    assert [t.turns[0].message for t in played] == list(observations["message"])
    assert [t.instruction for t in played] == list(observations["instruction"])
    assert reachable.tolist() == [1.0] * 5
    assert all(t.terminated and len(t.turns) == 8 for t in played)


def test_a_lost_judge_stops_training_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = FactsJudge.judge, iter(range(10_000))

    def judge(self: FactsJudge, conversations: Sequence[Conversation]) -> list[Verdict]:
        failed = Verdict("timeout", None, "too late")
        return [failed for _ in conversations] if next(calls) == 100 else original(self, conversations)

    monkeypatch.setattr(FactsJudge, "judge", judge)
    lenient = {**SMALL, "on_judge_failure": "nan", "max_failure_rate": 1.0}
    with pytest.raises(RuntimeError, match=r"got none \(timeout: too late\)") as stop:
        train_sb3("sb3-a2c", lenient, timesteps=128, out=tmp_path)
    assert "the agent as it was after 96 judged turns is in" in stop.value.__notes__[0]
    monkeypatch.undo()
    assert math.isfinite(evaluate_sb3(tmp_path, conversations=2).persona_consistency)


def test_evaluation_leaves_unjudged_turns_out(monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = FactsJudge.judge, iter(range(10_000))

    def judge(self: FactsJudge, conversations: Sequence[Conversation]) -> list[Verdict]:
        failed = Verdict("timeout", None, "too late")
        return [failed for _ in conversations] if next(calls) % 4 == 0 else original(self, conversations)

    monkeypatch.setattr(FactsJudge, "judge", judge)
    lenient = {**SMALL, "on_judge_failure": "nan", "max_failure_rate": 1.0}
    result = evaluate_sb3(Uniform(3), lenient, conversations=6)
    assert (result.judge_failures, result.judge_failure_rate) == (12, 0.25)
    assert math.isfinite(result.persona_consistency)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sb3-dqn, got 'sb3-pp0'; did you mean 'sb3-ppo'\?"):
        train_sb3("sb3-pp0", SMALL, timesteps=8, out=tmp_path)
    with pytest.raises(ValueError, match=r"sb3-a2c takes, got 'n_step'; did you mean 'n_steps'\?"):
        train_sb3("sb3-a2c", SMALL, timesteps=8, out=tmp_path, n_step=5)
    (tmp_path / "model.zip").touch()
    with pytest.raises(FileExistsError, match="expected a folder without a model"):
        train_sb3("sb3-a2c", SMALL, timesteps=8, out=tmp_path)
    (tmp_path / "sb3.json").write_text('{"schema": "other/1"}')
    with pytest.raises(ValueError, match="expected schema 'ppg-sb3/1', got 'other/1'"):
        load_sb3(tmp_path)
