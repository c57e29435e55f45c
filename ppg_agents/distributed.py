"""Several learner processes working as one: their ranks, their sums, and how they split a model's weights.

Every process (rank) plays its share of a batch's conversations, and all take the same optimiser step: gradients are
summed over ranks once per step, after each rank's last micro-batch. DistributedDataParallel computes the same, except
that it divides by the number of ranks (here the losses are already divided by the whole batch's size) and reduces once
per micro-batch, of which ranks have different numbers, because conversations are packed by length.

If a model with its gradients and moments is too large for one device, `shard_layers` splits the decoder layers over
ranks with torch's `fully_shard` (FSDP2). Every forward pass is then collective: all ranks run the same number
(`passes`), the sampler needs its own weights (vLLM), and `whole_weights` assembles the trained weights to save or load
them. Embeddings, head and norms outside the layers stay whole on every rank.

Nothing here knows a policy, a loss or an environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

PATIENCE = timedelta(hours=4)
"""How long a rank waits for the others, which may still be playing; a rank that dies ends the launch at once."""
BUCKET = 2**24
"""Gradient entries summed at a time."""


class Workers(Protocol):
    """The processes that learn together, seen from one of them.

    Every method but `shard` is collective: all ranks call it, in the same order.

    Attributes:
        rank: This process's number, from 0.
        size: Number of processes.
        main: Whether this is rank 0, the only one that logs and writes.
        sharded: Whether the launch asks for `shard_layers` (an accelerate config with FSDP).
    """

    # Baselines, standardisation, group statistics and denominators are those of the whole batch: a rank that used its
    # own share would compute another gradient, and runs would depend on the number of ranks. So credits, rewards and
    # labels are gathered first, every rank computes the same numbers, and then takes its own rows.

    rank: int
    size: int
    main: bool
    sharded: bool

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its sum over ranks, the same bits on every rank.

        Args:
            parameters: The same weights in the same order on every rank. A missing gradient counts as 0; one missing
                on all ranks stays missing.
        """

    def sum_number(self, x: float) -> float:
        """Return the sum of every rank's number, the same bits on every rank."""

    def gather(self, objects: list[Any]) -> list[Any]:
        """Return the objects of all ranks in rank order, on every rank."""

    def shard(self, n: int) -> slice:
        """Return this rank's share of n items: contiguous, so `gather` restores their order; it may be empty."""


class Alone:
    """One process, with nothing to sum."""

    rank, size, main, sharded = 0, 1, True, False

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Leave the gradients as they are."""

    def sum_number(self, x: float) -> float:
        """Return the number."""
        return x

    def gather(self, objects: list[Any]) -> list[Any]:
        """Return the objects."""
        return list(objects)

    def shard(self, n: int) -> slice:
        """Return all n items."""
        return slice(0, n)


class Group:
    """The processes of a distributed launch, through accelerate: gloo on the CPU, nccl on CUDA."""

    def __init__(self) -> None:
        """Connect to the other ranks, and make this rank's CUDA device the current one.

        Raises:
            ValueError: The launcher set no rank, or asks for sharding that `shard_layers` does not do.
        """
        if "LOCAL_RANK" not in os.environ:
            raise ValueError(
                "expected a launcher's LOCAL_RANK beside WORLD_SIZE, got none; start with accelerate launch or torchrun"
            )
        from accelerate import PartialState

        self._state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        self.rank, self.size = int(self._state.process_index), int(self._state.num_processes)
        self.main = self.rank == 0
        self.sharded = _set("ACCELERATE_USE_FSDP")
        if self.sharded and (os.environ.get("FSDP_VERSION") != "2" or _set("FSDP_OFFLOAD_PARAMS")):
            raise ValueError("expected an accelerate config with fsdp_version 2 and no offloading; use fsdp-8")

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum in float32 or wider, a bucket of weights at a time; undo the averaging of `fully_shard`."""
        parameters = list(parameters)
        for p in parameters:
            if isinstance(p, DTensor) and p.grad is not None:
                p.grad.mul_(self.size)
        for bucket in _buckets(p for p in parameters if not isinstance(p, DTensor)):
            wide = torch.promote_types(bucket[0].dtype, torch.float32)
            present = torch.tensor([p.grad is not None for p in bucket], dtype=wide, device=bucket[0].device)
            gradients = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([*(g.flatten().to(wide) for g in gradients), present])
            torch.distributed.all_reduce(flat)
            *sums, anywhere = torch.split(flat, [*(p.numel() for p in bucket), len(bucket)])
            for p, total, any_rank in zip(bucket, sums, anywhere.tolist(), strict=True):
                if p.grad is not None:
                    p.grad.copy_(total.view_as(p))
                elif any_rank:
                    p.grad = total.view_as(p).to(p.dtype, copy=True)

    def sum_number(self, x: float) -> float:
        """Sum in float64."""
        total = torch.tensor(x, dtype=torch.float64, device=self._state.device)
        torch.distributed.all_reduce(total)
        return float(total)

    def gather(self, objects: list[Any]) -> list[Any]:
        """Send the objects to every rank, pickled."""
        from accelerate.utils import gather_object

        return list(gather_object(list(objects)))

    def shard(self, n: int) -> slice:
        """Return a share that differs from any other rank's by at most one item."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)


def workers() -> Workers:
    """Return the processes launched with this one; `Alone` unless WORLD_SIZE is above 1.

    Call it before anything is put on a GPU. `finish` is its counterpart.

    Raises:
        ValueError: WORLD_SIZE is not a number, or was not set by a launcher.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdigit():
        raise ValueError(f"expected a number of processes in WORLD_SIZE, got {text!r}; start with accelerate launch")
    return Group() if int(text) > 1 else Alone()


def finish() -> None:
    """Disconnect from the other ranks; harmless if there are none, or if called twice."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def shard_layers(model: Any) -> None:
    """Split the weights of a transformers model's decoder layers over all ranks, in place.

    A layer's weights are whole while it computes, forward and backward. Create the optimizer afterwards.

    Args:
        model: A causal LM, or a PEFT model around one, the same on every rank.

    Raises:
        ValueError: The architecture names no decoder layers, or their weights are quantised.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    lm = model.get_base_model() if hasattr(model, "peft_config") else model
    kinds = set(lm._no_split_modules or ())
    layers = [module for module in lm.base_model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise ValueError(
            f"expected decoder layers to split, got {type(lm).__name__}, which names none; use a DDP config"
        )
    if odd := [name for name, p in layers[0].named_parameters() if not p.is_floating_point()]:
        raise ValueError(f"expected floating-point weights, got quantised ones ({odd[0]}); use a DDP config")
    mesh = init_device_mesh(next(lm.parameters()).device.type, (torch.distributed.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    outside = {p for p in lm.base_model.parameters() if not isinstance(p, DTensor)}
    fully_shard(lm.base_model, mesh=mesh, ignored_params=outside)  # the root prefetches the next layer


def passes(workers: Workers, own: int) -> int:
    """Return how many forward passes this rank runs if it needs ``own``; with split weights, as many as any rank."""
    return max(workers.gather([own])) if workers.sharded else own


def groups(parameters: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Return an optimizer's parameter groups: whole and split weights apart, as it cannot update both in one go."""
    parameters = list(parameters)
    parts = [[p for p in parameters if isinstance(p, DTensor) is split] for split in (False, True)]
    return [{"params": part} for part in parts if part]


def clip(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Clip the summed gradients by their 2-norm over whole and split weights together; return the norm before.

    Args:
        parameters: The trained weights; collective if some are split.
        max_norm: Larger gradients are scaled down to it; infinity leaves them as they are.
    """
    trained = [p for p in parameters if p.grad is not None]
    split = [p for p in trained if isinstance(p, DTensor)]
    whole = [p for p in trained if not isinstance(p, DTensor)]
    norms = [joined(nn.utils.get_total_norm([cast(Tensor, p.grad) for p in part])) for part in (whole, split) if part]
    total = torch.stack(norms).norm() if len(norms) > 1 else sum(norms, torch.zeros(()))
    for part in (whole, split):
        nn.utils.clip_grads_with_norm_(part, max_norm, total)
    return float(total)


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Assemble split trained weights on every rank while the context lasts; changes made to them meanwhile are kept.

    Collective. Does nothing without split weights.
    """
    swapped: list[tuple[nn.Module, str, Tensor]] = []
    hooks = [module._load_state_dict_post_hooks for module in model.modules()]
    saved_hooks = [dict(registered) for registered in hooks]
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if isinstance(p, DTensor) and p.requires_grad:
                swapped.append((module, name, p))
                setattr(module, name, nn.Parameter(p.full_tensor().detach()))
    for registered in hooks if swapped else ():
        registered.clear()  # the hooks of fully_shard expect split weights
    try:
        yield
    finally:
        for registered, before in zip(hooks, saved_hooks, strict=True):
            registered.update(before)
        with torch.no_grad():
            for module, name, split in swapped:
                split.copy_(split_like(getattr(module, name).detach(), split))
                setattr(module, name, split)


def joined(tensor: Tensor) -> Tensor:
    """Return the whole tensor, of an optimizer's moment for example; collective if it is split."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole tensor, the same on every rank, split like the weight; unchanged if the weight is whole."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true")


def _buckets(parameters: Iterable[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Yield runs of weights of one dtype, with up to `BUCKET` entries together."""
    bucket: list[Tensor] = []
    for p in parameters:
        full = sum(q.numel() for q in bucket) + p.numel() > BUCKET
        if bucket and (full or p.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket
