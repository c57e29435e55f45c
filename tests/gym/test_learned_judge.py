"""The learned judge: it learns on unseen personas what can be learnt, and says so when there is nothing."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppg_gym.conversation import Conversation, Persona, Verdict
from ppg_gym.data.dialogues import LoggedDialogue, LoggedTurn, read_consistent_llms
from ppg_gym.judges import fitting
from ppg_gym.judges.fit_report import FitReport, calibration_error
from ppg_gym.judges.fitting import fit
from ppg_gym.judges.learned import LearnedJudge, LearnedModel

pytest.importorskip("sklearn")

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "consistent-llms"
JOBS = ["nurse", "pilot", "baker", "farmer", "lawyer", "doctor", "sailor", "tailor", "waiter", "smith", "miner", "cook"]
CITIES = ["Oslo", "Lima", "Cairo", "Quito", "Delhi", "Paris", "Turin", "Seoul", "Porto", "Milan", "Accra", "Dakar"]
PERSONAS = 24


def persona(i: int, domain: str) -> Persona:
    text = f"I work as a {JOBS[i % 12]}. My home is {CITIES[(i // 2 + i) % 12]}. I own {i + 2} books."
    return Persona(f"{domain}-{i}", text, domain=domain)


def dialogue(i: int, domain: str, rng: np.random.Generator, label: Callable[[bool], float]) -> LoggedDialogue:
    """Eight replies of one persona; half of them name another job, in the same words."""
    someone = persona(i, domain)
    turns = []
    for n in range(8):
        true = bool(rng.random() < 0.5)
        job = JOBS[i % 12] if true else JOBS[(i + 1 + rng.integers(11)) % 12]
        start = ("Well,", "You see,", "Honestly,", "In fact,")[rng.integers(4)]
        reply = f"{start} I love to be a {job} on day {rng.integers(10**6)}."
        verdict = Verdict("scored", label(true)) if n else Verdict("unparsed", None)
        turns.append(LoggedTurn(f"And number {n}?", reply, verdict))
    return LoggedDialogue(domain, someone, tuple(turns), f"{domain}-{i % 2}.json", i, 1)


def logged(domain: str = "chatting", seed: int = 0, label: Callable[[bool], float] = float) -> list[LoggedDialogue]:
    rng = np.random.default_rng(seed)
    return [dialogue(i, domain, rng, label) for i in range(PERSONAS)]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Fewer candidates and folds: the data is easy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "STRENGTHS", (0.1,))
        patch.setattr(fitting, "FOLDS", 3)
        yield


Fitted = tuple[list[LoggedDialogue], LearnedModel, FitReport]


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    dialogues = logged()
    return dialogues, *fit(dialogues)


@pytest.fixture(scope="module")
def folder(fitted: Fitted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("learned") / "judge"
    fitted[1].save(path)
    return path


def asked(i: int, reply: str, domain: str = "chatting") -> Conversation:
    return Conversation(persona(i, domain)).add("partner", "And you?").add("policy", reply)


def test_it_tells_consistent_from_contradicting_on_personas_it_has_not_seen(fitted: Fitted) -> None:
    (report,) = fitted[2].domains
    for found in (report.held_out, report.cross_validated):
        assert found.judge.auc.value is not None
        assert found.judge.auc.value > 0.9
        assert found.judge.log_loss < found.base_rate.log_loss
        assert found.judge.brier < 0.15
        assert found.always.accuracy == pytest.approx(found.consistent)
        assert found.base_rate.auc.value == 0.5
    assert (report.auc_other_persona.value or 1.0) < (report.held_out.judge.auc.value or 0.0) - 0.1
    assert report.without_score == {"unparsed": PERSONAS}
    assert report.lines + report.held_out.lines == PERSONAS * 7


def test_no_persona_is_on_both_sides(fitted: Fitted) -> None:
    dialogues, _, whole = fitted
    (report,) = whole.domains
    held_out = set(report.held_out_personas)
    assert len(held_out) == report.held_out.personas == round(0.2 * PERSONAS)
    assert held_out < {d.persona.id for d in dialogues}
    assert report.personas == PERSONAS - len(held_out)
    # Nothing of the held-out personas reaches the model: without their lines it is the same, bit for bit.
    other = [
        replace(d, turns=(LoggedTurn("", "Hello there.", d.turns[1].verdict),)) if d.persona.id in held_out else d
        for d in dialogues
    ]
    again = fit(other)[0].domains["chatting"]
    before = fitted[1].domains["chatting"]
    assert again.dense.tobytes() == before.dense.tobytes()
    assert again.sparse.tobytes() == before.sparse.tobytes()
    assert (again.slope, again.offset, again.blocks) == (before.slope, before.offset, before.blocks)


def test_noise_is_reported_as_noise() -> None:
    rng = np.random.default_rng(5)
    (report,) = fit(logged(label=lambda true: float(rng.random() < 0.5)))[1].domains
    low = report.cross_validated.judge.auc.low
    assert low is not None
    assert low < 0.55
    assert any("use another judge" in warning or "may tell nothing" in warning for warning in report.warnings)


def test_a_judge_that_does_not_read_the_persona_says_so() -> None:
    polite = {0.0: "Thank you, I like number {}.", 1.0: "Never mind, I like number {}.", None: "Number {}."}
    dialogues = [
        replace(d, turns=tuple(replace(t, reply=polite[t.verdict.score].format(n)) for n, t in enumerate(d.turns)))
        for d in logged()
    ]
    (report,) = fit(dialogues)[1].domains
    assert (report.held_out.judge.auc.value or 0) > 0.9
    assert (report.auc_other_persona.value or 0) > 0.9
    assert any("how a reply sounds" in warning for warning in report.warnings)


def test_a_file_whose_verdicts_mean_the_opposite_is_named() -> None:
    dialogues = logged()
    flip = {0.0: Verdict("scored", 1.0), 1.0: Verdict("scored", 0.0), None: Verdict("unparsed", None)}
    flipped = [
        replace(d, turns=tuple(replace(turn, verdict=flip[turn.verdict.score]) for turn in d.turns))
        if d.source == "chatting-1.json"
        else d
        for d in dialogues
    ]
    (report,) = fit(flipped)[1].domains
    assert [check.source for check in report.files] == ["chatting-0.json", "chatting-1.json"]
    assert any(warning.startswith("chatting-1.json: ") and "wrong way round" in warning for warning in report.warnings)


def test_saved_and_loaded_it_scores_bit_for_bit_the_same_without_a_pickle(fitted: Fitted, folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "weights.npz"]
    with np.load(folder / "weights.npz", allow_pickle=False) as arrays:
        assert {arrays[name].dtype for name in arrays.files} == {np.dtype(np.float64)}
    content = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    assert content["report"] == json.loads(json.dumps(fitted[2].to_dict()))
    assert content["made_with"]["scikit-learn"]
    judge = LearnedJudge("chatting", {"path": str(folder)})
    conversations = [asked(i, f"Well, I love to be a {job} on day {i}.") for i in range(6) for job in JOBS]
    verdicts = judge.judge(conversations)
    model = LearnedModel.load(folder).domains["chatting"]
    assert model.sparse.tobytes() == fitted[1].domains["chatting"].sparse.tobytes()
    fitted[1].save(folder.parent / "again")
    second = LearnedJudge("chatting", {"path": str(folder.parent / "again")}).judge(conversations)
    assert [v.score for v in verdicts] == [v.score for v in second]
    assert [v.score for v in verdicts] == [judge.judge([c])[0].score for c in conversations]
    by_truth = {True: [], False: []}  # type: dict[bool, list[float]]
    for conversation, verdict in zip(conversations, verdicts, strict=True):
        job = conversation.lines[-1].text.split()[6]
        by_truth[job in conversation.persona.instruction].append(verdict.score or 0.0)
    assert np.mean(by_truth[True]) > np.mean(by_truth[False]) + 0.2


def test_silence_copies_and_repetitions_are_scored_by_rule(folder: Path) -> None:
    judge = LearnedJudge("chatting", {"path": str(folder)})
    long = "You see, I love to be a nurse here."
    again = asked(0, long).add("partner", "Sorry?").add("policy", long)
    baker = Persona("c", "You bake bread for the whole town.")
    copied = Conversation(baker).add("policy", "you bake bread for the whole TOWN")
    verdicts = judge.judge([asked(0, " … "), copied, again, asked(0, long)])
    assert [v.kind for v in verdicts] == ["silence", "copying", "repeating", ""]
    assert [v.score for v in verdicts[:3]] == [0.0] * 3
    assert judge.judge([]) == []


def test_only_what_it_was_fitted_on_is_judged(folder: Path) -> None:
    with pytest.raises(ValueError, match="expected a learned judge of domain 'therapy', got one of chatting"):
        LearnedJudge("therapy", {"path": str(folder)})
    judge = LearnedJudge("chatting", {"path": str(folder)})
    judge.check(persona(0, "chatting"))
    with pytest.raises(ValueError, match="expected a persona of this domain, got 'therapy-0' of 'therapy'"):
        judge.check(persona(0, "therapy"))
    with pytest.raises(ValueError, match="with an instruction"):
        judge.check(Persona("empty", " "))
    with pytest.raises(ValueError, match="unknown judge_options key 'pth' for the learned judge; did you mean 'path'"):
        LearnedJudge("chatting", {"pth": str(folder)})
    with pytest.raises(ValueError, match=r"expected judge_options\['path'\] .* to be a text, got None"):
        LearnedJudge("chatting", {})


def spoil(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    (folder / "model.json").write_text(json.dumps(content | changes), encoding="utf-8")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: [path.unlink() for path in f.iterdir()], "expected a learned judge"),
        (lambda f: (f / "model.json").write_text("{", encoding="utf-8"), "expected a readable learned judge"),
        (lambda f: (f / "weights.npz").write_bytes(b"PK\x03\x04junk"), "expected a readable learned judge"),
        (lambda f: np.savez(f / "weights.npz", x=np.array([object()])), "Object arrays cannot be loaded"),
        (lambda f: spoil(f, kind="other"), "expected kind 'ppg-gym learned judge'"),
        (lambda f: spoil(f, schema=99), "expected schema 1 with this version's features, got schema 99"),
        (lambda f: spoil(f, columns={"plain": ["length"]}), "this version's features"),
        (lambda f: spoil(f, domains={"chatting": {"blocks": ["plain"]}}), "expected a whole learned judge"),
        (lambda f: spoil(f, domains=[]), "expected a whole learned judge"),
    ],
)
def test_a_foreign_or_broken_folder_is_refused(
    fitted: Fitted, tmp_path: Path, harm: Callable[[Path], Any], message: str
) -> None:
    fitted[1].save(tmp_path)
    harm(tmp_path)
    with pytest.raises(ValueError, match=message):
        LearnedModel.load(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        LearnedModel.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("dialogues", "options", "message"),
    [
        ([], {}, "at least one logged dialogue"),
        (logged()[:3], {}, r"domain chatting: expected at least 10 training lines .* by 2 personas"),
        (logged(label=lambda true: 1.0), {}, "and 0 inconsistent lines"),
        (logged()[:1], {}, "domain chatting: expected at least 2 personas"),
        (logged(), {"features": "tokens"}, "expected features out of text, embeddings"),
        (logged(), {"held_out": 1.5}, r"expected held_out in \(0, 1\)"),
    ],
)
def test_too_little_to_fit_on_is_refused(dialogues: list[LoggedDialogue], options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(dialogues, **options)


def test_sentence_embeddings_take_the_encoder_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class SentenceTransformer:
        def __init__(self, name: str, trust_remote_code: bool) -> None:
            assert (name, trust_remote_code) == ("some/encoder", False)

        def encode(self, texts: list[str]) -> np.ndarray[Any, Any]:
            split = [[word.strip(".,") for word in text.split()] for text in texts]
            counts = [[words.count(job) + words.count(job[::-1]) for job in JOBS] for words in split]
            return np.array(counts, dtype=np.float32) + 0.01

    def other_words(reply: str) -> str:
        """Say the job in a word that shares no letter's place with it: only the encoder knows both."""
        job = next(job for job in JOBS if f" {job} " in reply)
        return f"I am a {job[::-1]}, number {reply.split()[-1]}"

    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = SentenceTransformer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    dialogues = [
        replace(d, turns=tuple(replace(turn, reply=other_words(turn.reply)) for turn in d.turns)) for d in logged()
    ]
    model, report = fit(dialogues, features="embeddings", encoder="some/encoder")
    assert "embeddings" in report.domains[0].blocks
    assert (report.domains[0].held_out.judge.auc.value or 0) > 0.9
    model.save(tmp_path)
    judge = LearnedJudge("chatting", {"path": str(tmp_path)})
    true, false = judge.judge([asked(0, "I am a esrun, number 7."), asked(0, "I am a tolip, number 7.")])
    assert (true.score or 0) > (false.score or 0)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ModuleNotFoundError, match="sentence_transformers is not installed; run: pip install"):
        LearnedJudge("chatting", {"path": str(tmp_path)})


def test_calibration_error_by_hand() -> None:
    sure = np.array([0.0] * 10 + [1.0] * 10)
    assert calibration_error(sure, sure == 1) == 0.0
    assert calibration_error(sure, sure == 0) == 1.0
    assert calibration_error(np.full(8, 0.75), np.array([True, False] * 4)) == pytest.approx(0.25)


def test_the_table_shows_the_judge_beside_the_constants(fitted: Fitted) -> None:
    table = fitted[2].table()
    for part in ("chatting: fitted on", "learned judge", "always consistent", "base rate", "24 unparsed"):
        assert part in table
    assert max(map(len, table.splitlines())) <= 160


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/consistent-llms beside the project")
def test_the_report_on_a_benchmark_file_is_well_formed() -> None:
    dialogues, read = read_consistent_llms(DATA / "education" / "mistral-instruct_0_792.json")
    model, whole = fit(dialogues)
    (report,) = whole.domains
    ruled = sum(count for count, _ in report.by_rule.values())
    assert report.lines + report.held_out.lines + ruled == read.scored
    assert sum(report.without_score.values()) >= read.unparsed
    for found in (report.held_out, report.cross_validated):
        assert found.clusters == ("persona" if found.personas >= 10 else "dialogue")
        for figures in (found.judge, found.always, found.base_rate):
            assert 0 <= figures.brier <= 1
            assert 0 <= figures.ece <= 1
            assert np.isfinite(figures.log_loss)
    json.dumps(whole.to_dict(), allow_nan=False)
    assert list(model.domains) == ["education"]
