"""Conversations between a policy and any Gymnasium text environment."""

from ppg_agents.rollout.lockstep import collect
from ppg_agents.rollout.speaker import AgentSpeaker, PolicySpeaker, Speaker
from ppg_agents.rollout.text_observation import TextObservation, TextObservations

__all__ = ["AgentSpeaker", "PolicySpeaker", "Speaker", "TextObservation", "TextObservations", "collect"]
