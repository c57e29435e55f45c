"""Dialogues as chat messages, one JSON object per line, for trainers that read conversations.

A row is ``{"messages", "persona", "domain", "scores", "source", "index", "speaker"}``. ``messages`` is the
role-play instruction as ``system``, then ``user`` and ``assistant`` strictly in turn, ending with ``assistant``: the
conversational format of Hugging Face TRL, and what ``datasets.load_dataset("json", …)`` reads as it is.
``scores`` holds one number or null per assistant message. Every row has the same types. Readers take a column's type
from the beginning of a file, so a row with a number among its scores goes first if there is one.

What chat templates refuse is not written: a dialogue is cut before the first message or reply without words, and one
that holds control tokens of a chat format, or half a surrogate pair, is left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ppg_gym.data.dialogues import LoggedDialogue, LoggedTurn
from ppg_gym.data.files import write_lines
from ppg_gym.data.report import mean_score
from ppg_gym.sanitise import holds_control

OPENING = "(You speak first.)"
"""Stands in for the partner's message where the judged speaker opens: many chat templates refuse an empty one."""


@dataclass(frozen=True)
class Exported:
    """Rows of chat messages.

    Attributes:
        rows: One per dialogue.
        notes: What was cut or left out, one sentence each.
    """

    rows: list[dict[str, Any]]
    notes: list[str]


def export(dialogues: Sequence[LoggedDialogue], min_score: float | None = None, opening: str = OPENING) -> Exported:
    """Return dialogues as rows of chat messages.

    Args:
        dialogues: What to export.
        min_score: Keep dialogues with at least this mean score over the replies that are written and scored; dialogues
            without a score are left out then. None keeps all.
        opening: The user's message where the judged speaker opens.

    Raises:
        ValueError: A minimum outside [0, 1], or an opening without words.
    """
    if min_score is not None and not 0.0 <= min_score <= 1.0:
        raise ValueError(f"expected min_score in [0, 1], got {min_score}")
    if not opening.strip():
        raise ValueError("expected words for the opening, got none; many chat templates take no empty message")
    rows: list[dict[str, Any]] = []
    cut = empty = control = unscored = below = 0
    for dialogue in dialogues:
        turns = _with_words(dialogue)
        cut += 0 < len(turns) < len(dialogue.turns)
        if not turns:
            empty += 1
            continue
        row = _row(dialogue, turns, opening)
        if any(_unfit(message["content"]) for message in row["messages"]):
            control += 1
            continue
        if min_score is not None:
            score = mean_score([LoggedDialogue(dialogue.domain, dialogue.persona, turns, "", 0, 1)])
            unscored += score is None
            below += score is not None and score < min_score
            if score is None or score < min_score:
                continue
        rows.append(row)
    first = next((i for i, row in enumerate(rows) if any(score is not None for score in row["scores"])), 0)
    rows[: first + 1] = [*rows[first : first + 1], *rows[:first]]
    counts = {
        "dialogues cut before a message or reply without words": cut,
        "dialogues left out: their first reply has no words": empty,
        "dialogues left out: they hold control tokens of a chat format": control,
        "dialogues left out: none of their replies is scored": unscored,
        f"dialogues left out: their mean score is below {min_score}": below,
    }
    return Exported(rows, [f"{n} {what}" for what, n in counts.items() if n])


def write_rows(path: str | os.PathLike[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSONL; the file is replaced in one step."""
    write_lines(path, rows)


def _row(dialogue: LoggedDialogue, turns: Sequence[LoggedTurn], opening: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "system", "content": dialogue.persona.instruction},
            *(message for turn in turns for message in _exchange(turn, opening)),
        ],
        "persona": dialogue.persona.id,
        "domain": dialogue.domain,
        "scores": [turn.verdict.score for turn in turns],
        "source": dialogue.source,
        "index": dialogue.index,
        "speaker": dialogue.speaker,
    }


def _exchange(turn: LoggedTurn, opening: str) -> Iterator[dict[str, str]]:
    yield {"role": "user", "content": turn.message or opening}
    yield {"role": "assistant", "content": turn.reply}


def _with_words(dialogue: LoggedDialogue) -> tuple[LoggedTurn, ...]:
    """Return the turns before the first one without words; the judged speaker may open."""
    for i, turn in enumerate(dialogue.turns):
        if not turn.reply.strip() or (not turn.message.strip() and (i or turn.message)):
            return dialogue.turns[:i]
    return dialogue.turns


def _unfit(text: str) -> bool:
    return holds_control(text) or any("\ud800" <= char <= "\udfff" for char in text)
