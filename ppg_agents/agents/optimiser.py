"""The optimiser's state on disk, and its learning rate by the step. Takes no step itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ppg_agents.distributed import joined, split_like


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of every trainable weight, ``<weight>.<kind>`` -> whole tensor; all workers call it together."""
    return {
        f"{name}.{kind}": joined(tensor).contiguous()
        for name, parameter in _trainable(model).items()
        for kind, tensor in optimizer.state.get(parameter, {}).items()
    }


def read_moments(file: Path, model: nn.Module, device: torch.device | str) -> dict[Tensor, dict[str, Tensor]]:
    """Read back what `moments_of` returned, split over the workers as the model's weights are.

    Raises:
        ValueError: The file has a weight that the model does not train.
    """
    from safetensors.torch import load_file

    named, moments = _trainable(model), dict[Tensor, dict[str, Tensor]]()
    for key, tensor in load_file(file).items():
        name, _, kind = key.rpartition(".")
        if name not in named:
            raise ValueError(f"expected this policy's optimiser state in {file.parent}, got weight {name!r}")
        where = "cpu" if kind == "step" else device
        moments.setdefault(named[name], {})[kind] = split_like(tensor.to(where), named[name])
    return moments


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def linear_decay(learning_rate: float, total_steps: int) -> Callable[[int], float]:
    """Return the rate that falls from `learning_rate` at step 0 to 0 at `total_steps`."""
    return lambda step: learning_rate * max(0.0, 1.0 - step / total_steps)


def schedule(rate: float | Callable[[int], float], total_steps: int | None) -> Callable[[int], float]:
    """Return the rate by the step: a function as it is, a number constant or falling to 0 over ``total_steps``.

    Raises:
        ValueError: A function and ``total_steps``.
    """
    if callable(rate):
        if total_steps is not None:
            raise ValueError("expected total_steps only with a number as learning rate, got a function")
        return rate
    return linear_decay(rate, total_steps) if total_steps else lambda step: rate
