# ruff: noqa: D101, D102 (the methods are those of ppg_agents.agents.Agent)
"""An agent of your own, REINFORCE: python examples/own_agent.py [--steps 8]      (pip install "ppg-gym[agents]").

Prints every batch's mean reward per turn, from .46 to .69; half a minute of one CPU core. In a package of
yours, the entry point ``mine = "own_agent:Reinforce"`` of the group ``ppg_agents.agents`` gives it the whole loop.
"""

import argparse
from typing import Any

import gymnasium as gym
import torch

from ppg_agents.generation.hf import HFSampler
from ppg_agents.policy import Policy
from ppg_agents.rollout import Speaker, collect
from ppg_agents.trajectory import Trajectory, batch


class Reinforce:
    def __init__(self, policy: Policy, mask: object, *, learning_rate: Any, sampler: Any, **others: object) -> None:
        self.policy, self.sampler = policy, sampler
        self.optimizer = torch.optim.SGD(policy.parameters(), lr=learning_rate(0))

    def start(self, n: int, seed: int = 0) -> None:
        self.speaker = Speaker(self.policy, self.sampler, n)
        self.generator = torch.Generator(self.policy.device).manual_seed(seed)

    def act(self, seen: Any) -> list[str]:
        said = self.speaker.reply(seen["instruction"], seen["message"], [True] * len(seen["message"]), self.generator)
        return [self.policy.spoken(reply[1].token_ids) if reply else "" for reply in said]

    def learn(self, trajectories: list[Trajectory]) -> dict[str, float]:
        judged = [t for t in trajectories if t.judged()]  # an unjudged turn is left out, never 0
        returns = torch.tensor([sum(t.judged()) / len(t.judged()) for t in judged], device=self.policy.device)
        data = batch(judged, self.policy.pad_id)
        log_probs = self.policy.log_probs(data.ids, data.attention, data.token_mask).sum(1)
        loss = -((returns - returns.mean()) * log_probs).mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.policy.version += 1
        return {"return": returns.mean().item(), "policy_version": self.policy.version}

    def save(self, folder: Any) -> None:
        self.policy.save(folder)

    def load(self, folder: Any) -> None:
        self.policy.load_weights(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    policy = Policy.load("tiny")
    agent = Reinforce(policy, None, learning_rate=lambda step: 0.4, sampler=HFSampler(policy))
    envs = gym.make_vec("ppg_gym:PersonaChat-v0", num_envs=32, domain="chatting")
    for step in range(parser.parse_args().steps):
        seeds, generator = range(32 * step, 32 * step + 32), torch.Generator(policy.device).manual_seed(step)
        print(f"batch {step + 1}:", agent.learn(collect(envs, policy, agent.sampler, seeds, generator)))
