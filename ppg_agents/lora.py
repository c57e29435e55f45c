"""Low-rank adaptation (arXiv 2106.09685) on a causal LM: made by PEFT, merged for sampling, fused for learning.

Swaps how PEFT's layers compute, never what they compute. Nothing here knows a token or a reward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ppg_agents.config import LoraSettings


@dataclass(frozen=True)
class Adapted:
    """A LoRA layer and where it sits.

    Attributes:
        parent: The module that holds it.
        name: Its name there.
        module: PEFT's layer.
        base: The layer below, with the frozen weight.
        adapter: PEFT's name of the active adapter.
    """

    parent: nn.Module
    name: str
    module: Any
    base: Any
    adapter: str


def add_lora(model: Any, settings: LoraSettings, seed: int = 0) -> Any:
    """Return `model` with LoRA on it; the global random state is left as it was."""
    from peft import LoraConfig, get_peft_model

    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def adapted_layers(model: Any) -> list[Adapted]:
    """Return the LoRA layers of a PEFT model; none for a plain one.

    Raises:
        ValueError: A layer is more than ``W + alpha/rank · B A``.
    """
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.lora import LoraLayer

    adapter = str(model.active_adapter)
    layers = []
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        plain = adapter not in module.lora_variant and not module.lora_bias.get(adapter)
        if not plain or not hasattr(module, "get_delta_weight"):
            raise ValueError(f"expected plain LoRA at {path}, got a variant (DoRA, bias, …); use plain LoRA")
        parent, _, name = path.rpartition(".")
        layers.append(Adapted(model.get_submodule(parent), name, module, module.get_base_layer(), adapter))
    return layers


@contextmanager
def merge(layers: Sequence[Adapted]) -> Iterator[None]:
    """Swap every layer for its base layer with ``W + alpha/rank · B A``; put both back afterwards.

    The original weight tensors are set aside, not subtracted from, so they return bit for bit.
    """
    kept: list[tuple[Adapted, Tensor]] = []
    try:
        with torch.no_grad():
            for layer in layers:
                weight = layer.base.weight
                kept.append((layer, weight.data))
                weight.data = weight.data + layer.module.get_delta_weight(layer.adapter).to(weight.dtype)
                setattr(layer.parent, layer.name, layer.base)
        yield
    finally:
        for layer, data in kept:
            layer.base.weight.data = data
            setattr(layer.parent, layer.name, layer.module)


@contextmanager
def fuse(layers: Sequence[Adapted]) -> Iterator[None]:
    """Let plain linear layers compute base and update in one go, forward and backward.

    Layers with dropout, of another type or of mixed dtypes keep PEFT's own computation.
    """
    fused = []
    try:
        for layer in layers:
            if (forward := _fused_forward(layer)) is not None:
                layer.module.forward = forward
                fused.append(layer.module)
        yield
    finally:
        for module in fused:
            del module.forward


def _fused_forward(layer: Adapted) -> Callable[[Tensor], Tensor] | None:
    module, base, key = layer.module, layer.base, layer.adapter
    if type(base) is not nn.Linear or not isinstance(module.lora_dropout[key], nn.Identity):
        return None
    down, up, scale = module.lora_A[key].weight, module.lora_B[key].weight, module.scaling[key]
    if not base.weight.dtype == down.dtype == up.dtype or base.weight.requires_grad:
        return None

    def forward(x: Tensor) -> Tensor:
        out: Tensor = _LoraLinear.apply(x, base.weight, base.bias, down, up, scale)  # type: ignore[no-untyped-call]
        return out

    return forward


class _LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + s · (x Aᵀ) Bᵀ with W and bias frozen; no intermediate of y's size is made or kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ down.T
        ctx.save_for_backward(rows, weight, down, up, low)
        ctx.scale, ctx.shape = scale, x.shape
        out = nn.functional.linear(rows, weight, bias).addmm_(low, up.T, alpha=scale)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, low = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_low = (grad @ up).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low, down).view(ctx.shape)
        return grad_x, None, None, grad_low.T @ rows, (grad.T @ low).mul_(ctx.scale), None
