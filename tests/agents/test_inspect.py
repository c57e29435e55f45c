"""What a run's page and report are made of: texts without markup, the right sample, the right masks, whole files."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from markdown_it import MarkdownIt

from ppg_agents import cli
from ppg_agents.commands import inspect as inspect_commands
from ppg_agents.commands import main as commands
from ppg_agents.config import OfflineSettings, TrainConfig
from ppg_agents.credit import PolicyClass
from ppg_agents.evaluate import summarise
from ppg_agents.horizon.choice import default_candidates
from ppg_agents.inspect import method as methods_in_words
from ppg_agents.inspect import page, sample, source, text
from ppg_agents.inspect.report import write_report
from ppg_agents.runs import Run, RunError
from ppg_agents.trajectory import Trajectory, Turn, to_json

HOSTILE = (
    "a|b <script>x</script> [l](javascript:1) ![i](http://x.y) www.x.y a@b.c http://x.y **b** `c` $d$ \u202eRTL\x00"
)
anything = st.text(
    st.characters(exclude_categories=[]) | st.sampled_from("<>&|`\\*_[](){}#!-+.:@$~^\n\r\t1 w\u202e\u200d\ufe0f")
)


def turn(reward: float = 0.5, status: str = "scored", version: int = 0, **fields: Any) -> Turn:
    verdict = {"status": status, "score": reward if status == "scored" else None, "rationale": "Why.", "kind": "truth"}
    whole: dict[str, Any] = {
        "message": "Hello.",
        "reply": "Hi.",
        "prompt_ids": (1, 2),
        "token_ids": (3, 4),
        "log_probs": (-0.1, math.nan),
        "reward": reward,
        "verdict": verdict,
        "policy_version": version,
    }
    return Turn(**(whole | fields))


def conversation(*turns: Turn, persona: str = "p", truncated: bool = False, seed: int = 0) -> Trajectory:
    return Trajectory("Be P.", persona, "chatting", seed, turns, terminated=not truncated, truncated=truncated)


def evaluate(run: Run, when: str, iteration: int, *rewards: float) -> None:
    """Store an evaluation of conversations of one turn, with the seeds 0, 1 and so on."""
    played = [conversation(turn(r), persona=f"h{i}", seed=i) for i, r in enumerate(rewards)]
    run.write_held_out(iteration, played)
    run.write_evaluation(when, {"iteration": iteration, **summarise(played).to_dict()})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a run of three iterations of two conversations, one verdict of which failed."""
    made = Run.create(
        tmp_path / "run", TrainConfig(batch=2, iterations=3, model="none", policy_class=PolicyClass("k-step", 2))
    )
    for i in range(3):
        lost = turn(math.nan, "timeout", i) if i == 1 else turn(0.3, version=i)
        both = (
            conversation(turn(0.2, version=i), lost, persona="p"),
            conversation(turn(0.9, version=i), persona=f"q{i}"),
        )
        made.append_trajectories(both)
        made.append_metrics({"iteration": i + 1, "consistency": 0.4 + 0.1 * i, "reward_per_turn": [0.5]})
    return made


def contents(path: Path, **options: Any) -> dict[str, Any]:
    """Return the data in a page."""
    found = page.write_page(path, conversations=options.pop("conversations", 200), **options).read_text(
        encoding="utf-8"
    )
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', found, re.DOTALL)
    assert match is not None
    data: dict[str, Any] = json.loads(match[1])
    return data


# ---- texts


@given(anything)
def test_nothing_is_invisible_in_a_shown_text(said: str) -> None:
    shown = text.visible(said)
    hidden = {c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")}
    assert hidden <= set("\n\t\u200d")
    assert text.visible(shown) == shown


def test_invisible_characters_are_spelled_out_and_emoji_stay() -> None:
    assert text.visible("a\u202eb\x00\ud800\u2028\U000e0041") == "a⟨U+202E⟩b⟨U+0000⟩⟨U+D800⟩⟨U+2028⟩⟨U+E0041⟩"
    assert text.visible("❤️ 👩‍🚀 é 漢 שלום") == "❤️ 👩‍🚀 é 漢 שלום"
    assert text.visible("a\u200db\ufe0f") == "a⟨U+200D⟩b⟨U+FE0F⟩"


@given(
    st.lists(
        st.none() | st.floats() | st.integers() | anything | st.dictionaries(anything, anything, max_size=3), max_size=4
    )
)
@settings(max_examples=60)
def test_data_in_a_script_element_cannot_end_it_and_comes_back_whole(value: Any) -> None:
    written = text.script_json(value)
    assert written.isascii()
    assert not set("<>&") & set(written)
    assert json.loads(written) == text.shown(value)


@given(anything)
def test_markdown_reads_as_the_text_and_is_text_alone(said: str) -> None:
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(f"> {text.markdown_line(said)} end\n")
    (inline,) = (token for token in tokens if token.type == "inline")
    assert {token.type for token in tokens} == {
        "blockquote_open",
        "paragraph_open",
        "inline",
        "paragraph_close",
        "blockquote_close",
    }
    assert {child.type for child in inline.children or ()} <= {"text", "text_special", "code_inline"}
    read = "".join(child.content for child in inline.children or ())
    assert read.split() == [*text.visible(said).split(), "end"]


def test_hostile_markdown() -> None:
    written = text.markdown(HOSTILE)
    assert "<script" not in written
    assert "](" not in written
    assert not re.search(r"(?<!\\)\||www\.|https?:/|b@c|a@b", written)
    assert text.markdown_line("1. one") == "1\\. one"
    assert text.markdown_line("- one 3.5-fold, e.g. this.") == "\\- one 3.5-fold, e.g. this."
    assert text.markdown_line("3.5 of it") == "3.5 of it"


# ---- masks and samples


@given(st.integers(1, 30), st.data())
@settings(max_examples=40)
def test_counted_rewards_are_the_rows_of_the_mask(n: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, n))
    lengths = (first, n - first) if first < n else (n,)
    weights = data.draw(hnp.arrays(float, (n, n), elements=st.sampled_from([0.0, 1.0, 0.5, -2.0])))
    for planning in (
        *default_candidates(n),
        PolicyClass("segment", segments=lengths),
        PolicyClass("k-step", n + 3),
        PolicyClass.parse(np.triu(weights)),
        PolicyClass.parse(np.triu(weights > 0)),
    ):
        counted = page.counted(planning, n)
        read = np.zeros((n, n))
        for t, end in enumerate(counted.ends):
            read[t, t:end] = counted.weights[t] if counted.weights else 1
        np.testing.assert_array_equal(read, planning.mask(n))


def test_classes_hold_the_run_s_own_once_and_end_with_full_planning() -> None:
    def labels(own: str, n: int) -> list[str]:
        return [str(one) for one in page.classes([PolicyClass.parse(own)], n).values()]

    assert labels("3-step", 6) == ["greedy", "2-step", "3-step", "4-step", "5-step", "segment 3,3", "full"]
    assert labels("segment 4,2", 6)[-2:] == ["segment 4,2", "full"]
    assert labels("[[1, 0.5], [0, 1]]", 2) == ["greedy", "custom 2x2", "full"]
    assert labels("greedy", 1) == ["greedy"]


def test_the_own_class_of_an_automatic_run_is_the_one_chosen_then() -> None:
    metrics = [
        {"iteration": 2, "horizon_class": "greedy"},
        {"iteration": 3},
        {"iteration": 4, "horizon_class": "3-step"},
    ]
    found = page.own_classes(TrainConfig(policy_class="auto"), metrics, [1, 2, 3, 4, None])
    assert [c.label for c in found] == ["full", "greedy", "greedy", "3-step", "full", "3-step"]


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=60), st.integers(1, 40))
@settings(max_examples=50)
def test_a_sample_is_as_large_as_asked_and_holds_failures_and_both_ends(
    rows: list[tuple[int, bool]], most: int
) -> None:
    all_rows = [sample.Row(0, i + 1, i, f"p{persona}", failed) for i, (persona, failed) in enumerate(rows)]
    chosen = sample.sample(all_rows, most)
    assert len(chosen) == min(most, len(rows))
    assert chosen == sorted(set(chosen))
    failed = sum(row.failed for row in all_rows)
    assert sum(all_rows[i].failed for i in chosen) >= min(failed, int(most * sample.FAILED_SHARE))
    if len(rows) > most >= 8:
        assert chosen[0] == 0
        assert chosen[-1] == len(rows) - 1


def test_pairs_are_of_one_persona_at_different_times_farthest_first() -> None:
    met = [("a", 0), ("b", 0), ("", 0), ("b", 1), ("a", 5), ("c", 5), ("c", 5), ("", 9)]
    assert sample.pairs(met) == [(0, 4), (1, 3)]


# ---- files


def test_a_run_s_page_holds_the_run(run: Run) -> None:
    data = contents(run.folder)
    assert (run.folder / "report.html").is_file()
    assert [c["iteration"] for c in data["conversations"]] == [1, 1, 2, 2, 3, 3]
    assert data["classes"][data["own"]] == {"label": "2-step", "ends": [2, 2], "weights": None}
    assert data["counts"]["statuses"] == [["scored", 8], ["timeout", 1]]
    assert data["pairs"] == [[0, 4]]
    lost = data["conversations"][2]["turns"][1]
    assert (lost["reward"], lost["status"], lost["logs"]) == (None, "timeout", [100, None])
    assert "no checkpoint" in " ".join(data["notes"])


def test_held_out_conversations_stand_beside_themselves_before_training(run: Run) -> None:
    evaluate(run, "before", 0, 0.2, 0.4, 0.6, math.nan)
    assert source.read(run.folder, 200).held_out is None  # there is nothing to put beside it yet
    evaluate(run, "iteration 2", 2, 0.9, 0.9, 0.9, 0.9)
    evaluate(run, "after", 3, 0.3, 0.8, 0.6, 0.5)
    run.write_held_out(7, [])  # of no evaluation: a run that was killed while it was written
    data = contents(run.folder)
    learned_from = data["counts"]["conversations"]
    assert data["pairs"] == [[learned_from + 2 * k, learned_from + 2 * k + 1] for k in range(4)]
    both = [[data["conversations"][i] for i in pair] for pair in data["pairs"]]
    assert [[c["held"] for c in pair] for pair in both] == [["before", "after"]] * 4
    rewards = [[c["turns"][0]["reward"] for c in pair] for pair in both]
    assert rewards == [[0.2, 0.3], [0.4, 0.8], [0.6, 0.6], [None, 0.5]]
    assert data["changes"] == {"pairs": 3, "mean": pytest.approx(0.5 / 3), "up": 2, "same": 1, "down": 0}
    held_out = source.read(run.folder, 8).held_out
    assert held_out is not None
    assert (len(held_out.pairs), len(held_out.changes)) == (2, 3)
    typical = source.read(run.folder, 200).held_out.typical()  # type: ignore[union-attr]
    assert typical is not None
    assert (typical.before.number, typical.change) == (1, pytest.approx(0.1))
    report = write_report(run.folder).read_text(encoding="utf-8")
    assert "Of 3 held-out conversations" in report
    assert "2 have a higher mean reward after, 1 the same, 0 a lower one; mean change +0.167." in report
    assert "### Held out, the same persona after: conversation 1, iteration 3" in report


def test_what_is_said_of_every_agent_is_what_it_does() -> None:
    from ppg_agents.agents.methods import METHODS

    for name, method in METHODS.items():
        config = TrainConfig(agent=name)
        assert methods_in_words.reads_credit(config) is (method.learns and method.credit), name
        assert (methods_in_words.baseline(config) == "batch-mean") is ("baseline" in method.takes), name
        plain = "baseline" in method.takes and method.advantage is None
        assert (methods_in_words.note(config) == "") is plain, name
    note = methods_in_words.note(TrainConfig(agent="mine:Agent"))
    assert note.startswith("The agent mine:Agent forms its own advantage from")
    by_class = TrainConfig(agent="ppo", agent_options={"credit": "class"})
    assert "instead of" in methods_in_words.note(TrainConfig(agent="ppo"))
    assert "instead of" not in methods_in_words.note(by_class)


@pytest.mark.parametrize(
    ("agent", "baseline", "said", "own"),
    [
        ("ppg", "batch-mean", "", True),
        ("grpo", None, "The agent grpo forms its own advantage from this credit (docs/agents.md).", True),
        ("sft", None, "The agent sft reads no credit (docs/agents.md)", False),
    ],
)
def test_a_run_s_page_and_report_say_what_its_agent_makes_of_the_credit(
    agent: str, baseline: str | None, said: str, own: bool, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run", TrainConfig(agent=agent, model="none"))
    run.append_trajectories([conversation(turn(0.2), turn(0.3))])
    data = contents(run.folder)
    assert data["baseline"] == baseline
    assert data["agent_note"].startswith(said)
    assert bool(data["agent_note"]) is bool(said)
    assert (data["own"] is not None, data["conversations"][0]["own"] is not None) == (own, own)
    assert dict(data["facts"])["Baseline"] == {"grpo": "the agent's own", "sft": "none"}.get(agent, "batch-mean")
    report = write_report(run.folder).read_text(encoding="utf-8")
    assert ("before any baseline is subtracted" in report) is not bool(said)
    assert (text.markdown(data["agent_note"]) in report) is True
    assert bool(re.search(r"full \\?\(own", report)) is own


def test_a_torn_last_line_is_said_and_another_damaged_line_is_named(run: Run) -> None:
    whole = run.trajectories_file.read_text()
    run.trajectories_file.write_text(whole + whole[:100])
    data = contents(run.folder, conversations=3)
    assert any("torn" in note for note in data["notes"])
    assert (len(data["conversations"]), data["counts"]["conversations"]) == (3, 6)
    run.trajectories_file.write_text("{}\n" + whole)
    with pytest.raises(ValueError, match=r"trajectories\.jsonl:1: expected schema"):
        contents(run.folder)


def test_odd_conversations_and_runs_can_be_shown(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", TrainConfig())
    data = contents(run.folder)
    assert (data["conversations"], data["evaluations"], data["pairs"]) == ([], [], [])
    assert any("not written any conversations" in note for note in data["notes"])
    file = tmp_path / "played.jsonl"
    odd = [
        conversation(truncated=True),
        conversation(turn(math.nan, verdict={})),
        conversation(turn(0.7, verdict={}, token_ids=(), log_probs=())),
    ]
    file.write_text("\n".join(map(to_json, odd)) + "\n")
    data = contents(file)
    assert file.with_suffix(".html").is_file()
    assert [[t["status"] for t in c["turns"]] for c in data["conversations"]] == [[], ["unjudged"], ["scored"]]
    assert data["own"] is None
    assert data["counts"]["empty"] == 1
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(RunError, match="empty file"):
        contents(tmp_path / "empty.jsonl")
    with pytest.raises(RunError, match=r"did you mean .*run'\?"):
        contents(tmp_path / "runn")


def test_an_offline_run_shows_the_dialogues_it_learned_from(tmp_path: Path) -> None:
    gone = Run.create(tmp_path / "gone", TrainConfig(offline=OfflineSettings(files=(str(tmp_path / "no.json"),))))
    gone.append_metrics({"iteration": 1, "weighted_token_log_prob": -3.0})
    gone.write_evaluation(
        "before",
        {"iteration": 0, "weighted_token_log_prob": -4.0, "per_file": {"no.json": {"weighted_token_log_prob": -4.0}}},
    )
    data = contents(gone.folder)
    assert data["offline"]
    assert data["metrics"] == {"key": "weighted_token_log_prob", "points": [[1, -3.0]], "lost": []}
    assert any("cannot be read" in note for note in data["notes"])
    assert "-4.000" in write_report(gone.folder).read_text()


def test_tokens_are_spelled_by_the_tokenizer(run: Run, tmp_path: Path, byte_tokenizer: Callable[..., Any]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    encode = lambda said: (*tokenizer.encode(said, add_special_tokens=False), end)  # noqa: E731

    def spoken(reply: str) -> Trajectory:
        ids = encode(reply)
        return conversation(turn(reply=reply, prompt_ids=(end, 9999), token_ids=ids, log_probs=(-1.0,) * len(ids)))

    run.trajectories_file.write_text("\n".join(map(to_json, [spoken("Hi!"), spoken("é")])) + "\n")
    data = contents(run.folder, tokenizer=str(tmp_path / "tokenizer"))
    plain, split = (c["turns"][0] for c in data["conversations"])
    spell = lambda turn: [data["tokens"][str(i)] for i in turn["tokens"]]  # noqa: E731
    assert spell(plain) == ["H", "i", "!", "<|end|>"]
    assert spell(split) == ["⟨Ã⟩", "⟨©⟩", "<|end|>"]
    assert (plain["inline"], split["inline"]) == (True, False)
    assert data["tokens"]["9999"] == "⟨9999⟩"
    assert data["control"] == [end]
    with pytest.raises(ValueError, match="--tokenizer: expected"):
        contents(run.folder, tokenizer=str(tmp_path))


def test_the_page_runs_its_own_script_alone_and_asks_for_nothing(run: Run) -> None:
    run.append_trajectories(
        [conversation(turn(reply="</script><script>alert(1)</script>{{script}}{{policy}}<!--<script>"))]
    )
    written = page.write_page(run.folder, conversations=200).read_text(encoding="utf-8")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', written)
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    hashed = lambda inside: f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"  # noqa: E731
    scripts = re.findall(r"<script>(.*?)</script>", written, re.DOTALL)
    styles = re.findall(r"<style>(.*?)</style>", written, re.DOTALL)
    assert directives["default-src"] == "'none'"
    assert [directives["script-src"], directives["style-src"]] == [hashed(scripts[0]), hashed(styles[0])]
    assert (len(scripts), len(styles), written.count("<script")) == (1, 1, 2)
    assert "alert(1)" in written
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "fetch(",
        "import(",
    ):
        assert way not in scripts[0]
    assert set(re.findall(r"https?://[^\"'\s]*", written.replace(policy, ""))) <= {"http://www.w3.org/2000/svg"}


# ---- the report and the commands


def rows(markdown: str) -> list[list[str]]:
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown.splitlines() if line.startswith("|")]


def test_the_report_holds_credit_failures_and_intervals(run: Run) -> None:
    result = {
        "iteration": 0,
        "persona_consistency": 0.4,
        "ci95": [0.3, 0.5],
        "per_turn": [0.4],
        "per_turn_ci95": [[0.1, 0.6]],
        "n_personas": 9,
        "conversations": 12,
        "reachable": None,
    }
    run.write_evaluation("before", result)
    run.write_evaluation("after", result | {"iteration": 3, "persona_consistency": 0.8, "ci95": [None, None]})
    run.append_trajectories([conversation(turn(message=HOSTILE, reply=HOSTILE, version=3), persona="p")] * 2)
    written = write_report(run.folder)
    assert written == run.folder / "report" / "report.md"
    report = written.read_text(encoding="utf-8")
    cells = rows(report)
    assert [" before ", " 0 ", " 0.400 ", r" \[0.300, 0.500\] ", " - ", " 9 ", " 12 "] in cells
    assert [" after ", " 3 ", " 0.800 ", r" \(too few to say\) ", " - ", " 9 ", " 12 "] in cells
    assert [" verdict: timeout ", " 1 of 11 replies "] in cells
    assert [
        " 1 ",
        " Hello. ",
        " Hi. ",
        " truth. Why. ",
        " 0.20 ",
        " 0.20 ",
        " 0.50 ",
        " 0.50 ",
    ] not in cells  # masked after
    assert [" 1 ", " Hello. ", " Hi. ", " truth. Why. ", " 0.20 ", " 0.20 ", " 0.50 "] in cells
    assert [" 2 ", " Hello. ", " Hi. ", " no score: timeout. Why. ", " none ", " masked ", " masked "] in cells
    assert len({len(row) for row in cells if row[0].strip() in ("turn", "1", "2") and len(row) > 3}) == 1
    kinds = {token.type for token in MarkdownIt("gfm-like", {"linkify": False}).parse(report)}
    assert not kinds & {"html_block", "fence", "code_block"}
    pictures = list((run.folder / "report").glob("*.png"))
    assert {p.name for p in pictures} == {"curve.png", "credit.png"}
    assert all(0 < p.stat().st_size <= 300_000 for p in pictures)


def call(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    for command in (inspect_commands.inspect_, inspect_commands.report):
        monkeypatch.setitem(commands.cli.commands, str(command.name), command)
    return cli.main(arguments)


def test_the_commands_print_paths_and_one_line_per_error(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, appendix = tmp_path / "page.html", tmp_path / "deep" / "appendix"
    assert call(["inspect", str(run.folder), "--out", str(out), "--conversations", "2"], monkeypatch) == 0
    assert call(["report", str(run.folder), "--out", str(appendix)], monkeypatch) == 0
    (appendix / "notes.md").write_text("mine")
    assert call(["report", str(run.folder), "--out", str(appendix)], monkeypatch) == 0, "written anew"
    assert capsys.readouterr().out.split() == [str(out), *[str(appendix / "report.md")] * 2]
    assert (appendix / "notes.md").read_text() == "mine"
    (appendix / "report.md").unlink()
    assert call(["report", str(run.folder), "--out", str(appendix)], monkeypatch) == 2
    assert "credit.png, which would be lost" in capsys.readouterr().err
    assert call(["inspect", str(tmp_path / "nothing")], monkeypatch) == 1
    assert call(["inspect", str(run.folder), "--out", str(run.trajectories_file / "x.html")], monkeypatch) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all(line.startswith("ppg-agent: expected") for line in errors)


@pytest.mark.parametrize("command", [inspect_commands.inspect_, inspect_commands.report])
def test_help_has_an_example(command: Any) -> None:
    assert f"Example: ppg-agent {command.name} runs/NAME" in CliRunner().invoke(command, ["--help"]).output


def test_logged_dialogues_are_read_without_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ppg_agents import offline
    from ppg_gym.conversation import Persona, Verdict
    from ppg_gym.data.dialogues import LoggedDialogue, LoggedTurn

    def dialogue(i: int) -> LoggedDialogue:
        turns = (
            LoggedTurn("Hi", "Ho", Verdict("scored", 1.0, "ok")),
            LoggedTurn("And?", "Hm", Verdict("unparsed", None)),
        )
        return LoggedDialogue("therapy", Persona(f"id{i}", f"You are {i}.", domain="therapy"), turns, "f.json", i, 1)

    monkeypatch.setattr(offline, "read_files", lambda _: ([dialogue(i) for i in range(10)], []))
    segments = PolicyClass("segment", segments=(2, 1))
    config = replace(TrainConfig(), offline=OfflineSettings(files=("f.json",)), policy_class=segments)
    run = Run.create(tmp_path / "run", config)
    data = contents(run.folder)
    assert len(data["conversations"]) == 8  # two personas are held out
    assert data["conversations"][0]["turns"][0]["tokens"] == []
    assert data["counts"]["statuses"] == [["scored", 8], ["unparsed", 8]]
    assert data["classes"][data["own"]] == {"label": "segment 2,1", "ends": [2, 2, 3], "weights": None}
    assert data["pairs"] == []
