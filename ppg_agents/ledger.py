"""Checks of the turn ledger: what is learned from is what was sampled, by the policy that learns.

Pure functions over trajectories, the arrays made of them and the log-probs that the learner computes. They raise or
measure; nothing here changes a batch, runs a model or knows a loss.
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
    """The batch is not what was sampled, or not by this policy; the message names the turn."""


def check_batch(trajectories: Sequence[Trajectory], data: Batch, trained: Tensor) -> None:
    """Compare a batch with the conversations that it was made of, and with the tokens that are to be trained on.

    Spans follow one another from the row's first token to its last; the ids, sampling log-probs, rewards and turn
    indices in them are the ledger's; the mask of sampled tokens is the union of the reply spans, and the mask of
    trained tokens that of the judged turns.

    Args:
        trajectories: B conversations.
        data: Their arrays.
        trained: Bool [B, L], the tokens that the loss sees.

    Raises:
        LedgerError: Anything that differs; the message names conversation, turn and token.
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
            said = "is" if expected[b, i] else "is not"
            raise _broken(
                f"the mask of {name} tokens to be the union of their reply spans",
                f"{not expected[b, i]} at token {i} of {where(trajectories, b)}, which {said} {kind}",
            )


def staleness(trajectories: Sequence[Trajectory], version: int, allowed: int = 0) -> int:
    """Return by how many optimiser steps the oldest turn is behind the learner.

    Args:
        trajectories: B conversations.
        version: The learner's.
        allowed: Most steps that a turn may be behind; 0 is on-policy.

    Raises:
        LedgerError: A turn of an older version, of a version yet to come, or of logged words.
    """
    oldest = 0
    for b, t, turn in _turns(trajectories):
        behind = version - turn.policy_version
        if turn.policy_version >= 0 and 0 <= behind <= allowed:
            oldest = max(oldest, behind)
            continue
        if turn.policy_version < 0:
            advice = "the words are logged ones: learn from them offline"
        elif behind < 0:
            advice = "the conversation is of another run or a later checkpoint: load the weights that sampled it"
        else:
            advice = (
                "the sampler did not take the newest weights: sync it before every rollout, or allow stale rollouts "
                f"(max_staleness >= {behind}) with importance weights"
            )
        within = f" or up to {allowed} older" if allowed else ""
        raise LedgerError(
            f"expected policy version {version}{within} at {where(trajectories, b, t)}, got version "
            f"{turn.policy_version}; {advice}"
        )
    return oldest


def temperature(trajectories: Sequence[Trajectory]) -> float:
    """Return the one temperature that all turns were sampled at; 1 when there is no turn.

    Raises:
        LedgerError: More than one temperature, or one that is not above 0: a greedy reply has no distribution.
    """
    first: float | None = None
    for b, t, turn in _turns(trajectories):
        if not 0 < turn.temperature < float("inf"):
            raise LedgerError(
                f"expected a sampling temperature above 0, got {turn.temperature} at {where(trajectories, b, t)}; "
                "greedy replies cannot be learned from: sample them"
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
        LedgerError: The first turn where it is not.
    """
    for b, t, turn in _turns(trajectories):
        if np.isfinite(turn.reward) and np.isnan(turn.log_probs).any():
            raise LedgerError(
                f"expected sampling log-probs at {where(trajectories, b, t)}, which importance weights divide by, got "
                "NaN; sample with one that reports them, or set importance to 'none'"
            )


def of_version(trajectories: Sequence[Trajectory], version: int, n: int) -> NDArray[np.bool_]:
    """Return [B, n], True at turns that this policy version sampled."""
    own = np.zeros((len(trajectories), n), dtype=np.bool_)
    for b, t, turn in _turns(trajectories):
        own[b, t] = turn.policy_version == version
    return own


@dataclass(frozen=True)
class Gap:
    """How far the learner's log-probs are from the sampler's, |lp − lp°| in nats; gaps of parts add up.

    Attributes:
        total: Sum over tokens.
        count: Tokens whose sampling log-prob is known.
        largest: The largest one.
        at: Its conversation and position in the row; None without a token.
        learner: The learner's log-prob there.
        sampler: The sampler's.
    """

    total: float = 0.0
    count: int = 0
    largest: float = 0.0
    at: tuple[int, int] | None = None
    learner: float = float("nan")
    sampler: float = float("nan")

    def __add__(self, other: Gap) -> Gap:
        worst = other if self.at is None or other.largest > self.largest else self
        return Gap(
            self.total + other.total, self.count + other.count, worst.largest, worst.at, worst.learner, worst.sampler
        )

    @property
    def mean(self) -> float:
        """Mean over tokens; 0 without one."""
        return self.total / max(1, self.count)


def gap(log_probs: Tensor, sampling_log_probs: Tensor, token_mask: Tensor, rows: Sequence[int]) -> Gap:
    """Measure the gap in one micro-batch.

    Args:
        log_probs: The learner's [R, L]; read where ``token_mask`` is true.
        sampling_log_probs: The sampler's [R, L]; NaN where nobody knows.
        token_mask: [R, L] bool.
        rows: The conversations' numbers in the batch.
    """
    own, theirs = log_probs.detach(), sampling_log_probs.to(log_probs.device)
    known = token_mask & ~theirs.isnan()
    count = int(known.sum())
    if not count:
        return Gap()
    gaps = (own - theirs).abs().masked_fill(~known, 0.0)
    row, position = divmod(int(gaps.argmax()), gaps.shape[1])
    return Gap(
        float(gaps.sum(dtype=torch.float64)),
        count,
        float(gaps[row, position]),
        (rows[row], position),
        float(own[row, position]),
        float(theirs[row, position]),
    )


def gap_fault(found: Gap, limit: float, trajectories: Sequence[Trajectory]) -> str | None:
    """Return what is wrong when the largest gap is above ``limit``, with turn, token and both values; else None."""
    if found.at is None or not found.largest > limit:
        return None
    b, position = found.at
    t, span = next((t, s) for t, s in enumerate(trajectories[b].spans()) if s.start <= position < s.end)
    turn = trajectories[b].turns[t]
    i = position - span.start
    return (
        f"expected log-probs of sampler and learner within {limit:g}, got {found.sampler:.6f} (sampler "
        f"{turn.sampler or 'unknown'!r}) and {found.learner:.6f} (learner), {found.largest:.6f} apart, at "
        f"{where(trajectories, b, t)}, token {i + 1} of {len(turn.token_ids)} (id {turn.token_ids[i]}); "
        "the reply was sampled from another distribution: check that the sampler speaks with the weights of version "
        f"{turn.policy_version}, at temperature {turn.temperature:g} and without top-p or penalties; raise "
        "max_log_prob_gap only for a sampler of lower precision than the learner"
    )


def default_gap_limit(dtype: torch.dtype) -> float:
    """Return the limit on `Gap.largest` for a learner that computes in this type: 0.01 in float32, else 1.

    Largest gaps measured where sampler and learner agree: 1e-5 in float32, 0.12 to 0.16 in bfloat16. A sampler that
    missed one optimiser step of the embedded model: 6.8 at learning rate 3e-3, 0.21 at 1e-4, 0.021 at 1e-5; in
    bfloat16 only the first stands out, and the recorded policy version is what tells.
    """
    return 0.01 if torch.finfo(dtype).bits >= 32 else 1.0


def where(trajectories: Sequence[Trajectory], b: int, t: int | None = None) -> str:
    """Return a conversation, and a turn of it, in words; both count from 1."""
    own = trajectories[b]
    seed = "" if own.seed is None else f", seed {own.seed}"
    turn = "" if t is None else f", turn {t + 1} of {len(own.turns)}"
    return f"conversation {b + 1} of {len(trajectories)} (persona {own.persona!r}{seed}){turn}"


def _turns(trajectories: Sequence[Trajectory]) -> Iterator[tuple[int, int, Turn]]:
    """Yield conversation, turn, both from 0, and what was said there."""
    return ((b, t, turn) for b, own in enumerate(trajectories) for t, turn in enumerate(own.turns))


def _same(name: str, got: Any, expected: Any, place: str, start: int) -> None:
    """Raise at the first entry that differs; NaN equals NaN."""
    got, expected = np.asarray(got), np.asarray(expected)
    wrong = np.flatnonzero((got != expected) & ~((got != got) & (expected != expected)))
    if len(wrong):
        i = int(wrong[0])
        raise _broken(f"{name} {expected[i]} of the ledger at {place}, token {start + i} of the row", f"{got[i]}")


def _broken(expected: str, got: str) -> LedgerError:
    return LedgerError(f"expected {expected}, got {got}; the batch is not the ledger: lay it out with ppg_agents.batch")
