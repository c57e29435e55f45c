"""More personas for an embedded domain: seeded, no facts twice, fit for its judge, never more than there are."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

from ppg_gym.conversation import Persona
from ppg_gym.data import make_personas, save_personas
from ppg_gym.domain.cast import personas as embedded
from ppg_gym.domain.loading import DOMAINS, SPLITS, load
from ppg_gym.domain.personas import read_personas
from ppg_gym.judges.facts import FactsJudge


def facts(personas: list[Persona]) -> set[tuple[str, ...]]:
    return {tuple(persona.facts.values()) for persona in personas}


@pytest.mark.parametrize("domain", DOMAINS)
def test_they_are_new_and_fit_for_the_judge(tmp_path: Path, domain: str) -> None:
    own = [persona for split in SPLITS for persona in embedded(domain, split)]
    first = make_personas(domain, 60, seed=3)
    second = make_personas(domain, 60, seed=4, exclude=first)
    groups = [facts(group) for group in (own, first, second)]
    assert list(map(len, groups)) == [len(own), 60, 60]
    assert not any(a & b for a, b in itertools.combinations(groups, 2))
    assert len({persona.id for persona in (*own, *first, *second)}) == len(own) + 120
    for persona in first:
        FactsJudge(domain).check(persona)
        assert persona.instruction == load(domain).instruct(persona.name, persona.facts)
    save_personas(tmp_path / "p.jsonl", first)
    assert read_personas(tmp_path / "p.jsonl", domain) == first


def test_the_seed_decides_and_fewer_are_the_first_of_more() -> None:
    assert make_personas("therapy", 5, seed=1) == make_personas("therapy", 9, seed=1)[:5]
    assert make_personas("therapy", 5, seed=1) != make_personas("therapy", 5, seed=2)


def test_every_possible_persona_can_be_made_and_no_more() -> None:
    space = math.prod(map(len, load("education").slots.values()))
    own = sum(len(embedded("education", split)) for split in SPLITS)
    some = make_personas("education", 7)
    rest = make_personas("education", space - own - 7, exclude=some)
    assert len(facts(rest)) == space - own - 7
    with pytest.raises(ValueError, match=f"at most {space - own - 7} personas .*, got {space};"):
        make_personas("education", space, exclude=some)
    assert len(facts(make_personas("education", space, allow_embedded=True))) == space


def test_excluded_facts_are_read_from_an_instruction_too() -> None:
    space = math.prod(map(len, load("education").slots.values()))
    own = sum(len(embedded("education", split)) for split in SPLITS)
    known = [Persona("x", persona.instruction) for persona in make_personas("education", 9)]
    other = [Persona("y", "You are a student who likes maps."), Persona("z", "", {"grade": "nine"})]
    with pytest.raises(ValueError, match=f"at most {space - own - 9} personas"):
        make_personas("education", 10_000, exclude=[*known, *other])


def test_an_unknown_domain_gets_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="did you mean 'therapy'"):
        make_personas("terapy", 1)
