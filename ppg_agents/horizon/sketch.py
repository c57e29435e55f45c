"""Per-turn score gradients of a policy, each stored as a random projection.

∇ log π(y_{b,t} | x_b, τ_{b,t−1}) is the same for every policy class; only the credit that multiplies it differs. These
vectors give the gradient of any class (see `advice`). A policy has too many weights to store them whole, so each is
projected to D numbers by a count sketch, which preserves inner products up to a known error.

Nothing here knows a reward's meaning, a policy class or a baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppg_agents.batch import Batch, batch
from ppg_agents.policy.policy import Policy
from ppg_agents.trajectory import Trajectory

Array = NDArray[np.float64]

DIMENSION = 1024
_CHUNK = 2**20
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64


@dataclass(frozen=True)
class Sketches:
    """Projected gradients and scores of B conversations of at most n turns.

    Attributes:
        vectors: [B, n, D] float32, the projected gradient of log π(reply of turn t); 0 at invalid turns.
        rewards: [B, n], the judge's scores.
        valid: [B, n] bool, played and judged.
        personas: B labels; conversations with equal labels are not independent.
        parameters: How many weights the gradients cover.
        seed: Of the projection; only sketches with the same seed can be compared.
        missing: [B, n] bool, a fault took the reward; None for no faults.
    """

    vectors: NDArray[np.float32]
    rewards: Array
    valid: NDArray[np.bool_]
    personas: tuple[str, ...]
    parameters: int
    seed: int
    missing: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        """Check shapes."""
        size, n = self.vectors.shape[:2] if self.vectors.ndim == 3 else (-1, -1)
        if self.rewards.shape != (size, n) or self.valid.shape != (size, n) or len(self.personas) != size:
            raise ValueError(
                f"expected vectors [B, n, D], rewards and valid [B, n] and B personas, got {self.vectors.shape}, "
                f"{self.rewards.shape}, {self.valid.shape} and {len(self.personas)}"
            )


class CountSketch:
    """A linear map from P weights to D numbers: every weight has one bucket and one sign (Charikar et al. 2002).

        (S x)_d = Σ_{i : h(i) = d} s(i) · x_i,   h(i) ∈ {0, …, D−1},  s(i) ∈ {−1, 1}

    For fixed x, y and random h, s: E⟨Sx, Sy⟩ = ⟨x, y⟩ and
    Var⟨Sx, Sy⟩ = (‖x‖²‖y‖² + ⟨x, y⟩² − 2 Σ_i x_i² y_i²) / D; with x = y the relative error is below √(2/D).

    h and s are hashes (splitmix64) of the weight's index and the seed, computed when needed: nothing of size
    P × D, or even P, is stored, and the map is the same on every device. CUDA adds up in any order, so results differ
    in the last bits from run to run.
    """

    def __init__(self, dimension: int = DIMENSION, seed: int = 0) -> None:
        """Choose the map.

        Args:
            dimension: D.
            seed: Same seed, same map.

        Raises:
            ValueError: ``dimension`` < 1 or ``seed`` < 0.
        """
        if dimension < 1 or seed < 0:
            raise ValueError(f"expected dimension >= 1 and seed >= 0, got {dimension} and {seed}")
        self.dimension, self.seed = dimension, seed
        self._offset = int(_mix(torch.tensor([seed]))[0])

    def __call__(self, gradients: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
        """Return S x, [D] float64 on the CPU.

        Args:
            gradients: x in pieces, one per weight tensor; None for zeros.
            sizes: Elements of every piece.
        """
        place = next((g.device for g in gradients if g is not None), torch.device("cpu"))
        total = torch.zeros(self.dimension, dtype=torch.float64, device=place)
        start = 0
        for gradient, size in zip(gradients, sizes, strict=True):
            if gradient is not None:
                flat = gradient.reshape(-1)
                for at in range(0, size, _CHUNK):
                    piece = flat[at : at + _CHUNK].double()
                    bucket, sign = self.places(start + at, len(piece), place)
                    total.index_add_(0, bucket, piece * sign)
            start += size
        return total.cpu()

    def places(self, start: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the bucket (long) and the sign (float64) of weights start, …, start + count − 1."""
        index = torch.arange(start, start + count, device=device)
        random = _mix(index + self._offset)
        sign = (random & 1).double().mul_(2).sub_(1)
        return _shifted(random, 1) % self.dimension, sign


def sketch(
    policy: Policy,
    trajectories: Sequence[Trajectory],
    *,
    dimension: int = DIMENSION,
    seed: int = 0,
    temperature: float = 1.0,
    n_turns: int | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> Sketches:
    """Project the gradient of every judged turn.

    One forward pass per conversation and one backward pass per judged turn; memory as for learning from one
    conversation. LoRA dropout is on, as in learning.

    Args:
        policy: Gradients are taken of its trainable weights.
        trajectories: At least one.
        dimension: D.
        seed: Of the projection.
        temperature: At which the replies were sampled.
        n_turns: n; default the longest conversation.
        done: Called with the number of conversations finished.

    Raises:
        ValueError: No trajectory, more turns than ``n_turns``, or no trainable weights.
        FloatingPointError: A gradient is not finite.
    """
    data = batch(trajectories, policy.pad_id, n_turns)
    project = CountSketch(dimension, seed)
    sizes = [p.numel() for p in policy.parameters()]
    vectors = np.zeros((*data.valid.shape, dimension), dtype=np.float32)
    for b, trajectory in enumerate(trajectories):
        for t, gradients in turn_gradients(policy, data, b, temperature):
            vectors[b, t] = project(gradients, sizes).numpy()
            if not np.isfinite(vectors[b, t]).all():
                raise FloatingPointError(
                    f"expected a finite gradient, got none at turn {t + 1} of conversation {b + 1} "
                    f"(persona {trajectory.persona!r}); the policy's weights or log-probs are broken"
                )
        done(b + 1)
    personas = tuple(t.persona or f"conversation {b}" for b, t in enumerate(trajectories))
    return Sketches(vectors, data.rewards, data.valid, personas, sum(sizes), seed, data.missing)


def turn_gradients(
    policy: Policy, data: Batch, row: int, temperature: float = 1.0
) -> Iterator[tuple[int, list[Tensor | None]]]:
    """Yield every judged turn t of a conversation with ∇ log π(y_t | x, τ_{t−1}), in the order of `Policy.parameters`.

    The conversation is scored once. A later turn's log-prob depends on the weights through earlier positions too, so
    each turn takes a backward pass through the whole conversation.

    Args:
        policy: Who is scored.
        data: The batch.
        row: Which conversation.
        temperature: At which the replies were sampled.

    Raises:
        ValueError: The policy has no trainable weights.
    """
    parameters = policy.parameters()
    if not parameters:
        raise ValueError("expected a policy with trainable weights, got none; load it with LoRA")
    judged: list[int] = np.flatnonzero(data.valid[row]).tolist()
    if not judged:
        return
    length = int(data.spans[row, judged[-1], 2])
    part = (slice(row, row + 1), slice(0, length))
    token_mask = data.token_mask[part]
    with torch.enable_grad():
        log_probs = policy.log_probs(data.ids[part], data.attention[part], token_mask, temperature=temperature)
        if not log_probs.requires_grad:  # no reply has a token
            return
        turn = data.turn_index[part].to(log_probs.device)
        for t in judged:
            reply = log_probs.masked_fill((turn != t) | ~token_mask.to(log_probs.device), 0.0).sum()
            more: dict[str, Any] = {"retain_graph": t != judged[-1], "allow_unused": True}
            yield t, list(torch.autograd.grad(reply, parameters, **more))


def _mix(x: Tensor) -> Tensor:
    """Return splitmix64's output for every int64 state, as int64."""
    x = x * _signed(_GOLDEN) + _signed(_GOLDEN)
    x = (x ^ _shifted(x, 30)) * _signed(_FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(_SECOND)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right without the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant
