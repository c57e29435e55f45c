"""Per-turn gradients against the definition and against the learner's own, and the projection's known error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ppg_agents import baselines, credit
from ppg_agents.agents.learner import Learner
from ppg_agents.batch import batch
from ppg_agents.credit import PolicyClass
from ppg_agents.horizon.choice import choose
from ppg_agents.horizon.sketch import CountSketch, sketch, turn_gradients
from ppg_agents.policy import Policy
from ppg_agents.trajectory import Trajectory, Turn

Make = Callable[..., Policy]


def ledger(policy: Policy, turns: list[int], seed: int = 0) -> list[Trajectory]:
    """Return conversations with so many turns each: random tokens and rewards, one instruction, own personas."""
    random = np.random.default_rng(seed)

    def one_turn() -> Turn:
        prompt, tokens = random.integers(0, 256, 5), random.integers(0, 256, int(random.integers(1, 6)))
        ids = (*tokens.tolist(), policy.end_of_turn_id)
        return Turn("m", "r", tuple(prompt.tolist()), ids, (math.nan,) * len(ids), float(random.random()))

    return [Trajectory("i", f"p{b}", "d", None, tuple(one_turn() for _ in range(n)), True, False)
            for b, n in enumerate(turns)]  # fmt: skip


def flat(gradients: list[torch.Tensor | None]) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gradients if g is not None])


def test_each_turn_has_its_own_gradient(make_policy: Make) -> None:
    """Turn by turn, the whole softmax on the turn's prefix; the batch scores a conversation once."""
    policy = make_policy(dtype=torch.float64)
    trajectory = ledger(policy, [3])[0]
    found = dict(turn_gradients(policy, batch([trajectory], policy.pad_id), 0))
    assert list(found) == [0, 1, 2]
    for t, span in enumerate(trajectory.spans()):
        prefix = trajectory.token_ids()[: span.end]
        scores = policy.model(input_ids=torch.tensor([prefix])).logits[0].log_softmax(-1)
        own = sum(scores[i - 1, prefix[i]] for i in range(span.start, span.end))
        naive = flat(list(torch.autograd.grad(own, policy.parameters())))
        torch.testing.assert_close(flat(found[t]), naive, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mask", [credit.full, credit.greedy, lambda n: credit.k_step(n, 2)])
def test_weighted_turns_add_up_to_the_learners_gradient(policy: Policy, mask: Any) -> None:
    conversations = ledger(policy, [3, 1, 2, 4])
    agent = Learner(policy, mask, baseline="leave-one-out", learning_rate=0.0, max_grad_norm=1e9)
    agent.learn(conversations)
    learner = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    data = batch(conversations, policy.pad_id)
    value = credit.credit(data.rewards, mask(4), data.valid)
    advantage = np.where(data.valid, value - baselines.leave_one_out(value, data.valid, ["i"] * 4), 0.0)
    summed = sum(
        float(advantage[b, t]) * flat(g) for b in range(4) for t, g in turn_gradients(policy, data, b)
    ) / len(conversations)  # fmt: skip
    assert isinstance(summed, torch.Tensor)
    torch.testing.assert_close(-learner, summed, rtol=0, atol=1e-5)
    assert float(summed.norm()) > 0.01


def test_a_sketch_keeps_products_and_leaves_the_policy_alone(policy: Policy) -> None:
    conversations = ledger(policy, [3, 2])
    data = batch(conversations, policy.pad_id)
    exact = torch.stack([flat(g) for b in range(2) for _, g in turn_gradients(policy, data, b)]).double().numpy()
    before = [p.clone() for p in policy.parameters()]
    counted: list[int] = []
    found = sketch(policy, conversations, dimension=2048, seed=3, done=counted.append)
    assert (counted, found.personas, found.parameters) == ([1, 2], ("p0", "p1"), exact.shape[1])
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(policy.parameters(), before, strict=True))
    assert not found.vectors[1, 2].any()
    assert list(found.valid.sum(1)) == [3, 2]
    kept = found.vectors[found.valid].astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1)
    error = (kept @ kept.T - exact @ exact.T) / np.outer(lengths, lengths)
    assert np.abs(error).max() < 5 * math.sqrt(2 / 2048)
    again = sketch(policy, conversations, dimension=2048, seed=3)
    np.testing.assert_array_equal(found.vectors, again.vectors)


def test_an_unjudged_turn_is_zero(policy: Policy) -> None:
    trajectory = ledger(policy, [2])[0]
    lost = Turn("m", "r", (1, 2), (3,), (math.nan,), math.nan)
    found = sketch(policy, [Trajectory("i", "", "d", None, (lost, *trajectory.turns, lost), True, False)], dimension=8)
    assert list(found.vectors[0].any(1)) == [False, True, True, False]
    assert found.personas == ("conversation 0",)


def splitmix(state: int) -> int:
    """Reference in Python's own integers (Steele, Lea, Flood 2014)."""
    mask = 2**64 - 1
    z = ((state + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_the_hash_is_splitmix64_on_every_device() -> None:
    assert splitmix(0) == 0xE220A8397B1DCDAF  # the published first output for seed 0
    bucket, sign = CountSketch(1000, seed=7).places(5, 20, torch.device("cpu"))
    offset = splitmix(7)
    words = [splitmix((i + offset) % 2**64) for i in range(5, 25)]
    assert bucket.tolist() == [(w >> 1) % 1000 for w in words]
    assert sign.tolist() == [2 * (w & 1) - 1 for w in words]


def test_count_sketch_has_the_known_mean_and_variance() -> None:
    random, dimension = np.random.default_rng(0), 16
    x, y = random.normal(size=(2, 40))
    y += 0.5 * x
    pieces = [torch.from_numpy(np.stack([x, y]))]
    products = []
    for seed in range(1000):
        project = CountSketch(dimension, seed)
        sx, sy = (project([row], [40]) for row in pieces[0])
        products.append(float(sx @ sy))
    expected = (x @ x) * (y @ y) + (x @ y) ** 2 - 2 * ((x * y) ** 2).sum()
    assert np.mean(products) == pytest.approx(x @ y, abs=4 * math.sqrt(expected / dimension / 1000))
    assert np.var(products) == pytest.approx(expected / dimension, rel=0.15)


def test_count_sketch_is_linear_and_does_not_care_for_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    project = CountSketch(8, 1)
    whole = project([x], [100])
    torch.testing.assert_close(project([x[:30], x[30:].view(7, 10)], [30, 70]), whole)
    head = x.clone()
    head[30:] = 0
    torch.testing.assert_close(project([x[:30], None], [30, 70]), project([head], [100]))
    monkeypatch.setattr("ppg_agents.horizon.sketch._CHUNK", 7)
    torch.testing.assert_close(project([x], [100]), whole)
    with pytest.raises(ValueError, match="dimension >= 1"):
        CountSketch(0)


def test_choose_answers_and_repeats_itself(policy: Policy) -> None:
    conversations = ledger(policy, [3] * 8)
    classes = [PolicyClass("greedy"), PolicyClass("k-step", 3), PolicyClass("full")]

    def once(previous: PolicyClass) -> Any:
        return choose(conversations, policy, classes, previous, np.random.default_rng(0))

    first, second = once(PolicyClass("greedy")), once(PolicyClass("greedy"))
    assert first == second
    assert {c.label for c in first.report.classes} == {"greedy", "full"}  # 3-step is full planning of 3 turns
    assert (first.policy_class.label, first.switched) == ("full", True)  # random rewards show no direction
    kept = once(PolicyClass("k-step", 3))
    assert (kept.policy_class.label, kept.switched) == ("full", False)
    assert "keeping full" in kept.reason
