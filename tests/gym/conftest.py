"""One persona by hand for every domain, and a way to ask how a single reply to a line is read."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ppg_gym.conversation import Conversation, Persona, Verdict
from ppg_gym.domain.loading import DOMAINS, load
from ppg_gym.judges.facts import FactsJudge

FACTS = {
    "chatting": {
        "job": "nurse", "city": "Oslo", "pet": "cat", "hobby": "chess",
        "food": "pizza", "music": "jazz", "drink": "tea", "sport": "tennis",
    },
    "education": {"grade": "four", "subject": "plants", "style": "pictures"},
    "therapy": {
        "trouble": "panic", "cause": "fire", "feeling": "tense", "person": "boss",
        "fear": "tunnels", "wish": "peace", "habit": "cleaning", "place": "museum",
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def hand_made() -> dict[str, Persona]:
    """Return one persona per domain; where none is written above, it has the first value of every fact."""
    firsts = {name: {slot: next(iter(values)) for slot, values in load(name).slots.items()} for name in DOMAINS}
    return {
        name: Persona("hand-made", load(name).instruct("Anna", facts), facts, name, "Anna")
        for name, facts in (firsts | FACTS).items()
    }


@pytest.fixture(scope="session")
def judge_one(hand_made: dict[str, Persona]) -> Callable[..., Verdict]:
    """Return a function (domain, message, reply, *earlier exchanges) -> verdict on the reply."""

    def judge(domain: str, message: str, reply: str, *earlier: tuple[str, str]) -> Verdict:
        conversation = Conversation(hand_made[domain])
        for said, answer in (*earlier, (message, reply)):
            conversation = conversation.add("partner", said).add("policy", answer)
        return FactsJudge(domain).judge([conversation])[0]

    return judge
