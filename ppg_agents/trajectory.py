"""The turn ledger: what was said, sampled and judged, and its file format.

Token ids are kept as sampled. Nothing here encodes sampled text again, talks to an environment or computes a credit.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from ppg_agents.policy.policy import Policy

SCHEMA = "ppg-trajectory/1"
NO_OPENING, ENDED = "no_opening", "ended"
"""Statuses of the partner: it never spoke, so that the only reply was not judged; a person who played it stopped."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turn:
    """One exchange: the partner's message and the policy's reply.

    Attributes:
        message: The partner's line.
        reply: The reply as the environment heard it.
        prompt_ids: Tokens between the previous reply's last sampled token and this reply.
        token_ids: The reply's tokens as sampled, end-of-turn included when it was sampled.
        log_probs: Their log-probabilities at sampling; NaN where unknown.
        reward: The judge's score; NaN if there is none.
        verdict: The judge's verdict as a plain dict; empty if the environment gives none.
        policy_version: Optimiser steps the policy had taken; -1 for logged replies of another speaker.
        sampler: What sampled the tokens (``hf``, ``vllm``); empty if unknown.
        temperature: Sampling temperature, which ``log_probs`` include.
    """

    message: str
    reply: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    reward: float
    verdict: Mapping[str, Any] = field(default_factory=dict)
    policy_version: int = 0
    sampler: str = ""
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.log_probs):
            raise ValueError(
                f"expected one log-prob per token, got {len(self.log_probs)} for {len(self.token_ids)} tokens"
            )


class Span(NamedTuple):
    """A turn's place in its conversation's tokens: prompt [prompt, start), sampled reply [start, end)."""

    prompt: int
    start: int
    end: int


@dataclass(frozen=True)
class Trajectory:
    """One conversation; its token sequence is every turn's ``prompt_ids + token_ids`` in order.

    Attributes:
        instruction: The role-play instruction.
        persona: The persona's id; empty if the environment gives none.
        domain: The domain's name.
        seed: The episode's seed.
        turns: In order; empty if not even the first prompt fitted.
        terminated: The conversation reached its planned end.
        truncated: It was cut short: by a limit on tokens or turns, or because judge or partner was lost.
        partner_status: ``ok``, or the partner's fault that ended the conversation.
        partner_reason: Why, where the environment says so.
        lost: A fault of judge or partner ended it, so its further rewards are missing, not 0.
        topic: What a logged dialogue was about; empty if that is not known.
    """

    instruction: str
    persona: str
    domain: str
    seed: int | None
    turns: tuple[Turn, ...]
    terminated: bool
    truncated: bool
    partner_status: str = "ok"
    partner_reason: str = ""
    lost: bool = False
    topic: str = ""

    @property
    def partner_failed(self) -> bool:
        """Whether a fault of the partner ended the conversation."""
        return self.partner_status not in ("ok", ENDED)

    def token_ids(self) -> list[int]:
        """Return the whole conversation's tokens."""
        return [token for turn in self.turns for token in (*turn.prompt_ids, *turn.token_ids)]

    def spans(self) -> list[Span]:
        """Return each turn's place in `token_ids`."""
        spans, at = [], 0
        for turn in self.turns:
            start = at + len(turn.prompt_ids)
            spans.append(Span(at, start, start + len(turn.token_ids)))
            at = spans[-1].end
        return spans

    def judged(self) -> list[float]:
        """Return the rewards of the turns that were judged."""
        return [turn.reward for turn in self.turns if math.isfinite(turn.reward)]


def group_labels(trajectories: Iterable[Trajectory]) -> list[tuple[str, str]]:
    """Return (instruction, topic) of each: what conversations that are compared with one another have in common."""
    return [(trajectory.instruction, trajectory.topic) for trajectory in trajectories]


def to_json(trajectory: Trajectory) -> str:
    """Return one line of JSON; NaN becomes null, and every turn has its reply's ``span``."""
    record: dict[str, Any] = {"schema": SCHEMA, **asdict(trajectory)}
    for name in ("partner_reason", "lost", "topic"):
        if not record[name]:
            del record[name]
    for turn, span in zip(record["turns"], trajectory.spans(), strict=True):
        turn["span"] = [span.start, span.end]
    return json.dumps(_without_nan(record), ensure_ascii=False, allow_nan=False)


def from_json(line: str) -> Trajectory:
    """Read what `to_json` wrote.

    Raises:
        ValueError: Not JSON, another schema, fields missing, unknown or broken, or a reply not at its ``span`` (files
            without spans are read too).
    """
    record = json.loads(line)
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        got = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"expected schema {SCHEMA!r}, got {got!r}")
    del record["schema"]
    try:
        stated_spans = [turn.pop("span", None) for turn in record["turns"]]
        turns = tuple(
            Turn(
                **{
                    **turn,
                    "prompt_ids": tuple(turn["prompt_ids"]),
                    "token_ids": tuple(turn["token_ids"]),
                    "log_probs": tuple(_number(p) for p in turn["log_probs"]),
                    "reward": _number(turn["reward"]),
                }
            )
            for turn in record["turns"]
        )
        record.setdefault("lost", record.get("partner_status", "ok") != "ok")  # written by earlier versions
        trajectory = Trajectory(**{**record, "turns": turns})
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"expected the fields of {SCHEMA}, got {type(error).__name__}: {error}") from error
    for t, (span, (_, start, end)) in enumerate(zip(stated_spans, trajectory.spans(), strict=True)):
        if span is not None and span != [start, end]:
            raise ValueError(
                f"expected the reply of turn {t + 1} at its span {span}, got its tokens at [{start}, {end}); "
                "tokens or a turn are missing"
            )
    return trajectory


def write_jsonl(path: str | Path, trajectories: Iterable[Trajectory]) -> None:
    """Write one trajectory per line, flushed line by line; overwrites the file."""
    _write(path, "w", trajectories)


def append(path: str | Path, trajectories: Iterable[Trajectory]) -> None:
    """Append trajectories to a file, flushed line by line."""
    _write(path, "a", trajectories)


def _write(path: str | Path, mode: str, trajectories: Iterable[Trajectory]) -> None:
    with Path(path).open(mode, encoding="utf-8") as file:
        for trajectory in trajectories:
            file.write(to_json(trajectory) + "\n")
            file.flush()


def read_jsonl(path: str | Path) -> list[Trajectory]:
    """Read what `write_jsonl` wrote; a last line cut off by a crash is dropped with a warning.

    Raises:
        ValueError: Any other line cannot be read; the message has file and line number.
    """
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    trajectories = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            trajectories.append(from_json(line))
        except ValueError as error:
            if number == len(lines) and isinstance(error, json.JSONDecodeError):
                log.warning("%s:%d: dropped the last line, which was cut off", path, number)
                break
            raise ValueError(f"{path}:{number}: {error}") from error
    return trajectories


class LoggedTurnLike(Protocol):
    """A logged exchange; ``verdict`` has ``status``, ``score`` and ``to_dict``."""

    @property
    def message(self) -> str: ...  # noqa: D102
    @property
    def reply(self) -> str: ...  # noqa: D102
    @property
    def verdict(self) -> Any: ...  # noqa: D102


class LoggedDialogueLike(Protocol):
    """A logged and judged dialogue; ``persona`` has ``id`` and ``instruction``."""

    @property
    def domain(self) -> str: ...  # noqa: D102
    @property
    def persona(self) -> Any: ...  # noqa: D102
    @property
    def topic(self) -> str: ...  # noqa: D102
    @property
    def turns(self) -> Sequence[LoggedTurnLike]: ...  # noqa: D102


def from_logged(
    dialogues: Iterable[LoggedDialogueLike], policy: Policy, max_tokens: int | None = None
) -> list[Trajectory]:
    """Encode logged dialogues for a policy.

    Args:
        dialogues: Dialogues with persona, messages, replies and verdicts.
        policy: Its tokenizer and chat template are used.
        max_tokens: Longest conversation, in tokens; at most, and by default, the policy's context length.

    Returns:
        One trajectory per dialogue, with NaN log-probs and ``policy_version`` -1. A conversation that is too long is
        cut before the first turn that does not fit, marked truncated and counted in a warning.

    Raises:
        ValueError: ``max_tokens`` is below 1.
    """
    limit = policy.context_length if max_tokens is None else min(max_tokens, policy.context_length)
    if limit < 1:
        raise ValueError(f"expected max_tokens >= 1, got {max_tokens}")
    trajectories, cut = [], 0
    for dialogue in dialogues:
        turns: list[Turn] = []
        used = 0
        for line in dialogue.turns:
            if turns:
                prompt = policy.next_prompt(line.message)
            else:
                prompt = policy.first_prompt(dialogue.persona.instruction, line.message)
            reply = policy.encode_reply(line.reply)
            used += len(prompt) + len(reply)
            if used > limit:
                break
            score = line.verdict.score
            turns.append(
                Turn(
                    message=line.message,
                    reply=line.reply,
                    prompt_ids=tuple(prompt),
                    token_ids=tuple(reply),
                    log_probs=(math.nan,) * len(reply),
                    reward=math.nan if score is None else float(score),
                    verdict=line.verdict.to_dict(),
                    policy_version=-1,
                )
            )
        truncated = len(turns) < len(dialogue.turns)
        cut += truncated
        trajectories.append(
            Trajectory(
                instruction=dialogue.persona.instruction,
                persona=dialogue.persona.id,
                domain=dialogue.domain,
                seed=None,
                turns=tuple(turns),
                terminated=not truncated,
                truncated=truncated,
                topic=dialogue.topic,
            )
        )
    if cut:
        log.warning("%d of %d dialogues cut at %d tokens", cut, len(trajectories), limit)
    return trajectories


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _without_nan(value: Any) -> Any:
    """Return ``value`` with None for every float that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return value
