"""A domain by its path: the documentation's example is whole, plays like an embedded one, and says what is wrong."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import ppg_gym
from ppg_gym.conversation import Conversation
from ppg_gym.data import make_personas
from ppg_gym.domain.cast import personas
from ppg_gym.domain.lint import cores, faults
from ppg_gym.domain.loading import DOMAINS, SPLITS, folder, load
from ppg_gym.domain.reading import reader
from ppg_gym.domain.saying import say
from ppg_gym.judges.facts import FactsJudge
from ppg_gym.partners.scenes import scene
from ppg_gym.partners.scripted import ScriptedPartner

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
MARK = "<!-- test: file interview.toml -->\n```toml\n"
TEXT = PAGE.read_text(encoding="utf-8").partition(MARK)[2].partition("```")[0]


@pytest.fixture
def own(tmp_path: Path) -> str:
    """Return the path of the documentation's domain."""
    (tmp_path / "interview.toml").write_text(TEXT)
    return str(tmp_path / "interview.toml")


def conversation(domain: str, seed: int) -> list[Any]:
    """Return what an environment shows when replies are drawn from the domain's mixture."""
    env = gym.make("PersonaChat-v0", domain=domain)
    game: Any = env.unwrapped
    read, rng = reader(domain), np.random.default_rng(seed)
    shown: list[Any] = [env.reset(seed=seed)]
    over = False
    while not over:
        mix = game.simulator.domain.mix_in(read.track(game._conversation).state)
        kind = str(rng.choice(list(mix), p=list(mix.values())))
        shown.append(env.step(say(read, kind, game._conversation, rng)))
        over = shown[-1][2]
    return shown


def test_the_documented_domain_is_read_as_it_is_meant_and_scores_by_its_table(own: str) -> None:
    domain, read = load(own), reader(own)
    assert (domain.name, list(faults(domain))) == ("interview", [])
    assert sum(domain.mix.values()) == pytest.approx(1.0)
    rng, persona = np.random.default_rng(0), personas(own, "train")[0]
    line = next(cores(domain, persona.facts))[1]
    for kind in domain.table.kinds:
        if kind != "repeating":
            heard = Conversation(persona).add("partner", line)
            verdict = FactsJudge(own).judge([heard.add("policy", say(read, kind, heard, rng))])[0]
            assert (verdict.kind, verdict.score) == (kind, domain.table.score["polite", kind]), verdict
    for seed in range(5):
        rewards = [step[1] for step in conversation(own, seed)[1:]]
        assert len(rewards) == domain.turns
        assert set(rewards) <= set(domain.table.score.values())


def test_its_personas_are_made_all_different_and_the_same_every_time(own: str, tmp_path: Path) -> None:
    both = [persona for split in SPLITS for persona in personas(own, split)]
    assert [len(personas(own, split)) for split in SPLITS] == [32, 16]  # 3 x 4 x 4 sets of facts
    assert len({tuple(p.facts.items()) for p in both}) == len({p.id for p in both}) == 48
    shutil.copy(own, tmp_path / "other.toml")
    assert [p.facts for p in personas(str(tmp_path / "other.toml"), "train")] != [p.facts for p in both[:32]]
    with pytest.raises(ValueError, match="at most 0 personas"):
        make_personas(own, 1)
    assert make_personas(own, 2, allow_embedded=True)[0].domain == "interview"


@pytest.mark.parametrize("name", DOMAINS)
def test_the_folder_of_an_embedded_domain_by_its_path_is_that_domain(name: str, tmp_path: Path) -> None:
    shutil.copytree(str(folder(name)), tmp_path / name)
    assert conversation(str(tmp_path / name), 7) == conversation(name, 7)


def test_a_spec_a_reader_and_a_relative_path_hold(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = gym.make("PersonaChat-v0", domain=own).spec
    assert spec is not None
    assert json.loads(spec.to_json())["kwargs"]["domain"] == own
    monkeypatch.chdir(Path(own).parent)
    assert load("interview.toml") is load("./interview.toml") is load(own)
    assert pickle.loads(pickle.dumps(reader("interview.toml"))) is reader(own)
    with pytest.raises(ValueError, match=r"interview.toml: expected a table \[partner\].*; add one with role"):
        scene(own)


def test_the_names_are_the_folders() -> None:
    assert ppg_gym.DOMAINS == DOMAINS == ("chatting", "education", "therapy")
    with pytest.raises(ValueError, match=r"the path of your own .*, got 'therapie'; did you mean 'therapy'"):
        load("therapie")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("turns = 8", "turns = eight", r":1: expected TOML, got: Invalid value"),
        ("turns = 8", 'turns = "8"', r": turns: expected an integer, got '8'"),
        ("turns = 8", "turn = 8", r": unknown key turn; did you mean 'turns'\?"),
        ("scenario =", "scenarios =", r"expected a string scenario, got none; add it"),
        ("[0.6, \"polite\"]", "[6, \"polite\"]", r"states.polite.plain: expected \[score in \[0, 1\]"),
        ("[0.6, \"polite\"]", "[0.6, \"polit\"]", r"states.polite.plain: .* one of \['curious', 'polite'\]"),
        ("reasoned = [0.6, \"curious\"]\n", "", r"state 'curious' has no entry for kind 'reasoned'"),
        ('plain.any = ["It is {value}.", "I would say {value}."]', "", r"got none for plain; add plain.any = "),
        ("I would say {value}.", "I would say {fact}.", r"replies.*plain.any: expected \{value\}, .*, got \{fact\}"),
        ('needs = ["fact", "reason"]', 'needs = ["fact", "reson"]', r"no marker is called 'reson'; did you mean"),
        ('kind = "plain"', 'kind = "plane"', r"kinds that no state has an entry for: \['plane'\]"),
        ("[markers]", "[mix]\nplain = 1.0\n[markers]", r"mix: expected a weight for every kind, missing .*reasoned"),
        ("prefix.curious", "prefix.curios", r"prefix.curious: expected a list of openings for the state, got None"),
        ("ask.tool", "ask.tools", r"ask.tools: expected one of the slots trade, tool, tongue"),
        ('statement = "You are a trained {trade}."', 'statement = "You work."', r"trade.statement: expected \{trade\}"),
        ('["welder", "welding"]', '["Welder"]', r"values.welder: expected phrases in lower case"),
        ('["welder", "welding"]', '["carpenter"]', r"to name one thing, got twice: \['carpenter'\]"),
        ("[markers]", "[options]\ntopics = \"tool\"\n[markers]", r"unknown key options.topics; did you mean 'topic'"),
        ("[markers]", '[options]\ndisputes = { curious = "ask" }\n[markers]', r"polite.reasoned: leads to 'curious'"),
        ("[markers]", '[why]\nplain = "{slots}"\n[markers]', r"why.plain: expected \{slot\}, \{fact\}, got \{slots\}"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_file_and_key(own: str, old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in TEXT
    file = tmp_path / "broken.toml"
    file.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as told:
        load(str(file))
    assert str(file) in str(told.value)


def test_a_missing_file_and_words_that_run_out_are_told(tmp_path: Path) -> None:
    shutil.copytree(str(folder("chatting")), tmp_path / "chat")
    (tmp_path / "chat" / "lines.toml").unlink()
    with pytest.raises(ValueError, match=r"chat/lines.toml: expected a readable file of a domain, got: No such file"):
        load(str(tmp_path / "chat"))
    one = re.sub(r"(start|prefix)(.\w+) = .*", r'\1\2 = ["Hm."]', TEXT)
    (tmp_path / "short.toml").write_text(one)
    with pytest.raises(ValueError, match=r"ask.trade: 1 openings x 2 lines run out of words; expected 4 ways"):
        load(str(tmp_path / "short.toml"))
    with pytest.raises(ValueError, match=r"nowhere.toml: expected a readable file of a domain, got: No such file"):
        load(str(tmp_path / "nowhere.toml"))


def test_a_line_that_asks_something_else_is_found(tmp_path: Path) -> None:
    (tmp_path / "odd.toml").write_text(TEXT.replace("What were you trained as?", "What tools did you learn?"))
    found = list(faults(load(str(tmp_path / "odd.toml"))))
    assert any("meant to be about trade, and read as tool" in fault for fault in found)


def test_the_partner_never_runs_out_of_words(own: str) -> None:
    partner, read, rng = ScriptedPartner(own), reader(own), np.random.default_rng(0)
    talk = Conversation(personas(own, "train")[1])
    for _ in range(200):
        talk = talk.add("partner", partner.speak([talk], [rng])[0].text)
        talk = talk.add("policy", say(read, "reasoned", talk, rng))
    assert len(read.track(talk).readings) == 200
