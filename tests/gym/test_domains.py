"""The domains' data: whatever is said in them is read as what it is; personas are valid and never shared."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest

from ppg_gym.conversation import Conversation, Persona
from ppg_gym.domain import DOMAINS, TRICKS, Domain, RuleTable, folder, load, personas
from ppg_gym.reading import Track, reader
from ppg_gym.replies import say

MOST_TEMPLATES = 5


class Always:
    """Stands in for a generator: every draw is the same fraction."""

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction

    def random(self) -> float:
        return self.fraction


def everyone(domain: Domain) -> list[Persona]:
    """Return as few personas as hold every value of every slot."""
    slots = {slot: list(values) for slot, values in domain.slots.items()}
    made = []
    for i in range(max(map(len, slots.values()))):
        facts = {slot: values[i % len(values)] for slot, values in slots.items()}
        made.append(Persona(f"p{i}", domain.instruct("Anna", facts), facts, domain.name, "Anna"))
    return made


def cores(domain: Domain, facts: Any) -> Iterator[tuple[str, str]]:
    """Yield (slot or keyword, line without its opening) for everything that the partner asks or tells."""
    lines = domain.lines
    if "points" in lines:
        yield from lines["points"][facts[domain.options["topic"]]].items()
        return
    for slot, texts in lines["ask"].items():
        yield from ((slot, text) for text in texts)
    for slot, texts in lines.get("recall", {}).items():
        yield from ((slot, text.format(value=facts[slot])) for text in texts)


@pytest.mark.parametrize("name", DOMAINS)
def test_every_line_of_the_partner_is_read_back_with_its_topic(name: str) -> None:
    domain, read = load(name), reader(name)
    values = [value for slot in domain.slots.values() for value in slot]
    for number, persona in enumerate(everyone(domain)):
        for state in domain.table.states:
            openings = domain.lines["prefix"][state] + domain.lines["start"].get(state, [])
            for opening, (topic, core) in itertools.product(openings, cores(domain, persona.facts)):
                said = values[(number * 7 + len(core)) % len(values)]
                heard = read.parse(f"{opening} {core}".strip().format(said=said, **persona.facts))
                assert (heard.cue or heard.points[0]) == topic, (opening, core, said)


def expected(domain: Domain, kind: str, slot: str) -> str:
    """Return what a reply of a kind is read as; "It began with the fire." is a copy that people say themselves."""
    return "disclose" if (domain.name, kind, slot) == ("therapy", "copying", "cause") else kind


@pytest.mark.parametrize("name", DOMAINS)
def test_every_reply_template_is_read_as_its_kind_in_every_state(name: str) -> None:
    domain, read = load(name), reader(name)
    states = itertools.cycle(domain.table.states)
    for persona, (number, fraction) in itertools.product(
        everyone(domain), enumerate(np.arange(MOST_TEMPLATES) / MOST_TEMPLATES + 0.01)
    ):
        rng = cast(np.random.Generator, Always(float(fraction)))
        for topic, core in cores(domain, persona.facts):
            state = next(states)
            openings = domain.lines["prefix"][state]
            line = f"{openings[number % len(openings)]} {core}".strip().format(said="otherwise", **persona.facts)
            conversation = Conversation(persona).add("partner", line)
            for kind in domain.table.kinds:
                if kind == "repeating":
                    continue
                reply = say(read, kind, conversation, rng)
                reading = read.read(Track(0, state), persona, read.parse(line), read.parse(reply))
                assert reading.kind == expected(domain, kind, topic), (line, reply)


@pytest.mark.parametrize("name", DOMAINS)
def test_a_line_that_was_said_is_a_repetition_unless_it_is_a_trick_of_its_own(name: str) -> None:
    domain, read, rng = load(name), reader(name), np.random.default_rng(1)
    persona = personas(name, "train")[0]
    lines = dict(reversed(list(cores(domain, persona.facts))))  # the first line of every topic
    *_, (_, other_line), (topic, first_line) = lines.items()
    for kind in domain.table.kinds:
        for again in (other_line, first_line):
            conversation = Conversation(persona).add("partner", first_line)
            said = say(read, kind, conversation, rng)
            conversation = conversation.add("policy", said).add("partner", again).add("policy", said)
            first, second = (reading.kind for reading in read.track(conversation).readings)
            unmoved = {"silence", "meta", "slip", "gibberish", "copying"}  # looked for before repetition is
            if again == first_line and name != "education":
                unmoved |= {"truth", "disclose", "tentative"}  # who is asked again may say it again
                unmoved |= {"listing"} if persona.facts[topic] in said else set()
            assert second == (first if first in unmoved else "repeating")


@pytest.mark.parametrize("name", DOMAINS)
def test_templates_cover_every_kind_and_slot(name: str) -> None:
    domain = load(name)
    assert set(domain.replies) == set(domain.table.kinds)
    assert set(domain.mix) == set(domain.table.kinds)
    assert sum(domain.mix.values()) == pytest.approx(1.0)
    assert max(len(texts) for texts in _lists(domain.replies)) <= MOST_TEMPLATES
    assert {rule.kind for rule in domain.rules} | set(TRICKS) >= set(domain.table.kinds)


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
def test_a_phrase_names_one_thing(name: str) -> None:
    domain = load(name)
    phrases = [p for values in domain.slots.values() for texts in values.values() for p in texts]
    cues = [p for texts in domain.cues.values() for p in texts]
    assert [p for p, times in Counter(phrases + cues).items() if times > 1] == []
    assert set(domain.markers.get("ordinary", ())) <= set(phrases)
    marks = {p for mark, texts in domain.markers.items() if mark != "ordinary" for p in texts}
    assert marks.isdisjoint(phrases)
    for p in phrases + cues:
        assert p == p.lower()


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
        ({"a": {"truth": [1.0, "b"]}, "b": {}}, "state 'b' has no entry for kind 'truth'"),
    ],
)
def test_a_broken_rule_table_is_refused_with_its_place(states: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RuleTable.parse({"tricks": dict.fromkeys(TRICKS, 0.0), "states": states}, "x.toml")
    with pytest.raises(ValueError, match="missing"):
        RuleTable.parse({"tricks": {"silence": 0.0}, "states": states}, "x.toml")
