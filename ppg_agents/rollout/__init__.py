"""Conversations between a policy and any Gymnasium text environment."""

from ppg_agents.rollout.lockstep import Speaker, collect
from ppg_agents.rollout.text_observation import TextObservation, TextObservations

__all__ = ["Speaker", "TextObservation", "TextObservations", "collect"]
