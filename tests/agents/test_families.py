"""The families of chat models with their own templates: prompts, reasoning, LoRA variants, loading."""

from __future__ import annotations

import importlib
import logging
import sys
import time
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import AddedToken

from ppg_agents.generation.hf import HFSampler
from ppg_agents.lora import fuse
from ppg_agents.policy import LoraSettings, Policy, add_lora
from ppg_agents.prompts import prompt_format, trainable_format

templates = pytest.importorskip("trl.chat_template_utils")

LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|finetune_right_pad_id|>")
QWEN = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
GEMMA = ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>", "<pad>")
PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
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
FAMILIES: dict[str, tuple[str, str, tuple[str, ...], dict[str, str], dict[str, Any]]] = {
    "llama": ("Llama", "llama3_2", LLAMA, {"bos_token": LLAMA[0], "eos_token": LLAMA[3]}, {}),
    "qwen2": ("Qwen2", "qwen2_5", QWEN, {"eos_token": QWEN[1]}, {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", "qwen3", QWEN, {"eos_token": QWEN[1]}, {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", "gemma", GEMMA, {"bos_token": "<bos>", "eos_token": "<eos>"}, SLIDING),
    "phi3": ("Phi3", "phi3", PHI, {"eos_token": "<|endoftext|>"}, {}),
    "gemma3": ("Gemma3", "gemma3", GEMMA, {"bos_token": "<bos>", "eos_token": "<eos>"}, SLIDING),
}
VARIANTS = {
    "plain": LoraSettings(rank=4, alpha=8),
    "dropout": LoraSettings(rank=4, alpha=8, dropout=0.3),
    "rslora": LoraSettings(rank=4, alpha=8, rslora=True),
    "dora": LoraSettings(rank=4, alpha=8, dora=True),
    "dora dropout": LoraSettings(rank=4, alpha=8, dora=True, dropout=0.3, targets=("q_proj", "down_proj")),
}
SAID = ("Hello, who are you?", "Really?\nSure?", "Ünïcode 🙂")
REPLIED = ("I am Ann.", "Yes.")


@pytest.fixture
def tokenizer_of(byte_tokenizer: Callable[..., Any]) -> Callable[[str], Any]:
    """Return the tokenizer of a family: bytes, its control tokens and the template that its models come with."""

    def make(family: str) -> Any:
        _, template, control, named, _ = FAMILIES[family]
        tokenizer = byte_tokenizer(getattr(templates, f"{template}_chat_template"), control)
        if family == "qwen3":
            tokenizer.add_tokens([AddedToken(t, special=False) for t in ("<think>", "</think>")])
        if family == "phi3":  # swallows the line break behind its control tokens
            tokenizer = byte_tokenizer(tokenizer.chat_template, ())
            tokenizer.add_tokens([AddedToken(t, special=True, rstrip=True) for t in control])
        tokenizer.add_special_tokens({**named, "pad_token": control[-1]})
        return tokenizer

    return make


def model_of(family: str) -> Any:
    """Return a random model of the family; the same one each time."""
    return _weights(family)[0]()


@cache
def _weights(family: str) -> tuple[Callable[[], Any]]:
    architecture, _, _, _, own = FAMILIES[family]
    suffix = "TextConfig" if architecture == "Gemma3" else "Config"
    config = getattr(transformers, architecture + suffix)(**{**SHARED, **own})

    def build() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return getattr(transformers, f"{architecture}ForCausalLM")(config).eval()

    return (build,)


@pytest.fixture
def policy_of(tokenizer_of: Callable[[str], Any]) -> Callable[..., Policy]:
    """Return a policy of a family whose LoRA is not zero."""

    def make(family: str = "llama", lora: LoraSettings | None = VARIANTS["plain"], **options: Any) -> Policy:
        model = model_of(family)
        if lora is not None:
            model = add_lora(model, lora, seed=1)
        policy = Policy(model, tokenizer_of(family), name=family, template_options=options)
        return stir(policy) if lora is not None else policy

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


def text_of(policy: Policy) -> str:
    return str(policy.tokenizer.decode(policy.first_prompt("i", "m")))


def loss(policy: Policy) -> torch.Tensor:
    return -policy.log_probs(*tokens()).mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_conversation_is_the_templates_token_by_token(family: str, policy_of: Callable[..., Policy]) -> None:
    policy = policy_of(family, None)
    tokenizer = policy.tokenizer
    ids, trained = policy.first_prompt("You are Ann.", SAID[0]), []
    for message, reply in zip(SAID[1:], REPLIED, strict=True):
        sampled = [*tokenizer.encode(reply, add_special_tokens=False), policy.end_of_turn_id]
        trained += range(len(ids), len(ids) + len(sampled))
        ids += sampled + policy.next_prompt(message)
    system = family != "gemma2"
    messages = [{"role": "system", "content": "You are Ann."}] if system else []
    messages += [{"role": "user", "content": SAID[0] if system else f"You are Ann.\n\n{SAID[0]}"}]
    for message, reply in zip(SAID[1:], REPLIED, strict=True):
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": message}]
    options = {"enable_thinking": False, "date_string": "26 Jul 2024"}
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)
    assert ids == whole
    assert "You are Ann." in tokenizer.decode(ids)
    assert ids.count(policy.end_of_turn_id) >= 2

    if family != "llama":  # whose newer templates have no variant, and need none
        tokenizer.chat_template = templates.get_training_chat_template(tokenizer) or tokenizer.chat_template
        out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **options)
        assert all(out["assistant_masks"][i] for i in trained)  # the end-of-turn tokens too


def test_instruction_without_a_system_role_and_without_a_first_message(policy_of: Callable[..., Policy]) -> None:
    for family in ("gemma2", "gemma3"):
        policy = policy_of(family, None)
        text = policy.tokenizer.decode(policy.first_prompt("You are Ann.", "Hi"))
        assert text == "<bos><start_of_turn>user\nYou are Ann.\n\nHi<end_of_turn>\n<start_of_turn>model\n"
        role = "user" if family == "gemma2" else "system"
        alone = [{"role": role, "content": "You are Ann."}, {"role": "user", "content": ""}]
        whole = policy.tokenizer.apply_chat_template(
            alone[:1] if family == "gemma2" else alone, add_generation_prompt=True, return_dict=False
        )
        assert policy.first_prompt("You are Ann.", " ") == whole


def test_a_template_without_a_date_of_its_own_is_given_one(policy_of: Callable[..., Policy]) -> None:
    assert "Today Date: 26 Jul 2024\n" in text_of(policy_of("llama", None))
    dated = policy_of("llama", None, date_string="1 May 2026")
    assert "Today Date: 1 May 2026\n" in text_of(dated)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_the_models_own_and_the_samplers(family: str, policy_of: Callable[..., Policy]) -> None:
    policy = policy_of(family)
    ids, attention = tokens()
    with torch.no_grad():
        scores = policy.model(input_ids=ids).logits.float().log_softmax(-1)
        own = scores[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        torch.testing.assert_close(policy.log_probs(ids, attention)[:, 1:], own, rtol=0, atol=2e-5)
    sampler, generator = HFSampler(policy, max_new_tokens=6), torch.Generator().manual_seed(0)
    before = {key: value.clone() for key, value in policy.model.state_dict().items()}
    sequence, spans, scores = [], [], []
    with policy.merged():
        sampler.start(1)
        for prompt in (policy.first_prompt("i", "m"), policy.next_prompt("n")):
            (sample,) = sampler.reply([prompt], generator)
            assert sample is not None
            spans += range(len(sequence) + len(prompt), len(sequence) + len(prompt) + len(sample.token_ids))
            sequence += [*prompt, *sample.token_ids]
            scores += sample.log_probs
    row = torch.tensor([sequence])
    with torch.no_grad():
        got = policy.log_probs(row, torch.ones_like(row))[0, spans]
    torch.testing.assert_close(got, torch.tensor(scores), rtol=0, atol=1e-4)
    after = policy.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


class TestReasoning:
    def test_off_the_training_variant_is_taken_and_named(
        self, tokenizer_of: Callable[[str], Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        tokenizer = tokenizer_of("qwen3")
        with caplog.at_level(logging.WARNING):
            form = trainable_format(tokenizer)
        assert "qwen3_training_chat_template" in caplog.text
        assert "rewrites an earlier turn" in caplog.text
        assert tokenizer.chat_template == templates.qwen3_training_chat_template
        assert form.between[1].endswith("<think>\n\n</think>\n\n")
        assert form.lead == ""
        assert not form.reasons

    def test_without_trl_it_is_refused_with_the_reason(
        self, tokenizer_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "trl", None)
        with pytest.raises(ValueError, match=r"rewrites an earlier turn.*chat_template=.*pip install trl"):
            trainable_format(tokenizer_of("qwen3"))
        assert trainable_format(tokenizer_of("llama")) == prompt_format(tokenizer_of("llama"))

    def test_an_unknown_template_keeps_its_own_reason(self, tokenizer_of: Callable[[str], Any]) -> None:
        tokenizer = tokenizer_of("qwen3")
        tokenizer.chat_template += " "
        with pytest.raises(ValueError, match=r"rewrites an earlier turn: .*</think>"):
            trainable_format(tokenizer)

    def test_on_it_is_trained_and_kept_but_not_spoken(self, policy_of: Callable[..., Policy]) -> None:
        policy = policy_of("qwen3", None, enable_thinking=True)
        tokenizer = policy.tokenizer
        thoughts = [f"<think>\nShe asks {n}.\n</think>\n\n{reply}" for n, reply in enumerate(REPLIED)]
        ids = policy.first_prompt("You are Ann.", SAID[0])
        messages = [{"role": "system", "content": "You are Ann."}, {"role": "user", "content": SAID[0]}]
        for message, text, reply in zip(SAID[1:], thoughts, REPLIED, strict=True):
            sampled = [*tokenizer.encode(text), policy.end_of_turn_id]
            assert policy.spoken(sampled) == reply
            assert "She asks" in policy.decode(sampled)
            ids += sampled + policy.next_prompt(message)
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": message}]
        assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert policy.spoken(tokenizer.encode("<think>\nShe asks")) == ""
        assert policy.spoken(tokenizer.encode("Well <think>\nshe")) == "Well"
        assert policy.spoken(tokenizer.encode("Plain <|im_start|>")) == policy.decode(tokenizer.encode("Plain "))
        logged = policy.encode_reply("Yes </think> no")
        assert tokenizer.decode(logged) == "<think>\n\n</think>\n\nYes < /think> no<|im_end|>"

    def test_opened_by_the_prompt(self, policy_of: Callable[..., Policy], tokenizer_of: Callable[[str], Any]) -> None:
        tokenizer = tokenizer_of("qwen3")
        tokenizer.chat_template = templates.qwen3_5_think_chat_template
        policy = Policy(model_of("qwen3"), tokenizer, template_options={"enable_thinking": True})
        assert policy.first_prompt("i", "m")[-2:] == tokenizer.encode("<think>\n")
        assert policy.format.reasons
        assert policy.format.lead == "\n</think>\n\n"
        assert policy.spoken(tokenizer.encode("hm\n</think>\n\nYes.<|im_end|>")) == "Yes."
        assert policy.spoken(tokenizer.encode("hm, what")) == ""


@pytest.mark.parametrize("variant", VARIANTS)
def test_lora_variant_learns_merges_and_returns(
    variant: str, tmp_path: Path, policy_of: Callable[..., Policy], tokenizer_of: Callable[[str], Any]
) -> None:
    family = "gemma3" if variant == "dora" else "llama"
    base = tmp_path / "base"
    model_of(family).save_pretrained(base)
    tokenizer_of(family).save_pretrained(base)
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
        peft = importlib.import_module("peft").PeftModel.from_pretrained(model_of(family), tmp_path / "adapter")
        torch.testing.assert_close(Policy(peft, tokenizer_of(family)).log_probs(ids, attention), expected)
        policy.save_merged(tmp_path / "merged")
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert not (tmp_path / "merged" / "adapter_config.json").exists()
        assert torch.equal(plain(input_ids=ids).logits, merged)
        again = Policy.load(tmp_path / "merged", lora=None, device="cpu")
        assert again.first_prompt("i", "m") == policy.first_prompt("i", "m")


def test_checkpoint_keeps_the_template_it_was_trained_on(
    tmp_path: Path, tokenizer_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model_of("qwen3").save_pretrained(tmp_path / "base")
    tokenizer_of("qwen3").save_pretrained(tmp_path / "base")
    policy = Policy.load(tmp_path / "base", device="cpu")
    policy.save(tmp_path / "adapter")
    monkeypatch.setitem(sys.modules, "trl", None)  # not needed again
    assert Policy.load(tmp_path / "adapter", device="cpu").format == policy.format
    with pytest.raises(ValueError, match="pip install trl"):
        Policy.load(tmp_path / "base", device="cpu")


def test_all_weights_and_shared_weights(policy_of: Callable[..., Policy], tmp_path: Path) -> None:
    policy = policy_of("qwen2", None)
    loss(policy).backward()
    assert all(p.grad is not None for p in policy.parameters())
    policy.save_merged(tmp_path)
    assert len(Policy.load(tmp_path, lora=None, device="cpu").parameters()) == len(policy.parameters())
    with pytest.raises(ValueError, match="got one that trains"):
        policy.reference_log_probs(*tokens())
    tied = LoraSettings(rank=2, targets=("embed_tokens",))
    with pytest.raises(ValueError, match="one that is tied"), pytest.warns(UserWarning, match="tied layer"):
        Policy(add_lora(model_of("qwen2"), tied), policy.tokenizer)


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


class TestQuantisation:
    def test_sampling_leaves_quantised_weights_alone(self, policy_of: Callable[..., Policy], tmp_path: Path) -> None:
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

    def test_what_is_asked_of_transformers(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        asked: dict[str, Any] = {}

        def load(path: str, **options: Any) -> Any:
            asked.update(options)
            return transformers.LlamaForCausalLM.from_pretrained(path)

        with pytest.raises(ModuleNotFoundError, match="pip install bitsandbytes") as missing:
            Policy.load(quantisation="4bit", device="cuda")
        assert missing.value.name == "bitsandbytes"
        _pretend(monkeypatch, "bitsandbytes")
        with pytest.raises(ValueError, match="expected a CUDA device, got cpu"):
            Policy.load(quantisation="4bit", device="cpu")
        with pytest.raises(ValueError, match="give a rank"):
            Policy.load(quantisation="4bit", lora=None)
        with pytest.raises(ValueError, match="'none' or '4bit', got '8bit'"):
            Policy.load(quantisation="8bit")  # type: ignore[arg-type]
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
        policy = Policy.load(quantisation="4bit", device="cuda", dtype=torch.bfloat16)
        config = asked["quantization_config"]
        assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (
            True,
            "nf4",
            True,
        )
        assert config.bnb_4bit_compute_dtype == torch.bfloat16
        assert asked["device_map"] == {"": torch.device("cuda")}
        assert asked["trust_remote_code"] is False
        assert policy.parameters()

    def test_liger_changes_this_model_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ModuleNotFoundError, match="pip install liger-kernel"):
            Policy.load(kernels="liger", device="cuda")
        called: list[dict[str, Any]] = []
        _pretend(monkeypatch, "liger_kernel")
        fake = types.ModuleType("liger_kernel.transformers.monkey_patch")
        fake.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}  # type: ignore[attr-defined]
        fake._apply_liger_kernel_to_instance = lambda **options: called.append(options)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
        monkeypatch.setattr(transformers.PreTrainedModel, "to", lambda self, *_: self)
        Policy.load(kernels="liger", device="cuda")
        assert called[0].pop("model").config.model_type == "llama"
        assert called == [{"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}]


def _pretend(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Let it look as if a package were installed."""
    own = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: types.SimpleNamespace() if name == package else own(name, *args),
    )


class TestNames:
    @pytest.mark.parametrize(
        ("name", "error", "message"),
        [
            (
                "/no/such/folder",
                FileNotFoundError,
                "a model folder or a hub name, got '/no/such/folder'.*no such folder",
            ),
            ("nobody/no-such-model", ConnectionError, "not in the local cache, and the hub cannot be reached"),
            ("tyny", ConnectionError, "did you mean 'tiny'"),
        ],
    )
    def test_unknown_model_is_named_at_once(
        self, name: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", _unreachable)
        start = time.perf_counter()
        with pytest.raises(error, match=message) as caught:
            Policy.load(name)
        assert time.perf_counter() - start < 15
        assert "\n" not in str(caught.value)

    def test_cached_model_needs_no_hub(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer_of: Callable[[str], Any]
    ) -> None:
        snapshot = tmp_path / "models--me--mine" / "snapshots" / "abc"
        model_of("llama").save_pretrained(snapshot)
        tokenizer_of("llama").save_pretrained(snapshot)
        (tmp_path / "models--me--mine" / "refs").mkdir()
        (tmp_path / "models--me--mine" / "refs" / "main").write_text("abc")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", _unreachable)
        start = time.perf_counter()
        policy = Policy.load("me/mine", device="cpu")
        assert policy.name == "me/mine"
        assert time.perf_counter() - start < 15

    def test_what_the_hub_says(self, monkeypatch: pytest.MonkeyPatch) -> None:
        errors = importlib.import_module("huggingface_hub.errors")
        for kind, error, message in (
            ("RepositoryNotFoundError", FileNotFoundError, "the hub has no such model"),
            ("GatedRepoError", PermissionError, "licence"),
            ("RemoteEntryNotFoundError", FileNotFoundError, "no config.json"),
        ):
            raised = getattr(errors, kind).__new__(getattr(errors, kind))
            monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, r=raised, **__: _raise(r))
            with pytest.raises(error, match=message):
                Policy.load("nobody/no-such-model")


def _raise(error: Exception) -> None:
    raise error


def _unreachable(*_: Any, **__: Any) -> None:
    raise OSError("[Errno -2] Name or service not known")
