"""What there is to show: a run folder or a file of trajectories, read once, of which a readable sample is kept.

Trajectories are read line by line, so that a large file costs no more memory than its sample.
"""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppg_agents.config import TrainConfig
from ppg_agents.durable import RunError
from ppg_agents.runs import Run, is_run

if TYPE_CHECKING:
    from ppg_agents.trajectory import Trajectory, Turn

FAILED_SHARE, PAIRED_SHARE = 0.25, 0.25
"""Of the conversations shown, the most that are taken for a failed verdict, and for a persona met early and late."""


@dataclass(frozen=True)
class Row:
    """A conversation's place in its file, and what the choice of a sample goes by."""

    offset: int
    number: int
    order: int
    persona: str
    failed: bool


@dataclass(frozen=True)
class Conversation:
    """A conversation to show.

    Attributes:
        number: Its line in the file, from 1.
        iteration: In which it was learned from; None where nobody knows.
        trajectory: What was said, sampled and judged.
    """

    number: int
    iteration: int | None
    trajectory: Trajectory


@dataclass
class Counts:
    """What became of all conversations of a file, shown or not."""

    conversations: int = 0
    turns: int = 0
    truncated: int = 0
    empty: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    partners: Counter[str] = field(default_factory=Counter)

    def add(self, trajectory: Trajectory) -> None:
        """Count a conversation."""
        self.conversations += 1
        self.turns += len(trajectory.turns)
        self.truncated += trajectory.truncated
        self.empty += not trajectory.turns
        self.statuses.update(status(turn) for turn in trajectory.turns)
        self.partners.update([trajectory.partner_status])


@dataclass(frozen=True)
class Source:
    """A run, or a file of conversations.

    Attributes:
        path: What was named.
        name: The run's folder or the file, without its parents.
        config: The run's settings; None for a file.
        metrics: One object per iteration.
        evaluations: Held-out results: when -> result.
        shown: The sample, in the order of the file.
        counts: Of everything there is.
        notes: What is not as usual, in whole sentences.
    """

    path: Path
    name: str
    config: TrainConfig | None
    metrics: Sequence[Mapping[str, Any]]
    evaluations: Mapping[str, Any]
    shown: Sequence[Conversation]
    counts: Counts
    notes: Sequence[str]

    @property
    def offline(self) -> bool:
        """Whether the conversations were logged by others."""
        return self.config is not None and bool(self.config.offline.files)

    @property
    def turns(self) -> int:
        """Turns in the longest conversation shown, at least 1."""
        return max((len(c.trajectory.turns) for c in self.shown), default=1) or 1


def status(turn: Turn) -> str:
    """Return the verdict's status; without one, ``scored`` or ``unjudged`` by the reward."""
    named = turn.verdict.get("status")
    return str(named) if named else "scored" if math.isfinite(turn.reward) else "unjudged"


def read(path: Path, most: int) -> Source:
    """Read a run folder or a file of trajectories.

    Args:
        path: The folder or the file.
        most: Conversations to keep, at least 1; see `sample`.

    Raises:
        RunError: Neither a run nor a file of trajectories.
        ValueError: A damaged line; the message has file and line.
    """
    path = Path(path)
    if is_run(path):
        run = Run.open(path)
        notes: list[str] = []
        if run.config.offline.files:
            shown, counts = _logged(run.config, most, notes)
        elif run.trajectories_file.is_file():
            shown, counts = conversations(run.trajectories_file, most, notes, run.config.batch)
        else:
            shown, counts = [], Counts()
        if not counts.conversations and not run.config.offline.files:
            notes.append("The run has written no conversation yet.")
        name = path.resolve().name
        return Source(path, name, run.config, run.metrics(), run.evaluations(), shown, counts, notes)
    if path.is_file():
        notes = []
        shown, counts = conversations(path, most, notes)
        if not counts.conversations:
            raise RunError(f"expected trajectories, one JSON object per line, got an empty file {path}; choose another")
        return Source(path, path.name, None, (), {}, shown, counts, notes)
    siblings = [str(p) for p in path.parent.iterdir() if is_run(p)] if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), siblings, n=1)
    hint = f"did you mean {near[0]}?" if near else "give a folder that ppg-agent train wrote"
    raise RunError(f"expected a run folder, or a .jsonl file of trajectories, got {path}; {hint}")


def conversations(
    path: Path, most: int, notes: list[str], batch: int | None = None
) -> tuple[list[Conversation], Counts]:
    """Read a sample of a file's conversations, and count all of them.

    Args:
        path: The file.
        most: Conversations to keep.
        notes: A torn last line, which a crash leaves, is noted here.
        batch: Conversations per iteration; None where the file is no run's.

    Raises:
        ValueError: A damaged line; the message has file and line.
    """
    from ppg_agents.trajectory import from_json

    counts, rows = Counts(), []
    for offset, number, trajectory in _lines(path, notes):
        versions = [turn.policy_version for turn in trajectory.turns]
        order = counts.conversations // batch if batch else max(versions, default=0)
        failed = any(status(turn) != "scored" for turn in trajectory.turns)
        rows.append(Row(offset, number, order, trajectory.persona, failed))
        counts.add(trajectory)
    shown = []
    with path.open("rb") as file:
        for i in sample(rows, most):
            file.seek(rows[i].offset)
            trajectory = from_json(file.readline().decode(errors="replace"))
            shown.append(Conversation(rows[i].number, rows[i].order + 1 if batch else None, trajectory))
    return shown, counts


def _lines(path: Path, notes: list[str]) -> Iterator[tuple[int, int, Trajectory]]:
    """Yield (byte offset, line number, conversation)."""
    from ppg_agents.trajectory import from_json

    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    trajectory = from_json(line.decode(errors="replace"))
                except ValueError as error:
                    if isinstance(error, json.JSONDecodeError) and not line.endswith(b"\n"):
                        notes.append(f"The last line of {path.name} is torn, as a crash leaves it, and is left out.")
                        return
                    raise ValueError(f"{path}:{number}: {error}") from error
                yield offset, number, trajectory
            offset += len(line)


def _logged(config: TrainConfig, most: int, notes: list[str]) -> tuple[list[Conversation], Counts]:
    """Return a sample of the logged dialogues that a run learned from; without tokens, which a run does not keep."""
    from ppg_agents.offline import read_files
    from ppg_agents.trajectory import Trajectory, Turn
    from ppg_gym.dialogues import split_by_persona

    try:
        dialogues, _ = read_files(config.offline)
        learned, _ = split_by_persona(dialogues, config.offline.held_out, config.seed)
    except (OSError, ValueError) as error:
        notes.append(f"The run learned from logged dialogues, which cannot be read here: {error}.")
        return [], Counts()
    notes.append("The conversations are the logged dialogues that the run learned from; others had spoken them.")
    found, counts, rows = [], Counts(), []
    for number, dialogue in enumerate(learned, start=1):
        turns = tuple(
            Turn(
                message=turn.message,
                reply=turn.reply,
                prompt_ids=(),
                token_ids=(),
                log_probs=(),
                reward=math.nan if turn.verdict.score is None else float(turn.verdict.score),
                verdict=turn.verdict.to_dict(),
                policy_version=-1,
            )
            for turn in dialogue.turns
        )
        who = dialogue.persona
        trajectory = Trajectory(who.instruction, who.id, dialogue.domain, None, turns, terminated=True, truncated=False)
        found.append(Conversation(number, None, trajectory))
        rows.append(Row(0, number, 0, who.id, any(status(turn) != "scored" for turn in turns)))
        counts.add(trajectory)
    return [found[i] for i in sample(rows, most)], counts


def sample(rows: Sequence[Row], most: int) -> list[int]:
    """Return which conversations to show, in order: all of them when there are at most so many.

    Otherwise: conversations with a failed verdict, evenly spread, up to a quarter; the first and the last conversation
    of personas that were met early and late, up to a quarter; then the first ones and the last ones in equal parts.
    """
    if len(rows) <= most:
        return list(range(len(rows)))
    failed = [i for i, row in enumerate(rows) if row.failed]
    chosen = set(_spread(failed, int(most * FAILED_SHARE)))
    for early, late in pairs([(row.persona, row.order) for row in rows])[: int(most * PAIRED_SHARE / 2)]:
        chosen |= {early, late}
    for i in range(len(rows)):
        for j in (i, len(rows) - 1 - i):
            if len(chosen) < most:
                chosen.add(j)
    return sorted(chosen)


def pairs(met: Sequence[tuple[str, int]]) -> list[tuple[int, int]]:
    """Return for every persona that was met at different times its first and its last conversation, farthest first.

    Args:
        met: (persona, order) of every conversation.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for i, (persona, order) in enumerate(met):
        if persona and (persona not in first or order < met[first[persona]][1]):
            first[persona] = i
        if persona and (persona not in last or order >= met[last[persona]][1]):
            last[persona] = i
    apart = {p: met[last[p]][1] - met[first[p]][1] for p in first}
    return [(first[p], last[p]) for p in sorted(first, key=lambda p: -apart[p]) if apart[p] > 0]


def _spread(indices: Sequence[int], most: int) -> list[int]:
    """Return at most so many of the indices, evenly spread."""
    if len(indices) <= most:
        return list(indices)
    return [indices[i * len(indices) // most] for i in range(most)]
