"""How far ahead to plan: every policy class measured on one batch."""

from ppg_agents.horizon.advice import ALIGNED, Horizon, Verdict, advise, own_mean_removed

__all__ = ["ALIGNED", "Horizon", "Verdict", "advise", "own_mean_removed"]
