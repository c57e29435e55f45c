"""Sentences against words in a row: the measurement's own numbers, a domain without the check, the table's source."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest

from ppg_gym.domain.english import english
from ppg_gym.domain.loading import load
from ppg_gym.domain.parsing import words
from ppg_gym.domain.reading import reader
from ppg_gym.domain.sentences import UNLIKELY, Sentences, sentences

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def script(name: str) -> Any:
    """Return a module of scripts/."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_paraphrases_are_told_from_what_is_made_of_them() -> None:
    plausibility = script("plausibility")
    rng = random.Random(1)
    good = list(plausibility.paraphrases(rng))
    makers = (plausibility.shuffled, plausibility.truncated, plausibility.duplicated)
    bad = [r._replace(text=text) for r in good for make in makers if (text := make(r.text, rng))]
    bad += [r._replace(text=text) for r in good if (text := plausibility.negated(r, rng))]
    verdicts = plausibility.judged(good)
    assert min(len(good), len(bad)) >= 500
    assert sum(kind in plausibility.REFUSED for _, kind, _ in verdicts) <= 0.02 * len(good)
    ranks = [[plausibility.rank(v) for v in found] for found in (verdicts, plausibility.judged(bad))]
    assert plausibility.auc(*ranks) >= 0.98


def test_sentences_end_at_stops_and_keep_their_sign() -> None:
    assert list(sentences(words("Hi! Are you, well, there? Yes"))) == [
        ["hi", "."],
        ["are", "you", ",", "well", ",", "there", "?"],
        ["yes", "."],
    ]


def test_the_lexicon_is_that_of_its_source() -> None:
    build = script("build_english")
    data = build.tomllib.loads(build.SOURCE.read_text(encoding="utf-8"))
    assert set(build.lexicon(data)) == set(english().words)


def test_a_domain_in_another_language_switches_the_check_off(tmp_path: Path) -> None:
    page = (SCRIPTS.parent / "docs" / "extending.md").read_text(encoding="utf-8")
    text = page.partition("<!-- test: file interview.toml -->\n```toml\n")[2].partition("```")[0]
    for name, options, fault in (("on", "", "order"), ("off", "[options]\nenglish = false\n", "")):
        file = tmp_path / f"{name}.toml"
        file.write_text(text.replace("[markers]", f"{options}[markers]", 1))
        assert reader(str(file)).parse("For is hammer of the.").fault == fault


@pytest.mark.parametrize("text", ["I work as a.", "Hammer is of is a for."])
def test_the_surprise_of_what_is_no_sentence(text: str) -> None:
    order = Sentences(load("chatting"), words)
    assert max(order.surprise(sentence) for sentence in sentences(words(text))) > UNLIKELY
