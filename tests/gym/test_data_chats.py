"""Chats between two personas: both sides of each, nothing guessed, every skipped dialogue named with its reason."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from ppg_gym.data import RefusedError, read_dialogues
from ppg_gym.data.chats import COLUMNS
from ppg_gym.data.dialogues import NO_VERDICT, LoggedDialogue
from ppg_gym.domain.personas import prose_persona

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "synthetic-persona-chat" / "test.csv"


def table(folder: Path, *rows: tuple[str, ...]) -> Path:
    text = io.StringIO()
    csv.writer(text).writerows([COLUMNS, *rows])
    path = folder / "chats.csv"
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    return path


def text(folder: Path, *lines: str) -> Path:
    path = folder / "chats.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def said(dialogue: LoggedDialogue) -> list[tuple[str, str]]:
    assert all(turn.verdict == NO_VERDICT for turn in dialogue.turns)
    return [(turn.message, turn.reply) for turn in dialogue.turns]


def test_a_row_gives_both_sides(tmp_path: Path) -> None:
    row = ("I bake.\nI sail.", "I run.", "User 1: Hi :)\n\nUser 2: Yo.\r\nUser 2: And?\nUser 1: User: no")
    (first, second), report = read_dialogues(table(tmp_path, row))
    assert first.persona == prose_persona("I bake.\nI sail.", "chatting")
    assert said(first) == [("", "Hi :)"), ("Yo. And?", "User: no")]
    assert said(second) == [("Hi :)", "Yo. And?")]
    assert [(d.index, d.speaker, d.source) for d in (first, second)] == [(0, 1, "chats.csv"), (0, 2, "chats.csv")]
    assert (report.dialogues, report.lines, report.judged_lines, report.personas) == (1, 3, 0, 2)
    assert report.notes == ("1 lines joined to the same user's line before (row 2)",)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (("", "b", "User 1: Hi\nUser 2: Yo"), "the persona of user 1 is empty"),
        (("a", " \n", "User 1: Hi\nUser 2: Yo"), "the persona of user 2 is empty"),
        (("a", "I am [name].", "User 1: Hi\nUser 2: Yo"), "a placeholder is left in a text"),
        (("a", "b", ""), "no conversation"),
        (("a", "b", "User 1: Hi"), "fewer than two lines"),
        (("a", "b", "User 1: Hi\n(The next day)\nUser 2: Yo"), "a line without 'User 1:' or 'User 2:'"),
        (("a", "b", "User 1: Hi\nUser 3: Yo"), "a line without 'User 1:' or 'User 2:'"),
        (("a", "b", "User 1: Hi\nUser 2: "), "an empty line"),
        (("a", "b", "User 1: I'm [User 1's name]\nUser 2: Yo"), "a placeholder is left in a text"),
        (("a", "b", "User 1: I'm (user 1).\nUser 2: Yo"), "a placeholder is left in a text"),
        (("a", "b", "User 1: I'm (name).\nUser 2: Yo"), "a placeholder is left in a text"),
        (("a", "b", "User 1: Hi\nUser 2: Bye, User 1!"), "a placeholder is left in a text"),
        (("a", "b"), "another number of columns than the header"),
    ],
)
def test_a_row_that_does_not_parse_is_skipped_with_its_reason(tmp_path: Path, row: tuple[str, ...], why: str) -> None:
    good = ("a", "b", "User 1: Hi (really) [1]\nUser 2: Yo, users")
    dialogues, report = read_dialogues(table(tmp_path, good, row, good))
    assert [dialogue.index for dialogue in dialogues] == [0, 0, 2, 2]
    (problem,) = report.problems
    assert (problem.line, problem.where, problem.why) == (4, "row 3", why)
    assert report.skipped == (f"1 row skipped: {why} (row 3)",)


def test_a_quote_without_an_end_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path, ("a", "b", "User 1: Hi\nUser 2: Yo"))
    path.write_text(path.read_text() + 'a,"b\n')
    with pytest.raises(RefusedError, match=r"chats.csv:4: row 3: expected a row of CSV, got unexpected end of data"):
        read_dialogues(path)


SELF = ["1 your persona: i bake .", "2 your persona: i sail ."]
PARTNER = ["3 partner's persona: i run ."]


def test_self_only_with_candidates(tmp_path: Path) -> None:
    lines = [*SELF, "3 hi\tyo\t\tno|yo", "4 and ?\tbye\t\tbye|no", "1 your persona: x", "2 a\tb"]
    (first, second), report = read_dialogues(text(tmp_path, *lines))
    assert first.persona == prose_persona("i bake .\ni sail .", "chatting")
    assert (first.speaker, said(first)) == (1, [("hi", "yo"), ("and ?", "bye")])
    assert (second.index, said(second)) == (1, [("a", "b")])
    assert (report.dialogues, report.lines, report.problems) == (2, 6, ())


def test_both_personas_without_candidates(tmp_path: Path) -> None:
    lines = [*SELF, *PARTNER, "4 hi\tyo", "5 and ?\tbye", "6 ok"]
    (you, partner), _ = read_dialogues(text(tmp_path, *lines))
    assert (you.speaker, said(you)) == (1, [("hi", "yo"), ("and ?", "bye")])
    assert (partner.speaker, said(partner)) == (2, [("", "hi"), ("yo", "and ?"), ("bye", "ok")])
    assert partner.persona == prose_persona("i run .", "chatting")


def test_a_dialogue_told_from_both_sides_is_read_once(tmp_path: Path) -> None:
    ours = ["1 your persona: a", "2 partner's persona: b", "3 hi\tyo", "4 and ?\tbye"]
    theirs = ["1 your persona: b", "2 partner's persona: a", "3 __SILENCE__\thi", "4 yo\tand ?"]
    dialogues, report = read_dialogues(text(tmp_path, *ours, *theirs))
    assert [said(dialogue) for dialogue in dialogues] == [
        [("hi", "yo"), ("and ?", "bye")],
        [("", "hi"), ("yo", "and ?")],
    ]
    assert report.notes == ("2 sides left out: the dialogue is also there from the other side",)


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (["1 hi\tyo"], "no persona line"),
        (["1 your persona: "], "an empty persona line"),
        (["1 your persona: x"], "no utterance"),
        (["1 your persona: x", "3 hi\tyo"], "a line number is out of order"),
        (["1 your persona: x", "2 hi\tyo", "ok\tbye"], "a line without a number"),
        (["1 your persona: x", "2 hi", "3 a\tb"], "a line without an utterance and a reply"),
        (["1 your persona: x", "2 hi\t\t\ta|b"], "a line without an utterance and a reply"),
        (["1 your persona: x", "2 hi\ta|b"], "several replies to one utterance"),
        (["1 your persona: x", "2 hi\tyo", "3 your persona: y"], "a persona line after the first utterance"),
        (["1 your persona: x", "2 hi\tyo", "3 __SILENCE__\tyo"], "silence after the first utterance"),
        (["1 your persona: x", "2 hi"], "only one of the two speaks"),
    ],
)
def test_a_dialogue_that_does_not_parse_is_skipped_with_its_reason(tmp_path: Path, lines: list[str], why: str) -> None:
    good = ["1 your persona: g", "2 hi\tyo"]
    dialogues, report = read_dialogues(text(tmp_path, *good, *lines, *good[:1], "2 hi\tbye"))
    assert [dialogue.index for dialogue in dialogues] == [0, 2]
    assert [(p.line, p.why) for p in report.problems] == [(3, why)]


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_file(), reason="needs ../shared/data/synthetic-persona-chat beside the project")
def test_the_released_test_split() -> None:
    dialogues, report = read_dialogues(DATA)
    assert len({problem.line for problem in report.problems}) + report.dialogues == 968
    assert (report.dialogues, len(dialogues), report.judged_lines) == (551, 1102, 0)
    assert [sentence.partition(" (")[0] for sentence in report.skipped] == [
        "402 rows skipped: a placeholder is left in a text",
        "14 rows skipped: a line without 'User 1:' or 'User 2:'",
        "1 row skipped: no conversation",
    ]
    assert not any("[User" in turn.reply for dialogue in dialogues for turn in dialogue.turns)
