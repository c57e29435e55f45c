"""The scripted partner: it follows the rule table, never runs out of things to say, and draws from one generator."""

from __future__ import annotations

from collections import Counter, deque

import numpy as np
import pytest

from ppg_gym.conversation import Conversation, Persona
from ppg_gym.domain.cast import personas
from ppg_gym.domain.files import FRESH
from ppg_gym.domain.loading import DOMAINS, TRICKS, load
from ppg_gym.domain.reading import reader
from ppg_gym.domain.saying import say
from ppg_gym.partners import make
from ppg_gym.partners.scripted import ScriptedPartner

TURNS = 60
TRUTHFUL = {name: tuple(kind for kind in load(name).mix if kind not in TRICKS) for name in DOMAINS}


def talk(name: str, persona: Persona, seed: int, turns: int, kinds: tuple[str, ...]) -> Conversation:
    """Return a conversation in which replies of these kinds are given in turn."""
    partner, read, rng = ScriptedPartner(name), reader(name), np.random.default_rng(seed)
    conversation = Conversation(persona)
    for t in range(turns):
        conversation = conversation.add("partner", partner.speak([conversation], [rng])[0].text)
        conversation = conversation.add("policy", say(read, kinds[t % len(kinds)], conversation, rng))
    return conversation


def heard(conversation: Conversation) -> list[str]:
    return [line.text for line in conversation.lines if line.speaker == "partner"]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", DOMAINS)
def test_sixty_turns_bring_every_topic_up_equally_and_no_line_twice_within_four(name: str, seed: int) -> None:
    persona = personas(name, "held-out")[seed]
    conversation = talk(name, persona, seed, TURNS, TRUTHFUL[name])
    lines = heard(conversation)
    for t in range(TURNS):
        assert lines[t] not in lines[max(0, t - FRESH) : t]
        assert lines[t]
        assert "{" not in lines[t]
    times = Counter(reader(name).track(conversation).asked)
    domain = load(name)
    lines_of = domain.lines
    topics = lines_of["points"][persona.facts[domain.options["topic"]]] if "points" in lines_of else lines_of["ask"]
    assert set(times) == set(topics)
    assert max(times.values()) - min(times.values()) <= (6 if domain.options.get("recall_chance") else 1)


@pytest.mark.parametrize("name", DOMAINS)
def test_the_state_follows_the_table_and_the_line_shows_it(name: str) -> None:
    domain, read = load(name), reader(name)
    openings = {state: tuple(domain.lines["prefix"][state]) for state in domain.table.states}
    ways: dict[str, tuple[str, ...]] = {domain.table.states[0]: ()}
    queue = deque(ways)
    while queue:  # the shortest way to every state
        state = queue.popleft()
        for kind in domain.table.kinds:
            if (after := domain.table.next[state, kind]) not in ways:
                ways[after] = (*ways[state], kind)
                queue.append(after)
    assert set(ways) == set(domain.table.states)
    persona = personas(name, "train")[5]
    for state, way in ways.items():
        for kind in domain.table.kinds:
            conversation = talk(name, persona, 11, len(way) + 1, (*way, kind))
            track = read.track(conversation)
            readings = [reading.kind for reading in track.readings]
            if kind == "repeating" and not way:
                assert readings == ["copying"]  # nothing was said before
                continue
            if kind == "repeating" and way[-1] in ("slip", "truth"):
                assert readings[-1] == way[-1]  # asked again, a lie is a lie and the truth the truth
                continue
            assert readings == [*way, kind]
            assert [reading.state for reading in track.readings][-1] == state
            assert track.state == domain.table.next[state, kind]
            line = ScriptedPartner(name).speak([conversation], [np.random.default_rng(0)])[0].text
            said = next((r.claimed for r in reversed(track.readings) if r.kind == "slip"), "") or "otherwise"
            spoken = [o.format(said=said, **persona.facts) for o in openings[track.state]]
            assert any(line.startswith(opening) for opening in spoken)


@pytest.mark.parametrize("name", DOMAINS)
def test_lines_are_drawn_from_the_generator_only(name: str) -> None:
    persona = personas(name, "train")[0]
    runs = [talk(name, persona, seed, 10, TRUTHFUL[name]) for seed in (1, 1, 2)]
    assert runs[0].lines == runs[1].lines
    assert heard(runs[0]) != heard(runs[2])


def test_a_contradiction_is_quoted_and_asked_about_again(hand_made: dict[str, Persona]) -> None:
    partner, rng = ScriptedPartner("chatting"), np.random.default_rng(0)
    conversation = Conversation(hand_made["chatting"]).add("partner", "Hi! Where do you live?")
    doubt = partner.speak([conversation.add("policy", "I live in Lima.")], [rng])[0].text
    assert "Lima" in doubt
    assert reader("chatting").parse(doubt).cue == "city"
    admitted = conversation.add("policy", "I live in Lima.").add("partner", doubt).add("policy", "No, I live in Oslo.")
    wary = partner.speak([admitted], [rng])[0].text
    assert "Oslo" in wary
    assert reader("chatting").parse(wary).cue == "city"


def test_what_was_told_is_asked_about_again(hand_made: dict[str, Persona]) -> None:
    lines = heard(talk("chatting", hand_made["chatting"], 4, TURNS, ("truth",)))
    recalled = [line for line in lines if " still your " in line or "So " in line]
    assert 5 <= len(recalled) <= 30


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("scriptd", {}, "did you mean 'scripted'"),
        ("scripted", {"x": 1}, r"expected no partner_options for the scripted partner, got \['x'\]"),
    ],
)
def test_errors(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, "chatting", options)
