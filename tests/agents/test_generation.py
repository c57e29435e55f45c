"""The sampler against the model itself: same log-probs, same distribution, no influence between rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ppg_agents.generation import Sample
from ppg_agents.generation.hf import HFSampler
from ppg_agents.policy import LoraSettings, Policy, add_lora


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (length,), generator=generator(seed)).tolist()


@pytest.mark.parametrize("kind", ["full", "sliding"])
@pytest.mark.parametrize("merged", [True, False])
def test_log_probs_equal_one_pass_over_the_final_sequence(
    policy: Policy,
    family_model: Callable[..., Any],
    byte_tokenizer: Callable[..., Any],
    kind: str,
    merged: bool,
) -> None:
    """Prompts of different lengths, conversations that end at different turns, a cache that grows."""
    if kind == "sliding":
        policy = Policy(add_lora(family_model("gemma2"), LoraSettings(rank=2)), byte_tokenizer())
    sampler = HFSampler(policy, max_new_tokens=9, temperature=1.3)
    ends = [4, 1, 6, 2, 6]
    ids: list[list[int]] = [[] for _ in ends]
    scores: list[list[float]] = [[] for _ in ends]
    sampler.start(len(ends))
    random = generator()

    def talk() -> None:
        for turn in range(6):
            prompts = [
                prompt(3 + (7 * i + 5 * turn) % 30, 10 * i + turn) if turn < end else None for i, end in enumerate(ends)
            ]
            for i, sample in enumerate(sampler.reply(prompts, random)):
                given = prompts[i]
                assert (sample is None) == (given is None)
                if sample is not None and given is not None:
                    ids[i] += [*given, *sample.token_ids]
                    scores[i] += [0.0] * len(given) + list(sample.log_probs)

    if merged:
        with policy.merged():
            talk()
    else:
        talk()
    assert max(map(len, ids)) > 128  # the cache has grown
    for row, expected in zip(ids, scores, strict=True):
        tensor = torch.tensor([row])
        with torch.no_grad():
            got = policy.log_probs(tensor, torch.ones_like(tensor), temperature=1.3)[0]
        want = torch.tensor(expected)
        torch.testing.assert_close(got[want != 0], want[want != 0], rtol=0, atol=1e-4)


def test_greedy_is_the_models_own_generate(policy: Policy) -> None:
    sampler = HFSampler(policy, max_new_tokens=20, temperature=0)
    prompts = [prompt(5, 1), prompt(17, 2), prompt(11, 3)]
    sampler.start(3)
    for given, sample in zip(prompts, sampler.reply(prompts), strict=True):
        reference = policy.model.generate(
            input_ids=torch.tensor([given]),
            attention_mask=torch.ones(1, len(given), dtype=torch.long),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=policy.end_of_turn_id,
            pad_token_id=policy.pad_id,
        )
        assert sample is not None
        assert list(sample.token_ids) == reference[0, len(given) :].tolist()


def test_rows_do_not_influence_each_other(policy: Policy) -> None:
    turns = [[prompt(4 + i + 9 * t, 10 * i + t) for i in range(4)] for t in range(3)]

    def talk(rows: list[int]) -> list[list[Sample | None]]:
        sampler = HFSampler(policy, max_new_tokens=8, temperature=0)
        sampler.start(len(rows))
        return [sampler.reply([turn[i] for i in rows]) for turn in turns]

    together = talk([0, 1, 2, 3])
    for i in range(4):
        for turn, (alone,) in zip(together, talk([i]), strict=True):
            sample = turn[i]
            assert sample is not None
            assert alone is not None
            assert sample.token_ids == alone.token_ids


def test_draws_follow_the_distribution(policy: Policy) -> None:
    n = 8_000
    sampler = HFSampler(policy, max_new_tokens=1)
    sampler.start(n)
    counts = torch.zeros(policy.config.vocab_size)
    for sample in sampler.reply([[65, 66, 67]] * n, generator()):
        assert sample is not None
        counts[sample.token_ids[0]] += 1
    logits = policy.model(input_ids=torch.tensor([[65, 66, 67]])).logits[0, -1].detach()
    p = logits.double().softmax(-1)
    chi2 = float((((counts - n * p) ** 2) / (n * p)).sum())
    k = policy.config.vocab_size - 1
    assert abs(chi2 - k) < 5 * (2 * k) ** 0.5


def test_a_reply_ends_at_end_of_turn_or_at_the_limit(policy: Policy) -> None:
    head = policy.model.get_output_embeddings()
    with torch.no_grad():
        head.weight[policy.end_of_turn_id] = 0.02 * head.weight[:256].sum(0)
    sampler = HFSampler(policy, max_new_tokens=6)
    sampler.start(64)
    samples = [s for s in sampler.reply([prompt(5, i) for i in range(64)], generator()) if s is not None]
    assert {s.ended for s in samples} == {True, False}
    for sample in samples:
        assert len(sample.token_ids) == len(sample.log_probs) <= 6
        assert policy.end_of_turn_id not in sample.token_ids[:-1]
        assert sample.ended == (sample.token_ids[-1] == policy.end_of_turn_id)
        assert sample.ended or len(sample.token_ids) == 6


def test_same_generator_seed_same_replies(policy: Policy) -> None:
    def talk(seed: int) -> list[Sample | None]:
        sampler = HFSampler(policy, max_new_tokens=5)
        sampler.start(3)
        return sampler.reply([prompt(5, 0)] * 3, generator(seed))

    assert talk(1) == talk(1)
    assert talk(1) != talk(2)


def test_refusals(policy: Policy) -> None:
    with pytest.raises(ValueError, match="max_new_tokens >= 1"):
        HFSampler(policy, max_new_tokens=0)
    sampler = HFSampler(policy)
    sampler.start(2)
    with pytest.raises(ValueError, match="expected 2 prompts"):
        sampler.reply([[1]], generator())
    with pytest.raises(ValueError, match="generator"):
        sampler.reply([[1], [2]])
    with pytest.raises(ValueError, match="at least one token"):
        sampler.reply([[1], []], generator())
    assert sampler.reply([None, None], generator()) == [None, None]
    policy.version += 1
    with pytest.raises(RuntimeError, match="after learning"):
        sampler.reply([[1], [2]], generator())
    policy.config.layer_types = ["linear_attention"]
    with pytest.raises(ValueError, match="sliding-window attention"):
        HFSampler(policy)


def test_a_sample_says_whose_it_is(policy: Policy) -> None:
    policy.version = 4
    sampler = HFSampler(policy, max_new_tokens=2, temperature=0.7)
    sampler.start(1)
    (sample,) = sampler.reply([[65]], generator())
    assert sample is not None
    assert (sample.policy_version, sample.temperature, sample.sampler) == (4, 0.7, "hf")
