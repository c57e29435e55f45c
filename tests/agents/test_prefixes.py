"""Rewards from scores of the conversation so far: values by hand, missing scores, refusals, and runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ppg_agents import config as configs
from ppg_agents.cli import main
from ppg_agents.config import ConfigError
from ppg_agents.prefixes import price, rewarded
from ppg_agents.runs.run import Run
from ppg_agents.trajectory import Trajectory, Turn, read_jsonl

NAN = math.nan


def scored(*scores: float, lost: bool = False) -> Trajectory:
    turns = tuple(Turn("m", "r", (1,), (2,), (0.0,), score) for score in scores)
    return Trajectory("i", "p", "d", None, turns, True, False, lost=lost)


def rewards(trajectory: Trajectory) -> list[float | None]:
    (found,) = rewarded([trajectory], "prefix")
    return [None if math.isnan(turn.reward) else turn.reward for turn in found.turns]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((0.25, 0.5, 1.0), [0.25, 0.25, 0.5]),
        ((0.75, 0.25, 0.5, 1.0), [0.75, 0.0, 0.0, 0.25]),  # what was lost again costs nothing
        ((0.0, 0.0), [0.0, 0.0]),
        ((-1.0, 0.5), [0.0, 0.5]),  # f is 0 before the first turn
        ((0.5, NAN, 0.75), [0.5, None, None]),  # who earned the step to .75 is unknown
        ((NAN, 1.0), [None, None]),
        ((), []),
    ],
)
def test_rewards_by_hand(scores: tuple[float, ...], expected: list[float | None]) -> None:
    assert rewards(scored(*scores)) == expected


def test_the_turns_own_scores_stay_what_they_are() -> None:
    played = [scored(0.75, 0.25)]
    assert rewarded(played, "turn") == played


def test_the_price_is_what_the_maximum_has_above_the_last_score() -> None:
    """Gaps 0.5 and 0; what lacks a score, or was lost, has no last one."""
    played = [scored(0.75, 0.25), scored(0.25, 0.5), scored(1.0, NAN), scored(1.0, 0.0, lost=True), scored()]
    assert price(played) == {"final_score": 0.375, "final_score_gap": 0.25}
    assert price(played[2:]) == {"final_score": None, "final_score_gap": None}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"discount": 0.9}, r"discount: expected 1 with reward 'prefix', got 0\.9"),
        ({"agent": "sft"}, "reward: expected 'turn' with the agent 'sft', got 'prefix'"),
    ],
)
def test_what_would_change_the_question_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configs.from_dict({"reward": "prefix", **settings})
    assert configs.from_dict({"reward": "turn", **settings}).reward == "turn"


SMALL = ("--batch", "4", "--set", "threads=1", "--set", "evaluation.conversations=0", "--set", "reward=prefix")


def test_an_online_run_learns_from_the_decomposed_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = ("--iterations", "1", "--set", "env.max_turns=3", "--set", "sampling.max_new_tokens=16")
    assert main(["train", *SMALL, *sizes, "--out", "run"]) == 0
    assert "the judge 'facts' scores the newest reply, so the run learns to give one" in capsys.readouterr().err
    run = Run.open(tmp_path / "run")
    (line,) = run.metrics()
    gaps, scores, credit = [], [], []
    for conversation in read_jsonl(run.trajectories_file):
        own = [turn.verdict["score"] for turn in conversation.turns]
        best = [max([0.0, *own[: t + 1]]) for t in range(len(own))]
        assert [turn.reward for turn in conversation.turns] == [b - a for a, b in zip([0.0, *best], best, strict=False)]
        scores += own
        gaps.append(best[-1] - own[-1])
        credit += [best[-1] - before for before in [0.0, *best[:-1]]]
    assert line["consistency"] == pytest.approx(sum(scores) / len(scores))  # the judge's scores, not the rewards
    assert line["credit_mean"] == pytest.approx(sum(credit) / len(credit))
    assert line["final_score_gap"] == pytest.approx(sum(gaps) / len(gaps))


def test_an_offline_run_does_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full planning over scores .5, 1, 0 has credits 1, .5, 0; with the scores as rewards they were 1.5, 1, 0."""
    monkeypatch.chdir(tmp_path)
    verdicts = [{"status": "scored", "score": score} for score in (0.5, 1.0, 0.0)]
    turns = [{"message": "Well?", "reply": "I am a nurse.", "verdict": verdict} for verdict in verdicts]
    schema = {"schema": "ppg-dialogue/1", "domain": "chatting", "turns": turns}
    lines = [{**schema, "persona": {"id": f"p{i}", "instruction": f"Be person {i}."}} for i in range(4)]
    lines += [{**line, "turns": [{**turns[0], "verdict": None}, *turns[1:]]} for line in lines]  # all of it unknown
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["train", *SMALL, "--offline", "talks.jsonl", "--out", "run"]) == 0
    (line,) = Run.open(tmp_path / "run").metrics()
    assert (line["consistency"], line["credit_mean"]) == (0.5, 0.5)
    assert (line["final_score"], line["final_score_gap"]) == (0.0, 1.0)
