"""Rescoring: the same judge says the same again, another one stands beside it, and the file is whole or not there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import ppg_gym  # noqa: F401 (registers the environment)
from ppg_gym.data.files import DataError, write_lines
from ppg_gym.domain.loading import DOMAINS
from ppg_gym.domain.reading import reader
from ppg_gym.domain.saying import say
from ppg_gym.judges.lab import rescoring
from ppg_gym.judges.lab.recorded import read_labels, read_recorded
from ppg_gym.judges.lab.rescoring import check_target, default_file, rescore


def play(domain: str, seed: int, kinds: tuple[str, ...] = ("truth", "slip", "vague", "evasion")) -> dict[str, Any]:
    """Return one conversation of the environment as a trajectory, played with replies of known kinds."""
    env = gym.make("ppg_gym:PersonaChat-v0", domain=domain, max_turns=4).unwrapped
    observation, _ = env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    rules = reader(domain)
    known = [kind for kind in kinds if kind in rules.domain.replies] or ["vague"]
    turns: list[dict[str, Any]] = []
    over = False
    while not over:
        message = observation["message"]
        reply = say(rules, known[int(rng.integers(len(known)))], env._conversation, rng)
        observation, reward, terminated, truncated, info = env.step(reply)
        turns.append(
            {
                "message": message,
                "reply": reply,
                "prompt_ids": [],
                "token_ids": [1],
                "log_probs": [None],
                "reward": reward,
                "verdict": info["verdict"],
                "policy_version": 0,
            }
        )
        over = terminated or truncated
    return {
        "schema": "ppg-trajectory/1",
        "instruction": observation["instruction"],
        "persona": info["persona"],
        "domain": domain,
        "seed": seed,
        "turns": turns,
        "terminated": terminated,
        "truncated": truncated,
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a folder with trajectories of every domain, the last line torn off."""
    lines = [json.dumps(play(domain, seed)) for domain in DOMAINS for seed in range(4)]
    (tmp_path / "trajectories.jsonl").write_text("\n".join(lines) + "\n" + lines[0][:80])
    return tmp_path


def test_the_judge_that_judged_says_the_same_again(run: Path) -> None:
    counts: list[int] = []
    dialogues = read_recorded(run)
    assert len(dialogues) == 4 * len(DOMAINS)
    assert all(dialogue.persona.facts for dialogue in dialogues)
    found = rescore(dialogues, "facts", {}, counts.append)
    assert counts[-1] == 16 * len(DOMAINS)
    assert all(pair.verdict == pair.turn.verdict for pair in found.pairs)
    parts = found.parts()
    assert [part.name for part in parts] == ["all", *DOMAINS, "turn 1", "turn 2", "turn 3", "turn 4"]
    assert [part.turns for part in parts] == [16 * len(DOMAINS), *[16] * len(DOMAINS), *[4 * len(DOMAINS)] * 4]
    assert parts[0].spearman.value == pytest.approx(1.0)
    assert (parts[0].agreement.agreement.value, parts[0].agreement.kappa.value) == (1.0, 1.0)
    assert parts[0].recorded_mean == parts[0].new_mean
    assert parts[0].new == {"scored": 16 * len(DOMAINS)}
    assert len(rescoring.table(parts).splitlines()) >= 9


def test_rows_hold_both_verdicts_and_can_be_read_as_labels(run: Path, tmp_path: Path) -> None:
    dialogues = read_recorded(run)
    rows = list(rescore(dialogues, "facts", {}).rows())
    first = json.loads((run / "trajectories.jsonl").read_text().splitlines()[0])
    assert rows[0]["recorded"] == rows[0]["verdict"] == first["turns"][0]["verdict"]
    assert [rows[0][key] for key in ("dialogue", "turn", "persona")] == [0, 1, first["persona"]]
    path = tmp_path / "rescored.jsonl"
    write_lines(path, rows)
    again = read_labels([path]).dialogues
    assert [d.turns for d in again] == [d.turns for d in dialogues]
    assert [d.persona for d in again] == [d.persona for d in dialogues]

    write_lines(path, [{**rows[0], "label": 0.25}, {**rows[1], "label": None}, *rows[2:4]])
    labels = read_labels([path])
    assert [turn.verdict.score for turn in labels.dialogues[0].turns] == [0.25, None, None, None]
    assert labels.unlabelled == 3
    write_lines(path, [rows[0], rows[2]])
    with pytest.raises(DataError, match=r"rescored.jsonl:2: expected turn 2 of dialogue 0, got 3; keep all rows"):
        read_labels([path])
    write_lines(path, [rows[0], {**rows[1], "recorded": {"status": "scored", "score": 2}}])
    with pytest.raises(DataError, match=r"rescored.jsonl:2: expected a score in \[0, 1\]"):
        read_labels([path])


def test_a_persona_whose_instruction_was_changed_is_prose(run: Path) -> None:
    record = json.loads((run / "trajectories.jsonl").read_text().splitlines()[0])
    record["instruction"] += " And you sail."
    write_lines(run / "changed.jsonl", [record])
    (dialogue,) = read_recorded(run / "changed.jsonl")
    assert (dialogue.persona.facts, dialogue.persona.instruction) == ({}, record["instruction"])
    with pytest.raises(ValueError, match="expected a persona with a known value"):
        rescore([dialogue], "facts", {})


def test_turns_without_a_score_and_unopened_conversations(run: Path) -> None:
    whole, unopened, bare = play("chatting", 1), play("chatting", 2), play("chatting", 3)
    whole["turns"][1] |= {"reward": None, "verdict": {"status": "timeout", "score": None, "rationale": "", "kind": ""}}
    lost = {"status": "error", "score": None, "rationale": "", "kind": ""}
    unopened["turns"] = [unopened["turns"][0] | {"message": "", "reward": None, "verdict": lost}]
    bare["turns"] = [turn | {"verdict": {}} for turn in bare["turns"]]
    write_lines(run / "some.jsonl", [whole, unopened, bare])
    found = rescore(read_recorded(run / "some.jsonl"), "facts", {})
    overall = found.parts()[0]
    assert overall.recorded == {"scored": 7, "timeout": 1, "error": 1}
    assert overall.new == {"scored": 8, "error": 1}
    assert (overall.turns, overall.agreement.lines) == (9, 7)
    assert "1 error (11.1%)" in rescoring.table(found.parts())
    scores = [pair.turn.verdict.score for pair in found.pairs[5:]]
    assert scores == [turn["reward"] for turn in bare["turns"]]
    assert all(math.isfinite(score) for score in scores)


def test_a_constant_judge_has_no_correlation(run: Path) -> None:
    write_lines(run / "same.jsonl", [play("chatting", seed, ("truth",)) for seed in range(3)])
    (overall, *_) = rescore(read_recorded(run / "same.jsonl"), "facts", {}).parts()
    assert (overall.spearman.value, overall.agreement.kappa.value) == (None, None)
    assert "Spearman is undefined: the recorded scores are all the same" in rescoring.table([overall])


def test_wrong_files_are_named(run: Path) -> None:
    text = (run / "trajectories.jsonl").read_text()
    broken = run / "broken.jsonl"
    broken.write_text(text.replace("\n", "\n{oops}\n", 1))
    with pytest.raises(DataError, match=r"broken.jsonl:2"):
        read_recorded(broken)
    broken.write_text(text.splitlines()[0].replace('"domain": "chatting"', '"domain": ""') + "\n")
    with pytest.raises(DataError, match="name its domain, got ''; give --domain"):
        read_recorded(broken)
    assert read_recorded(broken, "chatting")[0].persona.facts
    with pytest.raises(DataError, match=r"nothing.jsonl: expected a readable file"):
        read_recorded(run / "nothing.jsonl")
    with pytest.raises(ValueError, match=r"expected a judge out of facts, .* did you mean 'facts'"):
        rescore(read_recorded(run), "fakts", {})


def test_only_an_earlier_rescoring_is_replaced(run: Path) -> None:
    assert default_file(run, "my.module:Judge") == run / "rescored-my.module-Judge.jsonl"
    assert default_file(run / "a.jsonl", "llm") == run / "a-rescored-llm.jsonl"
    target = run / "out.jsonl"
    check_target(target)
    write_lines(target, rescore(read_recorded(run)[:1], "facts", {}).rows())
    check_target(target)
    with pytest.raises(ValueError, match=r"got .*trajectories.jsonl; give another --out"):
        check_target(run / "trajectories.jsonl")
    with pytest.raises(ValueError, match="got the folder"):
        check_target(run)
