"""Logged dialogues as data: one speaker's replies, what the other speaker said before each, the stored verdicts.

Every reader in `ppg_gym.data` returns these. Nothing here opens a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ppg_gym.conversation import Persona, Verdict
from ppg_gym.domain.personas import persona_key

NO_VERDICT = Verdict("error", None, "No verdict is stored for this line.")


@dataclass(frozen=True)
class LoggedTurn:
    """One reply of the judged speaker.

    Attributes:
        message: What the other speaker said since the last reply; empty when the judged speaker opens.
        reply: The stored line without the speaker's label, as the judge read it.
        verdict: The stored verdict. ``unparsed`` when the judge's text has no clear answer, ``error`` when the line
            has no verdict or speaks for both speakers, so that the verdict is not about one reply.
    """

    message: str
    reply: str
    verdict: Verdict


@dataclass(frozen=True)
class LoggedDialogue:
    """One judged speaker's side of a stored dialogue.

    Attributes:
        domain: ``chatting``, ``education``, ``therapy``, or another.
        persona: The judged speaker; the same persona has the same id in every file.
        turns: One per reply, in order.
        source: Name of the file.
        index: Position of the dialogue in the file.
        speaker: 1 or 2, as in the file.
        topic: What it is about; empty if the file does not say.
    """

    domain: str
    persona: Persona
    turns: tuple[LoggedTurn, ...]
    source: str
    index: int
    speaker: int
    topic: str = ""


def split_by_persona(
    dialogues: Sequence[LoggedDialogue], held_out: float = 0.2, seed: int = 0
) -> tuple[list[LoggedDialogue], list[LoggedDialogue]]:
    """Split so that no persona is on both sides.

    Personas are told apart by the words of their instruction. Where both speakers of a dialogue are judged, the other
    side of a held-out persona's dialogue may be among the training dialogues: its lines are then messages there, never
    replies to learn from.

    Args:
        dialogues: Dialogues of at least two personas.
        held_out: Share of the personas to hold out, in (0, 1); at least one persona goes to each side.
        seed: The split depends on this and on the set of personas, nothing else.

    Returns:
        Training and held-out dialogues, each in the given order.

    Raises:
        ValueError: Fewer than two personas, or a share outside (0, 1).
    """
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"expected held_out in (0, 1), got {held_out!r}")
    keys = [persona_key(dialogue.persona.instruction) for dialogue in dialogues]
    unique = sorted(set(keys))
    if len(unique) < 2:
        raise ValueError(
            f"expected at least 2 personas to hold one out, got {len(unique)} in {len(dialogues)} dialogues; "
            "add files with other personas"
        )
    size = min(max(round(held_out * len(unique)), 1), len(unique) - 1)
    order = np.random.default_rng(seed).permutation(len(unique))
    chosen = {unique[i] for i in order[:size]}
    train = [dialogue for dialogue, key in zip(dialogues, keys, strict=True) if key not in chosen]
    test = [dialogue for dialogue, key in zip(dialogues, keys, strict=True) if key in chosen]
    return train, test
