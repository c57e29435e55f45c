"""Measure the project's speeds and memory as ratios: both sides in one run, taking turns.

    python scripts/bench.py                          # everything, about five minutes
    python scripts/bench.py --only learner --json

trl          seconds for 32 conversations x 6 turns, sampled and learned from, against TRL's GRPOTrainer for
             192 single-turn completions of the same model (pip install 'ppg-gym[bench]'). TRL's prompts are
             prefixes of such conversations, so that a reply has the same context on both sides; with the
             opening prompts alone (what a single-turn trainer would see) the ratio is given as well.
learner      tokens per second of a whole learning step against bare model(ids) forward and backward.
environment  turns per second of one environment with scripted partner and facts judge, truthful replies.
memory       peak memory of the loss with a vocabulary of 128k against the loss over all logits at once.
per-turn     seconds of a learning step that reads every turn's whole past again, as single-turn trainers do, over
             those of one pass per conversation: one of 8, 20 and 60 turns of 24 + 16 tokens, random weights in the
             embedded model's shape. Exponents: slope of log(seconds) over log(turns).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CONVERSATIONS, TURNS, MAX_NEW_TOKENS = 32, 6, 16
TARGETS = {"trl": (">=", 5.0), "learner": (">=", 0.8), "environment": (">=", 20_000.0), "memory": ("<=", 0.35)}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Result = dict[str, Any]
clock = CLOCKS["wall"]


def spread(values: list[float]) -> dict[str, float]:
    """Return median, lowest and highest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def seconds(work: Callable[[], object]) -> float:
    """Return how long ``work`` takes."""
    start = clock()
    work()
    return clock() - start


class OurSide:
    """Samples conversations with the embedded environment and learns from them."""

    def __init__(self, model: str) -> None:
        import gymnasium as gym
        import torch

        import ppg_gym  # noqa: F401 (registers the environment)
        from ppg_agents import credit
        from ppg_agents.agents.learner import Learner
        from ppg_agents.generation.hf import HFSampler
        from ppg_agents.policy import Policy

        self.policy = Policy.load(model)
        self.sampler = HFSampler(self.policy, MAX_NEW_TOKENS)
        self.agent = Learner(self.policy, credit.full, baseline="batch-mean", learning_rate=1e-6)
        self.envs = gym.make_vec("PersonaChat-v0", num_envs=CONVERSATIONS, max_turns=TURNS)
        self.generator = torch.Generator(self.policy.device).manual_seed(0)

    def sample(self) -> list[Any]:
        """Return 32 conversations of 6 turns."""
        from ppg_agents.rollout import collect

        return collect(self.envs, self.policy, self.sampler, range(CONVERSATIONS), self.generator)

    def iteration(self) -> None:
        """Sample and take one step."""
        self.agent.learn(self.sample())


def bench_trl(settings: argparse.Namespace) -> Result:
    """Alternate our iterations with GRPOTrainer's steps, inside its own training loop."""
    try:
        import trl  # noqa: F401
    except ModuleNotFoundError:
        raise SystemExit("expected TRL, got none; pip install 'ppg-gym[bench]' or use --only") from None
    ours = OurSide(settings.model)
    played = ours.sample()
    prefixes = []
    for i, trajectory in enumerate(played):
        turns = trajectory.turns[: i % TURNS + 1]
        ids = [token for turn in turns for token in (*turn.prompt_ids, *turn.token_ids)]
        prefixes.append(ids[: len(ids) - len(turns[-1].token_ids)])
    openings = [list(trajectory.turns[0].prompt_ids) for trajectory in played]
    decode = ours.policy.tokenizer.decode
    ratios = {}
    details: Result = {}
    for name, prompts in (("prefixes", prefixes), ("openings", openings)):
        theirs, own, length = grpo(settings, ours, [decode(ids) for ids in prompts])
        ratios[name] = spread([a / b for a, b in zip(theirs, own, strict=True)])
        details[name] = {
            "prompt_tokens": statistics.mean(len(ids) for ids in prompts),
            "completion_tokens": length,
            "trl_seconds": spread(theirs),
            "our_seconds": spread(own),
        }
    replies = [len(turn.token_ids) for trajectory in played for turn in trajectory.turns]
    return {
        "ratio": ratios["prefixes"],
        "ratio_openings": ratios["openings"],
        "reply_tokens": statistics.mean(replies),
        **details,
    }


def grpo(settings: argparse.Namespace, ours: OurSide, prompts: list[str]) -> tuple[list[float], list[float], float]:
    """Return seconds of GRPO steps, of our iterations in between, and GRPO's mean completion length."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from ppg_agents.policy import Policy

    theirs: list[float] = []
    own: list[float] = []
    lengths: list[float] = []

    class Alternate(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = clock()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            theirs.append(clock() - self.start)
            own.append(seconds(ours.iteration))

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.append(statistics.mean(len(ids) for ids in completion_ids))
        return [float(ids[0] % 7) for ids in completion_ids]

    other = Policy.load(settings.model)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=CONVERSATIONS * TURNS,
            num_generations=TURNS,
            max_completion_length=MAX_NEW_TOKENS,
            max_steps=settings.repeats + 1,
            learning_rate=1e-6,
            beta=0.0,
            use_cpu=other.device.type == "cpu",
            bf16=other.device.type == "cuda",
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=other.model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=other.tokenizer,
            callbacks=[Alternate()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return theirs[1:], own[1:], statistics.mean(lengths)


def bench_learner(settings: argparse.Namespace) -> Result:
    """Alternate learning steps with forward and backward of the bare model on the same conversations."""
    from ppg_agents.batch import batch

    ours = OurSide(settings.model)

    def bare(ids: Any) -> None:
        ours.policy.model.zero_grad(set_to_none=True)
        ours.policy.model(input_ids=ids, use_cache=False).logits.mean().backward()

    rounds = []
    for _ in range(settings.repeats + 1):
        played = ours.sample()  # anew: what an older policy has said is not learned from
        data = batch(played, ours.policy.pad_id)
        theirs = seconds(partial(bare, data.ids.to(ours.policy.device)))
        rounds.append((theirs, seconds(partial(ours.agent.learn, played)), int(data.attention.sum())))
    del rounds[0]  # warm-up
    return {
        "ratio": spread([theirs / own for theirs, own, _ in rounds]),
        "tokens": statistics.mean(tokens for *_, tokens in rounds),
        "our_tokens_per_second": spread([tokens / own for _, own, tokens in rounds]),
        "bare_tokens_per_second": spread([tokens / theirs for theirs, _, tokens in rounds]),
    }


def bench_environment(settings: argparse.Namespace) -> Result:
    """Play truthful conversations, one reset each; the making of the replies and the seeding are not timed."""
    import gymnasium as gym
    import numpy as np

    import ppg_gym  # noqa: F401
    from ppg_gym.conversation import Conversation
    from ppg_gym.domain.reading import reader
    from ppg_gym.domain.saying import say

    envs = [gym.make("PersonaChat-v0", disable_env_checker=True) for _ in range(100)]
    personas = {persona.id: persona for persona in envs[0].unwrapped.simulator.personas}
    script: list[list[str]] = []
    for seed, env in enumerate(envs):
        observation, info = env.reset(seed=seed)
        conversation, replies, over = Conversation(personas[info["persona"]]), [], False
        while not over:
            conversation = conversation.add("partner", observation["message"])
            replies.append(say(reader("chatting"), "truth", conversation, np.random.default_rng(seed)))
            conversation = conversation.add("policy", replies[-1])
            observation, _, terminated, truncated, _ = env.step(replies[-1])
            over = terminated or truncated
        script.append(replies)

    def play() -> None:
        for env, replies in zip(envs, script, strict=True):
            for reply in replies:
                env.step(reply)
            env.reset()

    def rate(rounds: int = 20) -> float:
        spent = 0.0
        for _ in range(rounds):
            for seed, env in enumerate(envs):
                env.reset(seed=seed)
            spent += seconds(play)
        return rounds * sum(map(len, script)) / spent

    rate(1)
    return {"ratio": spread([rate() for _ in range(settings.repeats)]), "unit": "turns/s"}


def bench_memory(settings: argparse.Namespace) -> Result:
    """Compare peak memory in a fresh process for each side."""
    mib: dict[str, list[float]] = {"ours": [], "naive": []}
    for _ in range(max(1, min(3, settings.repeats))):
        for side, values in mib.items():
            command = [sys.executable, __file__, "--model", settings.model, "--memory-of", side]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            values.append(float(done.stdout.split()[-1]))
    ratio = spread([a / b for a, b in zip(mib["ours"], mib["naive"], strict=True)])
    return {"ratio": ratio, "our_mib": spread(mib["ours"]), "naive_mib": spread(mib["naive"])}


def memory_of(side: str, model: str) -> float:
    """Return the MiB that one loss and its backward pass add to the peak of this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ppg_agents import losses
    from ppg_agents.policy import LoraSettings, Policy, add_lora

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2**17,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    lm = add_lora(LlamaForCausalLM(config), LoraSettings())
    policy = Policy(lm, Policy.load(model, device="cpu").tokenizer)

    def loss(length: int) -> None:
        ids = torch.randint(0, 2**17, (2, length))
        every = torch.ones(ids.shape, dtype=torch.bool)
        if side == "ours":
            log_probs = policy.log_probs(ids, every)
        else:
            scores = lm(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
            chosen = scores.gather(-1, ids[:, 1:, None])[..., 0]
            log_probs = torch.cat([torch.zeros(2, 1), chosen], 1)
        turn, credit = torch.zeros_like(ids), torch.ones(2, 1)
        losses.partial_policy_gradient(log_probs, every, turn, credit).backward()  # type: ignore[no-untyped-call]

    loss(4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss(512)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def bench_per_turn(settings: argparse.Namespace) -> Result:
    """Alternate steps on a whole conversation with steps on its turns, each with its past as prompt."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from ppg_agents import credit
    from ppg_agents.agents.learner import Learner
    from ppg_agents.policy import LoraSettings, Policy, add_lora
    from ppg_agents.trajectory import Trajectory, Turn

    embedded = Policy.load(settings.model, lora=None)
    embedded.config.max_position_embeddings = 4096
    lm = AutoModelForCausalLM.from_config(embedded.config).to(embedded.device)
    policy = Policy(add_lora(lm, LoraSettings()), embedded.tokenizer)
    agent = Learner(policy, credit.greedy, baseline="none", learning_rate=0.0, max_grad_norm=1e9)
    random = np.random.default_rng(0)
    result: Result = {}

    def step(turns: list[tuple[Turn, ...]]) -> tuple[float, Any]:
        policy.version = 0
        played = [Trajectory("i", "p", "d", None, each, terminated=True, truncated=False) for each in turns]
        spent = seconds(lambda: agent.learn(played))
        return spent, torch.cat([p.grad.flatten() for p in policy.parameters()]) * len(turns)

    times: dict[str, list[list[float]]] = {"whole": [], "per_turn": []}
    for n in (8, 20, 60):
        said = random.integers(5, 200, (n, 24 + 16)).tolist()
        whole = [Turn("m", "r", tuple(t[:24]), tuple(t[24:]), (float("nan"),) * 16, random.random()) for t in said]
        past = [tuple(token for t in said[:i] for token in t) for i in range(n)]
        apart = [(replace(turn, prompt_ids=p + turn.prompt_ids),) for p, turn in zip(past, whole, strict=True)]
        (_, one), (_, many) = step([tuple(whole)]), step(apart)
        if not torch.allclose(one, many, rtol=1e-3, atol=1e-4 * float(one.abs().max())):
            raise SystemExit(f"expected equal gradients at {n} turns, got {float((one - many).abs().max())} apart")
        pairs = [(step([tuple(whole)])[0], step(apart)[0]) for _ in range(settings.repeats)]
        for side, spent in zip(times.values(), zip(*pairs, strict=True), strict=True):
            side.append(list(spent))
        result[f"ratio_{n}_turns"] = spread([many / one for one, many in pairs])
        result[f"seconds_{n}_turns"] = {side: spread(spent[-1]) for side, spent in times.items()}
    for side, spent in times.items():
        slopes = [float(np.polyfit(np.log((8, 20, 60)), np.log(row), 1)[0]) for row in zip(*spent, strict=True)]
        result[f"exponent_{side}"] = spread(slopes)
    return {"ratio": result.pop("ratio_60_turns"), "unit": "times, 60 turns", **result}


BENCHES = {
    "memory": bench_memory,  # first: a child's peak (ru_maxrss) begins at that of the process that starts it
    "trl": bench_trl,
    "learner": bench_learner,
    "environment": bench_environment,
    "per-turn": bench_per_turn,
}


def main() -> None:
    """Run the benchmarks that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=BENCHES, action="append", help="one of them; may be repeated")
    parser.add_argument("--model", default="tiny", help="a Hugging Face model; default the embedded one")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds after one to warm up")
    parser.add_argument("--threads", type=int, default=None, help="of torch; default its own")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: on a machine that is busy")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--memory-of", choices=["ours", "naive"], help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.memory_of:
        print(memory_of(settings.memory_of, settings.model))
        return
    global clock
    clock = CLOCKS[settings.clock]
    if settings.threads:
        import torch

        torch.set_num_threads(settings.threads)
    results: Result = {}
    for name in (name for name in BENCHES if name in (settings.only or BENCHES)):
        result = BENCHES[name](settings)
        if name in TARGETS:
            sign, target = TARGETS[name]
            median = result["ratio"]["median"]
            result["target"] = f"{sign} {target:g}"
            result["reached"] = median >= target if sign == ">=" else median <= target
        results[name] = result
        if not settings.json:
            print(f"{name:12} {text(result['ratio'])} {result.get('unit', '')}  target {result.get('target', 'none')}")
            for key, value in result.items():
                if key not in ("ratio", "target", "reached", "unit"):
                    print(f"    {key}: {text(value)}")
    if settings.json:
        print(json.dumps(results, indent=2))


def text(value: Any) -> str:
    """Return a number, a spread or a group of them in a form to read."""
    if isinstance(value, dict) and set(value) == {"median", "min", "max"}:
        return f"{value['median']:.4g} ({value['min']:.4g} to {value['max']:.4g})"
    if isinstance(value, dict):
        return ", ".join(f"{k} {text(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
