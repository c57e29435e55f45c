"""Many files into one set of dialogues and one of personas, without duplicates.

Reads through `ppg_gym.data.formats` and writes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from ppg_gym.conversation import Persona
from ppg_gym.data.dialogues import LoggedDialogue
from ppg_gym.data.files import DataError, shorten
from ppg_gym.data.formats import PERSONA_FORMATS, read, read_dialogues
from ppg_gym.data.report import Report
from ppg_gym.domain.personas import persona_id, persona_key


@dataclass(frozen=True)
class Collected:
    """What was read from many files.

    Attributes:
        dialogues: In the order of the files, each once.
        listed: The personas of persona files, in order.
        reports: One per file.
        notes: What was left out, one sentence each.
    """

    dialogues: list[LoggedDialogue]
    listed: list[Persona]
    reports: list[Report]
    notes: list[str]

    def personas(self) -> tuple[list[Persona], list[str]]:
        """Return every persona once, those of persona files first, and what was left out, in sentences.

        Personas are told apart by the words of their instruction. Where two share an id, the second gets one that is
        made from its words.

        Raises:
            DataError: The personas are of several domains; a persona file holds one.
        """
        given = [*self.listed, *(dialogue.persona for dialogue in self.dialogues)]
        domains = sorted({persona.domain for persona in given})
        if len(domains) > 1:
            raise DataError(
                f"expected personas of one domain for one file, got {', '.join(map(shorten, domains))}; "
                "import the files of each domain alone"
            )
        kept: dict[str, Persona] = {}
        ids: set[str] = set()
        renamed = 0
        for persona in given:
            key = persona_key(persona.instruction)
            if key in kept:
                continue
            if persona.id in ids:
                persona = replace(persona, id=persona_id(persona.instruction, persona.domain))
                renamed += 1
            ids.add(persona.id)
            kept[key] = persona
        notes = []
        if len(self.listed) + len({persona_key(d.persona.instruction) for d in self.dialogues}) > len(kept):
            notes.append(f"{len(kept)} different personas are kept, each once")
        if renamed:
            notes.append(f"{renamed} personas got a new id: theirs belongs to another one")
        return list(kept.values()), notes


def collect(
    paths: Sequence[str | os.PathLike[str]],
    format: str = "auto",
    domain: str | None = None,
    dialogues_only: bool = False,
) -> Collected:
    """Read many files.

    A dialogue's ``source`` is the file's name, with as many folders before it as it takes to tell the files apart.

    Args:
        paths: The files.
        format: See `ppg_gym.data.formats.read`; the same for all files.
        domain: See there.
        dialogues_only: Refuse persona files.

    Raises:
        DataError: A file is refused; the message says where and why.
    """
    names = _names(paths)
    dialogues: dict[tuple[Any, ...], LoggedDialogue] = {}
    listed: list[Persona] = []
    reports: list[Report] = []
    duplicates = 0
    for path, name in zip(paths, names, strict=True):
        items, report = (read_dialogues if dialogues_only else read)(path, format, domain)
        reports.append(report)
        if report.format in PERSONA_FORMATS:
            listed += cast("list[Persona]", items)
            continue
        for dialogue in cast("list[LoggedDialogue]", items):
            if dialogue.source == Path(path).name:
                dialogue = replace(dialogue, source=name)
            key = (dialogue.source, dialogue.index, dialogue.speaker, dialogue.persona.instruction, dialogue.turns)
            duplicates += key in dialogues
            dialogues.setdefault(key, dialogue)
    notes = [f"{duplicates} dialogues left out: they are there already, from the same place"] if duplicates else []
    return Collected(list(dialogues.values()), listed, reports, notes)


def _names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return each file's name with the fewest folders before it that tell different files apart."""
    parts = [Path(path).resolve().parts for path in paths]
    names = []
    for path in parts:
        depth = 1
        while depth < len(path) and any(other[-depth:] == path[-depth:] for other in parts if other != path):
            depth += 1
        names.append("/".join(path[-depth:]))
    return names
