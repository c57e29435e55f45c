"""PersonaChat-v0 and ReplySelection-v0 as plain Gymnasium environments: a loop, a vector, a bandit. No torch.

    python examples/gymnasium_loop.py [--turns 2000]

Prints a conversation with its verdicts, the mean reward of the same hand-written policy in 16 conversations side by
side (about .44), and that of a linear bandit that learns which of four candidates to say (from .63 to .77). Seconds.
"""

import argparse

import gymnasium as gym
import numpy as np

import ppg_gym  # noqa: F401 (registers the environments)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--turns", type=int, default=2000)
turns = parser.parse_args().turns


def my_policy(instruction: str, message: str) -> str:
    """Say the sentence of the persona that has most words in common with the question."""
    asked = set(message.lower().rstrip("?.!").split())
    nearest = max(instruction.split(". ")[1:-1], key=lambda sentence: len(asked & set(sentence.lower().split())))
    return nearest.replace("Your", "My").replace("your", "my").replace("You", "I").replace("you", "I") + "."


env = gym.make("PersonaChat-v0", domain="chatting", render_mode="ansi")
observation, info = env.reset(seed=0)
over = False
while not over:
    reply = my_policy(observation["instruction"], observation["message"])
    observation, reward, terminated, truncated, info = env.step(reply)
    over = terminated or truncated
print(env.render())

envs = gym.make_vec("PersonaChat-v0", num_envs=16, domain="chatting")
seen, infos = envs.reset(seed=0)
scores, ended = [], np.zeros(16, dtype=bool)
while not ended.all():
    replies = [my_policy(*pair) for pair in zip(seen["instruction"], seen["message"], strict=True)]
    seen, rewards, ends, cuts, infos = envs.step(replies)
    scores.extend(rewards[~ended])
    ended |= ends | cuts
print(f"my_policy, 16 conversations: {np.mean(scores):.2f}")

chooser = gym.make("ReplySelection-v0", domain="chatting", candidates=4)
shared, n, each = chooser.get_wrapper_attr("layout")
rng, gram, target, earned = np.random.default_rng(0), np.eye(each), np.zeros(each), np.zeros(turns)
row, info = chooser.reset(seed=0)
for turn in range(turns):  # ridge regression of the reward on a candidate's features; one choice in ten is free
    features = row[shared:].reshape(n, each).astype(float)
    choice = rng.integers(n) if rng.random() < 0.1 else np.argmax(features @ np.linalg.solve(gram, target))
    row, earned[turn], terminated, truncated, info = chooser.step(choice)
    gram += np.outer(features[choice], features[choice])
    target += earned[turn] * features[choice]
    if terminated or truncated:
        row, info = chooser.reset()
tenth = max(1, turns // 10)
print(f"bandit, first and last tenth of {turns} turns: {earned[:tenth].mean():.2f} {earned[-tenth:].mean():.2f}")
