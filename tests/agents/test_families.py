"""The families of chat models with their own templates: prompts, reasoning, log-probs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from ppg_agents.generation.hf import HFSampler
from ppg_agents.policy import LoraSettings, Policy, add_lora
from ppg_agents.policy.prompts import prompt_format, trainable_format

templates = pytest.importorskip("trl.chat_template_utils")

LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|finetune_right_pad_id|>")
QWEN = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
GEMMA = ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>", "<pad>")
PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
FAMILIES: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {
    "llama": ("llama3_2", LLAMA, {"bos_token": LLAMA[0], "eos_token": LLAMA[3]}),
    "qwen2": ("qwen2_5", QWEN, {"eos_token": QWEN[1]}),
    "qwen3": ("qwen3", QWEN, {"eos_token": QWEN[1]}),
    "gemma2": ("gemma", GEMMA, {"bos_token": "<bos>", "eos_token": "<eos>"}),
    "phi3": ("phi3", PHI, {"eos_token": "<|endoftext|>"}),
    "gemma3": ("gemma3", GEMMA, {"bos_token": "<bos>", "eos_token": "<eos>"}),
}
SAID = ("Hello, who are you?", "Really?\nSure?", "Ünïcode 🙂")
REPLIED = ("I am Ann.", "Yes.")


@pytest.fixture
def tokenizer_of(byte_tokenizer: Callable[..., Any]) -> Callable[[str], Any]:
    """Return the tokenizer of a family: bytes, its control tokens and the template that its models come with."""

    def make(family: str) -> Any:
        template, control, named = FAMILIES[family]
        tokenizer = byte_tokenizer(getattr(templates, f"{template}_chat_template"), control)
        if family == "qwen3":
            tokenizer.add_tokens([AddedToken(t, special=False) for t in ("<think>", "</think>")])
        if family == "phi3":  # swallows the line break behind its control tokens
            tokenizer = byte_tokenizer(tokenizer.chat_template, ())
            tokenizer.add_tokens([AddedToken(t, special=True, rstrip=True) for t in control])
        tokenizer.add_special_tokens({**named, "pad_token": control[-1]})
        return tokenizer

    return make


@pytest.fixture
def policy_of(tokenizer_of: Callable[[str], Any], family_model: Callable[..., Any]) -> Callable[..., Policy]:
    """Return a policy of a family, with LoRA that is not zero or without."""

    def make(family: str = "llama", lora: LoraSettings | None = None, **options: Any) -> Policy:
        model = family_model(family)
        if lora is not None:
            model = add_lora(model, lora, seed=1)
            generator = torch.Generator().manual_seed(2)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        return Policy(model, tokenizer_of(family), name=family, template_options=options)

    return make


def text_of(policy: Policy) -> str:
    return str(policy.tokenizer.decode(policy.first_prompt("i", "m")))


@pytest.mark.parametrize("family", FAMILIES)
def test_conversation_is_the_templates_token_by_token(family: str, policy_of: Callable[..., Policy]) -> None:
    policy = policy_of(family)
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
        policy = policy_of(family)
        text = policy.tokenizer.decode(policy.first_prompt("You are Ann.", "Hi"))
        assert text == "<bos><start_of_turn>user\nYou are Ann.\n\nHi<end_of_turn>\n<start_of_turn>model\n"
        role = "user" if family == "gemma2" else "system"
        alone = [{"role": role, "content": "You are Ann."}, {"role": "user", "content": ""}]
        whole = policy.tokenizer.apply_chat_template(
            alone[:1] if family == "gemma2" else alone, add_generation_prompt=True, return_dict=False
        )
        assert policy.first_prompt("You are Ann.", " ") == whole


@pytest.mark.parametrize("family", FAMILIES)
def test_without_an_instruction_the_conversation_is_the_templates_without_a_system_message(
    family: str, tokenizer_of: Callable[[str], Any]
) -> None:
    tokenizer = tokenizer_of(family)
    form = trainable_format(tokenizer)
    said = form.first(" ", "Hi") + form.lead + "Hello." + form.end_of_turn + form.next("Well?")
    lines = [("user", "Hi"), ("assistant", "Hello."), ("user", "Well?")]
    messages = [{"role": role, "content": content} for role, content in lines]
    options = {"enable_thinking": False, "date_string": "26 Jul 2024", "add_generation_prompt": True}
    assert said == tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert form.first("", "") == form.first("", "Hi").replace("Hi", "")


def test_a_template_without_a_date_of_its_own_is_given_one(policy_of: Callable[..., Policy]) -> None:
    assert "Today Date: 26 Jul 2024\n" in text_of(policy_of("llama"))
    dated = policy_of("llama", date_string="1 May 2026")
    assert "Today Date: 1 May 2026\n" in text_of(dated)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_the_models_own_and_the_samplers(family: str, policy_of: Callable[..., Policy]) -> None:
    policy = policy_of(family, LoraSettings(rank=4, alpha=8))
    ids = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))
    attention = torch.ones_like(ids)
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
        policy = policy_of("qwen3", enable_thinking=True)
        tokenizer = policy.tokenizer
        thoughts = [f"<think>\nShe asks {n}.\n</think>\n\n{reply}" for n, reply in enumerate(REPLIED)]
        ids = policy.first_prompt("You are Ann.", SAID[0])
        messages = [{"role": "system", "content": "You are Ann."}, {"role": "user", "content": SAID[0]}]
        for message, text, reply in zip(SAID[1:], thoughts, REPLIED, strict=True):
            sampled = [*tokenizer.encode(text), policy.end_of_turn_id]
            assert policy.spoken(sampled) == reply
            ids += sampled + policy.next_prompt(message)
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": message}]
        assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert policy.spoken(tokenizer.encode("<think>\nShe asks")) == ""
        assert policy.spoken(tokenizer.encode("Well <think>\nshe")) == "Well"
        assert policy.spoken(tokenizer.encode("Plain <|im_start|>")) == policy.spoken(tokenizer.encode("Plain "))
        logged = policy.encode_reply("Yes </think> no")
        assert tokenizer.decode(logged) == "<think>\n\n</think>\n\nYes < /think> no<|im_end|>"

    def test_opened_by_the_prompt(self, tokenizer_of: Callable[[str], Any], family_model: Callable[..., Any]) -> None:
        tokenizer = tokenizer_of("qwen3")
        tokenizer.chat_template = templates.qwen3_5_think_chat_template
        policy = Policy(family_model("qwen3"), tokenizer, template_options={"enable_thinking": True})
        assert policy.first_prompt("i", "m")[-2:] == tokenizer.encode("<think>\n")
        assert policy.format.reasons
        assert policy.format.lead == "\n</think>\n\n"
        assert policy.spoken(tokenizer.encode("hm\n</think>\n\nYes.<|im_end|>")) == "Yes."
        assert policy.spoken(tokenizer.encode("hm, what")) == ""


def test_checkpoint_keeps_the_template_it_was_trained_on(
    tmp_path: Path,
    tokenizer_of: Callable[[str], Any],
    family_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family_model("qwen3").save_pretrained(tmp_path / "base")
    tokenizer_of("qwen3").save_pretrained(tmp_path / "base")
    policy = Policy.load(tmp_path / "base", device="cpu")
    policy.save(tmp_path / "adapter")
    monkeypatch.setitem(sys.modules, "trl", None)  # not needed again
    assert Policy.load(tmp_path / "adapter", device="cpu").format == policy.format
    with pytest.raises(ValueError, match="pip install trl"):
        Policy.load(tmp_path / "base", device="cpu")
