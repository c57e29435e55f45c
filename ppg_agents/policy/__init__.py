"""The policy: a causal language model with LoRA that plays the persona."""

from ppg_agents.config.settings import LoraSettings
from ppg_agents.policy.policy import Policy, add_lora

__all__ = ["LoraSettings", "Policy", "add_lora"]
