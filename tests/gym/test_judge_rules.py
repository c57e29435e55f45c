"""What is scored by rule, and what is an answer although the rule is near."""

from __future__ import annotations

import pytest

from ppg_gym.conversation import Conversation, Persona
from ppg_gym.judges.rules import rule_verdict

PERSONA = Persona(
    "p",
    "You are the person described below.\n\nI run a dog obedience school. You always answer in short sentences. "
    "My parents are living in Bora Bora and I visit them every single summer with friends.",
)


def kind(*replies: str) -> str:
    """Return the rule that the last reply falls under, empty for none."""
    conversation = Conversation(PERSONA)
    for reply in replies:
        conversation = conversation.add("partner", "And?").add("policy", reply)
    verdict = rule_verdict(conversation)
    return verdict.kind if verdict else ""


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        (("",), "silence"),
        (("?! …",), "silence"),
        (("Well: you always answer in short sentences!",), "copying"),
        (("I run a dog obedience school.",), ""),  # the honest answer, in the persona's own words
        (("My parents are living in Bora Bora and I visit them every single summer with friends.",), "copying"),
        (("I like it a lot when it rains.", "Sure.", "I like it a lot when it rains!"), "repeating"),
        (("Yes, I do.", "Yes, I do."), ""),
        (("Yes, I do.", "Yes, I do.", "Yes, I do."), "repeating"),
        (("Yes.", "Yes.", "Yes.", "Yes."), ""),
    ],
)
def test_rules(replies: tuple[str, ...], expected: str) -> None:
    assert kind(*replies) == expected
