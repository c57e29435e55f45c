"""Float32 copies of weights that are stored in fewer bits: the optimiser's steps add up there.

At learning rate 1e-6 a step is smaller than half the distance of two neighbouring bfloat16 numbers for nearly every
weight: rounded after each step, it never moves. Here the step is taken on the copy, and the weight is the copy rounded
(mixed precision as in arXiv 1710.03740, without loss scaling, which bfloat16's range does not need).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Masters:
    """The tensors that an optimiser steps on: a float32 copy of every narrower weight, and every other weight itself.

    Gradients of narrower weights are added up in float32 too, and removed from the weight as each arrives: so
    ``.grad`` is that of the copy.

    Attributes:
        tensors: One per weight, in the order of the weights.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make the copies.

        Args:
            parameters: The trained weights, whole or split over processes.
        """
        self._parameters = list(parameters)
        self.tensors = [nn.Parameter(p.detach().float()) if _narrow(p) else p for p in self._parameters]
        self._pairs = [(p, copy) for p, copy in zip(self._parameters, self.tensors, strict=True) if copy is not p]
        for p, copy in self._pairs:
            p.register_post_accumulate_grad_hook(lambda p, copy=copy: _move_gradient(p, copy))  # type: ignore[no-untyped-call]

    def gather(self) -> None:
        """Move gradients that came without the hook (weights split over processes)."""
        for p, copy in self._pairs:
            if p.grad is not None:
                _move_gradient(p, copy)

    @torch.no_grad()
    def write(self) -> None:
        """Round every copy into its weight, after a step."""
        for p, copy in self._pairs:
            p.copy_(copy)

    def by_weight(self) -> dict[nn.Parameter, nn.Parameter]:
        """Return the tensor that the optimiser steps on, for every weight; the weight itself where there is no copy."""
        return dict(zip(self._parameters, self.tensors, strict=True))


def _narrow(p: Tensor) -> bool:
    return p.is_floating_point() and torch.finfo(p.dtype).bits < 32


def _move_gradient(p: nn.Parameter, copy: nn.Parameter) -> None:
    assert p.grad is not None  # autograd has just put it there
    copy.grad = p.grad.float() if copy.grad is None else copy.grad.add_(p.grad)
    p.grad = None
