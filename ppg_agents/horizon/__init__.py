"""How far ahead to plan: what one batch says of every policy class."""

from ppg_agents.horizon.advice import ALIGNED, Horizon, Verdict, advise, own_mean_removed

__all__ = ["ALIGNED", "Horizon", "Verdict", "advise", "own_mean_removed"]
