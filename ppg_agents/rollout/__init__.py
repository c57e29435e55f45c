"""Conversations between a policy and any Gymnasium text environment."""

from ppg_agents.rollout.lockstep import Speaker, collect

__all__ = ["Speaker", "collect"]
