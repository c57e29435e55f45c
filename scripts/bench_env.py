"""Measure how well judge and partner calls overlap: conversations against a local chat server of known latency.

Usage:  python scripts/bench_env.py [--conversations 64] [--turns 8] [--latency 0.1] [--rounds 5]

The server runs in a process of its own and answers every call after the latency: a verdict where one is asked for,
else a fresh line. In every round, all conversations are played at once through the vector environment, and some of
them one call after another; the ideal is one latency per turn, as the judge's call and the partner's next line do
not wait for one another. The opening lines (one latency more) are timed apart. The cache of answers is off.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np

import ppg_gym  # noqa: F401 (registers the environment)
from ppg_gym.domain.loading import load

VERDICT = {"rationale": "It fits.", "contradicts": False, "addresses_judge": False}  # anything else asked for is true


def serve(latency: float) -> None:
    """Run the server until standard input is closed; the first line printed is its URL."""
    from ppg_gym.llm.loopback import Loopback

    words, rng = load("chatting").options["common_words"], random.Random(0)

    def answer(body: dict[str, Any]) -> str:
        if "response_format" in body:
            asked = body["response_format"]["json_schema"]["schema"]["properties"]
            return json.dumps({name: VERDICT.get(name, True) for name in asked})
        return " ".join(rng.choices(words, k=12)).capitalize() + "?"

    with Loopback(answer, latency=latency, model="bench") as server:
        print(server.url, flush=True)
        sys.stdin.read()


@contextmanager
def server(latency: float) -> Iterator[str]:
    """Run the server in a process of its own; yield its URL."""
    command = [sys.executable, __file__, "--serve", "--latency", str(latency)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.stdin.close()


def make(url: str, n: int, turns: int) -> gym.vector.VectorEnv:
    """Return n conversations whose judge and partner ask the server."""
    options = {"base_url": url, "model": "bench", "cache": False, "concurrency": max(n, 1)}
    return gym.make_vec(
        "PersonaChat-v0",
        num_envs=n,
        max_turns=turns,
        judge="llm",
        judge_options=options,
        partner="llm",
        partner_options=options,
    )


def play(envs: gym.vector.VectorEnv, turns: int) -> tuple[float, float]:
    """Play all conversations to their end; return the seconds of the openings and of the turns."""
    n = envs.num_envs
    began = time.perf_counter()
    envs.reset(seed=0)
    opened = time.perf_counter()
    for turn in range(turns):
        _, rewards, terminated, truncated, infos = envs.step(tuple(f"I am here, {turn} of {i}." for i in range(n)))
        if not (rewards == 1.0).all() or truncated.any():
            raise RuntimeError(f"expected every reply to be judged and answered, got {infos['partner']['status']}")
    if not terminated.all():
        raise RuntimeError("expected every conversation to end")
    return opened - began, time.perf_counter() - opened


def one_after_another(envs: gym.vector.VectorEnv, turns: int) -> float:
    """Play one conversation, each call after the last; return the seconds of its turns."""
    envs.unwrapped.simulator._overlap = lambda: False  # type: ignore[attr-defined]
    return play(envs, turns)[1]


def spread(values: Sequence[float], unit: str = "") -> str:
    """Return median, lowest and highest in words."""
    return f"{np.median(values):.2f}{unit} ({min(values):.2f} to {max(values):.2f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--latency", type=float, default=0.1, help="seconds per call")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", type=int, default=2, help="conversations per round played one call after another")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.serve:
        return serve(chosen.latency)
    ideal = chosen.turns * chosen.latency
    together, alone, openings, used = [], [], [], []
    with server(chosen.latency) as url:
        many, single = make(url, chosen.conversations, chosen.turns), make(url, 1, chosen.turns)
        play(many, chosen.turns)  # connections, probes
        play(single, chosen.turns)
        for _ in range(chosen.rounds):
            before = resource.getrusage(resource.RUSAGE_SELF)
            opening, seconds = play(many, chosen.turns)
            after = resource.getrusage(resource.RUSAGE_SELF)
            together.append(seconds)
            openings.append(opening)
            used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            alone.append(np.mean([one_after_another(single, chosen.turns) for _ in range(chosen.alone)]))
        many.close()
        single.close()
    calls = chosen.conversations * 2 * chosen.turns
    print(f"{chosen.conversations} conversations x {chosen.turns} turns, latency {chosen.latency * 1000:.0f} ms,")
    print(f"{os.cpu_count()} cores, {chosen.rounds} rounds: median (lowest to highest)")
    print(f"all at once           {spread(together, ' s')}, ideal {ideal:.2f} s")
    print(f"against the ideal     {spread([t / ideal for t in together])} x")
    print(f"openings              {spread(openings, ' s')}")
    faster = [a * chosen.conversations / t for a, t in zip(alone, together, strict=True)]
    print(f"against one by one    {spread(faster)} x faster ({chosen.alone} conversations per round measured alone)")
    print(f"client's computing    {spread([u / calls * 1000 for u in used], ' ms')} per call")
    return None


if __name__ == "__main__":
    main()
