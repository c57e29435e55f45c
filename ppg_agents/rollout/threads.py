"""Conversations between a policy and single Gymnasium environments, each at its own pace.

A conversation waiting for its judge or partner does not hold up the others: each runs in its own thread and asks the
sampler by itself. Returns the same as `rollout.collect`. Nothing here learns.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import torch

from ppg_agents.generation import SingleSampler, draw_seeds, speaking
from ppg_agents.policy.policy import Policy
from ppg_agents.rollout.record import Record, texts
from ppg_agents.rollout.speaker import Side
from ppg_agents.trajectory import Trajectory

MakeEnv = Callable[[], gym.Env[Any, Any]]
# Seconds. Python handles Ctrl-C between waits of the main thread, so it waits in short spells. A thread inside a judge
# or partner cannot be interrupted: once stopped, threads get a short grace to leave, then the error is raised anyway.
_GRACE, _LOOK = 0.5, 0.1


class Envs:
    """Single environments: made when one is needed, kept for the next conversation, closed together."""

    def __init__(self, make: MakeEnv) -> None:
        """Set up without making any."""
        self._make = make
        self._idle: list[gym.Env[Any, Any]] = []
        self._lock = threading.Lock()
        self._closed = False

    def take(self) -> gym.Env[Any, Any]:
        """Return an environment that nobody uses."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return self._make()

    def give(self, env: gym.Env[Any, Any]) -> None:
        """Take one back; after `close`, close it at once."""
        with self._lock:
            if not self._closed:
                self._idle.append(env)
                return
        env.close()

    def close(self) -> None:
        """Close the idle ones now, and the others when they are given back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for env in idle:
            env.close()


class Seeds:
    """The seed of every reply: the same, turn by turn, as lockstep conversations draw them from the generator."""

    def __init__(self, generator: torch.Generator | None, n: int) -> None:
        """Set up for n conversations."""
        self._generator, self._n = generator, n
        self._rows: list[list[int | None]] = []
        self._lock = threading.Lock()

    def at(self, turn: int, conversation: int) -> int | None:
        """Return the seed of a conversation's reply, turns counted from 0."""
        with self._lock:
            while len(self._rows) <= turn:
                self._rows.append(draw_seeds(self._generator, self._n))
            return self._rows[turn][conversation]


class _StoppedError(Exception):
    """The rollout is over before this conversation is."""


def collect_each(
    make_env: MakeEnv | Envs,
    policy: Policy,
    sampler: SingleSampler,
    seeds: Sequence[int | None],
    generator: torch.Generator | None = None,
    domain: str = "",
) -> list[Trajectory]:
    """Hold one whole conversation per seed, each in a single environment at its own pace.

    An exception in one conversation, Ctrl-C included, stops all: replies under way are cancelled, no environment
    is stepped again, and the exception is raised within a second. A thread inside an environment
    leaves when that returns.

    Args:
        make_env: Makes an environment, in the thread that steps it; or `Envs` to reuse in the next rollout.
        policy: The policy; its LoRA is merged while its own model samples.
        sampler: Draws its replies.
        seeds: N seeds of the episodes; equal seeds share a persona.
        generator: Gives every reply its seed; None only for greedy sampling.
        domain: Written into the trajectories.

    Returns:
        N trajectories, in the order of `seeds`; see `rollout.collect`.

    Raises:
        ValueError: No generator, or observations of another kind.
    """
    n = len(seeds)
    if generator is None and sampler.temperature > 0:
        raise ValueError("expected a generator for sampling, got None; pass one or use temperature 0")
    envs = make_env if isinstance(make_env, Envs) else Envs(make_env)
    reply_seeds = Seeds(generator if sampler.temperature > 0 else None, n)
    stop = threading.Event()
    ended: queue.SimpleQueue[tuple[int, Trajectory | BaseException]] = queue.SimpleQueue()

    def work(i: int) -> None:
        try:
            env = envs.take()
            try:
                ended.put((i, _converse(env, policy, sampler, i, seeds[i], reply_seeds, domain, stop)))
            finally:
                envs.give(env)
        except BaseException as error:  # re-raised by the main thread
            ended.put((i, error))

    threads = [threading.Thread(target=work, args=(i,), name=f"ppg-conversation-{i}", daemon=True) for i in range(n)]
    done: dict[int, Trajectory] = {}
    sampler.start(n)
    try:
        with speaking(policy, sampler):
            try:
                for thread in threads:
                    thread.start()
                while len(done) < n:
                    try:
                        i, outcome = ended.get(timeout=_LOOK)
                    except queue.Empty:  # a signal is handled between waits
                        continue
                    if isinstance(outcome, BaseException):
                        raise outcome
                    done[i] = outcome
            finally:
                stop.set()
                if len(done) < n:
                    sampler.cancel()
                _join(threads, _GRACE)
    finally:
        if envs is not make_env:
            envs.close()
    return [done[i] for i in range(n)]


def _converse(
    env: gym.Env[Any, Any],
    policy: Policy,
    sampler: SingleSampler,
    i: int,
    seed: int | None,
    reply_seeds: Seeds,
    domain: str,
    stop: threading.Event,
) -> Trajectory:
    """Hold one conversation to its end."""
    observation, info = env.reset(seed=seed)
    record, side, turn = Record(_texts(observation), info, seed, domain), Side(policy, sampler), 0
    while not record.over:
        prompt = side.prompt(record.instruction, record.message)
        if prompt is None:
            record.cut(i)
            break
        if stop.is_set():
            raise _StoppedError
        spoken = side.said(prompt, sampler.reply_one(i, prompt, reply_seeds.at(turn, i)))
        if stop.is_set():
            raise _StoppedError
        observation, reward, terminated, truncated, info = env.step(spoken.text)
        record.add(spoken, float(reward), terminated, truncated, info)
        record.message = _texts(observation)[1]
        turn += 1
    return record.trajectory()


def _join(threads: Sequence[threading.Thread], seconds: float) -> None:
    """Wait for threads to end, at most ``seconds`` in total."""
    deadline = time.monotonic() + seconds
    for thread in threads:
        if thread.ident is not None:
            thread.join(max(0.0, deadline - time.monotonic()))


def _texts(observation: Any) -> tuple[str, str]:
    """Return instruction and message of an observation."""
    instruction, message = texts(observation)
    return str(instruction), str(message)
