"""Validation: the judge sees the conversation and no label, failures are counted, and a bad file is named by row."""

from __future__ import annotations

import csv
import importlib
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ppg_gym.data.files import DataError
from ppg_gym.domain.cast import personas
from ppg_gym.judges.lab.recorded import read_labels
from ppg_gym.judges.lab.validation import Validation, validate

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "consistent-llms"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/consistent-llms beside the project")
FAKE = '''
from ppg_gym.conversation import Verdict

seen = []

class Words:
    """Scores by words of the reply; fails on some."""

    def __init__(self, domain, options):
        self.options = options

    def check(self, persona):
        if "unjudgeable" in persona.instruction:
            raise ValueError("expected another persona")

    def judge(self, conversations):
        seen.extend(conversations)
        return [self._one(c.lines[-1].text) for c in conversations]

    def _one(self, reply):
        for status in ("timeout", "unparsed"):
            if status in reply:
                return Verdict(status, None, "It failed.")
        return Verdict("scored", 0.9 if "yes" in reply else 0.2)
'''
WORDS = "words_judge:Words"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Return a module with a judge that goes by a reply's words, importable by name."""
    (tmp_path / "words_judge.py").write_text(textwrap.dedent(FAKE))
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("words_judge")
    del sys.modules["words_judge"]


def table(folder: Path, *rows: tuple[Any, ...], columns: str = "domain,persona,history,reply,label") -> Path:
    path = folder / "labels.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns.split(","), *rows])
    return path


def row(
    reply: str, label: Any, persona: str = "I sail alone.", domain: str = "chatting", *history: str
) -> tuple[Any, ...]:
    return domain, persona, json.dumps(list(history or ("Hello?",))), reply, label


def check(path: Path, **options: Any) -> Validation:
    return validate(read_labels([path]), WORDS, {}, **options)


def test_failures_are_counted_and_left_out_per_domain(tmp_path: Path, fake: ModuleType) -> None:
    path = table(
        tmp_path,
        row("yes", 1),
        row("no", 0),
        row("unparsed", 0),
        row("yes", ""),
        row("yes", 0.3, "I fear cats.", "therapy"),
        row("timeout", 1, "I fear cats.", "therapy"),
        row("timeout", 1, "I fear cats.", "therapy"),
        row("yes", 1, "I fear cats.", "therapy"),
    )
    found = check(path)
    overall, chatting, therapy = found.parts
    assert [part.name for part in found.parts] == ["all", "chatting", "therapy"]
    assert (found.unlabelled, overall.lines, overall.judge.lines) == (1, 7, 4)
    assert overall.statuses == {"scored": 4, "unparsed": 1, "timeout": 2, "refused": 0, "error": 0}
    assert overall.to_dict()["shares"]["unparsed"] == pytest.approx(1 / 7)
    assert (overall.judge.agreement.value, chatting.judge.kappa.value) == (0.75, 1.0)
    assert (overall.constant.agreement.value, overall.constant.lines) == (0.5, 4)
    assert (overall.constant.kappa.value, overall.constant.auc.value) == (0.0, 0.5)
    assert (therapy.judge.lines, therapy.judge.auc.value) == (2, 0.5)
    text = found.table()
    assert "1 unparsed (14.3%)" in text
    assert "1 replies in the files carry no label" in text
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_judge_that_always_fails_has_no_statistics(tmp_path: Path, fake: ModuleType) -> None:
    (part,) = check(table(tmp_path, row("timeout", 1), row("timeout", 0))).parts
    assert (part.judge.lines, part.judge.agreement.value, part.judge.auc.value) == (0, None, None)
    assert "undefined: no line has both a label and a score" in check(tmp_path / "labels.csv").table()


def test_the_judge_sees_the_conversation_and_no_label(tmp_path: Path, fake: ModuleType) -> None:
    path = table(
        tmp_path,
        row("yes 1", 1, "I sail.", "chatting", "Who are you?", "yes 0", "Really?"),
        row("yes 2", 0, "I sail.", "chatting", "yes I open", "So do I."),
        ("chatting", "I sail.", "[]", "yes 3", 1),
    )
    check(path)
    said = [[(line.speaker, line.text) for line in c.lines] for c in fake.seen]
    assert said == [
        [("partner", "Who are you?"), ("policy", "yes 0"), ("partner", "Really?"), ("policy", "yes 1")],
        [("policy", "yes I open"), ("partner", "So do I."), ("policy", "yes 2")],
        [("policy", "yes 3")],
    ]
    assert all(c.verdicts == () for c in fake.seen)
    assert {c.persona.instruction for c in fake.seen} == {"I sail."}


def test_rows_of_one_dialogue_are_one_cluster(tmp_path: Path, fake: ModuleType) -> None:
    rows = [
        row("yes 1", 1, "I sail.", "chatting", "Hello?"),
        row("yes 2", 1, "I sail.", "chatting", "Hello?", "yes 1", "And?"),
        row("yes 3", 1, "I sail.", "chatting", "Another start."),
    ]
    assert check(table(tmp_path, *rows)).parts[0].judge.dialogues == 2
    marked = [(*cells, name) for cells, name in zip(rows, "abc", strict=True)]
    path = table(tmp_path, *marked, columns="domain,persona,history,reply,label,dialogue")
    assert check(path).parts[0].judge.dialogues == 3


def test_an_id_stands_for_the_embedded_persona(tmp_path: Path) -> None:
    persona = personas("chatting", "held-out")[0]
    path = table(tmp_path, row("I like it.", 1, persona.id))
    assert read_labels([path]).dialogues[0].persona == persona
    with pytest.raises(DataError, match=f"row 2: persona: expected the id .* did you mean {persona.id!r}"):
        read_labels([table(tmp_path, row("I like it.", 1, persona.id + "x"))])


def test_a_limit_draws_by_seed(tmp_path: Path, fake: ModuleType) -> None:
    path = table(tmp_path, *(row(f"yes {i}", i % 2) for i in range(40)))
    found = check(path, limit=10, seed=1)
    first = [c.lines[-1].text for c in fake.seen]
    assert (found.parts[0].lines, found.left_out, len(set(first))) == (10, 30, 10)
    check(path, limit=10, seed=1)
    check(path, limit=10, seed=2)
    again, other = fake.seen[10:20], fake.seen[20:]
    assert [c.lines[-1].text for c in again] == first != [c.lines[-1].text for c in other]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("a", 1), row("a", "good")], r"row 3: label: expected a number in \[0, 1\] or nothing, got 'good'"),
        ([row("a", 1.5)], r"row 2: label: expected a number in \[0, 1\]"),
        ([row("a", "nan")], "row 2: label"),
        ([row("a", 1, "", "chatting")], "row 2: persona: expected an id or a description"),
        ([row("a", 1, "I sail.", "cooking")], "row 2: domain: expected one of chatting, .* got 'cooking'"),
        ([("chatting", "I sail.", "Hello?", "a", 1)], "row 2: history: expected a JSON list of strings, got invalid"),
        ([("chatting", "I sail.", '["a", 1]', "a", 1)], "row 2: history: expected a JSON list of strings that say"),
        ([("chatting", "I sail.", "[]", "a")], "row 2: expected as many cells as the header"),
        ([row("a", 1), row("a", "x"), row("a", "y")], "row 3: label.*row 4: label"),
        ([row("a", "")], "expected at least one labelled reply, got none"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, rows: list[tuple[Any, ...]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_labels([table(tmp_path, *rows)])


def test_bad_columns_and_files_are_named(tmp_path: Path, fake: ModuleType) -> None:
    with pytest.raises(DataError, match="missing label, domain"):
        read_labels([table(tmp_path, columns="persona,history,reply")])
    with pytest.raises(DataError, match="got 'dialog'; did you mean 'dialogue'"):
        read_labels([table(tmp_path, columns="persona,history,reply,label,domain,dialog")])
    path = table(tmp_path, row("yes", 1))
    with pytest.raises(DataError, match="expected every file once"):
        read_labels([path, path])
    with pytest.raises(DataError, match="of domain 'therapy'; these files hold chatting"):
        read_labels([path], "therapy")
    path.write_bytes(b"persona,history,reply,label,domain\n\xff,[],a,1,chatting\n")
    with pytest.raises(DataError, match="readable UTF-8 CSV"):
        read_labels([path])
    with pytest.raises(ValueError, match="expected another persona"):
        check(table(tmp_path, row("yes", 1, "An unjudgeable one.")))
    assert not fake.seen


@needs_data
@pytest.mark.data
def test_a_real_file_is_judged_line_by_line(fake: ModuleType) -> None:
    labels = read_labels([DATA / "therapy" / "mistral-instruct_0_261.json"])
    found = validate(labels, WORDS, {}, limit=200)
    (part,) = found.parts
    assert (part.name, part.lines, found.unlabelled, found.left_out) == ("therapy", 200, 2, 418)
    assert part.judge.agreement.low < part.judge.agreement.value < part.judge.agreement.high
    assert part.constant.agreement.value == part.judge.consistent
    assert all(c.lines[-1].speaker == "policy" and c.lines[0].speaker == "partner" for c in fake.seen)
