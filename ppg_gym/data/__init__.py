"""Personas and dialogues in the formats that people have: read, check, count, collect and write them.

`read` is the one entry point for every format. Needs nothing beyond what the environment needs, and knows neither the
environment nor a learner. These names are for other packages; modules here import one another directly.
"""

from ppg_gym.data.collect import Collected, collect
from ppg_gym.data.dialogues import LoggedDialogue, LoggedTurn, split_by_persona
from ppg_gym.data.export import OPENING, Exported, export, write_rows
from ppg_gym.data.files import DataError, Problem, RefusedError
from ppg_gym.data.formats import FORMATS, PERSONA_FORMATS, detect, read, read_dialogues, validate
from ppg_gym.data.records import SCHEMA, save_personas, write_dialogues
from ppg_gym.data.report import Report, table
from ppg_gym.domain.cast import make_personas

__all__ = [
    "FORMATS",
    "OPENING",
    "PERSONA_FORMATS",
    "SCHEMA",
    "Collected",
    "DataError",
    "Exported",
    "LoggedDialogue",
    "LoggedTurn",
    "Problem",
    "RefusedError",
    "Report",
    "collect",
    "detect",
    "export",
    "make_personas",
    "read",
    "read_dialogues",
    "save_personas",
    "split_by_persona",
    "table",
    "validate",
    "write_dialogues",
    "write_rows",
]
