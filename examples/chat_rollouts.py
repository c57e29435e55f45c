"""Whole conversations as chat messages, with a reward per reply: for trainers that take a rollout function, or rows.

    python examples/chat_rollouts.py [--conversations 4] > rollouts.jsonl

``answer`` is yours: it gets a batch of chats and returns one reply to each, out of a server, a pipeline, any model.
One conversation per line; a reward is null where the judge gave no score, never 0. No torch; seconds.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np

import ppg_gym  # noqa: F401 (registers the environments)

Chat = list[dict[str, str]]


def rollouts(answer: Callable[[list[Chat]], list[str]], seeds: Sequence[int], **settings: Any) -> list[dict[str, Any]]:
    """Hold one conversation per seed, side by side; equal seeds are one persona and one opening line."""
    envs = gym.make_vec("PersonaChat-v0", num_envs=len(seeds), on_judge_failure="nan", **settings)
    seen, _ = envs.reset(seed=list(seeds))
    chats: list[Chat] = [[{"role": "system", "content": instruction}] for instruction in seen["instruction"]]
    rewards: list[list[float | None]] = [[] for _ in seeds]
    going = np.arange(len(seeds))
    while len(going):
        for i in going:
            chats[i].append({"role": "user", "content": seen["message"][i]})
        replies = [""] * len(seeds)  # who has ended says nothing
        for i, reply in zip(going, answer([chats[i] for i in going]), strict=True):
            replies[i] = reply
            chats[i].append({"role": "assistant", "content": reply})
        seen, scores, ends, cuts, _ = envs.step(replies)
        for i in going:
            rewards[i].append(float(scores[i]) if np.isfinite(scores[i]) else None)
        going = going[~(ends | cuts)[going]]
    envs.close()
    return [{"seed": seed, "messages": chat, "rewards": r} for seed, chat, r in zip(seeds, chats, rewards, strict=True)]


def by_rule(chats: list[Chat]) -> list[str]:
    """Say the sentence of the persona that has most words in common with the question."""
    replies = []
    for chat in chats:
        asked = set(chat[-1]["content"].lower().rstrip("?.!").split())
        facts = chat[0]["content"].split(". ")[1:-1]
        replies.append(max(facts, key=lambda fact: len(asked & set(fact.lower().split()))).replace("You ", "I ") + ".")
    return replies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=4)
    for row in rollouts(by_rule, range(parser.parse_args().conversations), domain="chatting", max_turns=4):
        print(json.dumps(row))
