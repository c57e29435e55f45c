"""The NLI judge, with a small classifier that the test trains on contradictions of the three domains' facts."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ppg_gym.conversation import Conversation, Persona
from ppg_gym.domain.loading import load
from ppg_gym.domain.parsing import spoken
from ppg_gym.domain.personas import role_play_instruction
from ppg_gym.judges.nli import NLIJudge

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LABELS = ("Entailment", "NEUTRAL", "contradiction")
DOMAINS = ("chatting", "education", "therapy")
SLOTS, VALUES = 2, 3  # per domain

Statement = tuple[str, str, str, str]  # domain, slot, premise, reply


def statements() -> list[Statement]:
    """Return what a persona's sentence and a truthful reply say of every fact."""
    found = []
    for domain in map(load, DOMAINS):
        for slot in [s for s in domain.slots if domain.statements[s].count("{") == 1][:SLOTS]:
            for value in list(domain.slots[slot])[:VALUES]:
                premise = domain.statements[slot].format(**{slot: value})
                found.append((domain.name, slot, premise, f"My {slot} is {value}."))
    return found


def pairs() -> Iterator[tuple[str, str, int]]:
    for (domain, slot, premise, _), (other, asked, said, reply) in itertools.product(statements(), repeat=2):
        if domain == other:
            label = 1 if slot != asked else 0 if premise == said else 2
            yield premise, reply, label


def save(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    rows = list(pairs())
    words = sorted({word for premise, reply, _ in rows for text in (premise, reply) for word in spoken(text)})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", ",", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=48, **special)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=48, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2,
        id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)},
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    encoded = tokenizer([r[0] for r in rows], [r[1] for r in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([r[2] for r in rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(300):
        losses = torch.nn.functional.cross_entropy(model(**encoded).logits, labels, reduction="none")
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        if losses.max() < 0.1:
            break
    return save(tmp_path_factory.mktemp("nli") / "model", model.eval(), tokenizer)


@pytest.fixture(scope="module")
def judge(trained: Path) -> NLIJudge:
    return NLIJudge("chatting", {"model": str(trained), "device": "cpu"})


def conversation(domain: str, reply: str, *values: int) -> Conversation:
    """Return a persona with one value per slot, wrapped into a role play, and a reply of it."""
    own = [s for s in statements() if s[0] == domain]
    facts = [own[slot * VALUES + value][2] for slot, value in enumerate(values)]
    persona = Persona("p", role_play_instruction(" ".join(facts), domain), domain=domain)
    return Conversation(persona).add("partner", "Tell me.").add("policy", reply)


def replies(domain: str) -> list[str]:
    return [s[3] for s in statements() if s[0] == domain]


def cases(domain: str) -> list[tuple[Conversation, bool]]:
    """Return every reply of a domain beside whether the persona contradicts it."""
    return [
        (conversation(domain, reply, first, second), number % VALUES != (first, second)[number // VALUES])
        for first, second in itertools.product(range(VALUES), repeat=2)
        for number, reply in enumerate(replies(domain))
    ]


def test_the_hub_is_asked_once_and_a_cached_model_is_read_without_it(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub as hub

    asked: list[str] = []

    def silent(url: str, timeout: float) -> None:
        asked.append(url)
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "get_hf_file_metadata", silent)
    for name, found in (("some-one/nli", "ConnectionError: no route"), ("a b/c", "HFValidationError")):
        with pytest.raises(ValueError, match=f"name on the hub that can be reached, got {found}.*give the folder"):
            NLIJudge("chatting", {"model": name})
    assert len(asked) == 1
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file: str(trained / file))
    assert NLIJudge("chatting", {"model": "some-one/cached"})


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_contradicted_persona_sentence_costs_the_score(trained: Path, domain: str) -> None:
    judge = NLIJudge(domain, {"model": str(trained), "device": "cpu"})
    asked = cases(domain)
    verdicts = judge.judge([c for c, _ in asked])
    bad = [(v.score or 0) > 0.5 for v, (_, contradicts) in zip(verdicts, asked, strict=True) if contradicts]
    good = [(v.score or 0) > 0.5 for v, (_, contradicts) in zip(verdicts, asked, strict=True) if not contradicts]
    assert sum(bad) <= 0.05 * len(bad)
    assert sum(good) >= 0.95 * len(good)
    binary = NLIJudge(domain, {"model": str(trained), "device": "cpu", "scale": "binary"})
    assert {v.score for v in binary.judge([c for c, _ in asked])} == {0.0, 1.0}


def test_batches_of_any_size_score_the_same(trained: Path, judge: NLIJudge) -> None:
    asked = [c for domain in DOMAINS for c, _ in cases(domain)[::5]]
    together = [v.score for v in judge.judge(asked)]
    alone = [judge.judge([c])[0].score for c in asked]
    small = NLIJudge("chatting", {"model": str(trained), "device": "cpu", "batch_size": 3}).judge(asked)
    assert together == pytest.approx(alone, abs=1e-5)
    assert together == pytest.approx([v.score for v in small], abs=1e-5)
    assert judge.judge([]) == []


def change(trained: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(trained, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return folder


def test_the_order_of_the_labels_does_not_matter(trained: Path, judge: NLIJudge, tmp_path: Path) -> None:
    order = [2, 0, 1]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(trained)
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight[order].clone())
        model.classifier.bias.copy_(model.classifier.bias[order].clone())
    model.config.id2label = {i: LABELS[old].upper() for i, old in enumerate(order)}
    model.config.label2id = {name: i for i, name in model.config.id2label.items()}
    folder = save(tmp_path / "permuted", model, transformers.AutoTokenizer.from_pretrained(trained))
    asked = [c for c, _ in cases("therapy")]
    permuted = NLIJudge("therapy", {"model": str(folder), "device": "cpu"}).judge(asked)
    assert [v.score for v in permuted] == pytest.approx([v.score for v in judge.judge(asked)], abs=1e-6)


@pytest.mark.parametrize(
    ("id2label", "found"),
    [
        ({"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, "LABEL_0"),
        ({"0": "entailment", "1": "not_entailment", "2": "other"}, "not_entailment"),
        ({"0": "contradiction", "1": "Contradiction", "2": "entailment"}, "Contradiction"),
        ({"0": "toxic", "1": "contradiction", "2": "other"}, "toxic"),
    ],
)
def test_labels_that_are_not_those_of_nli_are_refused_and_shown(
    trained: Path, tmp_path: Path, id2label: dict[str, str], found: str
) -> None:
    label2id = {name: int(i) for i, name in id2label.items()}
    folder = change(trained, tmp_path / "model", id2label=id2label, label2id=label2id)
    with pytest.raises(ValueError, match=rf"expected labels named contradiction and entailment .*{found}"):
        NLIJudge("chatting", {"model": str(folder)})


def test_what_is_no_classifier_is_refused_with_the_folder(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path}/none.*got no such folder; check the path"):
        NLIJudge("chatting", {"model": str(tmp_path / "none")})
    with pytest.raises(ValueError, match=r"got no config.json in it"):
        NLIJudge("chatting", {"model": str(tmp_path)})
    language_model = change(trained, tmp_path / "lm", architectures=["BertForMaskedLM"])
    with pytest.raises(ValueError, match=r"lm'.*expected a sequence classifier, got \['BertForMaskedLM'\]"):
        NLIJudge("chatting", {"model": str(language_model)})
    headless = change(trained, tmp_path / "headless")
    weights = __import__("safetensors.torch").torch
    kept = {k: v for k, v in weights.load_file(headless / "model.safetensors").items() if "classifier" not in k}
    weights.save_file(kept, headless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"headless'.*got none for \['classifier"):
        NLIJudge("chatting", {"model": str(headless)})
    weightless = change(trained, tmp_path / "weightless")
    (weightless / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"weightless'.*expected a model that transformers can load"):
        NLIJudge("chatting", {"model": str(weightless)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"judge_options\['model'\]: expected a folder or the name of a model on the hub, got None"),
        ({"modle": "x"}, "expected judge_options out of model, .*, got 'modle'; did you mean 'model'"),
        ({"model": "x", "trust_remote_code": True}, "got 'trust_remote_code'"),
        ({"model": "x", "metric": "line-to-lines"}, "did you mean 'line-to-line'"),
        ({"model": "x", "scale": 1}, "one of graded, binary, got 1"),
        ({"model": "x", "batch_size": 0}, "whole number of at least 1, got 0"),
        ({"model": "x", "device": 0}, "a text or None, got 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NLIJudge("chatting", options)


def test_own_lines_count_when_they_are_asked_for(trained: Path) -> None:
    first, second = next(s[2] for s in statements() if s[0] == "therapy"), replies("therapy")[1]
    persona = Persona("p", "You are somebody.", domain="therapy")
    lines = Conversation(persona).add("partner", "?").add("policy", first).add("partner", "And?").add("policy", second)
    scores = {}
    for metric in ("prompt-to-line", "line-to-line", "both"):
        judge = NLIJudge("therapy", {"model": str(trained), "device": "cpu", "metric": metric})
        scores[metric] = judge.judge([lines])[0].score or 0.0
    assert scores["line-to-line"] < 0.5
    assert scores["both"] == pytest.approx(min(scores.values()), abs=1e-5)
    alone = NLIJudge("therapy", {"model": str(trained), "device": "cpu", "metric": "line-to-line"})
    (verdict,) = alone.judge([Conversation(persona).add("partner", "?").add("policy", second)])
    assert (verdict.score, "no earlier line" in verdict.rationale) == (1.0, True)


def test_silence_and_copies_are_not_left_to_the_model(judge: NLIJudge) -> None:
    persona = Persona("p", role_play_instruction("You paint old boats in the harbour.", "chatting"))
    said = [Conversation(persona).add("policy", text) for text in ("?!", "you paint old boats in the harbour")]
    assert [(v.kind, v.score) for v in judge.judge(said)] == [("silence", 0.0), ("copying", 0.0)]


def test_a_line_too_long_for_the_model_is_judged_in_pieces_and_none_is_cut_off(judge: NLIJudge) -> None:
    words = ("my " * 22 + replies("chatting")[1]).split()
    halves = words[: len(words) // 2], words[len(words) // 2 :]
    whole, *parts = judge.judge([conversation("chatting", " ".join(said), 0, 0) for said in (words, *halves)])
    assert whole.score == pytest.approx(min(part.score or 0.0 for part in parts), abs=1e-5)
    assert judge.judge([conversation("chatting", "x" * 5000, 0, 0)])[0].status == "scored"


def test_of_a_long_persona_the_nearest_sentences_count(trained: Path, judge: NLIJudge) -> None:
    lie = next(reply for reply in replies("chatting") if "pilot" in reply)
    many = " ".join(f"Nothing number {i} is here." for i in range(50))
    own = [s[2] for s in statements() if s[0] == "chatting"]
    fact = next(text for text in own if "pilot" in text)
    few = NLIJudge("chatting", {"model": str(trained), "device": "cpu", "max_premises": 1})
    persona = Persona("p", f"{many} {fact}")
    alone = Persona("p", fact)
    scores = [j.judge([Conversation(p).add("policy", lie)])[0].score for j, p in ((few, persona), (judge, alone))]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_logits_that_are_not_numbers_give_no_score(trained: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(trained)
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    folder = save(tmp_path / "nan", model, transformers.AutoTokenizer.from_pretrained(trained))
    judge = NLIJudge("chatting", {"model": str(folder), "device": "cpu"})
    broken, silent = judge.judge([conversation("chatting", reply, 0, 0) for reply in (replies("chatting")[0], "")])
    assert (broken.status, broken.score) == ("error", None)
    assert silent.kind == "silence"


def test_a_persona_without_a_sentence_is_refused(judge: NLIJudge) -> None:
    judge.check(Persona("p", "You bake."))
    with pytest.raises(ValueError, match="at least one sentence, persona 'p' has none"):
        judge.check(Persona("p", role_play_instruction("", "chatting")))
