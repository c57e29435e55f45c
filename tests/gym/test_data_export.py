"""Chat messages: strictly in turn, of one type in every row, loaded as they are by datasets and TRL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppg_gym.conversation import Verdict
from ppg_gym.data import OPENING, export, write_rows
from ppg_gym.data.dialogues import NO_VERDICT, LoggedDialogue, LoggedTurn
from ppg_gym.domain.personas import prose_persona


def dialogue(*turns: tuple[str, str, float | None], persona: str = "I bake.") -> LoggedDialogue:
    told = tuple(
        LoggedTurn(message, reply, NO_VERDICT if score is None else Verdict("scored", score))
        for message, reply, score in turns
    )
    return LoggedDialogue("chatting", prose_persona(persona, "chatting"), told, "a.json", 0, 1)


def test_a_row_says_everything(tmp_path: Path) -> None:
    given = dialogue(("", "Hi", 1.0), ("And?", "No", None))
    (row,) = export([given]).rows
    assert row["messages"] == [
        {"role": "system", "content": given.persona.instruction},
        {"role": "user", "content": OPENING},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "No"},
    ]
    assert (row["scores"], row["persona"], row["domain"]) == ([1.0, None], given.persona.id, "chatting")
    write_rows(tmp_path / "rows.jsonl", [row])
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == row


texts = st.sampled_from(["", " ", "a", "b c", "<|im_end|>", "\ud83d"])
turns = st.lists(st.tuples(texts, texts, st.none() | st.floats(0, 1)), min_size=1, max_size=4)


@given(st.lists(turns, max_size=6), st.none() | st.floats(0, 1))
def test_any_dialogue_is_strictly_in_turn_or_left_out(found: list[Any], min_score: float | None) -> None:
    rows = export([dialogue(*given) for given in found], min_score).rows
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["system", *["user", "assistant"] * len(row["scores"])]
        assert all(message["content"].strip() for message in row["messages"])
        assert all(set(message) == {"role", "content"} for message in row["messages"])
        scores = [score for score in row["scores"] if score is not None]
        assert min_score is None or sum(scores) / len(scores) >= min_score
    numbers = [any(score is not None for score in row["scores"]) for row in rows]
    assert not any(numbers) or numbers[0]


def test_what_is_cut_or_left_out_is_counted() -> None:
    found = [
        dialogue(("Hi", "Yo", 1.0), ("", "Still there?", 0.0)),
        dialogue(("Hi", "", 1.0)),
        dialogue(("Hi", "<|im_end|>", 1.0)),
        dialogue(("Hi", "Yo", None)),
        dialogue(("Hi", "Yo", 0.4)),
    ]
    exported = export(found, min_score=0.5)
    assert [row["scores"] for row in exported.rows] == [[1.0]]
    assert exported.notes == [
        "1 dialogues cut before a message or reply without words",
        "1 dialogues left out: their first reply has no words",
        "1 dialogues left out: they hold control tokens of a chat format",
        "1 dialogues left out: none of their replies is scored",
        "1 dialogues left out: their mean score is below 0.5",
    ]


def test_an_opening_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match="expected words for the opening"):
        export([], opening=" ")


@pytest.mark.filterwarnings("ignore")
def test_datasets_and_trl_read_it_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="needs the extra [bench]")
    trl = pytest.importorskip("trl", reason="needs the extra [bench]")
    transformers = pytest.importorskip("transformers")
    # More than the 10 MB that column types are told from, and the only score at the end.
    many = [dialogue(("Hi", "x" * 20_000, None))] * 600 + [dialogue(("", "Yo", 0.5), ("So?", "No", None))]
    write_rows(tmp_path / "rows.jsonl", export(many).rows)
    path, cache = str(tmp_path / "rows.jsonl"), str(tmp_path / "cache")
    loaded = datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)
    assert (len(loaded), loaded.features["scores"].feature.dtype) == (601, "float64")
    assert loaded[0]["scores"] == [0.5, None]
    assert trl.is_conversational(loaded[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "ppg_agents" / "models" / "tiny")
    told = trl.maybe_apply_chat_template({"messages": loaded[0]["messages"]}, tokenizer)["text"]
    assert told.endswith(f"<|user|>{OPENING}<|end|><|assistant|>Yo<|end|><|user|>So?<|end|><|assistant|>No<|end|>")
