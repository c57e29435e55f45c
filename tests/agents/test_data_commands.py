"""``ppg-agent data`` from outside: files in, files out, results on stdout, an exit code that says it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ppg_agents.commands import data as data_commands
from ppg_agents.commands.data import data
from ppg_agents.trajectory import Trajectory, Turn, write_jsonl

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
CHAT = "1 your persona: i bake .\n2 partner's persona: i sail .\n3 hi\tyo\n4 and ?\tbye\n"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(data, [str(argument) for argument in arguments])


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    path = tmp_path / "chat.txt"
    path.write_text(CHAT)
    return path


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_import_writes_dialogues_and_personas(tmp_path: Path, chat: Path) -> None:
    out, people = tmp_path / "d.jsonl", tmp_path / "p.jsonl"
    result = run("import", chat, "--out", out, "--personas", people)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "persona-chat" in result.stderr
    assert [row["schema"] for row in rows(out)] == ["ppg-dialogue/1"] * 2
    assert len(rows(people)) == 2
    (found,) = json.loads(run("stats", out, "--json").stdout)
    assert (found["format"], found["dialogues"], found["lines"], found["personas"]) == ("dialogues", 1, 4, 2)
    alone = run("import", people, "--out", tmp_path / "again.jsonl")
    assert alone.exit_code == 0
    assert (tmp_path / "again.jsonl").read_text() == people.read_text()
    both = run("import", people, chat, "--out", out)
    assert (both.exit_code, "say where to write them with --personas" in both.stderr) == (2, True)


def test_trajectories_of_a_run_are_dialogues(tmp_path: Path) -> None:
    verdict = {"status": "scored", "score": 0.25, "rationale": "So.", "kind": "truth"}
    turns = (
        Turn("Hi", "Yo", (1,), (2,), (-0.5,), 0.25, verdict),
        Turn("And?", "No", (1,), (2,), (-0.5,), math.nan, {"status": "refused", "score": None}),
    )
    write_jsonl(tmp_path / "t.jsonl", [Trajectory("Be Mia.", "mia", "chatting", 0, turns, True, False)] * 2)
    (found,) = json.loads(run("stats", "--json", tmp_path / "t.jsonl").stdout)
    assert {key: found[key] for key in ("format", "dialogues", "judged_lines", "scored", "consistent")} == {
        "format": "trajectories",
        "dialogues": 2,
        "judged_lines": 4,
        "scored": 2,
        "consistent": 0.25,
    }


def test_validate_names_file_and_line(tmp_path: Path, chat: Path) -> None:
    good = run("validate", chat)
    assert (good.exit_code, good.stdout) == (0, "")
    bad = tmp_path / "bad.txt"
    bad.write_text(CHAT + "1 hi\tyo\n")
    result = run("validate", chat, bad)
    assert (result.exit_code, result.stdout) == (1, f"{bad}:5: line 5: no persona line\n")


def test_stats_prints_one_object_per_file_in_order(tmp_path: Path, chat: Path) -> None:
    other = tmp_path / "a.txt"
    other.write_text(CHAT)
    result = run("stats", chat, other, "--json")
    assert [entry["path"] for entry in json.loads(result.stdout)] == [str(chat), str(other)]
    assert result.stderr == ""


def test_export_splits_by_persona(tmp_path: Path, chat: Path) -> None:
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    result = run("export", chat, "--out", train, "--split-by-persona", "0.5", "--out-test", test, "--opening", "Go.")
    assert result.exit_code == 0
    (first,), (second,) = rows(train), rows(test)
    assert first["persona"] != second["persona"]
    assert "Go." in {row["messages"][1]["content"] for row in (first, second)}
    assert run("export", chat, "--out", train, "--split-by-persona", "0.5").exit_code == 2
    assert run("export", chat, "--out", train, "--split-by-persona", "0.5", "--out-test", train).exit_code == 2
    nothing = run("export", chat, "--out", train, "--min-score", "0.5")
    assert "2 dialogues left out: none of their replies is scored" in str(nothing.exception)
    assert rows(train) == [first]


def test_personas_are_made_and_excluded(tmp_path: Path) -> None:
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    assert run("personas", "--domain", "education", "-n", 100, "--out", first).exit_code == 0
    assert run("personas", "--domain", "education", "-n", 92, "--out", second, "--exclude", first).exit_code == 0
    everyone = {json.dumps(row["facts"]) for row in rows(first) + rows(second)}
    assert len(everyone) == 192
    third = tmp_path / "3.jsonl"
    result = run("personas", "--domain", "education", "-n", 1, "--out", third, "--exclude", first, second)
    assert "at most 0 personas" in str(result.exception)
    assert run("personas", "--domain", "education", "-n", 1, "--out", first, second).exit_code == 2


def test_many_personas_are_refused_beyond_what_there_are_or_show_how_far_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "p.jsonl"
    refused = run("personas", "--domain", "therapy", "-n", 999_999_999, "--out", out)
    assert "at most 429981312 personas ('therapy' has 429981696 sets of facts" in str(refused.exception)
    assert run("personas", "--domain", "therapy", "-n", 2000, "--out", out).stderr == f"wrote 2000 personas to {out}\n"
    monkeypatch.setattr(data_commands, "FEW", 1999)
    first, *_, last = run("personas", "--domain", "therapy", "-n", 2000, "--out", out).stderr.splitlines()
    assert first.startswith("making personas 1000/2000")
    assert last.startswith("wrote 2000")


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data beside the project")
def test_stats_of_the_file_with_empty_verdicts() -> None:
    path = DATA / "consistent-llms" / "chatting" / "llama3-8b-kto-sft-prompt_0_60_645.json"
    (found,) = json.loads(run("stats", path, "--json").stdout)
    counts = [found[key] for key in ("dialogues", "judged_lines", "scored", "unparsed", "polarity")]
    assert counts == [10, 600, 382, 218, "yes-is-inconsistent"]
