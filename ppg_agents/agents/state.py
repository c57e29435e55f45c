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

from ppg_agents.agents.masters import Masters
from ppg_agents.distributed import Workers, joined, split_like, whole_weights
from ppg_agents.policy.policy import Policy

SCHEMA = "ppg-agent/1"
MASTER = "master"


def save_state(
    folder: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    masters: Masters,
    own: Mapping[str, Any],
    workers: Workers,
) -> None:
    """Write adapter, tokenizer, moments, and the learner's ``own`` state as JSON; only the main worker writes.

    Float32 copies of weights in fewer bits go with the moments.
    """
    from safetensors.torch import save_file

    moments = _moments_of(policy.model, optimizer, masters)
    with whole_weights(policy.model):
        if not workers.main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        policy.save(folder)
    save_file(moments, folder / "optimizer.safetensors")
    state = {"schema": SCHEMA, **own}
    (folder / "agent.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def load_state(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, masters: Masters) -> dict[str, Any]:
    """Load policy, moments and float32 copies, and return the learner's own state.

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
    for parameter, master in masters.by_weight().items():
        kept = moments.get(parameter, {})
        if master is not parameter:
            with torch.no_grad():  # before the first step the copy is the weight
                master.copy_(kept.pop(MASTER, parameter.float()))
        if kept:
            optimizer.state[master] = kept
    return state


def _moments_of(model: nn.Module, optimizer: torch.optim.Optimizer, masters: Masters) -> dict[str, Tensor]:
    """Return ``<weight>.<kind>`` -> whole tensor for the moments of every trainable weight, and for its copy."""
    whole: dict[str, Tensor] = {}
    steps_on = masters.by_weight()
    for name, parameter in _trainable(model).items():
        master = steps_on[parameter]
        kept = dict(optimizer.state.get(master, {}))
        if master is not parameter:  # an optimiser without moments has nothing but this
            kept[MASTER] = master.detach()
        whole |= {f"{name}.{kind}": joined(tensor).contiguous() for kind, tensor in kept.items()}
    return whole


def _read_moments(file: Path, policy: Policy) -> dict[Tensor, dict[str, Tensor]]:
    """Return the saved moments and copies, split over the workers like the model's weights."""
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
