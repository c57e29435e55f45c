"""Logged dialogues: polarity from the file's own scores, no guessed verdict, no persona on both sides."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppg_gym.conversation import Persona
from ppg_gym.data import read_dialogues, write_dialogues
from ppg_gym.data.dialogues import LoggedDialogue, split_by_persona
from ppg_gym.data.files import DataError
from ppg_gym.domain.personas import persona_key, read_personas, role_play_instruction

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "consistent-llms"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/consistent-llms beside the project")
ANSWERS = ["It fits her job. NO", "She denies her job.\n\nYES", "Please provide the line.", "NO"]


def lesson(verdicts: list[str], score: float, **changes: Any) -> dict[str, Any]:
    """A dialogue in which a student answers a teacher once per verdict."""
    lines = [text for i in range(len(verdicts)) for text in (f"Teacher: Question {i}?\n", f"Student: Answer {i}.\n")]
    return {
        "task_name": "Education",
        "P1": "",
        "P2": "As a student I like maps.",
        "conversation": [list(pair) for pair in enumerate(lines)],
        "pturn": 1,
        "eval_prompt_consistency": [[2 * i + 1, text] for i, text in enumerate(verdicts)],
        "P2_prompt_consistency_score": score,
    } | changes


def chat() -> dict[str, Any]:
    lines = ["Mia: Hi, I bake.\n", "Ben: I sail.\n", "Mia: I never baked.\n", "Ben: Odd.\n"]
    return {
        "task_name": "Chatting",
        "P1": json.dumps('Mia bakes "bread".'),
        "P2": json.dumps("Ben sails."),
        "conversation": [list(pair) for pair in enumerate(lines)],
        "pturn": 1,
        "eval_prompt_consistency": [[0, "NO"], [1, "Fits. NO"], [2, "Denies it. YES"], [3, "Fits. NO."]],
        "P1_prompt_consistency_score": 0.5,
        "P2_prompt_consistency_score": 1.0,
    }


def save(folder: Path, content: Any) -> Path:
    path = folder / "dialogues.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("score", "polarity", "scores"),
    [
        (0.75, "yes-is-inconsistent", [1.0, 0.0, None, 1.0]),
        (0.25, "yes-is-consistent", [0.0, 1.0, None, 0.0]),
    ],
)
def test_polarity_is_the_one_that_explains_the_stored_score(
    tmp_path: Path, score: float, polarity: str, scores: list[float | None]
) -> None:
    (dialogue,), report = read_dialogues(save(tmp_path, [lesson(ANSWERS, score)]))
    assert [turn.verdict.score for turn in dialogue.turns] == scores
    assert dialogue.turns[2].verdict.status == "unparsed"
    assert (report.polarity, report.judged_lines, report.scored, report.unparsed) == (polarity, 4, 3, 1)
    assert (report.neither, report.yes_share, report.mismatch) == (1, 0.25, 0.0)


@pytest.mark.parametrize(("verdicts", "score"), [(ANSWERS, 0.5), (["YES", "NO"], 0.5)])
def test_a_file_is_refused_unless_exactly_one_polarity_fits(tmp_path: Path, verdicts: list[str], score: float) -> None:
    with pytest.raises(DataError, match=r"yes-is-inconsistent 0\.\d{3}, yes-is-consistent 0\.\d{3}"):
        read_dialogues(save(tmp_path, [lesson(verdicts, score)]))


@pytest.mark.parametrize(
    ("raw", "status", "rationale"),
    [
        ("It fits. NO", "scored", "It fits."),
        ("**NO**", "scored", "The judge answered '**NO**' without a reason."),
        ('1. The line "Hi! I bake." fits. So: NO.', "scored", 'The line "Hi! I bake." fits.'),
        ("NO. It would be YES if she denied it.", "scored", "It would be YES if she denied it."),
        ("YES or NO: please provide the line.", "unparsed", "YES or NO: please provide the line."),
        ("I will answer YES or NO.", "unparsed", "I will answer YES or NO."),
        ("No conflict, nothing to note (yes).", "unparsed", "No conflict, nothing to note (yes)."),
        ("", "unparsed", "The judge answered '' without a reason."),
    ],
)
def test_only_a_clear_answer_is_a_score(tmp_path: Path, raw: str, status: str, rationale: str) -> None:
    shown = sum("YES" not in text for text in [raw, *["NO"] * 3]) / 4
    (dialogue,), _ = read_dialogues(save(tmp_path, [lesson([raw, *["NO"] * 3], shown)]))
    verdict = dialogue.turns[0].verdict
    assert (verdict.status, verdict.rationale, verdict.raw) == (status, rationale, raw)


def test_both_judged_speakers_are_read_each_with_their_own_persona(tmp_path: Path) -> None:
    (mia, ben), report = read_dialogues(save(tmp_path, [chat()]))
    assert [(t.message, t.reply, t.verdict.score) for t in mia.turns] == [
        ("", "Hi, I bake.", 1.0),
        ("I sail.", "I never baked.", 0.0),
    ]
    assert [(t.message, t.reply, t.verdict.score) for t in ben.turns] == [
        ("Hi, I bake.", "I sail.", 1.0),
        ("I never baked.", "Odd.", 1.0),
    ]
    assert (mia.speaker, ben.speaker, mia.persona.name, ben.persona.name) == (1, 2, "Mia", "Ben")
    assert mia.persona.instruction == role_play_instruction('Mia bakes "bread".', "chatting")
    assert mia.persona.id != ben.persona.id
    assert (report.dialogues, report.judged_lines, report.scored) == (1, 4, 4)


@pytest.mark.parametrize(
    ("stored", "topic"),
    [({"topic": " World War 2"}, "World War 2"), ({"topic": None}, ""), ({"topic": ""}, ""), ({}, "")],
)
def test_the_topic_is_kept(tmp_path: Path, stored: dict[str, Any], topic: str) -> None:
    (dialogue,), _ = read_dialogues(save(tmp_path, [lesson(ANSWERS, 0.75, **stored)]))
    assert dialogue.topic == topic
    write_dialogues(tmp_path / "again.jsonl", [dialogue])
    assert ("topic" in (tmp_path / "again.jsonl").read_text()) == bool(topic)
    assert read_dialogues(tmp_path / "again.jsonl")[0] == [dialogue]


def test_the_second_speaker_may_open(tmp_path: Path) -> None:
    swapped = chat() | {"pturn": 2, "P1_prompt_consistency_score": 1.0, "P2_prompt_consistency_score": 0.5}
    first, second = read_dialogues(save(tmp_path, [swapped]))[0]
    assert (first.persona.name, second.persona.name) == ("Ben", "Mia")
    assert second.turns[0].message == ""


@pytest.mark.parametrize(
    "line", ["Student: Teacher: Look!\nStudent: I see.\n", "Student: I see.\n\n(Teacher's response: Good.)\n"]
)
def test_a_line_that_speaks_for_both_keeps_its_text_and_gives_no_score(tmp_path: Path, line: str) -> None:
    entry = lesson(["NO", "NO"], 1.0)
    entry["conversation"][1][1] = line
    (dialogue,), report = read_dialogues(save(tmp_path, [entry]))
    turn = dialogue.turns[0]
    assert turn.reply == line.removeprefix("Student: ").strip()
    assert (turn.verdict.status, turn.verdict.score, turn.verdict.raw) == ("error", None, "NO")
    assert (report.scored, report.unparsed, report.both_speakers) == (1, 0, 1)
    assert "0:1" in report.skipped[0]


def test_addressing_the_other_speaker_is_no_second_voice(tmp_path: Path) -> None:
    entry = lesson(["NO"], 1.0)
    entry["conversation"][1][1] = "Student: Teacher, I ask: may I tell the Teacher a story?\n"
    assert read_dialogues(save(tmp_path, [entry]))[1].scored == 1


def test_a_judged_speakers_line_without_a_verdict_is_kept_without_a_score(tmp_path: Path) -> None:
    entry = lesson(["NO", "NO"], 1.0)
    del entry["eval_prompt_consistency"][0]
    (dialogue,), report = read_dialogues(save(tmp_path, [entry]))
    assert [turn.verdict.status for turn in dialogue.turns] == ["error", "scored"]
    assert report.judged_lines == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_name": "Cooking"}, "dialogue 1, key 'task_name': expected one of"),
        ({"task_name": None}, "dialogue 1, key 'task_name': expected str, got NoneType"),
        ({"topic": 3}, "dialogue 1, key 'topic': expected str, got int"),
        ({"pturn": 3}, "dialogue 1, key 'pturn': expected 1 or 2"),
        ({"pturn": True}, "dialogue 1, key 'pturn': expected int, got bool"),
        ({"P2": " "}, "dialogue 1, key 'P2': expected the persona of a judged speaker"),
        (
            {"conversation": [[0, "Teacher: Hi\n"], [1, 7]]},
            r"dialogue 1, key 'conversation', item 1: expected \[",
        ),
        ({"conversation": [[0, "Teacher: Hi\n"], [2, "Student: Hi\n"]]}, "expected lines numbered 0, 1, 2"),
        (
            {"conversation": [[0, "Teacher: Hi\n"], [1, "Hello\n"]]},
            "line 1: expected a text that starts with 'Speaker:'",
        ),
        (
            {"eval_prompt_consistency": [[9, "NO"]]},
            "dialogue 1, key 'eval_prompt_consistency': expected one verdict",
        ),
        ({"eval_prompt_consistency": [[1, "NO"], [1, "NO"]]}, r"got verdicts for lines \[1, 1\]"),
        (
            {"P2_prompt_consistency_score": "1"},
            "dialogue 1, key 'P2_prompt_consistency_score': expected int or float",
        ),
        ({"P2_prompt_consistency_score": float("nan")}, "expected a score in"),
        ({"P2_prompt_consistency_score": 10**400}, "expected a score in"),
    ],
)
def test_a_bad_field_is_named_with_its_dialogue(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_dialogues(save(tmp_path, [lesson(["NO"], 1.0), lesson(["NO"], 1.0, **changes)]))
    assert str(caught.value).startswith(str(tmp_path / "dialogues.json") + ":1: dialogue 1")


def test_every_required_key_is_missed_by_name(tmp_path: Path) -> None:
    for key in lesson(["NO"], 1.0):
        entry = lesson(["NO"], 1.0)
        del entry[key]
        with pytest.raises(DataError, match=f"dialogue 0: missing key '{key}'"):
            read_dialogues(save(tmp_path, [entry]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([lesson(["NO"], 1.0), 3], "dialogue 1: expected an object, got int"),
        ([lesson([], 1.0)], "expected verdicts in 'eval_prompt_consistency'"),
        ("[" * 100_000, "nested too deeply"),
        ([{"name": "Mia", "persona": "Mia bakes."}], "did you mean to give it as --personas"),
        ([["Cells", {"grade_level": "college", "description": "Maps."}]], "did you mean to give it as --personas"),
        ([{"description": "I cannot sleep.", "strategy": "Silence."}], "did you mean to give it as --personas"),
    ],
)
def test_what_is_no_dialogue_file_is_refused_with_the_reason(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_dialogues(save(tmp_path, content))


def test_a_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a readable file"):
        read_dialogues(tmp_path / "none.json")


def logged(persona: int, index: int) -> LoggedDialogue:
    spelling = f"Person  number {persona}." if index % 2 else f"person number {persona}"
    return LoggedDialogue("chatting", Persona(str(index), spelling), (), "x.json", index, 1)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=30), st.floats(0.01, 0.99), st.integers(0, 9))
def test_no_persona_is_on_both_sides(owners: list[int], held_out: float, seed: int) -> None:
    dialogues = [logged(persona, index) for index, persona in enumerate(owners)]
    if len(set(owners)) < 2:
        with pytest.raises(ValueError, match="at least 2 personas to hold one out, got 1 in"):
            split_by_persona(dialogues, held_out, seed)
        return
    train, test = split_by_persona(dialogues, held_out, seed)
    sides = [{persona_key(d.persona.instruction) for d in side} for side in (train, test)]
    assert train
    assert test
    assert not sides[0] & sides[1]
    assert sorted([*train, *test], key=lambda d: d.index) == dialogues
    assert split_by_persona(dialogues, held_out, seed) == (train, test)


def test_the_split_follows_the_seed_and_refuses_a_share_out_of_range() -> None:
    dialogues = [logged(i, i) for i in range(20)]
    assert len(split_by_persona(dialogues, 0.25)[1]) == 5
    assert split_by_persona(dialogues, seed=0) != split_by_persona(dialogues, seed=1)
    with pytest.raises(ValueError, match="expected held_out in"):
        split_by_persona(dialogues, 1.0)


@pytest.mark.data
@needs_data
@pytest.mark.parametrize(
    ("name", "dialogues", "sides", "judged", "yes", "neither", "both_answers", "both_speakers"),
    [
        ("chatting/gemma-2-2b-it_0_10_89", 100, 200, 1000, 125, 6, 0, 0),
        ("chatting/mistral-instruct_0_10_727", 100, 200, 1000, 30, 1, 0, 0),
        ("chatting/llama3-8b-kto-sft-prompt_0_60_645", 10, 20, 600, 84, 210, 8, 0),
        ("chatting/llama-8b-sft-ppo-prompt_0_10_56", 10, 20, 100, 1, 0, 0, 0),
        ("education/mistral-instruct_0_615", 62, 62, 465, 128, 11, 0, 101),
        ("education/mistral-instruct_0_792", 32, 32, 960, 236, 25, 0, 67),
        ("therapy/mistral-instruct_0_261", 39, 39, 620, 386, 2, 0, 0),
        ("therapy/sft_new_lr_Llama-3.1-8B-Instruct_0_444", 43, 43, 685, 324, 3, 0, 0),
    ],
)
def test_the_benchmarks_dialogue_files(
    name: str,
    dialogues: int,
    sides: int,
    judged: int,
    yes: int,
    neither: int,
    both_answers: int,
    both_speakers: int,
) -> None:
    started = time.process_time()
    read, report = read_dialogues(DATA / f"{name}.json")
    assert time.process_time() - started < 1.0
    flipped = name == "therapy/mistral-instruct_0_261"
    assert report.polarity == ("yes-is-consistent" if flipped else "yes-is-inconsistent")
    assert (report.dialogues, len(read), report.judged_lines) == (dialogues, sides, judged)
    assert report.yes_share == pytest.approx(yes / judged)
    assert (report.neither, report.unparsed) == (neither, neither + both_answers)
    assert report.both_speakers == both_speakers
    assert report.scored == judged - report.unparsed - both_speakers
    assert report.mismatch < 0.004
    texts = [text for d in read for turn in d.turns for text in (turn.message, turn.reply)]
    assert all(text == text.strip() for text in texts)


@pytest.mark.data
@needs_data
def test_logged_and_live_personas_read_the_same() -> None:
    live = {p.instruction for p in read_personas(DATA / "chatting" / "personas.json", "chatting")}
    read, _ = read_dialogues(DATA / "chatting" / "llama-8b-sft-ppo-prompt_0_10_56.json")
    assert {d.persona.instruction for d in read} <= live


@pytest.mark.data
@needs_data
@pytest.mark.parametrize("domain", ["chatting", "education", "therapy"])
def test_the_benchmarks_persona_files_are_refused(domain: str) -> None:
    with pytest.raises(DataError, match="did you mean to give it as --personas"):
        read_dialogues(DATA / domain / "personas.json")
