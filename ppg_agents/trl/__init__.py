"""This project's environment and credit inside TRL."""

from ppg_agents.trl.rollouts import PersonaChat, TrainerSampler

__all__ = ["PersonaChat", "TrainerSampler"]
