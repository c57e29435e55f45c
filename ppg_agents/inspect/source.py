"""What there is to show: a run folder or a file of trajectories, read once, of which a readable sample is kept.

Trajectories are read line by line, so that a large file costs no more memory than its sample.
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
"""Pairs of held-out conversations that are shown, for every conversation that may be."""


@dataclass(frozen=True)
class Conversation:
    """A conversation to show.

    Attributes:
        number: Its line in the file, from 1.
        iteration: In which it was learned from, or after which it was played to evaluate; None where nobody knows.
        trajectory: What was said, sampled and judged.
        held_out: The evaluation that it was played for, by name; empty for one to learn from.
    """

    number: int
    iteration: int | None
    trajectory: Trajectory
    held_out: str = ""

    @property
    def mean(self) -> float | None:
        """Mean reward of the judged turns; None without any."""
        judged = self.trajectory.judged()
        return sum(judged) / len(judged) if judged else None


class Pair(NamedTuple):
    """A held-out conversation in two evaluations: the same seed, hence the same persona and the same opening line."""

    before: Conversation
    after: Conversation

    @property
    def change(self) -> float | None:
        """Mean reward after minus before; None where one of them was not judged."""
        before, after = self.before.mean, self.after.mean
        return None if before is None or after is None else after - before


@dataclass(frozen=True)
class HeldOut:
    """Two evaluations, conversation by conversation.

    Attributes:
        pairs: A sample, in the order of the evaluation, which knows nothing of the outcome.
        changes: Of every pair that was judged at both times, shown or not; see `Pair.change`.
    """

    pairs: Sequence[Pair]
    changes: Sequence[float]

    def typical(self) -> Pair | None:
        """Return the pair shown whose change is the median one, so that nobody has picked it; None without any."""
        judged = [(change, k) for k, pair in enumerate(self.pairs) if (change := pair.change) is not None]
        return self.pairs[sorted(judged)[(len(judged) - 1) // 2][1]] if judged else None


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
        shown: The sample of what was learned from, in the order of the file.
        counts: Of everything there is to learn from.
        notes: What is not as usual, in whole sentences.
        held_out: The first and the newest evaluation; None where a run has not kept two.
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
        """Return everything to show: what was learned from, then the held-out pairs."""
        return [*self.shown, *(one for pair in (self.held_out.pairs if self.held_out else ()) for one in pair)]

    @property
    def offline(self) -> bool:
        """Whether the conversations were logged by others."""
        return self.config is not None and bool(self.config.offline.files)

    @property
    def turns(self) -> int:
        """Turns in the longest conversation shown, at least 1."""
        return max((len(c.trajectory.turns) for c in self.all), default=1) or 1


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


def _held_out(run: Run, evaluations: Mapping[str, Any], most: int, notes: list[str]) -> HeldOut | None:
    """Return the first and the newest evaluation's conversations, of which the first pairs are kept."""
    names = {int(result.get("iteration", 0)): when for when, result in evaluations.items()}
    files = {iteration: path for iteration, path in run.held_out().items() if iteration in names}
    if len(files) < 2:
        return None
    first, last = min(files), max(files)
    later = {c.trajectory.seed: c for c in _played(files[last], last, names[last], notes)}
    pairs: list[Pair] = []
    changes: list[float] = []
    for one in _played(files[first], first, names[first], notes):
        other = later.get(one.trajectory.seed)
        if other is None or other.trajectory.persona != one.trajectory.persona:
            continue
        pair = Pair(one, other)
        pairs += [pair] if len(pairs) < most else []
        changes += [pair.change] if pair.change is not None else []
    return HeldOut(pairs, changes) if pairs else None


def _played(path: Path, iteration: int, when: str, notes: list[str]) -> Iterator[Conversation]:
    """Yield an evaluation's conversations."""
    for _, number, trajectory in _lines(path, notes):
        yield Conversation(number, iteration, trajectory, when)


def _logged(config: TrainConfig, most: int, notes: list[str]) -> tuple[list[Conversation], Counts]:
    """Return a sample of the logged dialogues that a run learned from; without tokens, which a run does not keep."""
    from ppg_agents.offline import read_files
    from ppg_agents.trajectory import Trajectory, Turn
    from ppg_gym.data import split_by_persona

    try:
        dialogues, _ = read_files(config.offline)
        learned, _ = split_by_persona(dialogues, config.offline.held_out, config.seed)
    except (OSError, ValueError) as error:
        notes.append(f"The run learned from logged dialogues, which cannot be read here: {error}.")
        return [], Counts()
    notes.append("The conversations are the logged dialogues that the run learned from; others had spoken them.")
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
        who = dialogue.persona
        trajectory = Trajectory(who.instruction, who.id, dialogue.domain, None, turns, terminated=True, truncated=False)
        logged.append(Conversation(number, None, trajectory))
        rows.append(Row(0, number, 0, who.id, any(status(turn) != "scored" for turn in turns)))
        counts.add(trajectory)
    return [logged[i] for i in sample(rows, most)], counts
