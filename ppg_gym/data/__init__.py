"""Personas and dialogues in the formats that people have: read, check, count, collect, write, make.

`read` is the one entry point for every format. Needs nothing beyond what the environment needs, and knows
neither the environment nor a learner.
"""

from ppg_gym.data.collect import Collected, collect
from ppg_gym.data.export import OPENING, Exported, export, write_rows
from ppg_gym.data.files import Problem, RefusedError, replacing
from ppg_gym.data.formats import FORMATS, PERSONA_FORMATS, detect, read, read_dialogues, validate
from ppg_gym.data.persona_maker import make_personas, save_personas
from ppg_gym.data.records import SCHEMA, write_dialogues
from ppg_gym.data.report import Report, table

__all__ = [
    "FORMATS",
    "OPENING",
    "PERSONA_FORMATS",
    "SCHEMA",
    "Collected",
    "Exported",
    "Problem",
    "RefusedError",
    "Report",
    "collect",
    "detect",
    "export",
    "make_personas",
    "read",
    "read_dialogues",
    "replacing",
    "save_personas",
    "table",
    "validate",
    "write_dialogues",
    "write_rows",
]
