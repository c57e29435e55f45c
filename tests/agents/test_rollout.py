"""Rollouts with a toy environment that knows nothing of this project."""

from __future__ import annotations

import logging
import math
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from ppg_agents.batch import batch
from ppg_agents.generation import Sample, draw_seeds
from ppg_agents.generation.hf import HFSampler
from ppg_agents.policy import Policy
from ppg_agents.rollout import collect
from ppg_agents.rollout.metrics import partner_faults
from ppg_agents.rollout.threads import Envs as Singles
from ppg_agents.rollout.threads import collect_each
from ppg_agents.trajectory import Trajectory, from_json, to_json

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
            assert turn.reply == policy.spoken(turn.token_ids)
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
    open_ended = 0
    for trajectory in roll(policy, toy_envs(*[{"turns": 4}] * 8)):
        assert list(trajectory.turns[0].prompt_ids) == policy.first_prompt(trajectory.instruction, "hello")
        for before, turn in zip(trajectory.turns, trajectory.turns[1:], strict=False):
            ended = before.token_ids[-1] == policy.end_of_turn_id
            closing = [] if ended else [policy.end_of_turn_id]
            assert list(turn.prompt_ids) == closing + policy.next_prompt(turn.message)
            open_ended += not ended
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


class Echo:
    """A sampler whose reply depends on conversation, turn, prompt and seed alone; notes who is speaking."""

    max_new_tokens, temperature, own_model = 6, 1.0, False

    def __init__(self, policy: Policy) -> None:
        self.policy, self.context_length = policy, policy.context_length
        self.cancelled = threading.Event()

    def start(self, n: int) -> None:
        self.turns = [0] * n

    def reply_one(self, conversation: int, prompt: Sequence[int], seed: int | None) -> Sample:
        self.turns[conversation] += 1
        mixed = random.Random(f"{conversation} {self.turns[conversation]} {list(prompt)} {seed}")
        length = mixed.randint(1, 6)
        tokens = [mixed.randrange(97, 123) for _ in range(length)]
        ended = length < 6
        tokens = [*tokens, self.policy.end_of_turn_id] if ended else tokens
        return Sample(tuple(tokens), (-1.0,) * len(tokens), ended, 7, 1.0, "echo")

    def reply(self, prompts: Sequence[Any], generator: torch.Generator | None) -> list[Sample | None]:
        seeds = draw_seeds(generator, len(prompts))
        return [None if p is None else self.reply_one(i, p, seeds[i]) for i, p in enumerate(prompts)]

    def cancel(self) -> None:
        self.cancelled.set()


class Slow(gym.Wrapper[Any, Any, Any, Any]):
    """An environment that holds at its first step until it may go on."""

    def __init__(self, env: gym.Env[Any, Any], wait: Callable[[], Any], closed: list[Any]) -> None:
        super().__init__(env)
        self.wait, self.closed = wait, closed

    def step(self, action: Any) -> Any:
        self.wait()
        return self.env.step(action)

    def close(self) -> None:
        self.closed.append(self)


def test_conversations_at_their_own_pace_equal_those_in_lockstep(policy: Policy, toy_envs: Envs) -> None:
    together = toy_envs(*[{"turns": 4}] * 6)
    seeds = [3, 3, 4, 5, 6, 7]
    in_step = collect(together, policy, Echo(policy), seeds, torch.Generator().manual_seed(1), "toy")
    envs = Singles(lambda: toy_envs({"turns": 4}).envs[0])
    for _ in range(2):  # the second time with the environments of the first
        each = collect_each(envs, policy, Echo(policy), seeds, torch.Generator().manual_seed(1), "toy")
        assert [to_json(t) for t in each] == [to_json(t) for t in in_step]
    turn = in_step[0].turns[0]
    assert (turn.policy_version, turn.sampler, turn.temperature) == (7, "echo", 1.0)
    envs.close()


def test_a_slow_environment_does_not_hold_the_others(policy: Policy, toy_envs: Envs) -> None:
    """One conversation's first step waits for all the others to have ended; in lockstep none would."""
    closed: list[Any] = []
    ended, first = threading.Semaphore(0), threading.Lock()

    class Watched(Slow):
        def step(self, action: Any) -> Any:
            waits = first.acquire(blocking=False)
            if waits:
                assert all(ended.acquire(timeout=10) for _ in range(5))
            result = super().step(action)
            if result[2] and not waits:
                ended.release()
            return result

    got = collect_each(
        lambda: Watched(toy_envs({"turns": 3}).envs[0], lambda: None, closed),
        policy,
        Echo(policy),
        list(range(6)),
        torch.Generator().manual_seed(0),
    )
    assert [len(t.turns) for t in got] == [3] * 6
    assert closed


def test_an_exception_in_one_conversation_stops_all(policy: Policy, toy_envs: Envs) -> None:
    closed: list[Any] = []
    held, go_on = threading.Event(), threading.Event()

    def fail() -> None:
        held.wait(10)
        raise RuntimeError("the judge is gone")

    def hold() -> None:
        held.set()
        go_on.wait(10)

    makers = iter([fail, hold])
    lock = threading.Lock()

    def make() -> Any:
        with lock:
            return Slow(toy_envs({}).envs[0], next(makers), closed)

    sampler = Echo(policy)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="the judge is gone"):
        collect_each(make, policy, sampler, [0, 1], torch.Generator())
    assert time.monotonic() - began < 5
    assert sampler.cancelled.is_set()
    go_on.set()  # the one that was inside of its environment leaves it now, and closes it
    deadline = time.monotonic() + 5
    while len(closed) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(closed) == 2


def test_ctrl_c_stops_within_a_second(policy: Policy, toy_envs: Envs) -> None:
    """The signal comes when every conversation is inside of an environment that does not return."""
    inside, go_on = threading.Barrier(4), threading.Event()
    sent: list[float] = []

    def hold() -> None:
        if inside.wait(10) == 0:
            sent.append(time.monotonic())
            signal.raise_signal(signal.SIGINT)
        go_on.wait(20)

    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            collect_each(
                lambda: Slow(toy_envs({}).envs[0], hold, []), policy, Echo(policy), [0, 1, 2, 3], torch.Generator()
            )
    finally:
        signal.signal(signal.SIGINT, former)
    assert time.monotonic() - sent[0] < 1.0
    go_on.set()


def test_refusals_of_single_conversations(policy: Policy, toy_envs: Envs) -> None:
    make = lambda: toy_envs({}).envs[0]  # noqa: E731
    with pytest.raises(ValueError, match="generator"):
        collect_each(make, policy, Echo(policy), [1])
    with pytest.raises(ValueError, match="wrap the environment"):
        collect_each(lambda: gym.make("CartPole-v1"), policy, Echo(policy), [1], torch.Generator())
