"""Check and measure the learner where there is a GPU: tests, tokens per second, utilisation, memory.

    python scripts/gpu_check.py                           # tests, then every shape; CUDA only
    python scripts/gpu_check.py --shapes qwen3-4b --lengths 16384 --no-tests --json results.json
    python scripts/gpu_check.py --tiny --no-tests         # the same code on small shapes, on the CPU

Weights are random, in the shapes of published config.json files; LoRA of rank 16 on every linear layer, bfloat16
weights. One learner step is `Learner.learn` on whole conversations: ledger checks, credit, forward, backward, clip,
AdamW. Half of a conversation's tokens are the policy's, in 20 turns.

Model FLOP utilisation (MFU) counts what the mathematics needs, not what is computed again:

    per token, linear layers   4 N + 6 N_lora      forward 2 N; backward 2 N for the inputs and 0 for frozen weights
    per token, attention       6 · layers · L · d  QKᵀ and AV over a mean past of L/2 tokens: 2 · 2 · (L/2) · d forward,
                                                   twice that backward; L = conversation length, d = heads · head size
    per trained token, head    4 · hidden · vocab  forward, and backward for its input; the embedding is a look-up
    MFU = FLOPs per second / peak                  recomputation (checkpointing, chunked head) earns nothing

N: weights of the decoder layers' linear maps, which are all multiplied with every token. The peak is the dense
bfloat16 one of the device: --peak-tflops, default 989 (H200 and H100 SXM, NVIDIA's data sheet, without sparsity).

A shape that does not fit is tried again with gradient checkpointing, then with one conversation per forward pass,
then reported as not fitting. Every shape runs in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    | {"num_attention_heads": 16},
    "qwen3-4b": {**QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36}
    | {"num_attention_heads": 32},
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 2048, "head_dim": 32}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1}
TURNS, RANK = 20, 16
Result = dict[str, Any]


def model_config(name: str, tiny: bool) -> Any:
    """Return a transformers config of a shape, small on request."""
    from transformers import AutoConfig

    shape = {**SHAPES[name], **(SMALL if tiny else {})}
    return AutoConfig.for_model(shape.pop("model_type"), **shape)


def make_policy(config: Any, device: str) -> Any:
    """Return a policy with random weights and a fresh LoRA; the tokenizer is the embedded one."""
    import torch
    from transformers import AutoModelForCausalLM

    from ppg_agents.config import LoraSettings
    from ppg_agents.policy import Policy, add_lora

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tokenizer = Policy.load(device="cpu").tokenizer
    return Policy(add_lora(model, LoraSettings(rank=RANK, alpha=2 * RANK)), tokenizer, name="random")


def flops(policy: Any, length: int, tokens: int, trained: int) -> float:
    """Return the model FLOPs of one step on so many tokens; see the module's docstring."""
    config = policy.config
    matrices = [(k, p) for k, p in policy.model.named_parameters() if p.ndim == 2 and ".layers." in k]
    lora = sum(p.numel() for name, p in matrices if "lora_" in name)
    frozen = sum(p.numel() for name, p in matrices if "lora_" not in name)
    width = config.num_attention_heads * config.head_dim
    attention = 6 * config.num_hidden_layers * length * width
    head = 4 * config.hidden_size * config.vocab_size
    return float(tokens * (4 * frozen + 6 * lora + attention) + trained * head)


def conversations(policy: Any, count: int, length: int) -> list[Any]:
    """Return conversations of ``length`` tokens in 20 turns, half of every turn said by the policy."""
    import numpy as np

    from ppg_agents.trajectory import Trajectory, Turn

    random = np.random.default_rng(0)
    half = length // TURNS // 2

    def turn() -> Turn:
        said, reply = (random.integers(0, policy.config.vocab_size, half).tolist() for _ in range(2))
        nobody = (math.nan,) * half
        return Turn("m", "r", tuple(said), tuple(reply), nobody, float(random.random()), {}, policy.version)

    return [
        Trajectory("i", "p", "d", None, tuple(turn() for _ in range(TURNS)), terminated=True, truncated=False)
        for _ in range(count)
    ]


class Device:
    """Where it runs: its clock and its memory."""

    def __init__(self, name: str) -> None:
        import torch

        self.name, self.cuda = name, torch.cuda if name.startswith("cuda") else None

    def seconds(self, work: Callable[[], object]) -> float:
        """Return how long ``work`` takes until the device is done."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait for the device."""
        if self.cuda:
            self.cuda.synchronize()

    def fresh(self) -> None:
        """Let go of what is not used, and begin a new peak."""
        gc.collect()
        if self.cuda:
            self.cuda.empty_cache()
            self.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        """Return the peak since `fresh`; on the CPU that of the whole process."""
        if self.cuda:
            return float(self.cuda.max_memory_allocated() / 2**30)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def learner(policy: Any, device: Device, length: int, settings: argparse.Namespace) -> Result:
    """Measure learning steps at one conversation length; say how it was made to fit."""
    import torch

    count = max(1, settings.step_tokens // length)
    last = ""
    for checkpointing, budget in ((False, count * length), (True, count * length), (True, length)):
        policy.gradient_checkpointing(checkpointing)
        device.fresh()
        try:
            measured = steps(policy, device, count, length, budget, settings)
            return {**measured, "checkpointing": checkpointing, "micro_batch_tokens": budget}
        except torch.OutOfMemoryError as error:
            last = str(error).partition(". ")[0]
        finally:
            policy.model.zero_grad(set_to_none=True)
            policy.gradient_checkpointing(False)
    return {"fits": False, "why": last}


def steps(policy: Any, device: Device, count: int, length: int, budget: int, settings: argparse.Namespace) -> Result:
    """Return tokens per second, utilisation and peak memory of learning steps on ``count`` conversations."""
    from ppg_agents import credit
    from ppg_agents.agents.learner import Learner

    agent = Learner(
        policy, lambda n: credit.k_step(n, 3), baseline="batch-mean", learning_rate=1e-6, micro_batch_tokens=budget
    )

    def step(batch: list[Any]) -> float:
        return device.seconds(lambda: agent.learn(batch))

    step(conversations(policy, count, length))
    times = [step(conversations(policy, count, length)) for _ in range(settings.repeats)]
    tokens = sum(len(t.token_ids()) for t in conversations(policy, count, length))
    used = [
        flops(policy, tokens // count, tokens, tokens // 2) / seconds / (settings.peak_tflops * 1e12)
        for seconds in times
    ]
    return {
        "fits": True,
        "conversations": count,
        "tokens": tokens,
        "tokens_per_second": spread([tokens / seconds for seconds in times]),
        "mfu": spread(used),
        "peak_gib": device.peak_gib(),
    }


def sampling(policy: Any, device: Device, settings: argparse.Namespace) -> Result:
    """Measure sampled tokens per second with transformers, LoRA merged, prompts read included."""
    import torch

    from ppg_agents.generation.hf import HFSampler

    sampler = HFSampler(policy, settings.new_tokens)
    prompts = [turn.turns[0].prompt_ids for turn in conversations(policy, settings.rows, 2 * TURNS * settings.prompt)]
    generator = torch.Generator(policy.device).manual_seed(0)
    made: list[int] = []

    def sample() -> None:
        sampler.start(len(prompts))
        made.append(sum(len(s.token_ids) for s in sampler.reply(prompts, generator) if s is not None))

    device.fresh()
    try:
        with policy.merged():
            sample()
            times = [device.seconds(sample) for _ in range(settings.repeats)]
    except torch.OutOfMemoryError as error:
        return {"fits": False, "why": str(error).partition(". ")[0]}
    rates = [n / seconds for n, seconds in zip(made[1:], times, strict=True)]
    return {"fits": True, "tokens_per_second": spread(rates), "rows": len(prompts), "peak_gib": device.peak_gib()}


def sampling_vllm(config: Any, settings: argparse.Namespace) -> Result:
    """Measure sampled tokens per second with vLLM on random weights, without an adapter, prompts read included."""
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        config.architectures = [{"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[config.model_type]]
        config.save_pretrained(folder)
        context = settings.prompt + settings.new_tokens
        options = {"load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16", "max_model_len": context}
        llm = LLM(folder, **options, enforce_eager=settings.tiny)
        prompts = [
            {"prompt_token_ids": [(i * 7919 + j) % config.vocab_size for j in range(settings.prompt)]}
            for i in range(settings.rows)
        ]
        asked = SamplingParams(max_tokens=settings.new_tokens, ignore_eos=True, detokenize=False)
        rates = []
        for _ in range(settings.repeats + 1):
            llm.reset_prefix_cache()
            start = time.perf_counter()
            done = llm.generate(prompts, asked, use_tqdm=False)
            rates.append(sum(len(r.outputs[0].token_ids) for r in done) / (time.perf_counter() - start))
    return {"fits": True, "tokens_per_second": spread(rates[1:]), "rows": settings.rows}


def measure(name: str, part: str, settings: argparse.Namespace) -> Result:
    """Measure one part of one shape in this process."""
    config = model_config(name, settings.tiny)
    if part == "vllm":
        return {"vllm": sampling_vllm(config, settings)}
    device = Device(settings.device)
    policy = make_policy(config, settings.device)
    results: Result = {"parameters": sum(p.numel() for p in policy.model.parameters())}
    results["learner"] = {str(n): learner(policy, device, n, settings) for n in settings.lengths}
    results["hf"] = sampling(policy, device, settings)
    return results


def spread(values: list[float]) -> dict[str, float]:
    """Return median, lowest and highest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def in_a_process(name: str, part: str, settings: argparse.Namespace) -> Result:
    """Measure one part of one shape in a fresh process; what fails there is the result."""
    command = [sys.executable, __file__, "--part", part, *sys.argv[1:], "--shapes", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=settings.patience, check=False)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("RESULT "):
            return dict(json.loads(line[len("RESULT ") :]))
    return {part: {"fits": False, "why": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}}


def run_tests() -> Result:
    """Run the learner's tests; models without a device of their own are put on CUDA where there is one."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/agents"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {"passed": done.returncode == 0, "summary": done.stdout.strip().splitlines()[-1:], "failed": failed}


def machine(settings: argparse.Namespace) -> Result:
    """Return what it was measured on."""
    import torch
    import transformers

    on_cuda = settings.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if on_cuda else f"CPU, {torch.get_num_threads()} threads",
        "peak_tflops": settings.peak_tflops,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lora_rank": RANK,
    }


def table(shapes: Result) -> Iterator[str]:
    """Yield the lines of a table to read."""
    yield f"{'shape':14}{'what':>16}{'tok/s':>10}{'MFU':>8}{'GiB':>8}  how"
    for name, result in shapes.items():
        rows = {f"learn {n}": row for n, row in result.get("learner", {}).items()}
        rows |= {f"sample {part}": result[part] for part in ("hf", "vllm") if part in result}
        for what, row in rows.items():
            if not row["fits"]:
                yield f"{name:14}{what:>16}{'-':>10}{'-':>8}{'-':>8}  {row['why']}"
                continue
            how = ", checkpointing" if row.get("checkpointing") else ""
            how = f"{row.get('conversations', row.get('rows'))} conversations{how}"
            mfu = f"{row['mfu']['median']:.1%}" if "mfu" in row else "-"
            gib = f"{row['peak_gib']:.1f}" if "peak_gib" in row else "-"
            yield f"{name:14}{what:>16}{row['tokens_per_second']['median']:>10,.0f}{mfu:>8}{gib:>8}  {how}"


def main() -> int:
    """Run what is asked for; return 1 when tests fail or there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens per conversation; default 4096 16384")
    parser.add_argument("--tiny", action="store_true", help="small widths and lengths, CPU")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bfloat16 peak of the device")
    parser.add_argument("--step-tokens", type=int, help="tokens per learner step; default 65536")
    parser.add_argument("--repeats", type=int, default=3, help="measured rounds after one to warm up")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--patience", type=float, default=1800.0, help="seconds for one shape")
    parser.add_argument("--part", choices=["torch", "vllm"], help=argparse.SUPPRESS)
    settings = parser.parse_args()
    settings.device = "cpu" if settings.tiny else "cuda"
    settings.lengths = settings.lengths or ([240, 480] if settings.tiny else [4096, 16384])
    settings.step_tokens = settings.step_tokens or (960 if settings.tiny else 65536)
    settings.rows, settings.prompt, settings.new_tokens = (4, 16, 16) if settings.tiny else (128, 512, 256)
    if settings.part:
        print("RESULT " + json.dumps(measure(settings.shapes[0], settings.part, settings)))
        return 0
    import torch

    if settings.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: expected a CUDA device, got none; --tiny tries the script on the CPU", file=sys.stderr)
        return 1
    results: Result = {"machine": machine(settings), "shapes": {}}
    if not settings.no_tests:
        results["tests"] = run_tests()
        print(*results["tests"]["summary"], *results["tests"]["failed"], sep="\n")
    vllm = importlib.util.find_spec("vllm") is not None
    for name in settings.shapes:
        found = in_a_process(name, "torch", settings)
        results["shapes"][name] = found | (in_a_process(name, "vllm", settings) if vllm else {})
    print(*table(results["shapes"]), sep="\n")
    if settings.json:
        settings.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0 if results.get("tests", {"passed": True})["passed"] else 1


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
