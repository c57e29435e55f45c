"""The loop on a toy environment: it learns, repeats itself, and a stop leaves no trace."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from safetensors.numpy import load_file

from ppg_agents import config as configs
from ppg_agents import offline as offline_learning
from ppg_agents import train as training
from ppg_agents.config import ConfigError, TrainConfig
from ppg_agents.credit import PolicyClass
from ppg_agents.evaluate import summarise
from ppg_agents.policy import Policy
from ppg_agents.rollout.environment import ConversationError
from ppg_agents.rollout.metrics import check_partner, partner_weights
from ppg_agents.runs import Run
from ppg_agents.terminal.interrupt import Interrupted
from ppg_agents.trajectory import Trajectory, Turn, from_json, read_jsonl, to_json


class Toy(gym.Env[dict[str, str], str]):
    """Asks two or three times; likes replies with letters from a to m; one turn may go unjudged."""

    def __init__(self, unjudged: int = 0, turns: int = 3, personas: int = 4) -> None:
        text = gym.spaces.Text(500)
        self.observation_space = gym.spaces.Dict({"instruction": text, "message": text})
        self.action_space = text
        self.unjudged, self.turns, self.personas = unjudged, turns, personas

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, str], dict[str, Any]]:
        super().reset(seed=seed)
        self.turn, self.persona = 0, f"p{int(self.np_random.integers(self.personas))}"
        return self.seen("hi"), {"turn": 0, "persona": self.persona, "reachable": 1.0}

    def step(self, action: str) -> tuple[dict[str, str], float, bool, bool, dict[str, Any]]:
        self.turn += 1
        score = sum("a" <= letter <= "m" for letter in action) / max(len(action), 1)
        judged = self.turn != self.unjudged
        verdict = {"status": "scored" if judged else "timeout", "score": score if judged else None}
        info = {"turn": self.turn, "persona": self.persona, "verdict": verdict}
        reward = score if judged else math.nan
        return self.seen(f"and {self.turn}?"), reward, self.turn >= self.turns, False, info

    def seen(self, message: str) -> dict[str, str]:
        return {"instruction": f"Be {self.persona}.", "message": message}


@pytest.fixture
def config(policy: Policy, tmp_path: Path) -> TrainConfig:
    """Return the settings of a small run on the toy, with a saved tiny model."""
    if "Toy-v0" not in gym.registry:
        gym.register("Toy-v0", entry_point=Toy)
    policy.model.unload().save_pretrained(tmp_path / "model")
    policy.tokenizer.save_pretrained(tmp_path / "model")
    settings = {
        "model": str(tmp_path / "model"),
        "iterations": 4,
        "batch": 4,
        "group": 2,
        "baseline": "moving-average",
        "checkpoint_every": 2,
        "learning_rate": 0.01,
        "env": {"id": "Toy-v0", "kwargs": {"unjudged": 2}, "max_turns": 3},
        "lora": {"rank": 4, "dropout": 0.1},
        "sampling": {"max_new_tokens": 4},
        "evaluation": {"conversations": 6},
    }
    return configs.from_dict(settings)


def records(run: Run) -> list[dict[str, Any]]:
    """Return the metrics without the clock."""
    return [{k: v for k, v in m.items() if not k.startswith("seconds_")} for m in run.metrics()]


def weights(run: Run) -> dict[str, Any]:
    latest = run.latest_checkpoint()
    assert latest is not None
    return load_file(latest[1] / "adapter_model.safetensors")


def assert_same(one: Run, other: Run) -> None:
    assert records(one) == records(other)
    assert one.trajectories_file.read_text() == other.trajectories_file.read_text()
    assert one.evaluations() == other.evaluations()
    for name, tensor in weights(one).items():
        assert np.array_equal(tensor, weights(other)[name]), name


@pytest.fixture
def whole(config: TrainConfig, tmp_path: Path) -> Run:
    """Return an uninterrupted run."""
    return training.train(config, tmp_path / "whole")


def stop_in(monkeypatch: pytest.MonkeyPatch, name: str, call: int, module: Any = training) -> None:
    """Send SIGINT when the loop calls one of its functions for the n-th time."""
    original, calls = getattr(module, name), iter(range(1, 1000))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, interrupted)


def test_a_run_leaves_its_folder_and_masks_unjudged_turns(whole: Run) -> None:
    names = {path.name for path in whole.folder.iterdir()}
    assert names == {
        "config.toml",
        "metrics.jsonl",
        "trajectories.jsonl",
        "evaluation.json",
        "held_out",
        "checkpoints",
        "curve.png",
    }
    assert [step for step, _ in whole.checkpoints()] == [2, 4]
    metrics = whole.metrics()
    assert [m["iteration"] for m in metrics] == [1, 2, 3, 4]
    assert all(m["judge_failures"] == 4 and m["reward_per_turn"][1] is None for m in metrics)
    trajectories = read_jsonl(whole.trajectories_file)
    assert len(trajectories) == 16
    first = [t.persona for t in trajectories[:4]]
    assert first[0] == first[1]
    assert first[2] == first[3]  # a group shares its persona
    after = whole.evaluations()["after"]
    assert (after["reachable"], after["judge_failures"], after["per_turn"][1]) == (1.0, 6, None)
    early, late = (read_jsonl(path) for path in whole.held_out().values())
    assert [(t.seed, t.persona, t.turns[0].message) for t in early] == [
        (t.seed, t.persona, t.turns[0].message) for t in late
    ]
    assert {turn.policy_version for t in late for turn in t.turns} == {4}
    assert summarise(late).persona_consistency == after["persona_consistency"]


def test_the_same_seed_gives_the_same_run(whole: Run, config: TrainConfig, tmp_path: Path) -> None:
    assert_same(training.train(config, tmp_path / "again"), whole)
    other = training.train(replace(config, seed=1), tmp_path / "other")
    assert records(other) != records(whole)


@pytest.mark.parametrize(
    ("function", "call", "saved"),
    [("collect", 3, 2), ("batch_metrics", 3, 3), ("play", 1, 0), ("play", 2, 4)],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    whole: Run,
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    call: int,
    saved: int,
) -> None:
    handler = signal.getsignal(signal.SIGINT)  # not the default one where the tests run in the background
    with monkeypatch.context() as patch:
        stop_in(patch, function, call)
        with pytest.raises(Interrupted, match=r"--resume .*stopped") as stop:
            training.train(config, tmp_path / "stopped")
    assert stop.value.iteration == saved
    run = Run.open(tmp_path / "stopped")
    assert run.latest_checkpoint() is not None
    assert signal.getsignal(signal.SIGINT) is handler
    assert_same(training.train(config, tmp_path / "stopped", resume=True), whole)


def test_a_crash_goes_back_to_the_last_checkpoint(
    whole: Run, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(1, 100))
    original = training.batch_metrics
    with monkeypatch.context() as patch:
        patch.setattr(training, "batch_metrics", lambda t: original(t) if next(calls) < 4 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            training.train(config, tmp_path / "crashed")
    run = Run.open(tmp_path / "crashed")
    assert [m["iteration"] for m in run.metrics()] == [1, 2, 3]
    run.metrics_file.write_text(run.metrics_file.read_text() + '{"torn')
    assert_same(training.train(config, run.folder, resume=True), whole)


def test_an_environment_that_fails_leaves_a_run_that_goes_on(
    whole: Run, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Toy.step, iter(range(10_000))

    def failing(self: Toy, action: str) -> Any:
        if next(calls) == 24 + 2 * 12 + 5:  # held-out before: 2 x 4 x 3 turns; an iteration: 4 x 3
            raise RuntimeError("the budget of 7 calls is used up")
        return original(self, action)

    with monkeypatch.context() as patch:
        patch.setattr(Toy, "step", failing)
        with pytest.raises(ConversationError, match=r"of 7 calls is used up; saved after iteration 2; .*--resume"):
            training.train(config, tmp_path / "failed")
    raised = replace(config, env=replace(config.env, max_failure_rate=0.5))
    assert_same(training.train(raised, tmp_path / "failed", resume=True), whole)


def test_resuming_with_other_settings_names_the_field(whole: Run, config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"batch: was 4, got 8; lora\.rank: was 4, got 8"):
        training.train(replace(config, batch=8, lora=replace(config.lora, rank=8)), whole.folder, resume=True)


def test_it_learns(config: TrainConfig, tmp_path: Path) -> None:
    easy = replace(
        config,
        iterations=25,
        batch=16,
        baseline="leave-one-out",
        env=replace(config.env, kwargs={}),
        learning_rate=0.02,
        lora=replace(config.lora, dropout=0.0),
        evaluation=replace(config.evaluation, conversations=32),
    )
    evaluations = training.train(easy, tmp_path / "run").evaluations()
    before, after = (evaluations[when]["persona_consistency"] for when in ("before", "after"))
    assert after > before + 0.2


def test_segments_must_fit_the_conversation(config: TrainConfig, tmp_path: Path) -> None:
    wrong = replace(config, policy_class=PolicyClass("segment", segments=(3, 3)))
    with pytest.raises(ConfigError, match=r"policy_class: .* sum to n = 3 turns, got \[3, 3\] = 6"):
        training.train(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_environment_that_is_not_there_is_named(config: TrainConfig, tmp_path: Path) -> None:
    for name in ("Nowhere-v0", "no_such_module:Toy-v0"):
        with pytest.raises(ConfigError, match=f"env.id: expected a registered environment, got '{name}'"):
            training.train(replace(config, env=replace(config.env, id=name)), tmp_path / "run")


def dialogue_file(folder: Path, dialogues: int = 12) -> Path:
    """Write a judged dialogue file in the benchmark's form: YES is a contradiction, one verdict is empty."""
    entries = []
    for i in range(dialogues):
        lines = [
            [0, "Therapist: How are you?\n"],
            [1, "Patient: Fine, fine.\n"],
            [2, "Therapist: Really?\n"],
            [3, "Patient: No, I am sad today.\n"],
        ]
        verdicts = [
            [1, "NO, it fits."],
            [3, "" if i == 3 else "YES, it does not fit." if i % 3 == 0 else "NO."],
        ]
        score = sum("YES" not in verdict[1] for verdict in verdicts) / len(verdicts)
        entries.append(
            {
                "task_name": "Therapy",
                "topic": "",
                "grade": "",
                "P1": "",
                "P2": f"You are patient number {i // 2}, who is sad.",
                "conversation": lines,
                "pturn": 1,
                "rounds": 4,
                "eval_prompt_consistency": verdicts,
                "P2_prompt_consistency_score": score,
            }
        )
    path = folder / "therapy" / "logged.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(entries))
    return path


@pytest.mark.parametrize(
    "planned",
    [
        {},
        {"policy_class": "greedy"},
        {"policy_class": "k-step", "lookahead": 2},
        {"policy_class": "segment 1,1"},
        {"policy_class": [[1, 0.5], [0, 1]]},
    ],
)
def test_offline_improves_the_held_out_likelihood_of_every_policy_class(
    config: TrainConfig, tmp_path: Path, planned: dict[str, Any]
) -> None:
    logged = {"baseline": "none", "offline": {"files": [str(dialogue_file(tmp_path))], "epochs": 2}}
    tables = configs.to_dict(config) | logged | planned
    run = training.train(configs.from_dict(tables), tmp_path / "run")
    before, after = (run.evaluations()[when] for when in ("before", "after"))
    for key in ("log_likelihood", "log_likelihood_per_token", "weighted_token_log_prob"):
        assert before[key] < after[key] < 0
    assert before["turns"] == after["turns"] > 0
    assert (run.folder / "curve.png").stat().st_size > 0
    report = json.loads((run.folder / "offline.json").read_text())
    assert not set(report["train"]["personas"]) & set(report["held_out"]["personas"])
    assert [f["unparsed"] for f in report["files"]] == [1]


def test_offline_goes_on_after_a_stop(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline = replace(config.offline, files=(str(dialogue_file(tmp_path)),), epochs=2)
    logged = replace(config, baseline="none", offline=offline)
    whole = training.train(logged, tmp_path / "whole")
    stop_in(monkeypatch, "batch_metrics", 3, offline_learning)
    with pytest.raises(Interrupted):
        training.train(logged, tmp_path / "stopped")
    again = training.train(logged, tmp_path / "stopped", resume=True)
    assert records(again) == records(whole)
    for name, tensor in weights(whole).items():
        assert np.array_equal(tensor, weights(again)[name])


def test_offline_the_groups_advantage_is_taken_of_the_whole_training_set(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offline = replace(config.offline, files=(str(dialogue_file(tmp_path)),), epochs=2)
    logged = replace(config, baseline="group", offline=offline)
    whole = training.train(logged, tmp_path / "whole")
    assert re.search(r"advantage: \d groups of one persona and topic, 0 of them with one", capsys.readouterr().err)
    assert "log_likelihood" not in whole.metrics()[0]  # what is raised is not the likelihood of these rewards
    stop_in(monkeypatch, "batch_metrics", 3, offline_learning)
    with pytest.raises(Interrupted):
        training.train(logged, tmp_path / "stopped")
    assert records(training.train(logged, tmp_path / "stopped", resume=True)) == records(whole)

    def alone(trajectories: list[Trajectory]) -> list[tuple[str, str]]:
        return [(str(i), "") for i, _ in enumerate(trajectories)]

    monkeypatch.setattr(offline_learning, "group_labels", alone)
    with pytest.raises(ConfigError, match=r"turn by turn: expected two of some, got one of each; use 'group'"):
        training.train(replace(logged, baseline="group-turn"), tmp_path / "alone")


def test_offline_segments_are_those_of_the_longest_dialogue(config: TrainConfig, tmp_path: Path) -> None:
    offline = replace(config.offline, files=(str(dialogue_file(tmp_path)),))
    wrong = replace(config, baseline="none", offline=offline, policy_class=PolicyClass.parse("segment 3,3,2"))
    with pytest.raises(ConfigError, match=r"sum to n = 2 turns, got \[3, 3, 2\] = 8"):
        training.train(wrong, tmp_path / "run")


def test_a_judge_that_fails_too_often_stops_the_run_whoever_counts() -> None:
    def played(lost: int, of: int) -> Trajectory:
        verdicts = [{"status": "timeout", "score": None, "rationale": "No answer."}] * lost
        verdicts += [{"status": "scored", "score": 1.0}] * (of - lost)
        turns = (Turn("hi", "well", (1,), (2,), (0.0,), math.nan, verdict) for verdict in verdicts)
        return Trajectory("Be.", "p", "toy", 0, tuple(turns), True, False)

    training.check_judge([played(5, 50), played(5, 50)], 0.05)  # 10 of the first 200
    with pytest.raises(ConversationError, match=r"at most 5% .* got 11 of 100; .*: 11 × \[timeout\] No answer.*'well'"):
        training.check_judge([played(6, 50), played(5, 50)], 0.05)
    training.check_judge([played(50, 50)] * 10, 1.0)


def played(
    turns: int, status: str = "ok", reason: str = "", rewards: tuple[float, ...] = (1.0, 0.5, 0.25, 0.0)
) -> Trajectory:
    """Return a conversation of so many turns, of four planned, that the partner's status ended."""
    verdict = {"status": "error", "score": None} if status == "no_opening" else {"status": "scored", "score": 1.0}
    scores = (math.nan,) if status == "no_opening" else rewards
    said = tuple(Turn("hi", f"well {t}", (1,), (2,), (0.0,), scores[t], verdict) for t in range(turns))
    over = status == "ok"
    return Trajectory("Be.", f"p{turns}", "toy", 0, said, over, not over, status, reason, lost=not over)


def test_a_partner_that_fails_too_often_stops_the_run_by_its_own_name() -> None:
    lost, whole = played(1, "timeout", "No answer."), played(4)
    check_partner([lost] * 10 + [whole], 0.05)  # 10 of the first 200
    check_partner([lost], 0.05)
    check_partner([played(1, "ended")] * 20, 0.05)
    check_partner([lost] * 20, 1.0)
    with pytest.raises(ConversationError) as fault:
        check_partner([lost] * 11 + [whole], 0.05)
    said = str(fault.value)
    assert "at most 5% of the partner's lines to be missing, got 11 of 26: faults of the partner ended 11 of 12" in said
    assert "mend the partner" in said
    assert said.endswith("The last causes: 11 × [timeout] No answer. (last: reply 'well 0')")
    with pytest.raises(ConversationError, match="ended 2 of 2 conversations; mend the partner"):
        check_partner([lost, lost], 0.5)
    never = [played(1, "no_opening", "no such model")] * 12
    training.check_judge(never, 0.0)
    with pytest.raises(ConversationError, match=r"never gave an opening line in 12 of 12.*\[no_opening\] no such m"):
        check_partner(never, 0.05)


def test_a_partner_that_fails_does_not_raise_the_consistency() -> None:
    whole = [played(4)] * 8
    lost = [played(1, "timeout")] * 4 + [played(2, "timeout")] * 2 + [played(4)] * 2
    assert partner_weights(whole).tolist() == [1.0] * 4
    assert partner_weights(lost).tolist() == [1.0, 2.0, 4.0, 4.0]
    for measure in (
        lambda some: training.batch_metrics(some)["consistency"],
        lambda some: summarise(some).persona_consistency,
    ):
        assert measure(whole) == measure(lost) == 1.75 / 4
    unopened = [*whole, played(1, "no_opening")]
    assert training.batch_metrics(unopened)["judge_failures"] == summarise(unopened).judge_failures == 0
    assert training.batch_metrics(unopened)["consistency"] == summarise(unopened).persona_consistency == 1.75 / 4
    short = [played(2, "ok")] * 4 + [played(4)] * 4  # the policy's own end is no fault
    assert partner_weights(short).tolist() == [1.0] * 4


def test_a_partner_s_reason_is_kept_in_the_file() -> None:
    lost = played(1, "timeout", "No answer.")
    assert from_json(to_json(lost)) == lost
    assert "partner_reason" not in to_json(played(4))
