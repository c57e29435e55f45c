"""Models that people bring: mixtures of experts, odd generation configs, tokenizers that do not fit, 16-bit weights.

Each works from loading to resuming, or is refused at load in one line that says what to do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gymnasium.vector import SyncVectorEnv

from ppg_agents import credit
from ppg_agents.agents.learner import Learner
from ppg_agents.building import advise
from ppg_agents.config.settings import TrainConfig
from ppg_agents.generation.hf import HFSampler
from ppg_agents.generation.versions import Versions
from ppg_agents.policy import LoraSettings, Policy, add_lora
from ppg_agents.rollout import collect

SHARED: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
EXPERTS: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": 4},
    "Mixtral": {"num_local_experts": 4},
    "Olmoe": {"num_experts": 4},
    "Glm4Moe": {**GROUPS, "head_dim": 16},
    "DeepseekV3": {**GROUPS, **LATENT, "head_dim": 8},
    "Phimoe": {"num_local_experts": 4},
    "GptOss": {"num_local_experts": 4, "head_dim": 16},
}


def random_model(name: str, **settings: Any) -> Any:
    """Return a small random causal LM of an architecture, the same every time."""
    config = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{name}ForCausalLM")(config(**{**SHARED, **settings})).eval()


def stirred(model: Any, targets: Any = "all-linear", dtype: torch.dtype = torch.float32) -> Any:
    """Return a model with LoRA that is not zero."""
    model = add_lora(model.to(dtype), LoraSettings(rank=2, targets=targets), seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def played(policy: Policy, envs: SyncVectorEnv, seed: int = 0) -> list[Any]:
    return collect(envs, policy, HFSampler(policy, 6), [0, 1], torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", EXPERTS)
def test_lora_on_a_mixture_of_experts_leaves_the_experts_alone(
    name: str, byte_tokenizer: Callable[..., Any], toy_envs: Callable[..., SyncVectorEnv]
) -> None:
    policy = Policy(stirred(random_model(name, **EXPERTS[name])), byte_tokenizer())
    policy.try_learning()
    adapted = {path.split(".")[-4] for path, _ in policy.model.named_parameters() if "lora_A" in path}
    assert adapted  # attention
    assert not adapted & {"experts", "gate", "router", "gate_proj", "shared_experts"}
    agent = Learner(policy, credit.full, baseline="none", learning_rate=1e-2)
    assert agent.learn(played(policy, toy_envs({"turns": 2}, {"turns": 1})))["log_prob_gap_max"] < 1e-4
    assert agent.steps == 1


def test_experts_named_in_the_targets_are_trained_merged_and_put_back(
    tmp_path: Path, byte_tokenizer: Callable[..., Any], toy_envs: Callable[..., SyncVectorEnv]
) -> None:
    targets = ("q_proj", "experts.gate_up_proj", "experts.down_proj")
    model = random_model("Qwen3Moe", **EXPERTS["Qwen3Moe"])
    base = {name: p.clone() for name, p in model.named_parameters()}
    policy = Policy(stirred(model, targets), byte_tokenizer(), name="somewhere")
    assert sum("mlp.experts" in name and "lora_" in name for name, _ in policy.model.named_parameters()) == 8
    envs = toy_envs({"turns": 2}, {"turns": 1})
    assert Learner(policy, credit.full, baseline="none").learn(played(policy, envs))["log_prob_gap_max"] < 1e-4
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = policy.log_probs(ids, torch.ones_like(ids))
        with policy.merged():
            merged = policy.log_probs(ids, torch.ones_like(ids))
            reference = policy.reference_log_probs(ids, torch.ones_like(ids))
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)
        untouched = Policy(random_model("Qwen3Moe", **EXPERTS["Qwen3Moe"]), byte_tokenizer())
        assert torch.equal(reference, untouched.log_probs(ids, torch.ones_like(ids)))
    kept = {name.replace(".base_layer", ""): p for name, p in policy.model.get_base_model().named_parameters()}
    assert all(torch.equal(kept[name], p) for name, p in base.items())
    with pytest.raises(ValueError, match="DoRA, saved modules or experts; use sync 'merged'"):
        Versions(policy, tmp_path / "sync", "adapter")
    policy.save_merged(tmp_path / "merged")
    plain = Policy.load(tmp_path / "merged", lora=None, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(plain.log_probs(ids, torch.ones_like(ids)), merged, rtol=0, atol=1e-5)


def test_layers_that_peft_cannot_adapt_are_refused_by_the_name_of_the_setting() -> None:
    with pytest.raises(ValueError, match=r"lora.targets \('nothing',\): expected layers .* or set lora.rank=0"):
        add_lora(random_model("Llama"), LoraSettings(targets=("nothing",)))


def test_a_model_that_runs_but_cannot_learn_is_refused(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    policy.try_learning()
    assert all(p.grad is None for p in policy.parameters())

    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("a view\nis being modified")

    monkeypatch.setattr(policy, "log_probs", fail)
    with pytest.raises(ValueError, match=r"that learns on four tokens, got Llama.*a view is being.*lora.targets"):
        policy.try_learning()


def test_gemma_3n_learns(byte_tokenizer: Callable[..., Any]) -> None:
    own = {"vocab_size_per_layer_input": 272, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    layers = {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 2, "head_dim": 16}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "altup_num_inputs": 2}
    model = stirred(random_model("Gemma3n", **own, **layers, **kinds))
    policy = Policy(model, byte_tokenizer())
    policy.try_learning()
    ids = torch.arange(20, 32)[None]
    policy.log_probs(ids, torch.ones_like(ids)).sum().backward()
    fused = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    for parameter in policy.parameters():
        parameter.grad = None
    scores = model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])  # PEFT's own layers
    scores.sum().backward()
    own_gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    assert len(fused) == len(own_gradients) > 0
    for a, b in zip(fused, own_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Rwkv", {"attention_hidden_size": 32}),
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("RecurrentGemma", {"lru_width": 32}),
    ],
)
def test_a_model_that_remembers_otherwise_is_refused_and_vllm_named(
    name: str, settings: dict[str, Any], byte_tokenizer: Callable[..., Any]
) -> None:
    policy = Policy(random_model(name, **settings), byte_tokenizer())
    with pytest.raises(ValueError, match=r"key-value cache holds all .* --set sampling.backend=vllm") as refused:
        HFSampler(policy)
    assert "\n" not in str(refused.value)


class TestTokens:
    def test_padding_without_an_embedding_is_replaced(self, byte_tokenizer: Callable[..., Any]) -> None:
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"pad_token": "<|more|>"})
        policy = Policy(random_model("Llama", vocab_size=262), tokenizer)
        assert tokenizer.pad_token_id >= 262
        assert policy.pad_id == policy.end_of_turn_id

    def test_words_without_an_embedding_are_refused(self, byte_tokenizer: Callable[..., Any]) -> None:
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(["Warsaw"])
        with pytest.raises(ValueError, match=r"got 262 embeddings and token 'Warsaw' with id 262 .*resize_token"):
            Policy(random_model("Llama", vocab_size=262), tokenizer)

    def test_an_adapter_with_embeddings_of_its_own_is_refused(
        self, tmp_path: Path, byte_tokenizer: Callable[..., Any]
    ) -> None:
        base = random_model("Llama")
        base.save_pretrained(tmp_path / "base")
        byte_tokenizer().save_pretrained(tmp_path / "base")
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens([f"word{i}" for i in range(20)])
        base.resize_token_embeddings(len(tokenizer))
        model = add_lora(base, LoraSettings(rank=2))
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
        tokenizer.save_pretrained(tmp_path / "adapter")
        with pytest.raises(ValueError, match=r"adapter.*other shapes.*merge it|got 272 embeddings and token"):
            Policy.load(tmp_path / "adapter", device="cpu")


class TestSaving:
    def shipped(self, **generation: Any) -> Any:
        model = random_model("Llama")
        model.generation_config = transformers.GenerationConfig(eos_token_id=7, **generation)
        return model

    @pytest.mark.parametrize("lora", [True, False])
    def test_a_generation_config_that_cannot_be_saved_is_and_stops_at_the_end_of_turn(
        self, lora: bool, tmp_path: Path, byte_tokenizer: Callable[..., Any]
    ) -> None:
        model = self.shipped(temperature=0.6, top_p=0.9)
        policy = Policy(stirred(model) if lora else model, byte_tokenizer())
        (policy.save_merged if lora else policy.save)(tmp_path / "out")
        written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
        assert written["eos_token_id"] == [policy.end_of_turn_id, 7]
        assert (written["temperature"], written["do_sample"]) == (0.6, True)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert model.generation_config.eos_token_id == 7

    def test_nothing_is_left_where_saving_fails(
        self, tmp_path: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise OSError("no space")

        monkeypatch.setattr(policy.tokenizer, "save_pretrained", fail)
        with pytest.raises(OSError, match="no space"):
            policy.save_merged(tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_weights_saved_under_other_names_and_in_pieces_are_read_back(
        self, tmp_path: Path, byte_tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        policy = Policy(random_model("Qwen3Moe", **EXPERTS["Qwen3Moe"]), byte_tokenizer())
        own = {name: p.clone() for name, p in policy.model.named_parameters()}
        save = type(policy.model).save_pretrained
        in_pieces = lambda model, folder: save(model, folder, max_shard_size="60KB")  # noqa: E731
        monkeypatch.setattr(type(policy.model), "save_pretrained", in_pieces)
        policy.save(tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.zero_()
        policy.load_weights(tmp_path)
        assert all(torch.equal(p, own[name]) for name, p in policy.model.named_parameters())
        with pytest.raises(ValueError, match="other names or shapes"):
            Policy(random_model("Llama"), byte_tokenizer()).load_weights(tmp_path)


class TestSixteenBits:
    def trained(
        self, make_policy: Callable[..., Policy], envs: SyncVectorEnv, dtype: torch.dtype, steps: int
    ) -> tuple[Learner, list[torch.Tensor]]:
        policy = make_policy(lora=False, dtype=dtype)
        agent = Learner(policy, credit.full, baseline="none", learning_rate=1e-6, max_grad_norm=1e6)
        before = [p.detach().clone() for p in agent.masters]
        for seed in range(steps):
            agent.learn(played(policy, envs, seed))
        return agent, before

    def test_small_steps_add_up_in_float32(
        self, make_policy: Callable[..., Policy], toy_envs: Callable[..., SyncVectorEnv]
    ) -> None:
        envs = toy_envs({"turns": 2}, {"turns": 2})
        agent, before = self.trained(make_policy, envs, torch.bfloat16, 3)
        moved = sum(int((a != b).sum()) for a, b in zip(before, agent.masters, strict=True))
        reference, start = self.trained(make_policy, envs, torch.float32, 3)
        possible = sum(int((a != b).sum()) for a, b in zip(start, reference.masters, strict=True))
        assert moved > 0.9 * possible
        for weight, copy in zip(agent.policy.parameters(), agent.masters, strict=True):
            assert weight.dtype == torch.bfloat16
            assert weight.grad is None
            assert torch.equal(weight, copy.bfloat16())

    def test_a_resumed_run_goes_on_from_the_copies(
        self, tmp_path: Path, make_policy: Callable[..., Policy], toy_envs: Callable[..., SyncVectorEnv]
    ) -> None:
        envs = toy_envs({"turns": 2}, {"turns": 2})
        agent, _ = self.trained(make_policy, envs, torch.bfloat16, 2)
        agent.save(tmp_path)
        other = Learner(
            make_policy(lora=False, dtype=torch.bfloat16, seed=5),
            credit.full,
            baseline="none",
            learning_rate=1e-6,
            max_grad_norm=1e6,
        )
        other.load(tmp_path)
        for learner in (agent, other):
            learner.learn(played(learner.policy, envs, 9))
        pairs = zip(agent.masters, other.masters, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)

    def test_an_adapter_on_a_16_bit_model_is_float32(self, byte_tokenizer: Callable[..., Any]) -> None:
        for targets in ("all-linear", ("q_proj", "experts.down_proj")):
            model = random_model("Qwen3Moe", **EXPERTS["Qwen3Moe"]).bfloat16()
            policy = Policy(add_lora(model, LoraSettings(rank=2, targets=targets)), byte_tokenizer())
            assert {p.dtype for p in policy.parameters()} == {torch.float32}


class TestAdvice:
    def test_settings_of_the_embedded_model_are_questioned_on_a_large_one(
        self, policy: Policy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        advise(TrainConfig(), policy)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr("ppg_agents.building._LARGE", 1000)
        monkeypatch.setattr("os.sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 10_000)
        advise(TrainConfig(), policy)
        rate, memory = capsys.readouterr().err.splitlines()
        assert rate.endswith("0 M weights with LoRA 1e-4 to 1e-3 is usual: --set learning_rate=1e-4")
        assert re.search(r"micro_batch_tokens 8192 may need .* --set micro_batch_tokens=\d+ or", memory)
        suited = TrainConfig(learning_rate=1e-4, micro_batch_tokens=256)
        advise(suited, policy)
        assert capsys.readouterr().err == ""
        advise(replace(suited, lora=LoraSettings(rank=0), learning_rate=1e-3), policy)
        assert "weights 1e-6 to 1e-5 is usual" in capsys.readouterr().err
