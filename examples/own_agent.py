# ruff: noqa: D102 (the methods are those of ppg_agents.agents.Agent and SpeakingAgent)
"""An agent of your own, REINFORCE: python examples/own_agent.py [--steps 8]      (pip install "ppg-gym[agents]").

Prints every batch's mean reward per turn, from .46 to .69; half a minute of one CPU core. In a package of
yours, the entry point ``mine = "own_agent:Reinforce"`` of the group ``ppg_agents.agents`` gives it the whole loop.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import torch

from ppg_agents.agents import Agent
from ppg_agents.batch import batch
from ppg_agents.generation.hf import HFSampler
from ppg_agents.policy import Policy
from ppg_agents.rollout import collect
from ppg_agents.trajectory import Trajectory


class Reinforce(Agent):
    """The policy speaks. With methods ``start(n, seed)`` and ``act(observations)`` the agent would speak for itself."""

    def __init__(self, policy: Policy, mask: object, *, learning_rate: Any, **others: object) -> None:
        self.policy = policy
        self.optimizer = torch.optim.SGD(policy.parameters(), lr=learning_rate(0))

    def learn(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
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
    sampler = HFSampler(policy)
    agent = Reinforce(policy, None, learning_rate=lambda step: 0.4)
    envs = gym.make_vec("ppg_gym:PersonaChat-v0", num_envs=32, domain="chatting")
    for step in range(parser.parse_args().steps):
        seeds, generator = range(32 * step, 32 * step + 32), torch.Generator(policy.device).manual_seed(step)
        print(f"batch {step + 1}:", agent.learn(collect(envs, policy, sampler, seeds, generator)))
