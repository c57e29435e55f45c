"""Several learner processes as one: who they are, what they add up, and how they split a model's weights.

Every process (rank) plays its own share of a batch's conversations, and all take the same optimiser step: the gradients
are summed over ranks once per step, when each has run its last micro-batch. That is what DistributedDataParallel
computes, less its division by the number of ranks (the losses are divided by the batch's size already); its hooks would
reduce once per micro-batch, and ranks have unequally many of those, because conversations are packed by length.

Where a model with its gradients and moments is too large for one device, `shard_layers` splits the decoder layers over
ranks with torch's `fully_shard` (FSDP2). Then every forward pass is collective: all ranks run equally many
(`passes`), a sampler needs weights of its own (vLLM), and `whole_weights` puts the trained weights together to save or
load them. Embeddings, head and norms outside the layers stay whole on every rank.

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
"""How long a rank waits for the others, who may still be playing; a rank that dies ends the launch at once."""
BUCKET = 2**24
"""Gradient entries that are summed at a time."""


class Workers(Protocol):
    """The processes that learn together, seen from one of them.

    Every method but `shard` is collective: all ranks call it, in the same order.

    Attributes:
        rank: This process, from 0.
        size: How many there are.
        main: Whether this is rank 0, who alone logs and writes.
        sharded: Whether the launch asks for `shard_layers` (an accelerate config with FSDP).
    """

    rank: int
    size: int
    main: bool
    sharded: bool

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Put the sum over ranks into every gradient, the same bits on every rank.

        Args:
            parameters: The same weights in the same order on every rank. One without a gradient counts as 0; one
                that has none on any rank is left without.
        """

    def sum_number(self, x: float) -> float:
        """Return the sum of every rank's number, the same bits on every rank."""

    def gather(self, objects: list[Any]) -> list[Any]:
        """Return the objects of all ranks in rank order, on every rank."""

    def shard(self, n: int) -> slice:
        """Return this rank's share of n items: contiguous, so that `gather` restores their order.

        Raises:
            ValueError: Fewer items than ranks.
        """


class Alone:
    """One process: its sums are its own."""

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
        """Meet the other ranks, and take this rank's CUDA device as the current one.

        Raises:
            ValueError: The launcher set no rank, or asks for another sharding than `shard_layers` does.
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
        """Sum in float32 or wider, a bucket of weights at a time; what `fully_shard` averaged is scaled up."""
        parameters = list(parameters)
        for p in parameters:
            if isinstance(p, DTensor) and p.grad is not None:
                p.grad.mul_(self.size)
        for bucket in _buckets(p for p in parameters if not isinstance(p, DTensor)):
            wide = torch.promote_types(bucket[0].dtype, torch.float32)
            have = torch.tensor([p.grad is not None for p in bucket], dtype=wide, device=bucket[0].device)
            own = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([*(g.flatten().to(wide) for g in own), have])
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
        if n < self.size:
            raise ValueError(f"expected a conversation or more per process, got {n} for {self.size}; raise the batch")
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)


def workers() -> Workers:
    """Return the processes that this one was launched with; `Alone` unless WORLD_SIZE is above 1.

    Call it before anything is put on a GPU. `finish` is its counterpart.

    Raises:
        ValueError: WORLD_SIZE is no number, or was set by no launcher.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdigit():
        raise ValueError(f"expected a number of processes in WORLD_SIZE, got {text!r}; start with accelerate launch")
    return Group() if int(text) > 1 else Alone()


def finish() -> None:
    """Leave the other ranks in good order; harmless when there are none, or when this is done already."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def shard_layers(model: Any) -> None:
    """Split the weights of a transformers model's decoder layers over all ranks, in place.

    A layer's weights are whole while it computes, forward and backward. Make the optimizer afterwards.

    Args:
        model: A causal LM, or a PEFT model around one, the same on every rank.

    Raises:
        ValueError: No decoder layers are known of this architecture, or their weights are quantised.
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
    fully_shard(lm.base_model, mesh=mesh, ignored_params=outside)  # the root, which fetches the next layer ahead


def passes(workers: Workers, own: int) -> int:
    """Return how many forward passes this rank runs when it has ``own`` of its own: as many as any rank."""
    return max(workers.gather([own])) if workers.sharded else own


def groups(parameters: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Return an optimizer's parameter groups: whole and split weights apart, which it cannot update in one go."""
    parameters = list(parameters)
    parts = [[p for p in parameters if isinstance(p, DTensor) is split] for split in (False, True)]
    return [{"params": part} for part in parts if part]


def clip(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Scale the summed gradients down to a 2-norm over whole and split weights together; return the norm before.

    Args:
        parameters: The trained weights; collective when some are split.
        max_norm: Larger gradients are scaled to it.
    """
    trained = [p for p in parameters if p.grad is not None]
    split = [p for p in trained if isinstance(p, DTensor)]
    own = [p for p in trained if not isinstance(p, DTensor)]
    norms = [joined(nn.utils.get_total_norm([cast(Tensor, p.grad) for p in part])) for part in (own, split) if part]
    total = torch.stack(norms).norm() if len(norms) > 1 else sum(norms, torch.zeros(()))
    for part in (own, split):
        nn.utils.clip_grads_with_norm_(part, max_norm, total)
    return float(total)


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Put trained weights that are split together on every rank; what is written to them meanwhile is kept.

    Collective. Without split weights it does nothing.
    """
    swapped: list[tuple[nn.Module, str, Tensor]] = []
    hooks = [module._load_state_dict_post_hooks for module in model.modules()]
    kept = [dict(registered) for registered in hooks]
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if isinstance(p, DTensor) and p.requires_grad:
                swapped.append((module, name, p))
                setattr(module, name, nn.Parameter(p.full_tensor().detach()))
    for registered in hooks if swapped else ():
        registered.clear()  # those of fully_shard expect split weights
    try:
        yield
    finally:
        for registered, before in zip(hooks, kept, strict=True):
            registered.update(before)
        with torch.no_grad():
            for module, name, split in swapped:
                split.copy_(split_like(getattr(module, name).detach(), split))
                setattr(module, name, split)


def joined(tensor: Tensor) -> Tensor:
    """Return a tensor whole, such as an optimizer's moment; collective when it is split."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole tensor split as the weight is, as it is when the weight is whole; the same on every rank."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true")


def _buckets(parameters: Iterable[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Yield neighbours of one dtype, of up to `BUCKET` entries together."""
    bucket: list[Tensor] = []
    for p in parameters:
        full = sum(q.numel() for q in bucket) + p.numel() > BUCKET
        if bucket and (full or p.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket
