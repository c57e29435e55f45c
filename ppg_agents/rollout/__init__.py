"""Conversations between a policy and any Gymnasium text environment."""

from ppg_agents.rollout.lockstep import collect
from ppg_agents.rollout.speaker import AgentSpeaker, PolicySpeaker, Speaker

__all__ = ["AgentSpeaker", "PolicySpeaker", "Speaker", "collect"]
