"""Variants of LoRA: learned, merged, bypassed, computed again; and what is left alone: quantised and tied weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ppg_agents.generation.hf import HFSampler
from ppg_agents.policy import LoraSettings, Policy, add_lora
from ppg_agents.policy.lora import fuse

VARIANTS = {
    "plain": LoraSettings(rank=4, alpha=8),
    "dropout": LoraSettings(rank=4, alpha=8, dropout=0.3),
    "rslora": LoraSettings(rank=4, alpha=8, rslora=True),
    "dora": LoraSettings(rank=4, alpha=8, dora=True),
    "dora dropout": LoraSettings(rank=4, alpha=8, dora=True, dropout=0.3, targets=("q_proj", "down_proj")),
}


@pytest.fixture
def policy_of(byte_tokenizer: Callable[..., Any], family_model: Callable[..., Any]) -> Callable[..., Policy]:
    """Return a policy of a family whose LoRA is not zero."""

    def make(family: str = "llama", lora: LoraSettings | None = VARIANTS["plain"]) -> Policy:
        model = family_model(family)
        if lora is None:
            return Policy(model, byte_tokenizer())
        return stir(Policy(add_lora(model, lora, seed=1), byte_tokenizer()))

    return make


def stir(policy: Policy) -> Policy:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


def tokens(n: int = 2, length: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 256, (n, length), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids)


def loss(policy: Policy) -> torch.Tensor:
    return -policy.log_probs(*tokens()).mean()


@pytest.mark.parametrize("variant", VARIANTS)
def test_lora_variant_learns_merges_and_returns(
    variant: str, tmp_path: Path, byte_tokenizer: Callable[..., Any], family_model: Callable[..., Any]
) -> None:
    family = "gemma3" if variant == "dora" else "llama"
    base = tmp_path / "base"
    family_model(family).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    policy = stir(Policy.load(base, lora=VARIANTS[variant], device="cpu"))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    before = [p.clone() for p in policy.parameters()]
    with torch.no_grad():
        start = loss(policy)
    loss(policy).backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    ids, attention = tokens()
    with torch.no_grad():
        expected = policy.log_probs(ids, attention)
        assert -expected.mean() < start

        state = {key: value.clone() for key, value in policy.model.state_dict().items()}
        modules = [id(module) for module in policy.model.modules()]
        with policy.merged():
            torch.testing.assert_close(policy.log_probs(ids, attention), expected, rtol=0, atol=1e-4)
            merged = policy.model(input_ids=ids).logits
        after = policy.model.state_dict()
        assert state.keys() == after.keys()
        assert modules == [id(module) for module in policy.model.modules()]
        assert all(torch.equal(state[key], after[key]) for key in state)
        assert torch.equal(policy.log_probs(ids, attention), expected)

        policy.save(tmp_path / "adapter")
        assert torch.equal(Policy.load(tmp_path / "adapter", device="cpu").log_probs(ids, attention), expected)
        peft = importlib.import_module("peft").PeftModel.from_pretrained(family_model(family), tmp_path / "adapter")
        torch.testing.assert_close(Policy(peft, byte_tokenizer()).log_probs(ids, attention), expected)
        policy.save_merged(tmp_path / "merged")
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert not (tmp_path / "merged" / "adapter_config.json").exists()
        assert torch.equal(plain(input_ids=ids).logits, merged)
        again = Policy.load(tmp_path / "merged", lora=None, device="cpu")
        assert again.first_prompt("i", "m") == policy.first_prompt("i", "m")


def test_all_weights_and_shared_weights(
    policy_of: Callable[..., Policy], family_model: Callable[..., Any], tmp_path: Path
) -> None:
    policy = policy_of("qwen2", None)
    loss(policy).backward()
    assert all(p.grad is not None for p in policy.parameters())
    policy.save_merged(tmp_path)
    assert len(Policy.load(tmp_path, lora=None, device="cpu").parameters()) == len(policy.parameters())
    with pytest.raises(ValueError, match="got one that trains"):
        policy.reference_log_probs(*tokens())
    tied = LoraSettings(rank=2, targets=("embed_tokens",))
    with pytest.raises(ValueError, match="one that is tied"), pytest.warns(UserWarning, match="tied layer"):
        Policy(add_lora(family_model("qwen2"), tied), policy.tokenizer)


@pytest.mark.parametrize("variant", ["plain", "dora"])
def test_reference_is_the_base_model_and_no_copy_of_it(variant: str, policy_of: Callable[..., Policy]) -> None:
    base, policy = policy_of("gemma3", None), policy_of("gemma3", VARIANTS[variant])
    ids, attention = tokens()
    mask = torch.arange(30)[None].expand(2, 30) % 3 == 0
    with torch.no_grad():
        expected = base.log_probs(ids, attention, mask, temperature=0.7)
        own = policy.log_probs(ids, attention, mask, temperature=0.7)
    places = {p.data_ptr() for p in policy.model.parameters()}

    def check() -> None:
        got = policy.reference_log_probs(ids, attention, mask, temperature=0.7)
        assert torch.equal(got, expected)
        assert not torch.equal(got, own)
        assert not got.requires_grad

    check()
    assert {p.data_ptr() for p in policy.model.parameters()} == places
    with policy.merged():
        check()
        with torch.no_grad():
            merged = policy.log_probs(ids, attention, mask, temperature=0.7)
        torch.testing.assert_close(merged, own, rtol=0, atol=1e-4)
    assert all(p.requires_grad for n, p in policy.model.named_parameters() if "lora_" in n)
    with torch.no_grad():
        assert torch.equal(policy.log_probs(ids, attention, mask, temperature=0.7), own)


@pytest.mark.parametrize("variant", ["plain", "dropout", "dora dropout", "all weights"])
def test_gradient_checkpointing_changes_no_gradient(variant: str, policy_of: Callable[..., Policy]) -> None:
    policy = policy_of("llama", VARIANTS.get(variant))
    runs = []
    kept: list[int] = []
    for active in (False, True):
        if active:
            policy.gradient_checkpointing()
        torch.manual_seed(7)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            value = loss(policy)
        kept.append(sum(sizes))
        if variant != "all weights":
            policy.reference_log_probs(*tokens())  # between forward and backward, without dropout
        runs.append((value, *torch.autograd.grad(value, policy.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert kept[1] < kept[0]
    with torch.no_grad():
        assert torch.equal(policy.log_probs(*tokens()), policy.log_probs(*tokens()))
    sampler = HFSampler(policy, max_new_tokens=3)  # which needs the cache that checkpointing forbids
    with policy.merged():
        sampler.start(1)
        assert sampler.reply([[1, 2, 3]], torch.Generator().manual_seed(0))[0]
    policy.gradient_checkpointing(False)
    torch.manual_seed(7)
    torch.testing.assert_close(loss(policy), runs[0][0], rtol=0, atol=0)


def test_fused_update_of_a_narrow_base_rounds_as_merging_does(policy_of: Callable[..., Policy]) -> None:
    policy = policy_of("llama")
    exact = torch.autograd.grad(loss(policy), policy.parameters())
    policy.model.get_base_model().to(torch.bfloat16)
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    with fuse(policy._lora):
        assert sum("forward" in vars(layer.module) for layer in policy._lora) == 14
    rounded = torch.autograd.grad(loss(policy), policy.parameters())
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.float32
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99


class FourBit(torch.nn.Linear):
    """A linear layer whose weight is kept as integers, as a quantised one is."""

    def quantise(self) -> None:
        self.scale = self.weight.data.abs().max() / 7
        self.weight = torch.nn.Parameter((self.weight.data / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.float() * self.scale)


def test_sampling_leaves_quantised_weights_alone(policy_of: Callable[..., Policy], tmp_path: Path) -> None:
    model = policy_of("llama").model
    for module in model.modules():
        if "base_layer" in vars(module).get("_modules", {}) and type(module.base_layer) is torch.nn.Linear:
            module.base_layer.__class__ = FourBit
            module.base_layer.quantise()
    policy = Policy(model, policy_of("llama").tokenizer)
    assert all(layer.quantised for layer in policy._lora)
    loss(policy).backward()
    assert all(p.grad is not None for p in policy.parameters())
    ids, attention = tokens()
    with torch.no_grad():
        expected = policy.log_probs(ids, attention)
        with policy.merged():
            assert torch.equal(policy.log_probs(ids, attention), expected)
    assert not torch.equal(policy.reference_log_probs(ids, attention), expected)
    with pytest.raises(ValueError, match="16 or 32 bits"):
        policy.save_merged(tmp_path)
