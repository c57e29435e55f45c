"""Checks of the turn ledger: the learner trains on exactly what was sampled, by the policy that learns.

Pure functions over trajectories, the arrays made from them and the learner's log-probs. They raise or measure; nothing
here changes a batch, runs a model or knows a loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppg_agents.batch import Batch
from ppg_agents.trajectory import Trajectory, Turn


class LedgerError(ValueError):
    """The batch is not what was sampled, or was not sampled by this policy; the message names the turn."""


def check_batch(trajectories: Sequence[Trajectory], data: Batch, trained: Tensor) -> None:
    """Check a batch against the conversations it was made from, and the mask of trained tokens.

    Spans follow one another from the row's first token to its last; ids, sampling log-probs, rewards and turn indices
    in them are the ledger's; the mask of sampled tokens is the union of the reply spans, and the mask of trained tokens
    the union of those of judged turns.

    Args:
        trajectories: B conversations.
        data: Their arrays.
        trained: Bool [B, L], the tokens the loss sees.

    Raises:
        LedgerError: Something differs; the message names conversation, turn and token.
    """
    ids, log_probs = data.ids.cpu().numpy(), data.sampling_log_probs.cpu().numpy()
    turn_index = data.turn_index.cpu().numpy()
    sampled, judged = np.zeros(ids.shape, dtype=np.bool_), np.zeros(ids.shape, dtype=np.bool_)
    real = data.attention.sum(1).tolist()
    for b, trajectory in enumerate(trajectories):
        at = 0
        for t, turn in enumerate(trajectory.turns):
            place = where(trajectories, b, t)
            prompt, start, end = (int(x) for x in data.spans[b, t])
            if prompt != at or not prompt <= start <= end:
                raise _broken(f"the spans of {place} to begin at {at}", f"prompt [{prompt}, {start}), reply to {end}")
            if start < 1 or end > real[b]:
                raise _broken(f"the reply of {place} inside tokens [1, {real[b]})", f"[{start}, {end})")
            if start - prompt != len(turn.prompt_ids) or end - start != len(turn.token_ids):
                lengths = f"{len(turn.prompt_ids)} prompt and {len(turn.token_ids)} reply tokens at {place}"
                raise _broken(lengths, f"spans of {start - prompt} and {end - start}")
            _same("id", ids[b, prompt:end], [*turn.prompt_ids, *turn.token_ids], place, prompt)
            _same("sampling log-prob", log_probs[b, start:end], np.array(turn.log_probs, np.float32), place, start)
            _same("turn index", turn_index[b, prompt:end], [t] * (end - prompt), place, prompt)
            _same("reward", data.rewards[b, t : t + 1], [turn.reward], place, start)
            sampled[b, start:end] = True
            judged[b, start:end] = np.isfinite(turn.reward)
            at = end
        if at != real[b]:
            raise _broken(f"{at} tokens in {where(trajectories, b)}", f"a row of {real[b]}")
        if len(trajectory.turns) < data.spans.shape[1] and (data.spans[b, len(trajectory.turns) :] >= 0).any():
            raise _broken(f"{len(trajectory.turns)} turns in {where(trajectories, b)}", "a span of one more")
    for name, mask, expected in (("sampled", data.token_mask, sampled), ("trained", trained, judged)):
        wrong = np.argwhere(mask.cpu().numpy() != expected)
        if len(wrong):
            b, i = wrong[0].tolist()
            kind = "a sampled token of a judged turn" if name == "trained" else "a sampled token"
            verb = "is" if expected[b, i] else "is not"
            raise _broken(
                f"the mask of {name} tokens to be the union of their reply spans",
                f"{not expected[b, i]} at token {i} of {where(trajectories, b)}, which {verb} {kind}",
            )


def staleness(trajectories: Sequence[Trajectory], version: int, allowed: int = 0) -> int:
    """Return how many optimiser steps the oldest turn is behind the learner.

    Args:
        trajectories: B conversations.
        version: The learner's policy version.
        allowed: How many steps a turn may be behind; 0 is on-policy.

    Raises:
        LedgerError: A turn is older than allowed, from a later version, or logged.
    """
    oldest = 0
    for b, t, turn in _turns(trajectories):
        behind = version - turn.policy_version
        if turn.policy_version >= 0 and 0 <= behind <= allowed:
            oldest = max(oldest, behind)
            continue
        if turn.policy_version < 0:
            advice = "the reply is a logged one: learn from it offline"
        elif behind < 0:
            advice = "the conversation is from another run or a later checkpoint: load the weights that sampled it"
        else:
            advice = (
                "the sampler does not have the newest weights: sync it before every rollout, or allow stale rollouts "
                f"(max_staleness >= {behind}) with importance weights"
            )
        within = f" or up to {allowed} older" if allowed else ""
        raise LedgerError(
            f"expected policy version {version}{within} at {where(trajectories, b, t)}, got version "
            f"{turn.policy_version}; {advice}"
        )
    return oldest


def temperature(trajectories: Sequence[Trajectory]) -> float:
    """Return the temperature that all turns were sampled at; 1 if there is no turn.

    Raises:
        LedgerError: Temperatures differ, or one is not above 0: a greedy reply has no distribution.
    """
    first: float | None = None
    for b, t, turn in _turns(trajectories):
        if not 0 < turn.temperature < float("inf"):
            raise LedgerError(
                f"expected a sampling temperature above 0, got {turn.temperature} at {where(trajectories, b, t)}; "
                "the learner cannot train on greedy replies: sample them"
            )
        first = turn.temperature if first is None else first
        if turn.temperature != first:
            raise LedgerError(
                f"expected one temperature in a batch, got {first} and, at {where(trajectories, b, t)}, "
                f"{turn.temperature}; sample a batch with one sampler"
            )
    return 1.0 if first is None else first


def check_known(trajectories: Sequence[Trajectory]) -> None:
    """Raise unless the log-prob of every sampled token in a judged turn is known.

    Raises:
        LedgerError: It is not; the message names the first such turn.
    """
    for b, t, turn in _turns(trajectories):
        if np.isfinite(turn.reward) and np.isnan(turn.log_probs).any():
            raise LedgerError(
                f"expected sampling log-probs at {where(trajectories, b, t)}, which importance weights divide by, got "
                "NaN; use a sampler that reports them, or set importance to 'none'"
            )


def of_version(trajectories: Sequence[Trajectory], version: int, n: int) -> NDArray[np.bool_]:
    """Return [B, n], True at turns that this policy version sampled."""
    current = np.zeros((len(trajectories), n), dtype=np.bool_)
    for b, t, turn in _turns(trajectories):
        current[b, t] = turn.policy_version == version
    return current


@dataclass(frozen=True)
class Apart:
    """How far sampler and learner are apart in one conversation, |lp − lp°| in nats.

    Attributes:
        row: Its row in the batch.
        count: Tokens whose sampling log-prob is known.
        total: Sum over these tokens.
        uncertain: Σ (1 − p°) over them, p° the probability that the sampler gave the token.
        largest: The largest gap; at ``position`` in the row, where ``learner`` and ``sampler`` are the two log-probs.
    """

    row: int
    count: int
    total: float
    uncertain: float
    largest: float
    position: int
    learner: float
    sampler: float


@dataclass(frozen=True)
class Gap:
    """How far the learner's log-probs are from the sampler's, |lp − lp°| in nats; those of parts add up.

    Attributes:
        total: Sum over tokens.
        count: Tokens whose sampling log-prob is known.
        conversations: The same for every conversation that has such tokens.
    """

    total: float = 0.0
    count: int = 0
    conversations: tuple[Apart, ...] = ()

    def __add__(self, other: Gap) -> Gap:
        return Gap(self.total + other.total, self.count + other.count, self.conversations + other.conversations)

    @property
    def mean(self) -> float:
        """Mean over tokens; 0 if there is none."""
        return self.total / max(1, self.count)

    @property
    def largest(self) -> float:
        """The largest gap; 0 without a token."""
        return max((apart.largest for apart in self.conversations), default=0.0)


def gap(log_probs: Tensor, sampling_log_probs: Tensor, token_mask: Tensor, rows: Sequence[int]) -> Gap:
    """Measure the gap in one micro-batch.

    Args:
        log_probs: The learner's [R, L]; read where ``token_mask`` is true.
        sampling_log_probs: The sampler's [R, L]; NaN where unknown.
        token_mask: [R, L] bool.
        rows: The conversations' row numbers in the batch.
    """
    learner, sampler = log_probs.detach(), sampling_log_probs.to(log_probs.device)
    known = token_mask & ~sampler.isnan()
    count = int(known.sum())
    if not count:
        return Gap()
    gaps = (learner - sampler).abs().masked_fill(~known, 0.0)
    uncertain = (1 - sampler.double().exp()).masked_fill(~known, 0.0).sum(1).tolist()
    counts, totals, positions = known.sum(1).tolist(), gaps.double().sum(1).tolist(), gaps.argmax(1).tolist()
    conversations = [
        Apart(
            rows[r],
            counts[r],
            totals[r],
            uncertain[r],
            float(gaps[r, positions[r]]),
            positions[r],
            float(learner[r, positions[r]]),
            float(sampler[r, positions[r]]),
        )
        for r in range(len(rows))
        if counts[r]
    ]
    return Gap(float(gaps.sum(dtype=torch.float64)), count, tuple(conversations))


# What separates a wrong sampler from rounding: not the largest gap, which in bfloat16 passes any limit at one token in
# thousands, but the gap per token, where a token of which the sampler was sure counts little: rounding moves logits by
# about the same amount everywhere, and a logit moves the log-prob of a token of probability p by about 1 − p of that.
# One conversation can be wrong alone (a batch that mixes adapters), so each is looked at too, with twice the limit.
_SLACK = 10.0  # uncertain tokens added, so that a single rounded token does not condemn a short batch
_ALONE = 2.0


def gap_fault(found: Gap, limit: float, trajectories: Sequence[Trajectory]) -> str | None:
    """Return a message if sampler and learner are further apart than rounding explains, else None.

    Apart means Σ|lp − lp°| > limit / min(1, T) · (Σ(1 − p°) + 10), at sampling temperature T, over the whole batch, or
    twice that in one conversation (own).

    Args:
        found: The gap of these conversations.
        limit: Nats per uncertain token, at temperature 1.
        trajectories: The conversations.
    """
    if not found.conversations:
        return None
    allowed = limit / min(1.0, temperature(trajectories))
    uncertain = sum(apart.uncertain for apart in found.conversations)
    whole = found.total / (uncertain + _SLACK)
    ratios = {apart.row: apart.total / (apart.uncertain + _SLACK) for apart in found.conversations}
    worst = max(found.conversations, key=lambda apart: (ratios[apart.row], apart.largest))
    if not (whole > allowed or ratios[worst.row] > _ALONE * allowed):
        return None
    where_it_is = f"{found.count} tokens of the batch" if whole > allowed else f"{worst.count} of one conversation"
    ratio, bound = (whole, allowed) if whole > allowed else (ratios[worst.row], _ALONE * allowed)
    b = worst.row
    t, span = next((t, s) for t, s in enumerate(trajectories[b].spans()) if s.start <= worst.position < s.end)
    turn = trajectories[b].turns[t]
    i = worst.position - span.start
    return (
        f"expected log-probs of sampler and learner within {bound:.3g} nats per uncertain token, got {ratio:.3g} over "
        f"{where_it_is}; most at {where(trajectories, b, t)}, token {i + 1} of {len(turn.token_ids)} (id "
        f"{turn.token_ids[i]}): {worst.sampler:.6f} (sampler {turn.sampler or 'unknown'!r}) and {worst.learner:.6f} "
        f"(learner), {worst.largest:.6f} apart; the replies were sampled from another distribution: check that the "
        f"sampler has the weights of version {turn.policy_version}, at temperature {turn.temperature:g} and without "
        "top-p or penalties; only for a sampler of lower precision than the learner, go on with --resume RUN --set "
        f"max_log_prob_gap={2 * ratio * min(1.0, turn.temperature):.2g}"
    )


def default_gap_limit(dtype: torch.dtype) -> float:
    """Return the limit for `gap_fault` of a learner that computes in this dtype: 0.001 in float32, else 0.12.

    Measured where sampler and learner agree, and where they do not: see docs/scaling.md#rounding.
    """
    return 0.001 if torch.finfo(dtype).bits >= 32 else 0.12


def where(trajectories: Sequence[Trajectory], b: int, t: int | None = None) -> str:
    """Describe a conversation, or a turn of it, in words; both count from 1."""
    trajectory = trajectories[b]
    seed = "" if trajectory.seed is None else f", seed {trajectory.seed}"
    turn = "" if t is None else f", turn {t + 1} of {len(trajectory.turns)}"
    return f"conversation {b + 1} of {len(trajectories)} (persona {trajectory.persona!r}{seed}){turn}"


def _turns(trajectories: Sequence[Trajectory]) -> Iterator[tuple[int, int, Turn]]:
    """Yield the number of the conversation, that of the turn, both from 0, and the turn."""
    return ((b, t, turn) for b, trajectory in enumerate(trajectories) for t, turn in enumerate(trajectory.turns))


def _same(name: str, got: Any, expected: Any, place: str, start: int) -> None:
    """Raise at the first entry that differs; NaN equals NaN."""
    got, expected = np.asarray(got), np.asarray(expected)
    wrong = np.flatnonzero((got != expected) & ~((got != got) & (expected != expected)))
    if len(wrong):
        i = int(wrong[0])
        raise _broken(f"{name} {expected[i]} of the ledger at {place}, token {start + i} of the row", f"{got[i]}")


def _broken(expected: str, got: str) -> LedgerError:
    return LedgerError(f"expected {expected}, got {got}; the batch is not the ledger: lay it out with ppg_agents.batch")
