"""Two learner processes on the CPU do what one does: sums, steps, split weights; and the launch configs.

This file is also the program of the two processes: each compares itself with a single process and writes down how far
they are apart.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ppg_agents import credit, distributed
from ppg_agents.accelerate_configs import launch_config, launch_configs
from ppg_agents.agents.learner import Learner
from ppg_agents.distributed import Alone, Workers
from ppg_agents.policy import LoraSettings, Policy
from ppg_agents.trajectory import Trajectory, Turn

STEPS: dict[str, dict[str, Any]] = {
    "leave-one-out": {"baseline": "leave-one-out", "micro_batch_tokens": 60},
    "batch-mean": {"baseline": "batch-mean", "aggregation": "turn_mean", "standardise": True},
    "moving-average": {"baseline": "moving-average", "n_turns": 4, "aggregation": "token_mean"},
    "all weights": {"baseline": "leave-one-out", "lora": None},
    "split": {"baseline": "leave-one-out", "micro_batch_tokens": 60, "kl_coefficient": 0.1, "split": True},
    "split, all weights": {"baseline": "batch-mean", "lora": None, "checkpointing": True, "split": True},
}
METRICS = ("loss", "grad_norm", "credit_mean", "credit_std", "tokens", "policy_version")


@cache
def loaded(lora: bool) -> Policy:
    policy = Policy.load(lora=LoraSettings(rank=4) if lora else None, device="cpu")
    generator = torch.Generator().manual_seed(2)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy


def small_policy(lora: bool = True) -> Policy:
    """Return the embedded model with LoRA that is not zero, or with all weights trainable."""
    return deepcopy(loaded(lora))


def conversations(policy: Policy, version: int) -> list[Trajectory]:
    """Return conversations of unlike length, one empty and one with a turn unjudged; groups span the processes."""
    random = np.random.default_rng(version)

    def turn() -> Turn:
        prompt, tokens = (
            random.integers(5, 200, 6).tolist(),
            random.integers(5, 200, int(random.integers(1, 9))).tolist(),
        )
        ids = (*tokens, policy.end_of_turn_id)
        return Turn("m", "r", tuple(prompt), ids, (math.nan,) * len(ids), float(random.random()), {}, version)

    batch = [
        Trajectory(f"i{b % 3}", "p", "d", None, tuple(turn() for _ in range(n)), True, False)
        for b, n in enumerate([4, 1, 0, 3, 2, 4, 2])
    ]
    unjudged = (batch[0].turns[0], replace(batch[0].turns[1], reward=math.nan), *batch[0].turns[2:])
    return [replace(batch[0], turns=unjudged), *batch[1:]]


def learn(
    workers: Workers,
    folder: Path,
    lora: bool = True,
    split: bool = False,
    checkpointing: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Return the first gradient, the weights after two steps, and what was measured; split ones resume in between."""
    policy = small_policy(lora)
    policy.gradient_checkpointing(checkpointing)
    workers.sharded = split
    if split and workers.size > 1:
        distributed.shard_layers(policy.model)

    def make() -> Learner:
        return Learner(policy, credit.full, learning_rate=1e-3, max_grad_norm=0.5, workers=workers, **options)

    agent, metrics, gradient = make(), [], torch.zeros(0)
    for version in range(2):
        batch = conversations(policy, version)
        metrics.append(agent.learn(batch[workers.shard(len(batch))]))
        if version == 0:
            gradient = flat(distributed.joined(p.grad) for p in policy.parameters() if p.grad is not None)
            if split and workers.size > 1:
                agent.save(folder)
                workers.gather([])  # it is written
                for p in policy.parameters():
                    p.data.zero_()
                agent = make()
                agent.load(folder)
    with distributed.whole_weights(policy.model):
        return {"gradient": gradient, "weights": flat(policy.parameters()), "metrics": metrics}


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def apart(a: Any, b: Any) -> float:
    return float((a - b).detach().abs().max())


def compare_steps(workers: Workers, folder: Path) -> dict[str, Any]:
    """Return how far a step of all processes is from the same step of one."""
    results = {}
    for name, options in STEPS.items():
        options = {**options, "lora": options.get("lora", True) is not None}
        together, alone = learn(workers, folder / name, **options), learn(Alone(), folder / name, **options)
        results[name] = {
            "gradient": apart(together["gradient"], alone["gradient"]),
            "weights": apart(together["weights"], alone["weights"]),
            "moved": apart(alone["weights"], flat(small_policy(options["lora"]).parameters())),
            "metrics": [[m[key] for key in METRICS] for m in together["metrics"]],
            "expected": [[m[key] for key in METRICS] for m in alone["metrics"]],
        }
    return results


def compare_sums(workers: Workers) -> dict[str, Any]:
    """Return the sums of known numbers and gradients, some of them missing on one rank or on both."""
    distributed.BUCKET = 5  # several buckets
    rank = workers.rank
    weights = [nn.Parameter(torch.zeros(3, 2)), *(nn.Parameter(torch.zeros(4)) for _ in range(3))]
    weights[0].grad = torch.full((3, 2), 1.0 + rank)
    if rank == 1:
        weights[1].grad = torch.arange(4.0)
    weights[2].data = weights[2].data.bfloat16()
    weights[2].grad = torch.full((4,), 256.0 if rank else 1.0, dtype=torch.bfloat16)
    workers.sum_gradients(weights)
    return {
        "rank": (rank, workers.size, workers.main),
        "number": workers.sum_number(0.1 + rank),
        "gather": workers.gather([f"{rank}{i}" for i in range(rank + 1)]),
        "gradients": [None if w.grad is None else w.grad.float().flatten().tolist() for w in weights],
        "shard": [list(range(n)[workers.shard(n)]) for n in (2, 5)],
    }


def compare_split(workers: Workers, folder: Path, lora: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Return how far a step on split decoder layers is from the same step on whole ones."""
    policies = [small_policy(lora), small_policy(lora)]
    for policy in policies:
        for parameter in policy.model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    split, one = policies
    split.model.enable_input_require_grads()  # as gradient checkpointing does
    full = sum(p.numel() for p in split.model.parameters())
    distributed.shard_layers(split.model)
    held = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in split.model.parameters())

    ids = torch.arange(5, 125).view(6, 20)
    every = torch.ones_like(ids, dtype=torch.bool)
    share = workers.shard(5)
    for row in range(5):
        one.log_probs(ids[row : row + 1], every[:1]).sum().backward()
    workers.sharded = True
    own = share.stop - share.start
    spare = distributed.passes(workers, own) - own
    for row in range(share.start, share.stop):  # one pass per conversation: 2 and 3 of them
        split.log_probs(ids[row : row + 1], every[:1]).sum().backward()
    for _ in range(spare):
        (0.0 * split.log_probs(ids[:1], every[:1]).sum()).backward()

    norms, results = [], {}
    for policy, who in ((split, workers), (one, Alone())):
        who.sum_gradients(policy.parameters())
        norms.append(distributed.clip(policy.parameters(), 0.5))
        torch.optim.AdamW(distributed.groups(policy.parameters()), lr=1e-3, foreach=True).step()
    moment = distributed.split_like(one.parameters()[-1].detach(), split.parameters()[-1])
    results["joined"] = apart(distributed.joined(moment), one.parameters()[-1])
    with distributed.whole_weights(split.model):
        results["weights"] = apart(flat(split.parameters()), flat(one.parameters()))
        results["types"] = sorted({type(p).__name__ for p in split.parameters()})
        if workers.main:
            split.save(folder)
    workers.gather([])  # the folder is written
    with distributed.whole_weights(split.model):
        for p in split.parameters():
            p.data.zero_()
    with distributed.whole_weights(split.model):
        results["zeroed"] = apart(flat(split.parameters()), 0)
        split.load_weights(folder)
    with distributed.whole_weights(split.model):
        results["loaded"] = apart(flat(split.parameters()), flat(one.parameters()))
    return {"norm": norms, "held": held / full, **results}


def program(folder: Path) -> None:
    """Be one of the processes."""
    workers = distributed.workers()
    results = {
        "sums": compare_sums(workers),
        "steps": compare_steps(workers, folder),
        "split lora": compare_split(workers, folder / "lora", True, torch.bfloat16),
        "split all": compare_split(workers, folder / "all", False, torch.float32),
    }
    (folder / f"{workers.rank}.json").write_text(json.dumps(results))
    distributed.finish()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what the two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**os.environ, **shared, "CUDA_VISIBLE_DEVICES": "", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_sums_numbers_objects_and_shares(both: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(both):
        sums = found["sums"]
        assert sums["rank"] == [rank, 2, rank == 0]
        assert sums["number"] == pytest.approx(1.2, abs=1e-15)
        assert sums["gather"] == ["00", "10", "11"]
        assert sums["gradients"] == [[3.0] * 6, [0.0, 1.0, 2.0, 3.0], [256.0] * 4, None]  # 257 is no bfloat16
    assert [found["sums"]["shard"] for found in both] == [[[0], [0, 1]], [[1], [2, 3, 4]]]


@pytest.mark.parametrize("name", STEPS)
def test_two_processes_learn_what_one_learns(both: list[dict[str, Any]], name: str) -> None:
    for found in both:
        step = found["steps"][name]
        assert step["gradient"] <= 1e-5
        assert step["weights"] <= 5e-5 < 1e-3 <= step["moved"]  # Adam makes a step of a rounding error near 0
        np.testing.assert_allclose(step["metrics"], step["expected"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["split lora", "split all"])
def test_split_layers_learn_what_whole_ones_learn(both: list[dict[str, Any]], name: str) -> None:
    for found in both:
        split = found[name]
        assert split["weights"] <= 1e-5
        assert split["norm"][0] == pytest.approx(split["norm"][1], rel=1e-5)
        assert split["norm"][0] > 0.5, "clipping had something to do"
        assert split["held"] < 0.75
        assert (split["joined"], split["zeroed"], split["types"]) == (0, 0, ["Parameter"])
        assert split["loaded"] == split["weights"]


def test_alone_is_the_default_and_a_world_without_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    alone = distributed.workers()
    assert (alone.rank, alone.size, alone.main, alone.sum_number(2.5), alone.gather([1])) == (0, 1, True, 2.5, [1])
    assert alone.shard(3) == slice(0, 3)
    distributed.finish()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="LOCAL_RANK"):
        distributed.workers()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="'two'"):
        distributed.workers()


@pytest.mark.parametrize("name", launch_configs())
def test_accelerate_reads_every_launch_config(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    config = load_config_from_file(str(launch_config(name)))
    command = ["--config_file", str(launch_config(name)), "--num_cpu_threads_per_process", "1", "script.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    environment = prepare_multi_gpu_env(args)
    split = name.startswith("fsdp")
    assert (args.use_fsdp, args.multi_gpu) == (split, not split)
    assert (environment.get("ACCELERATE_USE_FSDP"), environment.get("FSDP_VERSION")) == (
        ("true", "2") if split else (None, None)
    )
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    size = math.prod(map(int, name.partition("-")[2].split("x")))
    assert (config.num_processes, args.num_processes, args.num_machines) == (size, size, 2 if "x" in name else 1)


def test_an_unknown_launch_config_names_the_nearest() -> None:
    assert all(launch_configs().values())
    with pytest.raises(ValueError, match="did you mean 'ddp-8'"):
        launch_config("ddp8")


if __name__ == "__main__":
    program(Path(sys.argv[1]))
