"""Rollouts with a toy environment that knows nothing of this project."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from ppg_agents.evaluate import partner_faults
from ppg_agents.generation.hf import HFSampler
from ppg_agents.policy import Policy
from ppg_agents.rollout import collect
from ppg_agents.trajectory import Trajectory, batch, from_json, to_json

Envs = Callable[..., SyncVectorEnv]
MIXED = ({"turns": 3}, {"turns": 1}, {"turns": 4, "unjudged": 2}, {"turns": 2, "truncate": True})


def roll(policy: Policy, envs: SyncVectorEnv, *, seed: int = 0, seeds: Any = None, **options: Any) -> list[Trajectory]:
    sampler = HFSampler(policy, **{"max_new_tokens": 6, **options})
    generator = torch.Generator().manual_seed(seed)
    return collect(envs, policy, sampler, seeds or list(range(envs.num_envs)), generator, "toy")


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_every_conversation_goes_to_its_own_end(policy: Policy, toy_envs: Envs, mode: AutoresetMode) -> None:
    got = roll(policy, toy_envs(*MIXED, mode=mode))
    assert [len(t.turns) for t in got] == [3, 1, 4, 2]
    assert [t.terminated for t in got] == [True, True, True, False]
    assert [t.truncated for t in got] == [False, False, False, True]
    assert [turn.message for turn in got[2].turns] == ["hello", "line 1", "line 2", "line 3"]
    assert [t.seed for t in got] == [0, 1, 2, 3]
    for trajectory in got:
        assert trajectory.instruction == f"You are {trajectory.persona}."
        assert trajectory.domain == "toy"
        for t, turn in enumerate(trajectory.turns):
            unjudged = trajectory is got[2] and t == 1
            assert math.isnan(turn.reward) == unjudged
            score = None if unjudged else turn.reward
            status = "timeout" if unjudged else "scored"
            assert turn.verdict == {"status": status, "score": score, "rationale": "vowels"}
            assert turn.reply == policy.decode(turn.token_ids)
    to_json(got[2])


def test_a_partner_s_fault_is_kept_apart(policy: Policy, toy_envs: Envs, monkeypatch: pytest.MonkeyPatch) -> None:
    envs = toy_envs({"turns": 2, "truncate": True}, {"turns": 2})
    step = envs.step

    def with_partner(actions: Any) -> Any:
        *rest, infos = step(actions)
        status = np.array(["role_flip" if cut else "ok" for cut in rest[3]], dtype=object)
        return *rest, {**infos, "partner": {"status": status}, "_partner": np.array([True, True])}

    monkeypatch.setattr(envs, "step", with_partner)
    got = roll(policy, envs)
    assert [t.partner_status for t in got] == ["role_flip", "ok"]
    assert partner_faults(got) == {"role_flip": 1}
    assert from_json(to_json(got[0])).partner_status == "role_flip"


def test_the_ledger_is_the_token_sequence_that_was_sampled(policy: Policy, toy_envs: Envs) -> None:
    got = roll(policy, toy_envs(*MIXED), max_new_tokens=9)
    rows = batch(got, policy.pad_id)
    with torch.no_grad():
        log_probs = policy.log_probs(rows.ids, rows.attention, rows.token_mask)
    torch.testing.assert_close(log_probs, rows.sampling_log_probs, rtol=0, atol=1e-4)


def test_a_reply_that_was_cut_is_closed_before_the_next_message(policy: Policy, toy_envs: Envs) -> None:
    ended_early = open_ended = 0
    for trajectory in roll(policy, toy_envs(*[{"turns": 4}] * 8)):
        assert list(trajectory.turns[0].prompt_ids) == policy.first_prompt(trajectory.instruction, "hello")
        for before, turn in zip(trajectory.turns, trajectory.turns[1:], strict=False):
            ended = before.token_ids[-1] == policy.end_of_turn_id
            closing = [] if ended else [policy.end_of_turn_id]
            assert list(turn.prompt_ids) == closing + policy.next_prompt(turn.message)
            open_ended += not ended
            ended_early += ended
    assert open_ended


def test_same_seeds_same_trajectories(policy: Policy, toy_envs: Envs) -> None:
    a, b = (roll(policy, toy_envs(*[{}] * 4), seeds=[5, 5, 6, 6]) for _ in range(2))
    assert [to_json(t) for t in a] == [to_json(t) for t in b]
    assert a[0].persona == a[1].persona != a[2].persona
    other = roll(policy, toy_envs(*[{}] * 4), seeds=[5, 5, 6, 6], seed=1)
    assert [t.turns for t in other] != [t.turns for t in a]


def test_verdict_may_be_absent_and_the_policy_version_is_stamped(policy: Policy, toy_envs: Envs) -> None:
    policy.version = 9
    (got,) = roll(policy, toy_envs({"verdicts": False}))
    assert [dict(turn.verdict) for turn in got.turns] == [{}] * 3
    assert {turn.policy_version for turn in got.turns} == {9}


def test_a_full_context_truncates(
    make_policy: Callable[..., Policy], toy_envs: Envs, caplog: pytest.LogCaptureFixture
) -> None:
    policy = make_policy(max_position_embeddings=64)
    with caplog.at_level(logging.WARNING):
        long, short = roll(policy, toy_envs({"turns": 9}, {"turns": 2}), max_new_tokens=6)
    assert (long.truncated, long.terminated, short.terminated) == (True, False, True)
    assert 1 < len(long.turns) < 9
    assert len(long.token_ids()) <= 64
    assert "no room for another reply" in caplog.text
    (none,) = roll(policy, toy_envs({}), max_new_tokens=60)
    assert (none.turns, none.truncated) == ((), True)
    assert not batch([none], policy.pad_id).valid.any()


def test_lora_is_merged_while_sampling_and_back_afterwards(policy: Policy, toy_envs: Envs) -> None:
    before = {k: v.clone() for k, v in policy.model.state_dict().items()}
    roll(policy, toy_envs({}))
    after = policy.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_refusals(policy: Policy, toy_envs: Envs) -> None:
    with pytest.raises(ValueError, match="one seed for each of 2"):
        collect(toy_envs({}, {}), policy, HFSampler(policy), [1])
    envs = toy_envs({})
    envs.reset = lambda **_: (np.zeros(1), {})  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="wrap the environment"):
        collect(envs, policy, HFSampler(policy), [1])
