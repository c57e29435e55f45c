"""Persona files: three benchmark shapes and JSONL are read whole or refused with every bad entry named."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppg_gym.conversation import Persona
from ppg_gym.domain.personas import PersonaError, persona_key, read_personas, role_play_instruction, write_personas

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "consistent-llms"
ENTRIES: dict[str, list[Any]] = {
    "chatting": [
        {"name": "Mia Reed", "persona": json.dumps('Mia "Mi" Reed bakes bread.\n\nShe lives in Oslo.')},
        {"name": "Ben", "persona": "Ben sails."},
    ],
    "education": [
        ["Cells", {"grade_level": "college", "description": "As a college student I like maps."}],
        ["Rome", {"grade_level": "college", "description": "As a college student I like maps."}],
    ],
    "therapy": [{"description": "I cannot sleep.", "strategy": "I change the subject."}],
}


def save(folder: Path, content: Any) -> Path:
    path = folder / "personas.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("domain", ENTRIES)
def test_reads_the_benchmark_shapes(tmp_path: Path, domain: str) -> None:
    personas = read_personas(save(tmp_path, ENTRIES[domain]), domain)
    assert [p.id for p in personas] == [f"{domain}-{i}" for i in range(len(ENTRIES[domain]))]
    assert all(p.domain == domain and not p.facts for p in personas)


def test_the_text_is_decoded_and_wrapped_once(tmp_path: Path) -> None:
    mia, _ = read_personas(save(tmp_path, ENTRIES["chatting"]), "chatting")
    text = 'Mia "Mi" Reed bakes bread.\n\nShe lives in Oslo.'
    assert mia.name == "Mia Reed"
    assert mia.instruction == role_play_instruction(text, "chatting")
    assert mia.instruction.endswith("\n\n" + text)
    (patient,) = read_personas(save(tmp_path, ENTRIES["therapy"]), "therapy")
    assert "I cannot sleep." in patient.instruction
    assert "I change the subject." in patient.instruction


def test_a_broken_benchmark_file_names_every_bad_entry(tmp_path: Path) -> None:
    entries = [
        {"name": "Mia", "persona": "Mia bakes."},
        {"name": "Ben"},
        {"name": 3, "persona": '""'},
        "Ben sails.",
    ]
    with pytest.raises(PersonaError) as caught:
        read_personas(save(tmp_path, entries), "chatting")
    assert str(caught.value).split("\n  ")[1:] == [
        "entry 1: missing key 'persona'",
        "entry 2: key 'name': expected a string, got 3",
        "entry 2: key 'persona': expected text, got an empty string",
        "entry 3: expected an object with 'name' and 'persona', got a string",
    ]


def test_a_file_of_another_domain_is_named(tmp_path: Path) -> None:
    with pytest.raises(PersonaError, match="expected those of domain 'chatting', got those of 'therapy'"):
        read_personas(save(tmp_path, ENTRIES["therapy"]), "chatting")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected at least one persona, got none"),
        ("", "expected at least one persona, got none"),
        ('[{"name": "Mia",', "invalid JSON"),
        ([{"conversation": []}], "got dialogues; train on them with --offline"),
    ],
)
def test_what_is_no_persona_file_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(PersonaError, match=message):
        read_personas(save(tmp_path, content), "chatting")


def test_a_json_list_needs_a_domain_of_the_benchmark(tmp_path: Path) -> None:
    with pytest.raises(PersonaError, match="write the personas as JSONL"):
        read_personas(save(tmp_path, ENTRIES["therapy"]), "cooking")


def test_a_missing_file_or_another_encoding_is_a_persona_error(tmp_path: Path) -> None:
    with pytest.raises(PersonaError, match="readable UTF-8 file"):
        read_personas(tmp_path / "none.jsonl", "chatting")
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(PersonaError, match="readable UTF-8 file"):
        read_personas(tmp_path / "latin", "chatting")


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda s: s.strip().strip('"').strip())


people = st.builds(Persona, id=words, instruction=words, facts=st.dictionaries(words, words), name=words)


@given(st.lists(people, min_size=1, unique_by=lambda p: p.id))
def test_jsonl_round_trip_of_any_unicode(tmp_path_factory: pytest.TempPathFactory, personas: list[Persona]) -> None:
    path = tmp_path_factory.mktemp("personas") / "personas.jsonl"
    write_personas(path, personas)
    assert read_personas(path, "") == personas


def test_a_broken_jsonl_names_every_bad_line(tmp_path: Path) -> None:
    good = {"id": "a", "domain": "chatting", "name": "", "instruction": "Be Mia.", "facts": {"pet": "a cat"}}
    lines = [
        json.dumps(good),
        "{",
        json.dumps(good | {"id": "b", "fact": {}}),
        json.dumps({"id": "c"}),
        "",
        json.dumps(good),
        json.dumps(good | {"id": "d", "facts": {"pet": 1}, "domain": "therapy"}),
        json.dumps(good | {"id": "e", "facts": [], "name": None, "instruction": " "}),
        "[]",
    ]
    with pytest.raises(PersonaError) as caught:
        read_personas(save(tmp_path, "\n".join(lines)), "chatting")
    problems = str(caught.value).split("\n  ")[1:]
    assert problems.pop(0).startswith("line 2: expected a JSON object, got invalid JSON")
    assert problems == [
        "line 3: unknown key 'fact'; did you mean 'facts'?",
        "line 4: missing key 'instruction'",
        "line 6: duplicate id 'a', first used in line 1",
        "line 7: key 'domain': expected 'chatting', got 'therapy'",
        "line 7: key 'facts': key 'pet': expected a string, got 1",
        "line 8: key 'instruction': expected text, got an empty string",
        "line 8: key 'name': expected a string, got null",
        "line 8: key 'facts': expected an object of strings, got a list",
        "line 9: expected a JSON object, got a list",
    ]


def test_a_bad_set_is_not_written(tmp_path: Path) -> None:
    mia = Persona("a", "Be Mia.")
    with pytest.raises(PersonaError, match="more than once"):
        write_personas(tmp_path / "out.jsonl", [mia, mia])
    with pytest.raises(PersonaError, match="got no persona"):
        write_personas(tmp_path / "out.jsonl", [])
    assert not (tmp_path / "out.jsonl").exists()


def test_a_resource_inside_a_package_is_read() -> None:
    with pytest.raises(PersonaError, match=r"py\.typed: expected at least one persona"):
        read_personas(files("ppg_gym").joinpath("py.typed"), "chatting")


def test_persona_key_ignores_case_spacing_and_punctuation() -> None:
    assert persona_key("I’m Mia,\n a baker.") == persona_key("i'm MIA a  baker")
    assert persona_key("Mia bakes") != persona_key("Mia bakes bread")


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/consistent-llms beside the project")
@pytest.mark.parametrize(
    ("domain", "count", "distinct"), [("chatting", 200, 200), ("education", 100, 27), ("therapy", 100, 100)]
)
def test_the_benchmarks_persona_files(domain: str, count: int, distinct: int) -> None:
    personas = read_personas(DATA / domain / "personas.json", domain)
    assert len(personas) == len({p.id for p in personas}) == count
    assert len({persona_key(p.instruction) for p in personas}) == distinct
