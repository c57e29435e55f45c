"""One turn of many conversations: the rules that the single and the vector environment share.

Reply in, verdict and the partner's next line out. Spaces, seeds and episodes are left to the environments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ppg_gym import judges, partners
from ppg_gym.conversation import Conversation, Persona, Verdict
from ppg_gym.domain import loading as domains
from ppg_gym.domain.cast import personas as personas_of
from ppg_gym.domain.personas import read_personas
from ppg_gym.domain.twin import Twin
from ppg_gym.judges.failure_limit import FailureLimit
from ppg_gym.nearest import did_you_mean, refuse_unknown
from ppg_gym.sanitise import CUT

MAX_CHARS = 16_384  # of a reply that judge and partner get
ON_JUDGE_FAILURE = ("raise", "nan", "truncate")
UNOPENED = Verdict("error", None, "Not judged: the partner gave no opening line.")


class Outcome(NamedTuple):
    """What one turn led to.

    Attributes:
        conversation: With the reply, its verdict and the partner's next line.
        reward: The judge's score, NaN when there is none.
        terminated: The planned conversation is over.
        truncated: A judge or partner that failed ended it.
        message: The partner's next line; empty when the conversation is over.
        partner_status: ``ok``, or how the partner failed.
        partner_reason: Why, in a sentence; empty when it did not, or does not say.
    """

    conversation: Conversation
    reward: float
    terminated: bool
    truncated: bool
    message: str
    partner_status: str
    partner_reason: str = ""

    @property
    def verdict(self) -> Verdict:
        """The verdict on the reply."""
        return self.conversation.verdicts[-1]


class Simulator:
    """A domain with its personas, partner and judge, made from plain options.

    Args:
        domain: ``chatting``, ``education`` or ``therapy``, or the path of your own (see `domain.loading.load`).
        personas: ``train``, ``held-out``, or a path to a persona file.
        partner: Name of a partner.
        partner_options: Its options.
        judge: Name of a judge.
        judge_options: Its options.
        max_turns: Turns of the policy per conversation; None for the domain's own length.
        on_judge_failure: ``raise``, ``nan`` or ``truncate``.
        max_failure_rate: Largest share of replies that the judge may leave without a score.
        max_partner_failure_rate: Largest share of the partner's lines that may be missing.

    Raises:
        ValueError: An option is not what it should be.
    """

    def __init__(
        self,
        domain: str = "chatting",
        personas: str = "train",
        partner: str = "scripted",
        partner_options: Mapping[str, Any] | None = None,
        judge: str = "facts",
        judge_options: Mapping[str, Any] | None = None,
        max_turns: int | None = None,
        on_judge_failure: str = "raise",
        max_failure_rate: float = 0.05,
        max_partner_failure_rate: float = 0.05,
    ) -> None:
        self.domain = domains.load(domain)
        if on_judge_failure not in ON_JUDGE_FAILURE:
            raise ValueError(
                f"expected on_judge_failure out of {', '.join(ON_JUDGE_FAILURE)}, got {on_judge_failure!r}"
            )
        if max_turns is not None and (type(max_turns) is not int or max_turns < 1):
            raise ValueError(f"expected max_turns to be a positive integer or None, got {max_turns!r}")
        self.on_judge_failure = on_judge_failure
        self.failures = FailureLimit(
            max_failure_rate, "max_failure_rate", "replies without a score", "repair the judge", judges.FailureRateError
        )
        self.partner_failures = FailureLimit(
            max_partner_failure_rate,
            "max_partner_failure_rate",
            "the partner's lines to be missing",
            "mend the partner (its server, its model, partner_options)",
            partners.PartnerFailureRateError,
        )
        self.max_turns = max_turns or self.domain.turns
        self.partner = partners.make(partner, domain, partner_options or {})
        self.judge = judges.make(judge, domain, judge_options or {})
        self.personas = _personas(self.domain, personas)
        embedded = partner == "scripted" and judge == "facts"
        self.reachable = Twin.of(self.domain.table).best(self.max_turns) if embedded else math.nan

    def persona(self, wanted: object, rng: np.random.Generator) -> Persona:
        """Return the persona that ``reset``'s options ask for, or one drawn from ``rng``.

        Args:
            wanted: None, an id, a :class:`Persona`, or a dict with its fields.
            rng: The conversation's generator.

        Raises:
            ValueError: No persona has that id, a dict lacks an instruction or has an unknown field (the message offers
                the nearest name), or the judge cannot judge its replies.
        """
        if wanted is None:
            chosen = self.personas[int(rng.integers(len(self.personas)))]
        elif isinstance(wanted, Persona):
            chosen = wanted
        elif isinstance(wanted, str):
            named = next((persona for persona in self.personas if persona.id == wanted), None)
            if named is None:
                raise ValueError(_no_such_persona(self.domain.source, self.personas, wanted))
            chosen = named
        elif isinstance(wanted, Mapping) and isinstance(wanted.get("instruction"), str):
            refuse_unknown('fields of options["persona"]', wanted, [field.name for field in fields(Persona)])
            chosen = Persona(**{"id": "custom", "domain": self.domain.name, **wanted})
        else:
            raise ValueError(
                f'expected options["persona"] to be an id, a Persona or a dict with an "instruction", got {wanted!r}'
            )
        self.judge.check(chosen)
        return chosen

    def open(
        self, chosen: Sequence[Persona], rngs: Sequence[np.random.Generator]
    ) -> list[tuple[Conversation, partners.Said]]:
        """Return new conversations that hold the partner's first line, and no line where the partner failed.

        Raises:
            PartnerFailureRateError: Too many of the partner's lines were missing.
        """
        fresh = [Conversation(persona) for persona in chosen]
        lines = self.partner.speak(fresh, rngs)
        for conversation, line in zip(fresh, lines, strict=True):
            self._count(conversation, line)
        pairs = zip(fresh, lines, strict=True)
        return [(c.add("partner", line.text) if line.status == "ok" else c, line) for c, line in pairs]

    def turn(
        self, conversations: Sequence[Conversation], replies: Sequence[str], rngs: Sequence[np.random.Generator]
    ) -> list[Outcome]:
        """Judge one reply per conversation and let the partner speak where the conversation goes on.

        A reply of any length is taken: of a longer one than ``MAX_CHARS``, judge and partner get the first part.
        Where either of them waits for a server, they work at the same time, as the partner hears replies and not
        verdicts. A conversation that the partner never opened is truncated without a verdict.

        Raises:
            JudgeError: A reply was not scored and ``on_judge_failure`` is ``raise``.
            FailureRateError: Too many replies were not scored.
            PartnerFailureRateError: Too many of the partner's lines were missing.
        """
        spoken = [c.add("policy", heard(reply)) for c, reply in zip(conversations, replies, strict=True)]
        if all(c.lines for c in conversations):
            return self._turn(spoken, rngs)
        opened = [i for i, c in enumerate(conversations) if c.lines]
        played = self._turn([spoken[i] for i in opened], [rngs[i] for i in opened])
        others = [Outcome(c.judged(UNOPENED), math.nan, False, True, "", "no_opening") for c in spoken]
        return [dict(zip(opened, played, strict=True)).get(i, other) for i, other in enumerate(others)]

    def _turn(self, spoken: Sequence[Conversation], rngs: Sequence[np.random.Generator]) -> list[Outcome]:
        last = self.max_turns - 1
        next_lines: dict[int, partners.Said] = {}  # position of a conversation -> the partner's next line
        if self._overlap():
            with ThreadPoolExecutor(1) as aside:
                going = [i for i, c in enumerate(spoken) if len(c.verdicts) < last]
                speaking = aside.submit(self.partner.speak, [spoken[i] for i in going], [rngs[i] for i in going])
                try:
                    verdicts = self.judge.judge(spoken)
                    next_lines = dict(zip(going, speaking.result(), strict=True))
                except BaseException:
                    # Leaving the block joins the partner's thread, which may wait long for a server: stop it first.
                    getattr(self.partner, "abandon", lambda: None)()
                    raise
        else:
            verdicts = self.judge.judge(spoken)
        judged: list[Conversation] = []
        ends: list[tuple[bool, bool]] = []  # (terminated, truncated)
        for conversation, verdict in zip(spoken, verdicts, strict=True):
            lost = verdict.score is None
            if lost and self.on_judge_failure == "raise":
                raise judges.JudgeError(verdict)
            cause = f"[{verdict.status}] {verdict.rationale or 'no reason given'}" if lost else None
            self.failures.count(cause, _example(conversation) if cause else "")
            judged.append(conversation.judged(verdict))
            over = len(conversation.verdicts) >= last
            ends.append((over, lost and not over and self.on_judge_failure == "truncate"))
        going = [i for i, end in enumerate(ends) if end == (False, False)]
        if not next_lines:
            lines = self.partner.speak([judged[i] for i in going], [rngs[i] for i in going])
            next_lines = dict(zip(going, lines, strict=True))
        for i in going:
            self._count(judged[i], next_lines[i])
        silence = partners.Said("")
        heard = [silence if any(end) else next_lines[i] for i, end in enumerate(ends)]
        return [
            Outcome(
                conversation=c.add("partner", line.text) if line.text else c,
                reward=math.nan if c.verdicts[-1].score is None else c.verdicts[-1].score,
                terminated=over,
                truncated=cut or line.status != "ok",
                message=line.text,
                partner_status=line.status,
                partner_reason=line.reason,
            )
            for c, line, (over, cut) in zip(judged, heard, ends, strict=True)
        ]

    def _count(self, conversation: Conversation, line: partners.Said) -> None:
        """Count a line that the partner was asked for; a person who stops is no fault."""
        if line.status == partners.ENDED:
            return
        cause, why = None, f": {line.reason}" if line.reason else ""
        if line.status != "ok":
            cause = f"[{line.status}]{why[1:]}" if conversation.lines else f"[no opening line] {line.status}{why}"
        self.partner_failures.count(cause, _example(conversation) if cause else "")

    def _overlap(self) -> bool:
        """Return whether judge and partner may work at the same time, and one of them spends its time waiting."""
        waits = getattr(self.judge, "waits", False) or getattr(self.partner, "waits", False)
        return waits and not getattr(self.partner, "hears_verdicts", False)

    def usage(self) -> dict[str, dict[str, int]]:
        """Return what judge and partner have asked their servers for so far in this process.

        Returns:
            ``{"judge": {"calls": …, "prompt_tokens": …, …}, "partner": {…}}``; environments of equal options share
            their counts. Empty where no server is asked.
        """
        parts = {"judge": self.judge, "partner": self.partner}
        counted = {name: getattr(getattr(part, "chat", None), "counts", None) for name, part in parts.items()}
        return {name: asdict(counts) for name, counts in counted.items() if counts is not None}

    def close(self) -> None:
        """Close the connections of judge and partner."""
        for part in (self.judge, self.partner):
            if callable(close := getattr(part, "close", None)):
                close()


def _example(conversation: Conversation) -> str:
    """Return whose conversation it is, and its newest reply."""
    reply = f", reply {conversation.lines[-1].text[:80]!r}" if conversation.lines else ""
    return f"persona {conversation.persona.id}{reply}"


def heard(reply: str) -> str:
    """Return what judge and partner get of a reply: at most ``MAX_CHARS`` characters, with a mark where it was cut."""
    return reply if len(reply) <= MAX_CHARS else reply[: MAX_CHARS - len(CUT)] + CUT


def _personas(domain: domains.Domain, source: str) -> tuple[Persona, ...]:
    if source in domains.SPLITS:
        return personas_of(domain.source, source)
    path = Path(source) if isinstance(source, str) else None
    if path is None or not path.exists() or path.is_dir():
        why = "a folder" if path is not None and path.is_dir() else "no such file"
        raise ValueError(
            f"expected personas to be {' or '.join(map(repr, domains.SPLITS))} or a path to a persona file,"
            f" got {source!r}: {why}{did_you_mean(source, domains.SPLITS)}"
        )
    return tuple(read_personas(path, domain.name))


def _no_such_persona(domain: str, personas: Sequence[Persona], wanted: str) -> str:
    """Return the message for an unknown id: which one is nearest, or which split has it."""
    for split in domains.SPLITS:
        if any(persona.id == wanted for persona in personas_of(domain, split)):
            return f"expected the id of one of {len(personas)} personas, got {wanted!r}, which is in personas={split!r}"
    ids = [persona.id for persona in personas]
    hint = did_you_mean(wanted, ids, f"the first is {ids[0]!r}")
    return f"expected the id of one of {len(personas)} personas, got {wanted!r}{hint}"
