"""Prompts, log-probabilities, merging and saving of a policy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppg_agents.policy import LoraSettings, Policy, add_lora
from ppg_agents.policy.prompts import prompt_format

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
DROPS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if empty_thought %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
OPEN_ENDED = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
FORGETS = CHATML.replace("{{ m.content }}", "{{ m.content if loop.index0 > 0 and loop.last else 'hi' }}")
NUMBERED = CHATML.replace("{{ m.role }}", "{{ m.role }}{{ loop.index if m.role == 'user' else '' }}")
IM = ("<|im_start|>", "<|im_end|>", "<|bos|>")


def naive_log_probs(policy: Policy, ids: torch.Tensor) -> torch.Tensor:
    scores = policy.model(input_ids=ids).logits.log_softmax(-1)
    own = scores[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return torch.cat([torch.zeros(len(ids), 1, dtype=own.dtype), own], 1)


@pytest.mark.parametrize("chunk", [None, 3])
def test_log_probs_and_their_gradient_are_those_of_the_full_softmax(
    make_policy: Callable[..., Policy], chunk: int | None
) -> None:
    policy = make_policy(dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (3, 12), generator=generator)
    attention = torch.arange(12) < torch.tensor([[12], [7], [9]])
    token_mask = attention & (torch.rand(3, 12, generator=generator) < 0.6)
    weight = torch.randn(3, 12, generator=generator, dtype=torch.float64)

    got = policy.log_probs(ids, attention, token_mask, chunk=chunk)
    expected = naive_log_probs(policy, ids) * token_mask
    expected[:, 0] = 0
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), policy.parameters()),
        torch.autograd.grad((expected * weight).sum(), policy.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_head_never_sees_more_than_a_chunk(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    logits = policy.logits
    monkeypatch.setattr(policy, "logits", lambda h: sizes.append(h.shape[:-1].numel()) or logits(h))
    ids = torch.randint(0, 256, (4, 20))
    token_mask = torch.arange(20)[None] % 2 == 0
    policy.log_probs(ids, torch.ones_like(ids), token_mask.expand(4, 20), chunk=8).sum().backward()
    assert max(sizes) <= 8
    assert sum(sizes) == 2 * 4 * 9  # selected positions only, once forward and once again backward


def test_temperature_and_refusals(policy: Policy) -> None:
    ids = torch.tensor([[1, 2, 3]])
    ones = torch.ones_like(ids)
    cold = policy.log_probs(ids, ones, temperature=0.5)[0, 1]
    expected = (policy.model(input_ids=ids[:, :1]).logits[0, -1] / 0.5).log_softmax(-1)[2]
    torch.testing.assert_close(cold, expected)
    assert policy.log_probs(ids, ones, torch.zeros_like(ids)).tolist() == [[0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="padded on the right"):
        policy.log_probs(ids, torch.tensor([[0, 1, 1]]))
    with pytest.raises(ValueError, match="one shape"):
        policy.log_probs(ids, torch.ones(1, 2))


def test_softcapped_logits_are_respected(family_model: Callable[..., Any], byte_tokenizer: Callable[..., Any]) -> None:
    model = family_model("gemma2", final_logit_softcapping=2.0)
    policy = Policy(add_lora(model, LoraSettings(rank=2)), byte_tokenizer())
    ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = policy.log_probs(ids, torch.ones_like(ids))
        torch.testing.assert_close(got, naive_log_probs(policy, ids), rtol=0, atol=1e-5)


def test_unknown_head_is_refused(tiny_llama: Callable[..., Any], byte_tokenizer: Callable[..., Any]) -> None:
    model = tiny_llama()
    model.config.final_logit_softcapping = 1.0  # Llama's own forward does not apply it
    with pytest.raises(ValueError, match="whose logits differ"):
        Policy(model, byte_tokenizer())


def test_merged_computes_the_same_and_restores_bit_for_bit(policy: Policy) -> None:
    ids = torch.randint(0, 256, (2, 10))
    before = {k: v.clone() for k, v in policy.model.state_dict().items()}
    expected = policy.log_probs(ids, torch.ones_like(ids))
    modules = [type(m).__name__ for m in policy.model.modules()]
    with policy.merged(), policy.merged():
        assert not any("lora" in name for name, _ in policy.model.get_base_model().named_parameters())
        torch.testing.assert_close(policy.log_probs(ids, torch.ones_like(ids)), expected, rtol=0, atol=1e-4)
    with pytest.raises(KeyboardInterrupt), policy.merged():
        raise KeyboardInterrupt
    after = policy.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert [type(m).__name__ for m in policy.model.modules()] == modules


def test_lora_dropout_is_active_only_while_gradients_are_recorded(
    tiny_llama: Callable[..., Any], byte_tokenizer: Callable[..., Any]
) -> None:
    policy = Policy(add_lora(tiny_llama(), LoraSettings(rank=4, dropout=0.5)), byte_tokenizer())
    ids = torch.arange(8)[None]
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
        a, b = (policy.log_probs(ids, torch.ones_like(ids)) for _ in range(2))
    assert torch.equal(a, b)
    torch.manual_seed(0)
    c, d = (policy.log_probs(ids, torch.ones_like(ids)) for _ in range(2))
    assert not torch.equal(c, d)


@pytest.mark.parametrize("template", ["own", "chatml", "no system"])
def test_prompts_add_up_to_the_template_of_the_whole_conversation(
    byte_tokenizer: Callable[..., Any], tiny_llama: Callable[..., Any], template: str
) -> None:
    choices = {"own": (), "chatml": (CHATML, IM), "no system": (NO_SYSTEM, IM)}
    tokenizer = byte_tokenizer(*choices[template])
    policy = Policy(tiny_llama(), tokenizer)
    said, replied = ["Hello, who are you?", "Really?\nSure?", "Ünïcode 🙂"], ["I am Ann.", " Yes  "]
    ids = policy.first_prompt("You are Ann.", said[0])
    for message, reply in zip(said[1:], replied, strict=True):
        ids += [*tokenizer.encode(reply, add_special_tokens=False), policy.end_of_turn_id]
        ids += policy.next_prompt(message)
    first = {"role": "user", "content": said[0]}
    messages = [{"role": "system", "content": "You are Ann."}, first]
    if template == "no system":
        messages = [{"role": "user", "content": f"You are Ann.\n\n{said[0]}"}]
        tokenizer.chat_template = tokenizer.chat_template.replace(" | trim", "")
    for message, reply in zip(said[1:], replied, strict=True):
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": message}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ids == tokenizer.encode(whole, add_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "options", "reason"),
    [
        (None, {}, "chat template, got none"),
        (DROPS_THOUGHTS, {}, "rewrites an earlier turn"),
        (DROPS_THOUGHTS, {"empty_thought": True}, "rewrites an earlier turn"),
        (OPEN_ENDED, {}, "close a reply with a control token"),
        (FORGETS, {}, "rewrites an earlier turn|once"),
        (NUMBERED, {}, "same text between"),
        ("{{ raise_exception('broken') }}", {}, "broken"),
    ],
)
def test_template_that_cannot_be_trained_on_is_refused(
    byte_tokenizer: Callable[..., Any], template: str | None, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        prompt_format(byte_tokenizer(template, IM), options)


CONTROL_TEXT = st.lists(
    st.sampled_from(["<|end|>", "<|user|>", "<|", "end|>", "|>", "<", " ", "a", "<|e<|end|>nd|>", "<|pad|>"])
).map("".join)


@settings(max_examples=200, deadline=None)
@given(CONTROL_TEXT, CONTROL_TEXT)
def test_control_tokens_in_content_are_plain_text(instruction: str, message: str) -> None:
    policy = _shared_policy()
    control = set(policy.tokenizer.all_special_ids) | set(policy.tokenizer.added_tokens_decoder)
    told = "i" if policy.format.plain(instruction) else ""
    for got, plain in (
        (policy.first_prompt(instruction, message), policy.first_prompt(told, "m")),
        (policy.next_prompt(message), policy.next_prompt("m")),
        (policy.encode_reply(message), policy.encode_reply("m")),
    ):
        assert [i for i in got if i in control] == [i for i in plain if i in control]


_POLICIES: list[Policy] = []


@pytest.fixture(autouse=True)
def _share(make_policy: Callable[..., Policy]) -> None:
    if not _POLICIES:
        _POLICIES.append(make_policy())


def _shared_policy() -> Policy:
    return _POLICIES[0]


def test_what_is_spoken_drops_control_tokens_only(policy: Policy) -> None:
    assert policy.spoken(policy.encode_reply("I do , really 🙂")) == "I do , really 🙂"


def test_load_and_save_round_trip(
    tmp_path: Path, tiny_llama: Callable[..., Any], byte_tokenizer: Callable[..., Any]
) -> None:
    base, saved = tmp_path / "base", tmp_path / "saved"
    tiny_llama().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    state = torch.random.get_rng_state()
    policy = Policy.load(base, lora=LoraSettings(rank=4), device="cpu", seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    twin = Policy.load(base, lora=LoraSettings(rank=4), device="cpu", seed=3)
    pairs = zip(policy.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)

    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    policy.save(saved)
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert not [f.name for f in saved.iterdir() if f.suffix in (".bin", ".pt", ".pkl", ".md")]
    ids = torch.arange(10)[None]
    expected = policy.log_probs(ids, torch.ones_like(ids))
    loaded = Policy.load(saved, device="cpu")
    assert loaded.parameters()
    twin.load_weights(saved)
    for other in (loaded, twin):
        assert torch.equal(other.log_probs(ids, torch.ones_like(ids)), expected)
    with pytest.raises(ValueError, match="other names or shapes"):
        Policy.load(base, lora=LoraSettings(rank=2), device="cpu").load_weights(saved)


def test_policy_without_lora_trains_all_weights(tmp_path: Path, make_policy: Callable[..., Policy]) -> None:
    policy, other = make_policy(lora=False), make_policy(lora=False, seed=5)
    assert len(policy.parameters()) == len(list(policy.model.parameters()))
    policy.save(tmp_path)
    other.load_weights(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), other.parameters(), strict=True))
