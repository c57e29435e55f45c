"""Tiny random models with a byte-level tokenizer, a toy environment, workers in threads: no files, no downloads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium as gym
import pytest
import torch
import transformers
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ppg_agents.policy import LoraSettings, Policy, add_lora

CONTROL = ("<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>")
TEMPLATE = (
    "{{ '<|bos|>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def byte_tokenizer(template: str = TEMPLATE, control: tuple[str, ...] = CONTROL) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer without merges: one token per byte, plus control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(control))
    named = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    named = {key: token for key, token in named.items() if token in control}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named)


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Return a random 2-layer Llama of width 32 with a fairly sure head."""
    settings: dict[str, Any] = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        **overrides,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def make_policy(*, dtype: torch.dtype = torch.float32, lora: bool = True, **overrides: Any) -> Policy:
    """Return a policy on the tiny Llama; its LoRA is not zero."""
    model = tiny_llama(**overrides).to(dtype)
    if lora:
        model = add_lora(model, LoraSettings(rank=4, alpha=8), seed=1)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
            elif "lora_A" in name:
                parameter.data = parameter.data.to(dtype)
    return Policy(model, byte_tokenizer(), name="toy")


SHARED = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", SLIDING),
    "phi3": ("Phi3", {}),
    "gemma3": ("Gemma3", SLIDING),
}


def family_model(family: str, **overrides: Any) -> Any:
    """Return a random model of a family, of width 32; the same one each time."""
    name, own = ARCHITECTURES[family]
    config = getattr(transformers, name + ("TextConfig" if name == "Gemma3" else "Config"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{name}ForCausalLM")(config(**{**SHARED, **own, **overrides})).eval()


class Rank:
    """One of several workers in threads: what they gather meets in a list that they share."""

    sharded = False

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, table: list[Any]) -> None:
        self.rank, self.size, self.main = rank, size, rank == 0
        self._meeting, self._table = meeting, table

    def gather(self, objects: list[Any]) -> list[Any]:
        self._table[self.rank] = objects
        self._meeting.wait(60)
        found = [x for part in self._table for x in part]
        self._meeting.wait(60)
        return found

    def sum_number(self, x: float) -> float:
        return float(sum(self.gather([x])))

    def sum_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        own = list(parameters)
        every = self.gather([[None if p.grad is None else p.grad.clone() for p in own]])
        for p, grads in zip(own, zip(*every, strict=True), strict=True):
            there = [g for g in grads if g is not None]
            p.grad = torch.stack(there).sum(0) if there else None

    def shard(self, n: int) -> slice:
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)


def on_ranks(size: int, work: Callable[[Rank], Any]) -> list[Any]:
    """Return what every worker's work returns, in the order of ranks; when one fails, the others wait no longer."""
    meeting, table = threading.Barrier(size), [None] * size

    def run(rank: int) -> Any:
        try:
            return work(Rank(rank, size, meeting, table))
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(run, rank) for rank in range(size)]]


class ToyChat(gym.Env[dict[str, str], str]):
    """A partner that counts; rewards vowels; ends after `turns` turns; may give no verdict or NaN."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own)

    def __init__(self, turns: int = 3, truncate: bool = False, unjudged: int = 0, verdicts: bool = True) -> None:
        self.observation_space = gym.spaces.Dict({"instruction": gym.spaces.Text(500), "message": gym.spaces.Text(500)})
        self.action_space = gym.spaces.Text(500)
        self.turns, self.truncate, self.unjudged, self.verdicts = turns, truncate, unjudged, verdicts

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, str], dict[str, Any]]:
        super().reset(seed=seed)
        self.persona = f"p{int(self.np_random.integers(1000))}"
        self.turn = 0
        return self._observation("hello"), {"turn": 0, "persona": self.persona}

    def step(self, action: str) -> tuple[dict[str, str], float, bool, bool, dict[str, Any]]:
        self.turn += 1
        reward = sum(c in "aeiou" for c in action.lower()) / max(1, len(action))
        info: dict[str, Any] = {"turn": self.turn, "persona": self.persona}
        judged = self.turn != self.unjudged
        if self.verdicts:
            score = reward if judged else None
            info["verdict"] = {
                "status": "scored" if judged else "timeout",
                "score": score,
                "rationale": "vowels",
            }
        done = self.turn >= self.turns
        reward = reward if judged else float("nan")
        return (
            self._observation(f"line {self.turn}"),
            reward,
            done and not self.truncate,
            done and self.truncate,
            info,
        )

    def _observation(self, message: str) -> dict[str, str]:
        return {"instruction": f"You are {self.persona}.", "message": message}


def toy_envs(*kwargs: dict[str, Any], mode: AutoresetMode = AutoresetMode.DISABLED) -> SyncVectorEnv:
    """Return one toy environment per set of keyword arguments."""
    makers: list[Callable[[], gym.Env[Any, Any]]] = [lambda k=k: ToyChat(**k) for k in kwargs]  # type: ignore[misc]
    return SyncVectorEnv(makers, autoreset_mode=mode)


@pytest.fixture(name="byte_tokenizer", scope="session")
def _byte_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return byte_tokenizer


@pytest.fixture(name="tiny_llama", scope="session")
def _tiny_llama() -> Callable[..., LlamaForCausalLM]:
    return tiny_llama


@pytest.fixture(name="family_model", scope="session")
def _family_model() -> Callable[..., Any]:
    return family_model


@pytest.fixture(name="on_ranks", scope="session")
def _on_ranks() -> Callable[..., list[Any]]:
    return on_ranks


@pytest.fixture(name="make_policy", scope="session")
def _make_policy() -> Callable[..., Policy]:
    return make_policy


@pytest.fixture(name="toy_envs", scope="session")
def _toy_envs() -> Callable[..., SyncVectorEnv]:
    return toy_envs


@pytest.fixture
def policy() -> Policy:
    """Return a fresh policy in float32 with LoRA."""
    return make_policy()
