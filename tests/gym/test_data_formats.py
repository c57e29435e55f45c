"""Every format has one entry point: told by its content, read whole, or refused with file, line and what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppg_gym.conversation import STATUSES, Persona, Verdict
from ppg_gym.data import FORMATS, RefusedError, collect, detect, read, read_dialogues, validate, write_dialogues
from ppg_gym.data.dialogues import NO_VERDICT, LoggedDialogue, LoggedTurn
from ppg_gym.data.files import list_items
from ppg_gym.domain.personas import prose_persona

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data beside the project")

LESSON = {
    "task_name": "Education",
    "P1": "",
    "P2": "As a student I like maps.",
    "conversation": [[0, "Teacher: Hello?\n"], [1, "Student: Hi.\n"], [2, "Teacher: And?\n"], [3, "Student: No.\n"]],
    "pturn": 1,
    "eval_prompt_consistency": [[1, "It fits. NO"], [3, "NO"]],
    "P2_prompt_consistency_score": 1.0,
}
TRAJECTORY: dict[str, Any] = {
    "schema": "ppg-trajectory/1",
    "instruction": "Be Mia.",
    "persona": "mia",
    "domain": "chatting",
    "seed": 3,
    "turns": [
        {
            "message": "Hi",
            "reply": "Yo",
            "reward": 0.5,
            "token_ids": [1],
            "verdict": {"status": "scored", "score": 0.5},
        },
        {
            "message": "And?",
            "reply": "",
            "reward": None,
            "verdict": {"status": "timeout", "score": None, "rationale": "x"},
        },
        {"message": "So?", "reply": "Ok", "reward": 1.0, "verdict": {}},
        {"message": "So?", "reply": "Ok", "reward": 7.0, "verdict": {}},
    ],
}
FILES = {
    "consistent-llms": json.dumps([LESSON], indent=1),
    "consistent-llms-personas": json.dumps([{"name": "Mia", "persona": "Mia bakes."}]),
    "synthetic-persona-chat": "user 1 personas,user 2 personas,Best Generated Conversation\n"
    'I bake.,I sail.,"User 1: Hi\nUser 2: Yo"\n',
    "persona-chat": "1 your persona: i bake.\n2 hi\tyo\n",
    "personas": json.dumps({"id": "mia", "domain": "chatting", "instruction": "Be Mia."}),
    "dialogues": json.dumps(
        {
            "schema": "ppg-dialogue/1",
            "domain": "chatting",
            "persona": {"id": "mia", "instruction": "Be Mia."},
            "turns": [{"message": "Hi", "reply": "Yo"}],
        }
    ),
    "trajectories": json.dumps(TRAJECTORY),
}


def save(folder: Path, text: str, name: str = "file") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def line_of(refused: pytest.ExceptionInfo[RefusedError]) -> int:
    return refused.value.problems[0].line


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_told_by_its_content_and_by_no_other(tmp_path: Path, format: str) -> None:
    path = save(tmp_path, FILES[format])
    items, report = read(path)
    assert (report.format, bool(items), validate(path)) == (format, True, [])
    assert read(path, format)[0] == items
    for other in FORMATS.keys() - {format}:
        with pytest.raises(RefusedError, match=f"file:1: expected .*; did you mean the format '{format}'"):
            read(path, other)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("\n\n", 1, "got an empty file"),
        ("hello\n", 1, "expected a file in one of the formats .*, got 'hello'"),
        ("[]", 1, "got an empty list"),
        ("[\n3]", 2, "got a list of 3"),
        ('[\n{"P1":', 2, "got a fault: Expecting value"),
        ('\n{"a": 1}', 2, r"an object with the keys \['a'\]"),
        ('{"messages": []}', 1, "chat messages, which are written for trainers"),
        ('{"schema": "ppg-dialog/1"}', 1, "did you mean 'ppg-dialogue/1'"),
        ('{"schema": [1]}', 1, r"expected the schema .*, got \[1\]"),
        ("{", 1, "expected a JSON object, got invalid JSON"),
        ("user 1 personas,user 2 personas,chat\n", 1, "got none called Best Generated Conversation"),
    ],
)
def test_what_is_no_known_file_is_refused_with_its_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = save(tmp_path, text)
    with pytest.raises(RefusedError, match=message) as refused:
        read(path)
    assert line_of(refused) == line
    assert f"{path}:{line}: " in str(refused.value)


def test_a_byte_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"1 your persona: a\n2 caf\xe9\tb\n")
    with pytest.raises(RefusedError, match="latin:2: expected a readable UTF-8 file, got byte 0xe9"):
        read(tmp_path / "latin")


def test_an_unknown_format_gets_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'persona-chat'"):
        read(save(tmp_path, "x"), "personachat")


def test_a_persona_file_is_no_dialogue_file(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="did you mean to give it as --personas"):
        read_dialogues(save(tmp_path, FILES["personas"]))


def test_every_bad_entry_of_a_json_file_has_its_line(tmp_path: Path) -> None:
    path = save(tmp_path, json.dumps([LESSON, LESSON | {"pturn": 3}, LESSON | {"P2": ""}], indent=1))
    starts = [line for line, _ in list_items(path.read_text())]
    assert [problem.line for problem in validate(path)] == starts[1:]
    assert "dialogue 1, key 'pturn': expected 1 or 2" in str(validate(path)[0])
    personas = save(tmp_path, '[\n{"name": "Mia", "persona": "Mia bakes."},\n{"name": "Ben", "persona": ""}\n]')
    assert [str(p) for p in validate(personas)] == ["entry 1: key 'persona': expected text, got an empty string"]
    assert validate(personas)[0].line == 3
    broken = save(tmp_path, json.dumps([LESSON], indent=1)[:-1])
    assert validate(broken)[0].line == broken.read_text().count("\n") + 1


def test_a_dialogue_file_without_a_fitting_polarity_is_a_problem(tmp_path: Path) -> None:
    (problem,) = validate(save(tmp_path, json.dumps([LESSON | {"P2_prompt_consistency_score": 0.5}])))
    assert "fit exactly one polarity" in str(problem)


def test_the_domain_is_the_files_own(tmp_path: Path) -> None:
    for format in ("consistent-llms-personas", "personas", "dialogues", "trajectories"):
        with pytest.raises(RefusedError, match="therapy"):
            read(save(tmp_path, FILES[format]), domain="therapy")
    for format in ("synthetic-persona-chat", "persona-chat"):
        dialogues, _ = read_dialogues(save(tmp_path, FILES[format]), domain="therapy")
        assert {dialogue.domain for dialogue in dialogues} == {"therapy"}


def test_a_trajectory_is_read_as_a_dialogue(tmp_path: Path) -> None:
    torn = json.dumps(TRAJECTORY)[:50]
    rows = [TRAJECTORY, TRAJECTORY | {"turns": []}, TRAJECTORY | {"persona": "", "instruction": " "}]
    path = save(tmp_path, "\n".join([*map(json.dumps, rows), torn]))
    (dialogue,), report = read_dialogues(path)
    assert (dialogue.persona, dialogue.index) == (Persona("mia", "Be Mia.", domain="chatting"), 0)
    verdicts = [turn.verdict for turn in dialogue.turns]
    assert verdicts[:3] == [Verdict("scored", 0.5), Verdict("timeout", None, "x"), Verdict("scored", 1.0)]
    assert (verdicts[3].status, verdicts[3].rationale) == ("error", "The reward 7.0 is no score in [0, 1].")
    assert (report.judged_lines, report.scored, report.unparsed, report.consistent) == (4, 2, 0, 0.75)
    assert [(p.line, p.why) for p in report.problems] == [
        (2, "no turn was played"),
        (3, "no instruction"),
        (4, "the last line is torn off"),
    ]
    with pytest.raises(RefusedError, match="got invalid JSON") as refused:
        read(save(tmp_path, "\n".join([json.dumps(TRAJECTORY), torn, json.dumps(TRAJECTORY)])))
    assert line_of(refused) == 2


def test_every_bad_line_of_a_dialogue_file_is_named(tmp_path: Path) -> None:
    good = json.loads(FILES["dialogues"])
    turn = {"message": "", "reply": "Yo"}
    rows = [
        good,
        good | {"persone": 1},
        good | {"persona": {"id": "mia"}},
        good | {"turns": []},
        good | {"turns": [turn | {"verdict": {"status": "scored", "score": 2}}]},
        good | {"turns": [turn | {"verdict": {"status": "unparsed", "score": 1.0}}]},
        good | {"turns": [turn, {"message": 3, "reply": "Yo"}]},
        good | {"speaker": 3},
    ]
    assert [str(p.line) + " " + str(p) for p in validate(save(tmp_path, "\n".join(map(json.dumps, rows))))] == [
        "2 unknown key 'persone'; did you mean 'persona'?",
        "3 missing key 'persona.instruction'",
        "4 key 'turns': expected at least one turn, got none",
        "5 turns[0].verdict: expected a score in [0, 1] for a scored verdict, got 2.0",
        "6 turns[0].verdict: expected no score for a verdict with status 'unparsed', got 1.0",
        "7 key 'turns[1].message': expected a string, got 3",
        "8 key 'speaker': expected 1 or 2, got 3",
    ]


words = st.text(min_size=1, max_size=20).filter(str.strip)
scored = st.builds(Verdict, st.just("scored"), st.floats(0, 1), words, words, words)
failed = st.builds(Verdict, st.sampled_from(sorted(STATUSES - {"scored"})), st.none(), words, words, words)
turns = st.lists(
    st.builds(LoggedTurn, st.text(), st.text(), st.just(NO_VERDICT) | scored | failed), min_size=1, max_size=3
)


@st.composite
def logged(draw: st.DrawFn) -> LoggedDialogue:
    domain = draw(words)
    persona = Persona(draw(words), draw(words), draw(st.dictionaries(words, words)), domain, draw(words))
    return LoggedDialogue(
        domain, persona, tuple(draw(turns)), draw(words), draw(st.integers(0, 99)), draw(st.integers(1, 2))
    )


@given(st.lists(logged(), min_size=1, max_size=4))
def test_what_is_written_is_read_back_unchanged(
    tmp_path_factory: pytest.TempPathFactory, dialogues: list[LoggedDialogue]
) -> None:
    path = tmp_path_factory.mktemp("round") / "dialogues.jsonl"
    write_dialogues(path, dialogues)
    assert read_dialogues(path)[0] == dialogues


def test_half_a_surrogate_pair_survives(tmp_path: Path) -> None:
    turn = LoggedTurn("\ud83d", "é", NO_VERDICT)
    dialogue = LoggedDialogue("chatting", prose_persona("I bake.", "chatting"), (turn,), "a", 0, 1)
    write_dialogues(tmp_path / "d.jsonl", [dialogue])
    assert read_dialogues(tmp_path / "d.jsonl")[0] == [dialogue]


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path) -> None:
    path = save(tmp_path, "before", "d.jsonl")
    with pytest.raises(AttributeError):
        write_dialogues(path, [None])  # type: ignore[list-item]
    assert (path.read_text(), list(tmp_path.iterdir())) == ("before", [path])
    with pytest.raises(ValueError, match="expected a folder that exists"):
        write_dialogues(tmp_path / "none" / "d.jsonl", [])
    with pytest.raises(ValueError, match="got something else of that name"):
        write_dialogues("/dev/null", [])


def test_collecting_keeps_every_dialogue_and_persona_once(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    first, second = save(tmp_path, FILES["persona-chat"]), save(tmp_path / "b", FILES["persona-chat"])
    clash = json.dumps({"id": "mia", "domain": "chatting", "instruction": "Be another Mia."})
    listed = [save(tmp_path, FILES["personas"], "p1"), save(tmp_path, clash, "p2")]
    found = collect([first, first, second, *listed])
    assert [dialogue.source for dialogue in found.dialogues] == [f"{tmp_path.name}/file", "b/file"]
    assert found.notes == ["1 dialogues left out: they are there already, from the same place"]
    people, notes = found.personas()
    assert [person.instruction[:6] for person in people] == ["Be Mia", "Be ano", "You ar"]
    assert len({person.id for person in people}) == 3
    assert notes == ["1 personas got a new id: theirs belongs to another one"]
    with pytest.raises(ValueError, match="expected personas of one domain for one file"):
        collect([first, save(tmp_path, json.dumps(TRAJECTORY | {"domain": "cooking"}), "t")]).personas()


TABLE = {
    "chatting/gemma-2-2b-it_0_10_89.json": (100, 10.0, 1000, 0.125, 6, 6),
    "chatting/mistral-instruct_0_10_727.json": (100, 10.0, 1000, 0.030, 1, 1),
    "chatting/llama3-8b-kto-sft-prompt_0_60_645.json": (10, 60.0, 600, 0.140, 210, 218),
    "chatting/llama-8b-sft-ppo-prompt_0_10_56.json": (10, 10.0, 100, 0.010, 0, 0),
    "education/mistral-instruct_0_615.json": (62, 15.0, 465, 0.275, 11, 11),
    "education/mistral-instruct_0_792.json": (32, 60.0, 960, 0.246, 25, 25),
    "therapy/mistral-instruct_0_261.json": (39, 31.8, 620, 0.623, 2, 2),
    "therapy/sft_new_lr_Llama-3.1-8B-Instruct_0_444.json": (43, 31.9, 685, 0.473, 3, 3),
}


@needs_data
@pytest.mark.data
@pytest.mark.parametrize("name", TABLE)
def test_the_released_files_give_the_published_counts(tmp_path: Path, name: str) -> None:
    path = DATA / "consistent-llms" / name
    dialogues, report = read_dialogues(path)
    told = report.to_dict()
    per_dialogue = round(told["lines"] / told["dialogues"], 1)
    row = (told["dialogues"], per_dialogue, told["judged_lines"], round(told["yes_share"], 3), told["neither"])
    assert (*row, told["unparsed"]) == TABLE[name]
    consistent = "therapy/mistral" in name
    assert told["polarity"] == ("yes-is-consistent" if consistent else "yes-is-inconsistent")
    write_dialogues(tmp_path / "d.jsonl", dialogues)
    again, copied = read_dialogues(tmp_path / "d.jsonl")
    assert again == dialogues
    for key in ("dialogues", "judged_lines", "scored", "unparsed", "personas", "consistent", "skipped"):
        assert copied.to_dict()[key] == told[key], key


@needs_data
@pytest.mark.data
def test_the_released_persona_files_say_their_domain() -> None:
    for domain, count in (("chatting", 200), ("education", 100), ("therapy", 100)):
        path = DATA / "consistent-llms" / domain / "personas.json"
        assert detect(path, path.read_text(encoding="utf-8")) == "consistent-llms-personas"
        personas, _ = read(path)
        assert (len(personas), {persona.domain for persona in personas}) == (count, {domain})
