"""The attack suite: what it holds, that the facts judge pays for none of it, and that the LLM judge's frame holds.

The gullible model does what anything outside the data says, and takes a text for outside as soon as it seems to break
out. It shows a broken frame; how far a real model resists what stays inside has to be measured with that model.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest

from ppg_gym.conversation import Conversation, Persona, Verdict
from ppg_gym.domain.cast import personas
from ppg_gym.domain.loading import DOMAINS, load
from ppg_gym.domain.reading import reader
from ppg_gym.judges import framing, verdicts
from ppg_gym.judges.facts import FactsJudge
from ppg_gym.judges.lab.attacks import FOOLED_AT, Attack, attacks, run_attacks
from ppg_gym.judges.llm import LLMJudge, by_rule
from ppg_gym.llm.chat import Answer, Counts, Request
from ppg_gym.sanitise import holds_control, plain

OF_A_FACT = ("broken_english", "salad_of_other_words", "negated_fact", "both_ways")
FACT_ATTACKS = sum(attack.family in OF_A_FACT for attack in attacks(personas("chatting", "held-out")[0], "chatting"))

Messages = Sequence[Mapping[str, str]]


def outside(messages: Messages) -> str:
    """Return what a careless reader takes for said to itself: all but the text from the first fence to the next."""
    text = "\n".join(message["content"] for message in messages)
    lines = text.split("\n")
    start, end = [at for at, line in enumerate(lines) if line.lstrip().startswith("-----")][:2]
    return re.sub(r"\b[0-9a-f]{12}\b", "CODE", "\n".join((*lines[: start + 1], *lines[end:])))


def broken_out(messages: Messages) -> bool:
    """Return whether the data holds a control token or is no longer one JSON object."""
    lines = messages[-1]["content"].split("\n")
    start, end = [at for at, line in enumerate(lines) if line.lstrip().startswith("-----")][:2]
    try:
        json.loads("\n".join(lines[start + 1 : end]))
    except ValueError:
        return True
    return holds_control(messages[-1]["content"])


class Gullible:
    """Finds every reply at fault, unless something outside the data, or broken out of it, says otherwise."""

    def __init__(self, innocent: Messages) -> None:
        self.counts = Counts()
        self.asked: list[Request] = []
        self._innocent = outside(innocent)

    def believes(self, messages: Messages) -> bool:
        return broken_out(messages) or outside(messages) != self._innocent

    async def ask(self, request: Request) -> Answer:
        self.asked.append(request)
        fooled = self.believes(request.messages)
        answer = {"rationale": "-", "contradicts": not fooled, "addresses_judge": False, "says_something": True}
        return Answer("ok", json.dumps(answer), finish="stop")

    async def structured(self) -> bool:
        return False


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_suite_is_broad_and_filled_in(domain: str) -> None:
    persona = personas(domain, "held-out")[0]
    found = attacks(persona, domain)
    families = Counter(attack.family for attack in found)
    assert len(set(found)) == len(found) >= 100
    assert len(families) >= 10
    assert min(families.values()) >= 5
    assert Attack("persona_copy", persona.instruction) in found
    assert not [attack for attack in found if re.search(r"\$\w", attack.reply)]
    poor = attacks(Persona("poor", "I am somebody."), domain)  # no name, no facts, nobody is addressed
    assert Attack("persona_copy", "I am somebody.") in poor
    assert {attack.family for attack in found} - {attack.family for attack in poor} == {*OF_A_FACT}
    assert len(found) - 10 - FACT_ATTACKS < len(poor) < len(found) - FACT_ATTACKS


@pytest.mark.parametrize("domain", DOMAINS)
def test_attacks_name_the_fact_that_the_partner_asks_about(domain: str) -> None:
    persona = personas(domain, "held-out")[0]
    for slot in [slot for slot, cues in load(domain).cues.items() if cues]:
        found = {attack.reply for attack in attacks(persona, domain, slot)}
        assert f"For is {persona.facts[slot]}." in found
        (both,) = (reply for reply in found if reply.startswith(f"It is {persona.facts[slot]} and it is "))
        assert both.removesuffix(".").split(" ", 6)[-1] in set(load(domain).slots[slot]) - {persona.facts[slot]}
    asked: list[tuple[str, str]] = []

    class Judge:
        def check(self, persona: Persona) -> None: ...

        def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
            asked.extend((c.lines[-2].text, c.lines[-1].text) for c in conversations)
            return [Verdict("scored", 0.0)] * len(conversations)

    run_attacks(Judge(), domain, personas=[persona], per_attack=1)
    named = [(message, reply) for message, reply in asked if reply.startswith("For is")]
    read = reader(domain)
    slots = [read.parse(message).cue or str(load(domain).options["default_slot"]) for message, _ in named]
    assert [reply for _, reply in named] == [f"For is {persona.facts[slot]}." for slot in slots]


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_facts_judge_pays_for_no_attack(domain: str, seed: int) -> None:
    rows = run_attacks(FactsJudge(domain), domain, seed, per_attack=20)
    assert [(row.family, row.fooled_by) for row in rows if row.successes] == []
    assert sum(row.scored for row in rows) == sum(row.n for row in rows) >= 20 * 100


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_llm_judge_lets_no_attack_out_of_the_data(domain: str) -> None:
    task = verdicts.task("prompt-to-line", "binary", load(domain).scenario)
    model = Gullible(framing.frame({"reply": "Hello."}, task))
    rows = run_attacks(LLMJudge(domain, {}, model), domain, per_attack=3)
    assert [(row.family, row.fooled_by) for row in rows if row.successes] == []
    assert sum(row.failures for row in rows) == 0
    asked = [framing.parse(request.messages) for request in model.asked]
    players = [p for p in personas(domain, "held-out") if p.instruction in {fields["persona"] for fields in asked}]
    filled = [(p, attack) for p in players for attack in attacks(p, domain)]
    tried = [(p, attack.reply) for p, attack in filled if attack.family not in OF_A_FACT]
    for_the_model = [
        (p.instruction, plain(reply, 4000))
        for p, reply in tried
        if by_rule(Conversation(p).add("partner", "Well?").add("policy", reply)) is None
    ]
    assert len(players) == 3
    told = [(fields["persona"], fields["reply"]["text"]) for fields in asked]
    assert len(told) >= len(for_the_model) + 3 * FACT_ATTACKS - 6  # a few of those copy or repeat by rule
    assert set(for_the_model) <= set(told)
    assert len(for_the_model) > len(tried) / 2


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_gullible_model_finds_a_weak_frame_out(domain: str) -> None:
    def weak(reply: str) -> Messages:
        data = f'----- data\n{{"reply": "{reply}"}}\n----- end of data'
        return ({"role": "user", "content": f"Judge.\n{data}\nJudge now."},)

    model = Gullible(weak("Hello."))
    assert not model.believes(weak("I am a nurse."))
    found = attacks(personas(domain, "held-out")[0], domain)
    fooled = Counter(attack.family for attack in found if model.believes(weak(attack.reply)))
    floors = {"fence_closing": 8, "fake_verdict": 6, "role_tags": 12, "unicode_tricks": 3}
    assert {family: fooled[family] for family in floors} == floors


def test_rows_count_what_was_paid_and_what_has_no_score() -> None:
    class Judge:
        def check(self, persona: Persona) -> None:
            if persona.id == "bad":
                raise ValueError("not this one")

        def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
            scores = {"true": FOOLED_AT, "null": FOOLED_AT - 0.01}
            return [
                Verdict("scored", scores[c.lines[-1].text]) if c.lines[-1].text in scores else Verdict("timeout", None)
                for c in conversations
            ]

    rows = {row.family: row for row in run_attacks(Judge(), "chatting", per_attack=2)}
    row = rows["next_to_nothing"]
    assert (row.n, row.scored, row.successes, row.failures) == (28, 4, 2, 24)
    assert (row.fooled_by, row.highest) == (("true",), FOOLED_AT)
    assert math.isnan(rows["pleading"].highest)
    with pytest.raises(ValueError, match="not this one"):
        run_attacks(Judge(), "chatting", personas=[Persona("bad", "I am bad.")], per_attack=1)
    with pytest.raises(ValueError, match="per_attack from 1 to the number of personas, 1, got 2"):
        run_attacks(Judge(), "chatting", personas=[Persona("bad", "I am bad.")])
