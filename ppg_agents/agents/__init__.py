"""Who learns: one learner for every method of the table, and the protocol that anybody's own agent follows."""

from ppg_agents.agents.methods import METHODS
from ppg_agents.agents.protocol import Agent, Needs, OfflineAgent, PreparingAgent, SpeakingAgent
from ppg_agents.agents.registry import agents, make_agent

__all__ = ["METHODS", "Agent", "Needs", "OfflineAgent", "PreparingAgent", "SpeakingAgent", "agents", "make_agent"]
