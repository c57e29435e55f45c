"""The learner on the device at hand, CUDA where there is one: its gradients, its log-probs, its memory tricks."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch

from ppg_agents.generation.hf import HFSampler
from ppg_agents.policy import Policy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def gradient(policy: Policy, ids: torch.Tensor) -> torch.Tensor:
    policy.model.zero_grad(set_to_none=True)
    policy.log_probs(ids, torch.ones_like(ids, dtype=torch.bool), chunk=16).sum().backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.flatten().cpu() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_of_the_cpu_in_float64(make_policy: Callable[..., Policy], checkpointing: bool) -> None:
    ids = torch.arange(60).view(3, 20) * 4
    plain = make_policy()
    exact = gradient(Policy(deepcopy(plain.model).double(), plain.tokenizer), ids)
    policy = Policy(plain.model.to(DEVICE), plain.tokenizer)
    policy.gradient_checkpointing(checkpointing)
    assert policy.device.type == DEVICE
    torch.testing.assert_close(gradient(policy, ids).double(), exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 1e-4), (torch.bfloat16, 0.25)])
def test_learner_and_sampler_agree_about_what_was_sampled(dtype: torch.dtype, gap: float) -> None:
    policy = Policy.load(device=DEVICE, dtype=dtype)
    sampler = HFSampler(policy, max_new_tokens=12)
    prompts = [policy.first_prompt("You are Ann.", "hello"), policy.first_prompt("You are Bo, and you paint.", "hi")]
    before = [p.detach().clone() for p in policy.model.parameters()]
    sampler.start(2)
    with policy.merged():
        replies = sampler.reply(prompts, torch.Generator(policy.device).manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply is not None
        ids = torch.tensor([[*prompt, *reply.token_ids]])
        with torch.no_grad():
            scored = policy.log_probs(ids, torch.ones_like(ids, dtype=torch.bool))[0, len(prompt) :].cpu()
        torch.testing.assert_close(scored, torch.tensor(reply.log_probs), rtol=0, atol=gap, check_dtype=False)
