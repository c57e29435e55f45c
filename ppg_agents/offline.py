"""Logged, judged dialogues as training data: read, split by persona, encoded, learned from, scored.

`Offline` is the task that `train` runs on them. The only place here that reads a file format of the environment
package.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ppg_agents.agents.protocol import Agent, OfflineAgent, PreparingAgent
from ppg_agents.batch import batch
from ppg_agents.config.parsing import ConfigError
from ppg_agents.config.settings import OfflineSettings, TrainConfig
from ppg_agents.credit import Mask
from ppg_agents.group_advantage import PER_TURN
from ppg_agents.horizon.planner import Planner
from ppg_agents.missing import Credits
from ppg_agents.prefixes import Reward, price, rewarded
from ppg_agents.rollout.metrics import batch_metrics, reply_lengths
from ppg_agents.runs.files import finite
from ppg_agents.terminal.progress import say
from ppg_agents.terminal.table import aligned
from ppg_agents.trajectory import Trajectory, from_logged, group_labels

if TYPE_CHECKING:
    from ppg_agents.distributed import Workers
    from ppg_agents.generation import Sampler
    from ppg_agents.policy.policy import Policy
    from ppg_agents.runs.run import Run
    from ppg_agents.terminal.interrupt import Interrupt
    from ppg_gym.data import LoggedDialogue, Report


class Offline:
    """Logged dialogues; the objective is their reward-weighted log-likelihood."""

    def __init__(self, config: TrainConfig, interrupt: Interrupt, team: Workers) -> None:
        self.config, self.interrupt, self.team = config, interrupt, team
        self.dialogues, self.reports = read_files(config.offline)
        turns = max((len(dialogue.turns) for dialogue in self.dialogues), default=1)
        self.turns: int | None = turns
        self.mask = Planner(config, turns, team).mask

    def remember(self, run: Run) -> None:
        """Do nothing: every iteration follows from its number."""

    def meet(self, agent: Agent) -> None:
        """Take the agent, and let it look at the training conversations if it wants to; nobody speaks.

        Raises:
            ConfigError: It does not learn from logged dialogues, or compares those of one persona and topic where no
                two are.
        """
        if not (isinstance(agent, OfflineAgent) and agent.learns_offline):
            name = self.config.agent
            raise ConfigError(f"agent: expected one that learns offline, such as 'ppg', got {name!r}")
        self.agent = agent
        groups = Counter(group_labels(self.data.train)) if self.config.baseline in PER_TURN else Counter()
        self.alone = (sum(size == 1 for size in groups.values()), len(groups))
        if self.config.baseline == "group-turn" and self.alone[0] == len(groups):
            raise ConfigError(
                "baseline 'group-turn' compares dialogues of one persona and topic turn by turn: expected two of some, "
                "got one of each; use 'group', or give more dialogues"
            )
        if isinstance(agent, PreparingAgent):
            agent.prepare(rewarded(self.data.train, self.config.reward))

    def prepare(self, policy: Policy, sampler: Sampler) -> None:
        """Hold out personas and encode the dialogues."""
        self.end_of_turn_id = policy.end_of_turn_id
        settings, seed, reward = self.config.offline, self.config.seed, self.config.reward
        self.data = encode(self.dialogues, self.reports, settings, policy, seed, reward)
        self.per_epoch = math.ceil(len(self.data.train) / self.config.batch)
        self.iterations = self.config.offline.epochs * self.per_epoch

    def describe(self, run: Run) -> None:
        """Report what was read, and record it in the run folder."""
        say(report_table(self.data))
        if self.alone[1]:
            say("advantage: {1} groups of one persona and topic, {0} of them with one conversation".format(*self.alone))
        say(f"run folder: {run.folder}")
        read, before = finite(to_json(self.data)), run.read_json("offline.json")
        if before is not None and before != read:
            different = ", ".join(key for key in read if read[key] != before.get(key))
            raise ConfigError(
                f"offline.files: expected the dialogues that the run in {run.folder} learns from, got others: "
                f"{different} differ from its offline.json; put the files back, or begin a new run"
            )
        run.write_json("offline.json", read)

    def step(self, run: Run, iteration: int) -> dict[str, Any]:
        """Learn from the iteration's share of a pass over the data; every pass has its own order."""
        epoch, position = divmod(iteration, self.per_epoch)
        order = np.random.default_rng([self.config.seed, epoch]).permutation(len(self.data.train))
        rows = order[position * self.config.batch :][: self.config.batch]
        trajectories = [self.data.train[row] for row in rows]
        began = time.perf_counter()
        learned_from = rewarded(trajectories, self.config.reward)
        learned = self.agent.learn_offline(learned_from[self.team.shard(len(trajectories))])
        lengths = reply_lengths(trajectories, self.end_of_turn_id)
        metrics = {"epoch": epoch + 1, **batch_metrics(trajectories), **lengths, **learned}
        if self.config.reward == "prefix":
            metrics |= price(trajectories)
        if self.agent.loss_is_likelihood:  # loss = -objective
            total = -learned["loss"] * len(trajectories)
            weight = weighted_tokens(learned_from, self.mask(self.turns or 1), self.config.discount)
            metrics |= likelihood(total, weight, learned_from)
        return {**metrics, "seconds_learning": time.perf_counter() - began}

    def evaluate(self) -> tuple[dict[str, Any], Sequence[Trajectory]] | None:
        """Score the dialogues of held-out personas; nothing is played."""
        mask = self.mask(self.turns or 1)
        with self.interrupt.abandonable():
            held_out = {name: rewarded(part, self.config.reward) for name, part in self.data.held_out.items()}
            return held_out_likelihood(self.agent, held_out, mask, self.config.discount), ()

    def close(self) -> None:
        """Nothing to close."""


@dataclass(frozen=True)
class Logged:
    """Logged conversations, ready to learn from.

    Attributes:
        train: Conversations to learn from, each with at least one judged turn.
        held_out: Conversations of other personas, per file.
        reports: What was read, per file.
        cut: Dialogues cut at a whole turn to fit the longest sequence.
        dropped: Dialogues left without a judged turn, by the cut or from the start.
        personas: Personas in (train, held_out).
    """

    train: list[Trajectory]
    held_out: dict[str, list[Trajectory]]
    reports: list[Report]
    cut: int
    dropped: int
    personas: tuple[int, int]


def read_files(settings: OfflineSettings) -> tuple[list[LoggedDialogue], list[Report]]:
    """Read all files.

    Raises:
        DataError: An invalid file; the message says where and why.
    """
    from ppg_gym.data import read_dialogues

    dialogues, reports = [], []
    for path in settings.files:
        some, report = read_dialogues(path)
        dialogues += some
        reports.append(report)
    return dialogues, reports


def encode(
    dialogues: Sequence[LoggedDialogue],
    reports: Sequence[Report],
    settings: OfflineSettings,
    policy: Policy,
    seed: int,
    reward: Reward = "turn",
) -> Logged:
    """Hold out personas and encode with the policy's tokenizer; leave out what has no ``reward``.

    Raises:
        ValueError: Too few personas to hold some out, or nothing fits the longest sequence.
    """
    from ppg_gym.data import split_by_persona

    parts = split_by_persona(dialogues, settings.held_out, seed)
    encoded = [list(zip(part, from_logged(part, policy, settings.max_tokens), strict=True)) for part in parts]
    kept = [[(d, t) for d, t in part if rewarded([t], reward)[0].judged()] for part in encoded]
    if not kept[0] or not kept[1]:
        raise ValueError(
            "expected conversations with judged turns that fit in both parts of the split, got "
            f"{len(kept[0])} and {len(kept[1])}; raise offline.max_tokens, give more files, or a model with "
            "a longer context"
        )
    held_out: dict[str, list[Trajectory]] = {}
    for dialogue, trajectory in kept[1]:
        held_out.setdefault(dialogue.source, []).append(trajectory)
    return Logged(
        train=[t for _, t in kept[0]],
        held_out=held_out,
        reports=list(reports),
        cut=sum(t.truncated for part in kept for _, t in part),
        dropped=sum(map(len, encoded)) - sum(map(len, kept)),
        personas=(len({d.persona.id for d, _ in kept[0]}), len({d.persona.id for d, _ in kept[1]})),
    )


def weighted_tokens(trajectories: Sequence[Trajectory], mask: Mask, discount: float) -> float:
    """Return Σ_b Σ_t A_{b,t} · |y_{b,t}|, tokens weighed by what the learner weighs their reply with.

    Args:
        trajectories: B conversations.
        mask: The policy class [n, n].
        discount: γ, per turn.
    """
    data = batch(trajectories, 0, len(mask))
    credits = Credits(data.rewards, data.valid, data.missing, mask, discount)
    return float((credits.filled() * credits.replies * (data.spans[..., 2] - data.spans[..., 1])).sum())


def likelihood(total: float, weight: float, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Return the reward-weighted log-likelihood of conversations on three scales.

    Args:
        total: Σ_b Σ_t A_{b,t} · log π(y_{b,t} | …), nats, with A the credit, made up for what faults took away.
        weight: `weighted_tokens`.
        trajectories: The B conversations of the sum.

    Returns:
        ``log_likelihood``: per conversation; ``log_likelihood_per_token``: per reply token of a judged turn;
        ``weighted_token_log_prob``: per credit-weighted token, total / Σ_b Σ_t A_{b,t} · |y_{b,t}|, a mean
        log-probability, the only one comparable between batches and policy classes; None without credit.
    """
    tokens = sum(len(turn.token_ids) for t in trajectories for turn in t.turns if math.isfinite(turn.reward))
    return {
        "log_likelihood": total / len(trajectories),
        "log_likelihood_per_token": total / tokens,
        "weighted_token_log_prob": total / weight if weight else None,
    }


def held_out_likelihood(
    agent: OfflineAgent, held_out: Mapping[str, Sequence[Trajectory]], mask: Mask, discount: float
) -> dict[str, Any]:
    """Return the objective of offline learning on held-out personas.

    Returns:
        `likelihood` over all of them and ``per_file``; and the numbers of ``conversations`` and judged ``turns``.
    """
    scored = {name: agent.evaluate_offline(trajectories) for name, trajectories in held_out.items()}
    totals = {name: scored[name]["objective"] * len(trajectories) for name, trajectories in held_out.items()}
    weights = {name: weighted_tokens(held_out[name], mask, discount) for name in held_out}
    everyone = [trajectory for trajectories in held_out.values() for trajectory in trajectories]
    return {
        **likelihood(sum(totals.values()), sum(weights.values()), everyone),
        "conversations": len(everyone),
        "turns": sum(int(result["turns"]) for result in scored.values()),
        "per_file": {name: likelihood(totals[name], weights[name], held_out[name]) for name in held_out},
    }


def report_table(logged: Logged) -> str:
    """Return what was read as a plain table, one line per file, and the split below it."""
    rows: list[tuple[str, ...]] = [("file", "dialogues", "judged lines", "scored", "unparsed", "polarity")]
    for report in logged.reports:
        share = f"{report.unparsed / max(report.judged_lines, 1):.1%}"
        counts = (report.dialogues, report.judged_lines, report.scored)
        rows.append((_name(report.path), *map(str, counts), share, report.polarity or "-"))
    notes = [f"{_name(report.path)}: {note}" for report in logged.reports for note in report.skipped]
    held_out = sum(map(len, logged.held_out.values()))
    split = (
        f"learning from {len(logged.train)} conversations of {logged.personas[0]} personas, "
        f"held out {held_out} of {logged.personas[1]} others; {logged.cut} cut at a whole turn to fit, "
        f"{logged.dropped} without a judged turn left out"
    )
    return "\n".join([*aligned(rows, right=range(1, 5)), *notes, split])


def to_json(logged: Logged) -> dict[str, Any]:
    """Return what was read and how it was split, as plain JSON."""
    return {
        "files": [asdict(report) for report in logged.reports],
        "cut": logged.cut,
        "dropped": logged.dropped,
        "train": {"conversations": len(logged.train), "personas": sorted({t.persona for t in logged.train})},
        "held_out": {
            "conversations": sum(map(len, logged.held_out.values())),
            "personas": sorted({t.persona for part in logged.held_out.values() for t in part}),
        },
    }


def _name(path: str) -> str:
    return "/".join(Path(path).parts[-2:])
