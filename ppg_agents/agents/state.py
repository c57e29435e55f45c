"""A learner's state in a folder: its policy, its optimiser's moments and whatever else it needs to go on.

Safetensors and JSON only. With several workers, all call these functions together, because weights may be split.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppg_agents.distributed import Workers, joined, split_like, whole_weights
from ppg_agents.policy.policy import Policy

SCHEMA = "ppg-agent/1"


def save_state(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, own: Mapping[str, Any], workers: Workers
) -> None:
    """Write adapter, tokenizer, moments, and the learner's ``own`` state as JSON; only the main worker writes."""
    from safetensors.torch import save_file

    moments = _moments_of(policy.model, optimizer)
    with whole_weights(policy.model):
        if not workers.main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        policy.save(folder)
    save_file(moments, folder / "optimizer.safetensors")
    state = {"schema": SCHEMA, **own}
    (folder / "agent.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def load_state(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load policy and moments, and return the learner's own state.

    Raises:
        ValueError: The schema, the model or the optimiser state does not fit.
    """
    state: dict[str, Any] = json.loads((folder / "agent.json").read_text(encoding="utf-8"))
    if state.get("schema") != SCHEMA:
        raise ValueError(f"expected schema {SCHEMA!r} in {folder}, got {state.get('schema')!r}")
    moments = _read_moments(folder / "optimizer.safetensors", policy)
    with whole_weights(policy.model):
        policy.load_weights(folder)
    optimizer.state.clear()
    optimizer.state.update(moments)
    return state


def _moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the moments of every trainable weight: ``<weight>.<kind>`` -> whole tensor."""
    return {
        f"{name}.{kind}": joined(tensor).contiguous()
        for name, parameter in _trainable(model).items()
        for kind, tensor in optimizer.state.get(parameter, {}).items()
    }


def _read_moments(file: Path, policy: Policy) -> dict[Tensor, dict[str, Tensor]]:
    """Return the saved moments, split over the workers like the model's weights."""
    from safetensors.torch import load_file

    named, moments = _trainable(policy.model), dict[Tensor, dict[str, Tensor]]()
    for key, tensor in load_file(file).items():
        name, _, kind = key.rpartition(".")
        if name not in named:
            raise ValueError(f"expected this policy's optimiser state in {file.parent}, got weight {name!r}")
        device = "cpu" if kind == "step" else policy.device
        moments.setdefault(named[name], {})[kind] = split_like(tensor.to(device), named[name])
    return moments


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
