"""Reads a run folder or a file of trajectories, and keeps a sample small enough to show.

Trajectories are read line by line, so a large file needs no more memory than its sample.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ppg_agents.config.settings import TrainConfig
from ppg_agents.inspect.sample import Row, sample
from ppg_agents.nearest import did_you_mean
from ppg_agents.runs.files import RunError
from ppg_agents.runs.run import Run, is_run

if TYPE_CHECKING:
    from ppg_agents.trajectory import Trajectory, Turn

HELD_OUT_SHARE = 0.25
"""Held-out pairs to show, as a share of the most conversations to show."""


@dataclass(frozen=True)
class Conversation:
    """A conversation to show.

    Attributes:
        number: Its line in the file, from 1.
        iteration: The one that learned from it, or after which it was played for evaluation; None if unknown.
        trajectory: What was said, sampled and judged.
        held_out: Name of the evaluation it was played for; empty if it was learned from.
    """

    number: int
    iteration: int | None
    trajectory: Trajectory
    held_out: str = ""

    @property
    def mean(self) -> float | None:
        """Mean reward of the judged turns; None if there are none."""
        judged = self.trajectory.judged()
        return sum(judged) / len(judged) if judged else None


class Pair(NamedTuple):
    """A held-out conversation in two evaluations: same seed, so same persona and opening line."""

    before: Conversation
    after: Conversation

    @property
    def change(self) -> float | None:
        """Mean reward after minus before; None if either was not judged."""
        before, after = self.before.mean, self.after.mean
        return None if before is None or after is None else after - before


@dataclass(frozen=True)
class HeldOut:
    """Two evaluations, conversation by conversation.

    Attributes:
        pairs: A sample, in the order of the evaluation, so not chosen by outcome.
        changes: One per pair judged both times, shown or not; see `Pair.change`.
    """

    pairs: Sequence[Pair]
    changes: Sequence[float]

    def typical(self) -> Pair | None:
        """Return the shown pair with the median change, so it is not hand-picked; None if there is none."""
        judged = [(change, k) for k, pair in enumerate(self.pairs) if (change := pair.change) is not None]
        return self.pairs[sorted(judged)[(len(judged) - 1) // 2][1]] if judged else None


@dataclass
class Counts:
    """How all conversations of a file ended, shown or not."""

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
        path: As the user gave it.
        name: The name of the run's folder or the file.
        config: The run's settings; None for a file.
        metrics: One object per iteration.
        evaluations: Held-out results: when -> result.
        shown: A sample of the training conversations, in the order of the file.
        counts: Over all training conversations.
        notes: Anything unusual, in whole sentences.
        held_out: The first and the newest evaluation; None if the run has not kept two.
    """

    path: Path
    name: str
    config: TrainConfig | None
    metrics: Sequence[Mapping[str, Any]]
    evaluations: Mapping[str, Any]
    shown: Sequence[Conversation]
    counts: Counts
    notes: Sequence[str]
    held_out: HeldOut | None = None

    @property
    def all(self) -> list[Conversation]:
        """Return everything to show: the training conversations, then the held-out pairs."""
        return [*self.shown, *(c for pair in (self.held_out.pairs if self.held_out else ()) for c in pair)]

    @property
    def offline(self) -> bool:
        """Whether the run learned from logged dialogues."""
        return self.config is not None and bool(self.config.offline.files)

    @property
    def turns(self) -> int:
        """Turns in the longest conversation shown, at least 1."""
        return max((len(c.trajectory.turns) for c in self.all), default=1) or 1


def status(turn: Turn) -> str:
    """Return the verdict's status; if it has none, ``scored`` or ``unjudged``, going by the reward."""
    named = turn.verdict.get("status")
    return str(named) if named else "scored" if math.isfinite(turn.reward) else "unjudged"


def read(path: Path, most: int) -> Source:
    """Read a run folder or a file of trajectories.

    Args:
        path: The folder or the file.
        most: Conversations to keep, at least 1; see `sample`.

    Raises:
        RunError: The path is neither a run nor a file of trajectories.
        ValueError: A line is damaged; the message names file and line.
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
            notes.append("The run has not written any conversations yet.")
        name = path.resolve().name
        evaluations = run.evaluations()
        held_out = _held_out(run, evaluations, max(1, int(most * HELD_OUT_SHARE)), notes)
        return Source(path, name, run.config, run.metrics(), evaluations, shown, counts, notes, held_out)
    if path.is_file():
        notes = []
        shown, counts = conversations(path, most, notes)
        if not counts.conversations:
            raise RunError(f"expected trajectories, one JSON object per line, got an empty file {path}; choose another")
        return Source(path, path.name, None, (), {}, shown, counts, notes)
    siblings = [str(p) for p in path.parent.iterdir() if is_run(p)] if path.parent.is_dir() else []
    hint = did_you_mean(path, siblings) or "; give a folder that ppg-agent train wrote"
    raise RunError(f"expected a run folder, or a .jsonl file of trajectories, got {path}{hint}")


def conversations(
    path: Path, most: int, notes: list[str], batch: int | None = None
) -> tuple[list[Conversation], Counts]:
    """Read a sample of a file's conversations, and count all of them.

    Args:
        path: The file.
        most: Conversations to keep.
        notes: Gains a line if a crash left the last line torn.
        batch: Conversations per iteration; None if the file is not a run's.

    Raises:
        ValueError: A line is damaged; the message names file and line.
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
                        notes.append(f"The last line of {path.name} is torn, as after a crash, and is left out.")
                        return
                    raise ValueError(f"{path}:{number}: {error}") from error
                yield offset, number, trajectory
            offset += len(line)


def _held_out(run: Run, evaluations: Mapping[str, Any], most: int, notes: list[str]) -> HeldOut | None:
    """Return how the first and the newest evaluation differ, with the first ``most`` pairs."""
    names = {int(result.get("iteration", 0)): when for when, result in evaluations.items()}
    files = {iteration: path for iteration, path in run.held_out().items() if iteration in names}
    if len(files) < 2:
        return None
    first, last = min(files), max(files)
    later = {t.seed: Conversation(number, last, t, names[last]) for _, number, t in _lines(files[last], notes)}
    pairs: list[Pair] = []
    changes: list[float] = []
    for _, number, trajectory in _lines(files[first], notes):
        after = later.get(trajectory.seed)
        if after is None or after.trajectory.persona != trajectory.persona:
            continue
        pair = Pair(Conversation(number, first, trajectory, names[first]), after)
        pairs += [pair] if len(pairs) < most else []
        changes += [pair.change] if pair.change is not None else []
    return HeldOut(pairs, changes) if pairs else None


def _logged(config: TrainConfig, most: int, notes: list[str]) -> tuple[list[Conversation], Counts]:
    """Return a sample of the logged dialogues a run learned from, without tokens: a run does not keep them."""
    from ppg_agents.offline import read_files
    from ppg_agents.trajectory import Trajectory, Turn
    from ppg_gym.data import split_by_persona

    try:
        dialogues, _ = read_files(config.offline)
        learned, _ = split_by_persona(dialogues, config.offline.held_out, config.seed)
    except (OSError, ValueError) as error:
        notes.append(f"The run learned from logged dialogues, which cannot be read here: {error}.")
        return [], Counts()
    notes.append("These are the logged dialogues that the run learned from; other speakers produced them.")
    logged, counts, rows = [], Counts(), []
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
        persona = dialogue.persona
        trajectory = Trajectory(
            persona.instruction, persona.id, dialogue.domain, None, turns, terminated=True, truncated=False
        )
        logged.append(Conversation(number, None, trajectory))
        rows.append(Row(0, number, 0, persona.id, any(status(turn) != "scored" for turn in turns)))
        counts.add(trajectory)
    return [logged[i] for i in sample(rows, most)], counts
