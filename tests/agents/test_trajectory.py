"""The turn ledger: file format, broken files, batches, logged dialogues."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ppg_agents.batch import batch
from ppg_agents.policy import Policy
from ppg_agents.trajectory import (
    SCHEMA,
    Trajectory,
    Turn,
    append,
    from_json,
    from_logged,
    read_jsonl,
    to_json,
    write_jsonl,
)


def turn(prompt: list[int], tokens: list[int], reward: float = 1.0, **fields: Any) -> Turn:
    log_probs = tuple(-0.1 * (i + 1) for i in range(len(tokens)))
    return Turn("m", "r", tuple(prompt), tuple(tokens), log_probs, reward, **fields)


def trajectory(*turns: Turn, **fields: Any) -> Trajectory:
    settings = {"instruction": "Bé Ann.", "persona": "p1", "domain": "d", "seed": 3, "terminated": True}
    return Trajectory(**{**settings, "turns": turns, "truncated": False, **fields})


VERDICT = {"status": "timeout", "score": None, "rationale": "späť\u2028line", "kind": ""}
LEDGER = [
    trajectory(turn([1, 2], [3, 4], 0.25), turn([5], [6], math.nan, verdict=VERDICT, policy_version=7)),
    trajectory(seed=None, terminated=False, truncated=True),
]


def test_file_round_trip_keeps_everything(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    write_jsonl(path, LEDGER[:1])
    append(path, LEDGER[1:])
    got = read_jsonl(path)
    assert [to_json(t) for t in got] == [to_json(t) for t in LEDGER]
    assert math.isnan(got[0].turns[1].reward)
    assert dataclasses.replace(got[0], turns=()) == dataclasses.replace(LEDGER[0], turns=())
    assert got[0].turns[0] == LEDGER[0].turns[0]
    other = trajectory(turn([1], [2], sampler="vllm", temperature=0.7), topic="maps")
    assert from_json(to_json(other)) == other
    assert "topic" not in to_json(LEDGER[0])
    assert got[1] == LEDGER[1]
    first = json.loads(path.read_text(encoding="utf-8").split("\n")[0])
    assert first["schema"] == SCHEMA == "ppg-trajectory/1"
    assert first["turns"][1]["reward"] is None


def test_spans_are_written_and_checked_and_may_be_absent() -> None:
    record = json.loads(to_json(LEDGER[0]))
    assert [t["span"] for t in record["turns"]] == [[2, 4], [5, 6]]
    assert LEDGER[0].spans() == [(0, 2, 4), (4, 5, 6)]
    for t in record["turns"]:
        for name in ("span", "sampler", "temperature"):
            del t[name]
    assert to_json(from_json(json.dumps(record))) == to_json(LEDGER[0])
    lost = json.loads(to_json(LEDGER[0]))
    del lost["turns"][0]
    with pytest.raises(ValueError, match=r"reply of turn 1 at its span \[5, 6\], got its tokens at \[1, 2\)"):
        from_json(json.dumps(lost))


def test_a_torn_last_line_is_dropped_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "t.jsonl"
    write_jsonl(path, LEDGER)
    whole = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        for cut in range(2, len(to_json(LEDGER[1]).encode()), 7):
            path.write_bytes(whole[:-cut])
            assert len(read_jsonl(path)) == 1
            assert f"{path}:2: dropped the last line, which was cut off" in caplog.text
            caplog.clear()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"schema": ', "Expecting value"),
        ('{"schema": "other/1"}', "expected schema 'ppg-trajectory/1', got 'other/1'"),
        ("[]", "got 'list'"),
        ('{"schema": "ppg-trajectory/1", "turns": []}', "fields of ppg-trajectory/1"),
    ],
)
def test_any_other_broken_line_is_an_error_with_its_place(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f"{to_json(LEDGER[0])}\n{line}\n{to_json(LEDGER[1])}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=reason) as error:
        read_jsonl(path)
    assert str(error.value).startswith(f"{path}:2: ")


def test_batch_golden() -> None:
    got = batch([*LEDGER, trajectory(turn([8], [9]))], pad_id=0, n_turns=3)
    assert got.ids.tolist() == [[1, 2, 3, 4, 5, 6], [0] * 6, [8, 9, 0, 0, 0, 0]]
    assert got.attention.int().tolist() == [[1] * 6, [0] * 6, [1, 1, 0, 0, 0, 0]]
    assert got.token_mask.int().tolist() == [[0, 0, 1, 1, 0, 1], [0] * 6, [0, 1, 0, 0, 0, 0]]
    assert got.turn_index.tolist() == [[0, 0, 0, 0, 1, 1], [0] * 6, [0] * 6]
    np.testing.assert_array_equal(got.rewards, [[0.25, np.nan, np.nan], [np.nan] * 3, [1, np.nan, np.nan]])
    assert got.valid.tolist() == [[True, False, False], [False] * 3, [True, False, False]]
    torch.testing.assert_close(got.sampling_log_probs[0], torch.tensor([0, 0, -0.1, -0.2, 0, -0.1]))
    assert (got.ids.dtype, got.rewards.dtype) == (torch.long, np.float64)
    with pytest.raises(ValueError, match="at least one"):
        batch([], 0)
    with pytest.raises(ValueError, match="n_turns=1"):
        batch(LEDGER, 0, n_turns=1)
    with pytest.raises(ValueError, match="one log-prob per token"):
        Turn("m", "r", (), (1,), (), 0.0)


def test_logged_dialogues_are_cut_at_whole_turns(policy: Policy, caplog: pytest.LogCaptureFixture) -> None:
    def said(message: str, reply: str, score: float | None) -> SimpleNamespace:
        status = "unparsed" if score is None else "scored"
        verdict = SimpleNamespace(score=score, to_dict=lambda: {"status": status, "score": score})
        return SimpleNamespace(message=message, reply=reply, verdict=verdict)

    lines = [said("", "I am Ann.", 1.0), said("Sure <|end|>?", "Yes.", None), said("x" * 99, "No.", 0.0)]
    persona = SimpleNamespace(id="p", instruction="Be Ann.")
    dialogue = SimpleNamespace(domain="d", persona=persona, turns=lines, topic="")
    with caplog.at_level(logging.WARNING):
        got, whole = from_logged([dialogue], policy, max_tokens=80) + from_logged([dialogue], policy)
    assert "1 of 1 dialogues cut at 80 tokens" in caplog.text
    assert (len(got.turns), got.truncated, got.terminated) == (2, True, False)
    assert (len(whole.turns), whole.truncated, whole.terminated) == (3, False, True)
    assert policy.tokenizer.decode(got.token_ids()) == (
        "<|bos|><|system|>Be Ann.<|end|><|user|><|end|><|assistant|>I am Ann.<|end|>"
        "<|user|>Sure < |end|>?<|end|><|assistant|>Yes.<|end|>"
    )
    assert math.isnan(got.turns[1].reward)
    assert got.turns[0].reward == 1.0
    assert all(math.isnan(p) for p in got.turns[0].log_probs)
    assert got.turns[1].verdict == {"status": "unparsed", "score": None}


def test_batch_of_a_long_ledger_is_what_the_policy_saw(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    rows = batch([LEDGER[0]], policy.pad_id)
    assert rows.ids[rows.attention].tolist() == LEDGER[0].token_ids()
