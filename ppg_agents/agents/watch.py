"""What an optimiser step does to the policy, from log-probs that the step computes anyway; nothing here changes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ppg_agents.losses import kl_estimate


@dataclass(frozen=True)
class Watched:
    """Sums over the trained tokens of a batch; those of parts add up.

    Attributes:
        entropy: Entropies of the policy's next-token distributions, nats.
        entropies: How many.
        moved: Estimates of KL(π° ‖ π) from the sampling policy to the learner, nats.
        known: Tokens whose sampling log-prob is known.
        strayed: Estimates of KL(π ‖ π_ref) from the learner to the reference model, nats.
        referred: Tokens that the reference model scored.
    """

    entropy: float = 0.0
    entropies: int = 0
    moved: float = 0.0
    known: int = 0
    strayed: float = 0.0
    referred: int = 0

    def __add__(self, other: Watched) -> Watched:
        return Watched(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def metrics(self) -> dict[str, float]:
        """Return ``entropy``, ``kl_sampler`` and ``kl_reference``, nats per token; not those that nobody measured."""
        sums = (
            ("entropy", self.entropy, self.entropies),
            ("kl_sampler", self.moved, self.known),
            ("kl_reference", self.strayed, self.referred),
        )
        return {name: total / count for name, total, count in sums if count}


@torch.no_grad()
def watch(
    log_probs: Tensor, sampling: Tensor, token_mask: Tensor, entropies: Tensor | None, reference: Tensor | None
) -> Watched:
    """Measure one micro-batch; all tensors are [R, L'].

    Both divergences are k3 (`losses.kl_estimate`), which is unbiased over tokens that the first of the two policies
    sampled: for KL(π° ‖ π) always, for KL(π ‖ π_ref) while sampler and learner are the same.

    Args:
        log_probs: The learner's.
        sampling: The sampler's; NaN where unknown.
        token_mask: True on trained tokens.
        entropies: Of the learner's distributions; None if not measured.
        reference: The reference model's log-probs; None if not measured.
    """

    def total(values: Tensor) -> float:
        return float(values.sum(dtype=torch.float64))

    count, known = int(token_mask.sum()), token_mask & ~sampling.isnan()
    return Watched(
        entropy=0.0 if entropies is None else total(entropies.masked_fill(~token_mask, 0.0)),
        entropies=0 if entropies is None else count,
        moved=total(kl_estimate(sampling, log_probs, known)),
        known=int(known.sum()),
        strayed=0.0 if reference is None else total(kl_estimate(log_probs, reference, token_mask)),
        referred=0 if reference is None else count,
    )


def of_batch(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the metrics of a batch from those of its steps: the last one's, and how many steps were clipped."""
    merged = {name: value for step in steps for name, value in step.items()}
    return {**merged, "grad_clipped": sum(step["grad_clipped"] for step in steps) / len(steps)}
