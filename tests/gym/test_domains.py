"""The domains' data: whatever is said in them is read as what it is; personas are valid and never shared."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ppg_gym.conversation import Conversation
from ppg_gym.domain.cast import personas
from ppg_gym.domain.lint import MOST_TEMPLATES, cores, faults
from ppg_gym.domain.loading import DOMAINS, TRICKS, RuleTable, folder, load
from ppg_gym.domain.reading import reader
from ppg_gym.domain.saying import say


@pytest.mark.parametrize("name", DOMAINS)
def test_every_line_of_the_partner_and_every_template_of_a_reply_is_read_as_what_it_is(name: str) -> None:
    assert list(faults(load(name))) == []


@pytest.mark.parametrize("name", DOMAINS)
def test_a_line_that_was_said_is_a_repetition_unless_it_is_a_trick_of_its_own(name: str) -> None:
    domain, read, rng = load(name), reader(name), np.random.default_rng(1)
    persona = personas(name, "train")[0]
    lines = dict(reversed(list(cores(domain, persona.facts))))  # the first line of every topic
    *_, (other_topic, other_line), (topic, first_line) = lines.items()
    for kind in domain.table.kinds:
        for asked, again in ((other_topic, other_line), (topic, first_line)):
            conversation = Conversation(persona).add("partner", first_line)
            said = say(read, kind, conversation, rng)
            conversation = conversation.add("policy", said).add("partner", again).add("policy", said)
            first, second = (reading.kind for reading in read.track(conversation).readings)
            unmoved = {"silence", "meta", "slip", "gibberish", "copying"}  # looked for before repetition is
            if again == first_line and "ask" in domain.lines:
                unmoved |= {rule.kind for rule in domain.rules if "fact" in rule.needs}  # asked again, said again
            if "ask" in domain.lines and persona.facts[asked] in said:
                unmoved |= {"listing"}
            assert second == (first if first in unmoved else "repeating")


@pytest.mark.parametrize("name", DOMAINS)
def test_every_template_is_tried(name: str) -> None:
    assert max(len(texts) for texts in _lists(load(name).replies)) <= MOST_TEMPLATES


def _lists(value: Any) -> Iterator[list[str]]:
    if isinstance(value, list):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _lists(item)


@pytest.mark.parametrize("name", DOMAINS)
def test_the_readme_states_the_rule_table(name: str) -> None:
    table, text = load(name).table, (folder(name) / "README.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\|.*\|$", text, re.M)]
    (_, *kinds, rest), *states = next(rows[i:] for i, row in enumerate(rows) if row[0] == "state")
    named = {row[0].replace("**", "").replace(" ", "_"): row[1:] for row in states if row[0].startswith("**")}
    assert set(named) == set(table.states)
    assert rest == "anything else"
    for state, cells in named.items():
        for kind, cell in zip(kinds, cells, strict=False):
            score, after = cell.split(", ")
            assert (float(score), _follows(after, state)) == (table.score[state, kind], table.next[state, kind])
        for kind in set(table.kinds) - set(kinds):
            assert _follows(cells[-1], state) == table.next[state, kind]
    stated = {float(score) for score in re.findall(r"^\| [^|]+ \| ([\d.]+) \|$", text, re.M)}
    assert stated == {table.score[table.states[0], trick] for trick in TRICKS}


def _follows(cell: str, state: str) -> str:
    return state if cell == "stays" else cell.removeprefix("→ ").replace(" ", "_")


@pytest.mark.parametrize("name", DOMAINS)
def test_personas(name: str) -> None:
    domain = load(name)
    train, held_out = personas(name, "train"), personas(name, "held-out")
    assert len(train) >= 200
    assert len(held_out) >= 100
    both = train + held_out
    assert len({tuple(sorted(p.facts.items())) for p in both}) == len(both)
    assert len({p.id for p in both}) == len(both)
    for persona in both:
        assert persona.domain == name
        assert persona.name in persona.instruction
        assert list(persona.facts) == list(domain.slots)
        for slot, value in persona.facts.items():
            assert value in domain.slots[slot]
            assert value in persona.instruction
    for slot, values in domain.slots.items():
        assert {p.facts[slot] for p in train} == {p.facts[slot] for p in held_out} == set(values)


def test_an_unknown_domain_offers_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'therapy'"):
        folder("therapie")


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({"a": {"truth": [1.5, "a"]}}, r"states\.a\.truth: expected \[score in \[0, 1\]"),
        ({"a": {"truth": [1.0, "b"]}}, r"got \[1\.0, 'b'\]"),
        ({"a": {"truth": 1.0}}, r"states\.a\.truth: .* got 1\.0"),
        ({"a": {"truth": [1.0, "b"]}, "b": {}}, "state 'b' has no entry for kind 'truth'"),
    ],
)
def test_a_broken_rule_table_is_refused_with_its_place(states: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RuleTable.parse({"tricks": dict.fromkeys(TRICKS, 0.0), "states": states}, "x.toml")
    with pytest.raises(ValueError, match="missing"):
        RuleTable.parse({"tricks": {"silence": 0.0}, "states": states}, "x.toml")
