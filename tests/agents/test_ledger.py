"""Every check of the ledger, broken on purpose; and what it measures on a real rollout."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv

from ppg_agents import credit, ledger
from ppg_agents.agents.gradient import trained_tokens
from ppg_agents.agents.learner import Learner
from ppg_agents.batch import Batch, batch
from ppg_agents.cli import main
from ppg_agents.config.settings import TrainConfig
from ppg_agents.generation.hf import HFSampler
from ppg_agents.ledger import Gap, LedgerError
from ppg_agents.policy import LoraSettings, Policy, add_lora
from ppg_agents.rollout import collect
from ppg_agents.rollout.environment import make_envs
from ppg_agents.trajectory import Trajectory, Turn

Make = Callable[..., Policy]
Envs = Callable[..., SyncVectorEnv]


def turn(prompt: list[int], tokens: list[int], reward: float = 1.0, **fields: Any) -> Turn:
    log_probs = tuple(-0.5 * (i + 1) for i in range(len(tokens)))
    return Turn("m", "r", tuple(prompt), tuple(tokens), log_probs, reward, **fields)


def trajectory(*turns: Turn) -> Trajectory:
    return Trajectory("Be Ann.", "ann", "d", 7, turns, True, False)


PLAYED = [
    trajectory(turn([1, 2], [3, 4], 0.25), turn([5], [6], math.nan), turn([7, 8], [9])),
    trajectory(turn([1], [2], policy_version=3)),
]


def edited(tensor: torch.Tensor, b: int, i: int, value: Any) -> torch.Tensor:
    changed = tensor.clone()
    changed[b, i] = value
    return changed


def respan(data: Batch, b: int, t: int, span: tuple[int, int, int]) -> Batch:
    spans = data.spans.copy()
    spans[b, t] = span
    return replace(data, spans=spans)


def test_an_untouched_batch_passes() -> None:
    data = batch(PLAYED, 0, n_turns=4)
    assert [list(map(tuple, row)) for row in data.spans.tolist()] == [
        [(0, 2, 4), (4, 5, 6), (6, 8, 9), (-1, -1, -1)],
        [(0, 1, 2), (-1, -1, -1), (-1, -1, -1), (-1, -1, -1)],
    ]
    ledger.check_batch(PLAYED, data, trained_tokens(data))


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda d: respan(d, 0, 1, (3, 5, 6)), r"spans of conversation 1 of 2 \(persona 'ann', seed 7\), turn 2 of 3"),
        (lambda d: respan(d, 0, 1, (5, 5, 6)), r"to begin at 4, got prompt \[5, 5\), reply to 6"),
        (lambda d: respan(d, 0, 2, (6, 8, 10)), r"turn 3 of 3 inside tokens \[1, 9\), got \[8, 10\)"),
        (lambda d: respan(d, 1, 0, (0, 0, 2)), r"conversation 2 .* inside tokens \[1, 2\), got \[0, 2\)"),
        (lambda d: respan(d, 0, 0, (0, 1, 4)), r"2 prompt and 2 reply tokens at .* turn 1 of 3, got spans of 1 and 3"),
        (lambda d: respan(d, 1, 1, (2, 3, 4)), r"1 turns in conversation 2 .* a span of one more"),
        (lambda d: replace(d, attention=edited(d.attention, 1, 2, True)), r"2 tokens in conversation 2 .* a row of 3"),
        (lambda d: replace(d, ids=edited(d.ids, 0, 3, 99)), r"id 4 of the ledger at .* turn 1 of 3, token 3 .* got 99"),
        (lambda d: replace(d, ids=edited(d.ids, 0, 4, 99)), r"id 5 of the ledger at .* turn 2 of 3, token 4 .* got 99"),
        (
            lambda d: replace(d, sampling_log_probs=edited(d.sampling_log_probs, 0, 3, -0.75)),
            r"sampling log-prob -1.0 of the ledger at .* turn 1 of 3, token 3 of the row, got -0.75",
        ),
        (lambda d: replace(d, turn_index=edited(d.turn_index, 0, 8, 1)), r"turn index 2 .* turn 3 of 3, token 8"),
        (lambda d: replace(d, rewards=np.where(d.rewards == 0.25, 0.75, d.rewards)), r"reward 0.25 .* got 0.75"),
        (lambda d: replace(d, token_mask=edited(d.token_mask, 0, 7, True)), r"got True at token 7 .* is not a sampled"),
        (lambda d: replace(d, token_mask=edited(d.token_mask, 0, 2, False)), r"got False at token 2 .* is a sampled"),
    ],
)
def test_a_batch_that_is_not_the_ledger_is_refused(corrupt: Callable[[Batch], Batch], message: str) -> None:
    data = batch(PLAYED, 0, n_turns=4)
    with pytest.raises(LedgerError, match=message):
        ledger.check_batch(PLAYED, corrupt(data), trained_tokens(data))


@pytest.mark.parametrize(("token", "said"), [(1, "is not"), (5, "is not"), (8, "is")])
def test_only_sampled_tokens_of_judged_turns_are_trained_on(token: int, said: str) -> None:
    data = batch(PLAYED, 0)
    trained = trained_tokens(data)
    wrong = edited(trained, 0, token, not trained[0, token])
    with pytest.raises(LedgerError, match=rf"of trained tokens .* at token {token} of .* {said} a sampled token of a"):
        ledger.check_batch(PLAYED, data, wrong)


def versions(*numbers: int) -> list[Trajectory]:
    return [trajectory(*(turn([1], [2], policy_version=k) for k in numbers))]


def test_versions() -> None:
    assert ledger.staleness(versions(5, 5), 5) == 0
    assert ledger.staleness(versions(5, 3), 5, allowed=2) == 2
    assert ledger.of_version(versions(5, 3), 5, 3).tolist() == [[True, False, False]]
    with pytest.raises(LedgerError, match=r"policy version 5 at .* turn 2 of 2, got version 4; the sampler does"):
        ledger.staleness(versions(5, 4), 5)
    with pytest.raises(LedgerError, match=r"version 5 or up to 1 older at .* turn 1 of 1, got version 3; .* >= 2"):
        ledger.staleness(versions(3), 5, allowed=1)
    with pytest.raises(LedgerError, match=r"got version 6; the conversation is from another run"):
        ledger.staleness(versions(6), 5, allowed=9)
    with pytest.raises(LedgerError, match=r"got version -1; the reply is a logged one"):
        ledger.staleness(versions(-1), 0, allowed=9)


def test_one_temperature() -> None:
    def at(*temperatures: float) -> list[Trajectory]:
        return [trajectory(*(turn([1], [2], temperature=x) for x in temperatures))]

    assert ledger.temperature(at(0.7, 0.7)) == 0.7
    assert ledger.temperature(at()) == 1.0
    with pytest.raises(LedgerError, match=r"got 0.7 and, at .* turn 2 of 2, 1.0"):
        ledger.temperature(at(0.7, 1.0))
    with pytest.raises(LedgerError, match=r"above 0, got 0.0 at .* turn 1 of 1"):
        ledger.temperature(at(0.0))


def test_gap_by_hand() -> None:
    own = torch.tensor([[0.0, -1.0, -2.0, -3.0], [0.0, -1.0, -9.0, -9.0]])
    theirs = torch.tensor([[5.0, -1.5, -2.25, math.nan], [5.0, -1.125, -1.0, 0.0]])
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0]], dtype=torch.bool)
    whole = ledger.gap(own, theirs, mask, [4, 2])
    assert (whole.count, whole.total, whole.largest, whole.mean) == (3, 0.875, 0.5, 0.875 / 3)
    first, second = whole.conversations
    assert (first.row, first.count, first.total, first.largest) == (4, 2, 0.75, 0.5)
    assert (first.position, first.learner, first.sampler) == (1, -1.0, -1.5)
    assert first.uncertain == pytest.approx(2 - math.exp(-1.5) - math.exp(-2.25))
    assert (second.row, second.count, second.total, second.position) == (2, 1, 0.125, 1)
    parts = [ledger.gap(own[[i]], theirs[[i]], mask[[i]], [row]) for i, row in ((0, 4), (1, 2))]
    assert sum(parts, Gap()) == whole
    assert ledger.gap(own, torch.full_like(own, math.nan), mask, [0, 1]) == Gap()
    assert ledger.gap_fault(Gap(), 0.1, PLAYED) is None


def batch_of(conversations: int, tokens: int, probability: float) -> tuple[list[Trajectory], torch.Tensor]:
    """Return conversations of one long reply each, and the sampler's log-probs [conversations, 1 + tokens]."""
    score = math.log(probability)
    reply = Turn("m", "r", (1,), tuple(range(tokens)), (score,) * tokens, 1.0, sampler="hf")
    return [trajectory(reply)] * conversations, torch.full((conversations, 1 + tokens), score)


class TestRounding:
    """The limit is one of nats per uncertain token: 0.12 here, as in bfloat16."""

    def fault(self, played: list[Trajectory], sampler: torch.Tensor, learner: torch.Tensor) -> str | None:
        mask = torch.ones(sampler.shape, dtype=torch.bool)
        mask[:, 0] = False
        return ledger.gap_fault(ledger.gap(learner, sampler, mask, range(len(sampler))), 0.12, played)

    def test_one_token_in_thousands_is_rounding(self) -> None:
        played, sampler = batch_of(20, 100, 0.4)
        noise = torch.randn(sampler.shape, generator=torch.Generator().manual_seed(0))
        learner = sampler + 0.05 * noise
        learner[7, 50] -= 3.0
        assert self.fault(played, sampler, learner) is None
        played, sampler = batch_of(1, 4, 0.4)  # nor is it in a short batch
        learner = sampler.clone()
        learner[0, 2] -= 1.1
        assert self.fault(played, sampler, learner) is None

    def test_a_small_difference_everywhere_is_another_sampler(self) -> None:
        played, sampler = batch_of(20, 100, 0.4)
        message = (
            r"within 0.12 nats per uncertain token, got 0.16\d over 2000 tokens of the batch; most at conversation"
        )
        assert re.search(message, str(self.fault(played, sampler, sampler - 0.1)))

    def test_a_sure_token_counts_less(self) -> None:
        played, sampler = batch_of(20, 100, 0.95)
        assert self.fault(played, sampler, sampler - 0.005) is None
        assert self.fault(played, sampler, sampler - 0.05)

    def test_one_wrong_conversation_of_many_is_found(self) -> None:
        played, sampler = batch_of(40, 100, 0.4)
        learner = sampler.clone()
        learner[3] -= 0.2
        message = (
            r"within 0.24 nats per uncertain token, got 0.28\d over 100 of one conversation; most at conversation 4"
        )
        assert re.search(message, str(self.fault(played, sampler, learner)))

    def test_rounding_of_logits_grows_as_the_temperature_falls(self) -> None:
        played, sampler = batch_of(20, 100, 0.4)
        assert self.fault(played, sampler, sampler - 0.1)
        cool = [replace(t, turns=tuple(replace(turn, temperature=0.5) for turn in t.turns)) for t in played]
        assert self.fault(cool, sampler, sampler - 0.1) is None

    def test_the_advice_can_be_followed(self) -> None:
        played, sampler = batch_of(20, 100, 0.4)
        advised = re.search(r"--set max_log_prob_gap=([\d.]+)", str(self.fault(played, sampler, sampler - 0.1)))
        assert advised
        found = ledger.gap(sampler - 0.1, sampler, torch.ones(sampler.shape, dtype=torch.bool), range(20))
        assert ledger.gap_fault(found, float(advised[1]), played) is None


def rollout(policy: Policy, envs: SyncVectorEnv, temperature: float = 1.0, seed: int = 0) -> list[Trajectory]:
    sampler = HFSampler(policy, max_new_tokens=6, temperature=temperature)
    return collect(envs, policy, sampler, [0, 1, 2], torch.Generator().manual_seed(seed))


def swap(played: list[Trajectory], b: int, t: int, **fields: Any) -> list[Trajectory]:
    turns = list(played[b].turns)
    turns[t] = replace(turns[t], **fields)
    return [*played[:b], replace(played[b], turns=tuple(turns)), *played[b + 1 :]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_learner_agrees_with_the_sampler_at_its_temperature(
    make_policy: Make, toy_envs: Envs, temperature: float
) -> None:
    policy = make_policy()
    agent = Learner(policy, credit.full, micro_batch_tokens=200)
    played = rollout(policy, toy_envs(*[{"turns": 3}] * 3), temperature)
    assert {turn.temperature for t in played for turn in t.turns} == {temperature}
    metrics = agent.learn(played)
    assert 0 < metrics["log_prob_gap_mean"] <= metrics["log_prob_gap_max"] < 1e-5
    assert metrics["staleness_max"] == 0


def test_a_log_prob_that_is_not_the_policy_s_stops_learning(make_policy: Make, toy_envs: Envs) -> None:
    policy = make_policy()
    agent = Learner(policy, credit.full, learning_rate=1.0, micro_batch_tokens=200)
    before = [p.detach().clone() for p in policy.parameters()]
    played = rollout(policy, toy_envs(*[{"turns": 3}] * 3))
    own = played[1].turns[2]
    forged = tuple(p - 0.25 * (i == 1) for i, p in enumerate(own.log_probs))
    message = (
        rf"within 0.00\d+ nats per uncertain token, got 0.0\d+ over .* conversation 2 of 3 .*, turn 3 of 3, "
        rf"token 2 of {len(forged)} \(id {own.token_ids[1]}\): {forged[1]:.6f} \(sampler 'hf'\) and -\d+\.\d+ "
        r"\(learner\), 0.2(5|499)\d+ apart"
    )
    with pytest.raises(LedgerError, match=message):
        agent.learn(swap(played, 1, 2, log_probs=forged))
    assert (agent.steps, policy.version) == (0, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    nobody_knows = swap(played, 1, 2, log_probs=(math.nan,) * len(forged))
    assert agent.learn(nobody_knows)["log_prob_gap_max"] < 1e-5
    assert Learner(make_policy(), credit.full, max_log_prob_gap=0.5).learn(swap(played, 1, 2, log_probs=forged))


def test_a_rollout_of_the_version_before_is_caught_by_its_label_and_by_its_log_probs(
    make_policy: Make, toy_envs: Envs
) -> None:
    policy = make_policy()
    agent = Learner(policy, credit.full, baseline="none", learning_rate=0.01)
    envs = toy_envs(*[{"turns": 2}] * 3)
    played = swap(rollout(policy, envs), 0, 0, reward=1.0)
    agent.learn(played)
    with pytest.raises(LedgerError, match=r"policy version 1 at conversation 1 of 3 .* turn 1 of 2, got version 0"):
        agent.learn(played)
    one_old = swap(rollout(policy, envs), 2, 1, policy_version=0)
    with pytest.raises(LedgerError, match=r"conversation 3 of 3 .* turn 2 of 2, got version 0"):
        agent.learn(one_old)
    relabelled = [replace(t, turns=tuple(replace(x, policy_version=1) for x in t.turns)) for t in played]
    with pytest.raises(LedgerError, match="sampled from another distribution"):
        agent.learn(relabelled)
    stale = Learner(policy, credit.full, learning_rate=0.0, max_staleness=1, importance="turn")
    metrics = stale.learn(played)
    assert metrics["staleness_max"] == 1
    assert "log_prob_gap_max" not in metrics
    assert 0 < metrics["importance_ess"] < 1


def test_dropout_is_not_a_gap(toy_envs: Envs, tiny_llama: Any, byte_tokenizer: Any) -> None:
    model = add_lora(tiny_llama(), LoraSettings(rank=4, alpha=64, dropout=0.5), seed=1)
    for name, parameter in model.named_parameters():
        parameter.data += 0.1 * ("lora_B" in name)
    policy = Policy(model, byte_tokenizer())
    agent = Learner(policy, credit.full, baseline="none", importance="turn")
    metrics = agent.learn(rollout(policy, toy_envs(*[{"turns": 2}] * 3)))
    assert metrics["log_prob_gap_max"] < 1e-3
    assert metrics["importance_ess"] == pytest.approx(1)
    assert metrics["importance_truncated"] == 0


def test_mixed_temperatures_and_unknown_log_probs_stop_learning(policy: Policy, toy_envs: Envs) -> None:
    played = rollout(policy, toy_envs(*[{"turns": 2}] * 3))
    with pytest.raises(LedgerError, match="one temperature in a batch"):
        Learner(policy, credit.full).learn(swap(played, 0, 1, temperature=0.5))
    unknown = swap(played, 0, 1, log_probs=(math.nan,) * len(played[0].turns[1].token_ids))
    with pytest.raises(LedgerError, match=r"sampling log-probs at conversation 1 of 3 .* turn 2 of 2"):
        Learner(policy, credit.full, importance="turn").learn(unknown)
    with pytest.raises(ValueError, match=r"max_log_prob_gap > 0 and max_staleness >= 0, got None and -1"):
        Learner(policy, credit.full, max_staleness=-1)


def test_the_limit_goes_by_precision() -> None:
    limits = {dtype: ledger.default_gap_limit(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)}
    assert list(limits.values()) == [0.001, 0.001, 0.12]


WRONG: dict[str, Callable[[Policy], Any]] = {
    "none": lambda policy: None,
    "version before": lambda policy: nudge(policy, 0.003),
    "another adapter": lambda policy: nudge(policy, 0.1),
}


def nudge(policy: Policy, size: float) -> None:
    """Move every weight of the adapter, as learning does."""
    generator = torch.Generator().manual_seed(4)
    for parameter in policy.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator).sign()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", [*WRONG, "temperature 0.8", "temperature 0.95"])
def test_the_embedded_model_finds_every_wrong_sampler(dtype: str, wrong: str) -> None:
    policy = Policy.load(device="cpu", dtype=getattr(torch, dtype), seed=1)
    nudge(policy, 0.01)
    config = TrainConfig()
    envs = make_envs(config, 8, "train")
    sampler = HFSampler(policy, 48)
    trajectories = collect(envs, policy, sampler, list(range(8)), torch.Generator().manual_seed(0))
    envs.close()
    if wrong.startswith("temperature"):
        at = float(wrong.split()[1])
        trajectories = [replace(t, turns=tuple(replace(x, temperature=at) for x in t.turns)) for t in trajectories]
    else:
        WRONG[wrong](policy)
    agent = Learner(policy, credit.full, learning_rate=1e-4)
    too_weak_for_16_bits = dtype == "bfloat16" and wrong in ("version before", "temperature 0.95")
    if wrong == "none" or too_weak_for_16_bits:
        assert agent.learn(trajectories)["log_prob_gap_max"] < (1e-4 if dtype == "float32" else 2.0)
        return
    with pytest.raises(LedgerError, match="sampled from another distribution"):
        agent.learn(trajectories)


def test_a_run_that_the_gap_stops_is_saved_and_goes_on_with_another_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "batch=2 env.max_turns=1 sampling.max_new_tokens=4 evaluation.conversations=0 max_log_prob_gap=1e-12"
    options = [part for setting in small.split() for part in ("--set", setting)]
    out = str(tmp_path / "run")
    assert main(["train", "--iterations", "1", *options, "--out", out]) == 1
    said = capsys.readouterr().err
    assert "another distribution" in said
    assert f"saved after iteration 0; go on with: ppg-agent train --resume {out}" in said
    assert main(["train", "--resume", out, "--set", "max_log_prob_gap=5"]) == 0
