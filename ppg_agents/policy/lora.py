"""LoRA (arXiv 2106.09685) on a causal LM: made by PEFT, merged for sampling, fused for learning.

Changes how PEFT's layers compute, never what they compute; everything swapped comes back bit for bit. Nothing here
knows a token or a reward.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ppg_agents.config.settings import LoraSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapted:
    """A LoRA layer and where it sits.

    Attributes:
        parent: The module that holds it.
        name: Its name there.
        module: PEFT's layer.
        base: The layer it wraps, with the frozen weight.
        weight: The frozen weight: a matrix, or those of all experts, [experts, …, …].
        adapter: PEFT's name for the active adapter.
        plain: Whether it computes just ``W + s · B A``; False with DoRA or a trained bias.
        quantised: Whether the base weight is stored in 4 or 8 bits.
    """

    parent: nn.Module
    name: str
    module: Any
    base: Any
    weight: nn.Parameter
    adapter: str
    plain: bool = True
    quantised: bool = False


Originals = list[tuple[Adapted, list[tuple[nn.Parameter, Tensor]]]]
"""Merged layers, each with its base parameters and the tensors they held before."""


def add_lora(model: Any, settings: LoraSettings, seed: int = 0) -> Any:
    """Return `model` with LoRA on it; leaves the global random state as it was.

    The update is scaled by ``alpha / rank``, with rsLoRA (arXiv 2312.03732) by ``alpha / √rank``. DoRA
    (arXiv 2402.09353) also trains the norm of every output's weights.

    In a mixture of experts whose experts are fused into one parameter, ``"all-linear"`` leaves out the whole block of
    experts, router and shared experts; experts are adapted where a target names their parameter.

    Raises:
        ValueError: PEFT cannot put LoRA on these targets; the message has its reason.
    """
    from peft import LoraConfig, get_peft_model

    targets: str | list[str] = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    experts = _fused_experts(model)
    if targets == "all-linear" and experts:
        targets = _outside(model, {path.split(".")[-3] for path in experts})
        log.info("LoRA leaves experts and routers alone; to train experts, name their parameters in lora.targets")
    parameters = [t for t in targets if any(f".{path}".endswith(f".{t}") for path in experts)] if experts else []
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=[t for t in targets if t not in parameters] if parameters else targets,
        target_parameters=parameters or None,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            return get_peft_model(model, config)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            f"lora.targets {settings.targets!r}: expected layers of {type(model).__name__} that PEFT can adapt, got: "
            f"{' '.join(str(error).split())[:200]}; name other layers in lora.targets, or set lora.rank=0"
        ) from error


def _fused_experts(model: nn.Module) -> list[str]:
    """Return the names of parameters that hold the weights of all experts of a layer, [experts, …, …]."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if "expert" in path.rpartition(".")[2]
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]


def _outside(model: Any, blocks: set[str]) -> list[str]:
    """Return the names of all linear layers but the head and those in modules with one of these names."""
    # Not only the layers with experts: PEFT reads `gate_proj` in a dense layer as "the experts", as they once were.
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not model.get_output_embeddings()
        and not blocks & set(path.split("."))
    ]


def adapted_layers(model: Any) -> list[Adapted]:
    """Return the LoRA layers of a PEFT model; none for a plain one.

    Raises:
        ValueError: A layer has a variant that cannot be merged into one weight, its base weight is tied to another
            layer (so merging would change both), or the adapter replaces whole modules.
    """
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    adapter = str(model.active_adapter)
    owners: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(path)
    layers = []
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(
                f"expected an adapter with LoRA layers only, got one that replaces {path}; merge that first"
            )
        if not isinstance(module, LoraLayer):
            continue
        variant = module.lora_variant.get(adapter)
        kind = "LoRA" if variant is None else type(variant).__name__.removesuffix("Variant")
        if not (kind == "LoRA" or kind.startswith("Dora")) or not hasattr(module, "get_delta_weight"):
            raise ValueError(f"expected LoRA, rsLoRA or DoRA at {path}, got {kind}, which cannot be merged; use one")
        base = module.get_base_layer()
        weight = base.weight if hasattr(base, "weight") else module.get_param()
        if len(shared := owners.get(id(weight), [])) > 1:
            raise ValueError(f"expected an untied weight at {path}, got one that is tied: {shared}; drop the target")
        parent, _, name = path.rpartition(".")
        layers.append(
            Adapted(
                parent=model.get_submodule(parent),
                name=name,
                module=module,
                base=base,
                weight=weight,
                adapter=adapter,
                plain=variant is None and not module.lora_bias.get(adapter),
                quantised=not weight.is_floating_point(),
            )
        )
    return layers


@contextmanager
def merge(layers: Sequence[Adapted]) -> Iterator[Originals]:
    """Swap every layer for its base layer with the update in the weight; put both back afterwards.

    A layer whose base weight is quantised is left alone: rounding would lose the update.

    Yields:
        The original weights, for `bypass`.
    """
    # PEFT un-merges by subtracting the update, and (W + ΔW) − ΔW is not W in floating point: the base weights would
    # drift a little with every rollout. So the merged weight is a new tensor, and the old one is put back.
    originals: Originals = []
    try:
        with torch.no_grad():
            for layer in layers:
                if layer.quantised:
                    continue
                originals.append((layer, [(p, p.data) for p in layer.base.parameters(recurse=False)]))
                if layer.plain:
                    weight = layer.weight
                    weight.data = weight.data + layer.module.get_delta_weight(layer.adapter).to(weight.dtype)
                else:
                    layer.module.merge(safe_merge=True, adapter_names=[layer.adapter])
                    layer.module.merged_adapters.clear()
                    layer.module._caches.clear()  # PEFT would need these to subtract the update
                setattr(layer.parent, layer.name, layer.base)
        yield originals
    finally:
        for layer, parameters in reversed(originals):  # PEFT nests the layers of one module's parameters
            layer.module.merged_adapters.clear()
            for parameter, data in parameters:
                parameter.data = data
            setattr(layer.parent, layer.name, layer.module)


@contextmanager
def bypass(layers: Sequence[Adapted], merged: Originals) -> Iterator[None]:
    """Swap every layer for its base layer as it was before LoRA, merged or not; copies nothing."""
    current = [(parameter, parameter.data) for _, parameters in merged for parameter, _ in parameters]
    present = [(layer, getattr(layer.parent, layer.name)) for layer in layers]
    try:
        for _, parameters in reversed(merged):
            for parameter, data in parameters:
                parameter.data = data
        for layer in layers:
            setattr(layer.parent, layer.name, layer.base)
        yield
    finally:
        for parameter, data in current:
            parameter.data = data
        for layer, module in present:
            setattr(layer.parent, layer.name, module)


@contextmanager
def dropout(layers: Sequence[Adapted], active: bool) -> Iterator[None]:
    """Switch LoRA's dropout on or off: off ends with the context, on stays until it is switched off.

    Gradient checkpointing recomputes layers in the backward pass, after the context has ended, with dropout still on.
    """
    before = [layer.module.training for layer in layers]
    _set_dropout(layers, [active] * len(layers))
    try:
        yield
    finally:
        if not active:
            _set_dropout(layers, before)


def _set_dropout(layers: Sequence[Adapted], modes: Sequence[bool]) -> None:
    for layer, mode in zip(layers, modes, strict=True):
        if layer.module.training != mode:
            layer.module.training = mode  # for this module alone; DoRA reads it
            layer.module.lora_dropout.train(mode)


@contextmanager
def fuse(layers: Sequence[Adapted]) -> Iterator[None]:
    """Let plain linear layers compute base and update in one go, forward and backward.

    DoRA layers, and layers with dropout, quantised or of another type, keep PEFT's own computation. LoRA weights wider
    than the base weight (float32 on bfloat16) are rounded to its type to compute, as merging rounds them. Nesting (a
    layer recomputed in the backward pass) is harmless.
    """
    # PEFT computes the update apart and adds it to the base layer's output, which makes more tensors of that size per
    # layer; `_LoraLinear` adds into the output and keeps only the [.., rank] product. The swapped forward is an
    # instance attribute: deleting it brings PEFT's own back, and `vars` shows when an outer `fuse` has set it.
    fused = []
    try:
        for layer in layers:
            if "forward" not in vars(layer.module) and (forward := _fused_forward(layer)) is not None:
                layer.module.forward = forward
                fused.append(layer.module)
        yield
    finally:
        for module in fused:
            del module.forward


def _fused_forward(layer: Adapted) -> Callable[[Tensor], Tensor] | None:
    module, base, key = layer.module, layer.base, layer.adapter
    if type(base) is not nn.Linear or not layer.plain or not isinstance(module.lora_dropout[key], nn.Identity):
        return None
    lower, upper, scale = module.lora_A[key], module.lora_B[key], module.scaling[key]
    if layer.quantised or any(p.requires_grad for p in base.parameters(recurse=False)):
        return None

    def forward(x: Tensor) -> Tensor:
        tensors = (base.weight, base.bias, lower.weight, upper.weight)  # read now: FSDP may have gathered a shard
        out: Tensor = _LoraLinear.apply(x, *tensors, scale)  # type: ignore[no-untyped-call]
        return out

    return forward


class _LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + s · (x Aᵀ) Bᵀ with W and bias frozen; makes and keeps no intermediate of y's size."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.scale, ctx.shape, ctx.kinds = scale, x.shape, (down.dtype, up.dtype)
        down, up = down.to(weight.dtype), up.to(weight.dtype)
        low = rows @ down.T
        ctx.save_for_backward(rows, weight, down, up, low)
        out = nn.functional.linear(rows, weight, bias).addmm_(low, up.T, alpha=scale)
        # Not `view`: autograd lets nobody change a view from a custom function in place, as Gemma 3n does.
        shaped: Tensor = torch.ops.aten._unsafe_view(out, [*x.shape[:-1], out.shape[-1]])
        return shaped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, low = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_low = (grad @ up).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low, down).view(ctx.shape)
        grad_down, grad_up = grad_low.T @ rows, (grad.T @ low).mul_(ctx.scale)
        return grad_x, None, None, grad_down.to(ctx.kinds[0]), grad_up.to(ctx.kinds[1]), None
