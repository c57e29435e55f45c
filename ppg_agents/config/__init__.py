"""The settings of a training run: read, checked, written. Nothing here imports torch."""

from ppg_agents.config.parsing import ConfigError, flatten
from ppg_agents.config.settings import (
    PERSONA_CHAT,
    AutoSettings,
    EnvSettings,
    EvaluationSettings,
    LoadSettings,
    LoraSettings,
    OfflineSettings,
    SamplingSettings,
    TrainConfig,
    differences,
    from_dict,
    load,
    parse_assignments,
    to_dict,
)

__all__ = [
    "PERSONA_CHAT",
    "AutoSettings",
    "ConfigError",
    "EnvSettings",
    "EvaluationSettings",
    "LoadSettings",
    "LoraSettings",
    "OfflineSettings",
    "SamplingSettings",
    "TrainConfig",
    "differences",
    "flatten",
    "from_dict",
    "load",
    "parse_assignments",
    "to_dict",
]
