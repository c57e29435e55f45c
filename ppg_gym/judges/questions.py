"""Questions and answers about a persona, which a model makes once per persona for the ``qa`` metric.

Only the prompt and the reading of the answer are here; the judge asks, and keeps what it got.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ppg_gym.judges import framing, verdicts
from ppg_gym.sanitise import plain

LONGEST = 300  # characters of a question or an answer
MAX_TOKENS = 100  # per question and its answer
_TASK = (
    "You prepare an interview. The field `persona` describes a character. Write {n} different questions that tell"
    " whether somebody stays true to this character, and the answer that the character would give to each. Take"
    " every question from something that the description states: facts first (who the character is, does, has,"
    " likes, fears, lived through), then manner. One point per question, together as many points of the"
    " description as possible; a question that the description does not answer is wrong. Put questions in the"
    " second person and answers in the first, one short sentence each. If the description does not hold {n} points,"
    " write fewer.\n\n"
    "Answer with one JSON object and nothing else: `questions`, a list of objects with the keys `question` and"
    " `answer`, both text."
)


class Question(NamedTuple):
    """A question about a persona and the answer in the persona's words."""

    question: str
    answer: str


def messages(instruction: str, n: int, limit: int) -> framing.Messages:
    """Return the messages that ask for ``n`` questions about the persona of an instruction."""
    return framing.frame({"persona": instruction}, _TASK.format(n=n), limit)


def schema(n: int) -> dict[str, Any]:
    """Return the JSON schema of the answer: 1 to ``n`` questions."""
    text = {"type": "string"}
    item = verdicts.closed({"question": text, "answer": text})
    return verdicts.closed({"questions": {"type": "array", "items": item, "minItems": 1, "maxItems": n}})


def read(text: str, finish: str, shape: Mapping[str, Any]) -> tuple[Question, ...]:
    """Return the questions that an answer holds.

    Raises:
        UnparsedError: It does not fit the schema, a text is empty, or a question comes twice.
    """
    pairs = tuple(
        Question(plain(item["question"], LONGEST), plain(item["answer"], LONGEST))
        for item in verdicts.read(text, finish, shape)["questions"]
    )
    if not all(question and answer for question, answer in pairs):
        raise verdicts.UnparsedError("expected a text for every question and answer, got an empty one")
    if len({question.casefold() for question, _ in pairs}) < len(pairs):
        raise verdicts.UnparsedError("expected different questions, got one twice")
    return pairs
