"""The runs that a figure needs: `compare` cells, shared by all figures of a folder.

Reads and combines settings; starts nothing and may not import torch.

The paper's figures [P] are: (2) residual of persona consistency against the step, K = 1..5; (3) consistency against the
number of training trajectories, K = 1..5; (4) the best K against that number; (5) mean consistency of conversations of
10, 20, 40, 60 steps. Sizes, seeds, intervals and everything else here are our choice [D].
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ppg_agents.compare.cell import check as check_settings
from ppg_agents.compare.cell import results, turns_of
from ppg_agents.compare.engine import folder_of
from ppg_agents.compare.plan import Job, Plan, config_of, jobs
from ppg_agents.config.parsing import ConfigError, put
from ppg_agents.runs.files import json_object
from ppg_agents.runs.run import Run, is_run

FIGURES = ("fig2", "fig3", "fig4", "fig5", "table")
DOMAINS, QUICK_DOMAINS = ("education", "therapy", "chatting"), ("therapy",)
LOOKAHEADS, QUICK_LOOKAHEADS, FULL = (1, 2, 3, 4, 5), (1, 3, 5), "full"
SIZES, QUICK_SIZES = (80, 160, 320, 640), (80, 160)
SEEDS, QUICK_SEEDS = 5, 2
TURNS, QUICK_TURNS = (10, 20, 40, 60), (10, 20)
METHODS = ("ppg", "base", "best-of-n", "ppo", "sft")
METHOD_CLASSES, QUICK_METHOD_CLASSES = ("full", "greedy", "2", "3", "5", "auto"), ("full", "greedy", "3")
SETTINGS = {"batch": 16, "keep_checkpoints": 1, "evaluation.conversations": 64, "schedule": "constant", "threads": 1}
STEPS, LENGTHS = "steps.json", "lengths.json"


@dataclass(frozen=True)
class Request:
    """A figure to draw.

    Attributes:
        figure: One of `FIGURES`.
        domains: Names of domains.
        sizes: Training conversations.
        seeds: How many training seeds: 0, 1, ….
        turns: Lengths of the conversations of figure 5.
        lookaheads: K of figures 2 to 5.
        train_turns: Train figure 5 at each length, instead of evaluating the same policies at all.
        quick: Fewer of everything.
        settings: For all runs, by dotted name, on top of `SETTINGS`.
    """

    figure: str
    domains: tuple[str, ...] = DOMAINS
    sizes: tuple[int, ...] = SIZES
    seeds: int = SEEDS
    turns: tuple[int, ...] = TURNS
    lookaheads: tuple[int, ...] = LOOKAHEADS
    train_turns: bool = False
    quick: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured(Job):
    """A run with more measurements.

    Attributes:
        steps: Whether to evaluate it turn by turn after a history of the untrained model (`step_level`).
        turns: More lengths of conversations to evaluate it on.
    """

    module: ClassVar[str] = "ppg_agents.reproduce.cell"
    further: ClassVar[tuple[str, ...]] = (STEPS, LENGTHS)

    steps: bool = False
    turns: tuple[int, ...] = ()

    def measured(self, folder: Path) -> bool:
        """Return whether all measurements are there."""
        lengths = measurements(self, folder, LENGTHS)
        return all(str(n) in lengths for n in self.turns) and bool(not self.steps or measurements(self, folder, STEPS))


def measurements(job: Job, folder: Path, name: str) -> dict[str, Any]:
    """Return the measurements of the policy trained with the largest size; empty without any.

    Raises:
        RunError: The file is damaged.
    """
    path = folder / name
    measured: dict[str, Any] = json_object(path).get(after(job), {}) if path.exists() else {}
    return measured


def after(job: Job) -> str:
    """Return the key of `measurements`: the iteration that the largest size ends with."""
    return f"iteration {job.sizes[-1] // config_of(job).batch}"


def from_json(text: str) -> Measured:
    """Read what `compare.cell.to_json` wrote."""
    fields = json.loads(text)
    return Measured(**{**fields, "sizes": tuple(fields["sizes"]), "turns": tuple(fields["turns"])})


def plan(request: Request, turns: int | None = None) -> Plan:
    """Return the comparison behind a figure.

    Args:
        request: The figure.
        turns: Of every conversation; None for the domain's default.

    Raises:
        ConfigError: A wrong setting.
    """
    settings: dict[str, Any] = {}
    length = {} if turns is None else {"env.max_turns": turns, "env.kwargs.max_turns": turns}
    for key, value in {**SETTINGS, **request.settings, **length}.items():
        put(settings, key, value)
    lookaheads = tuple(map(str, request.lookaheads))
    classes = lookaheads if request.figure == "fig2" else (*lookaheads, FULL)
    table = request.figure == "table"
    if table:  # an agent with one class gets the first
        classes = QUICK_METHOD_CLASSES if request.quick else METHOD_CLASSES
    return Plan(
        domains=request.domains,
        agents=METHODS if table else ("ppg",),
        classes=classes,
        sizes=tuple(sorted(request.sizes)),
        seeds=tuple(range(request.seeds)),
        settings=settings,
        class_agents=("ppg",) if table else (),
    )


def planned(request: Request, out: Path) -> dict[Path, list[Job]]:
    """Return the runs of a figure, by folder.

    Raises:
        ConfigError: A wrong setting, or a folder whose runs have other settings.
    """
    if request.figure == "fig5" and request.train_turns:
        wanted = {out / f"{n}-turns": plan(request, n) for n in request.turns}
    else:
        wanted = {out: plan(request)}
    further: dict[str, Any] = {"steps": request.figure == "fig2"}
    further["turns"] = request.turns if request.figure == "fig5" and not request.train_turns else ()
    runs_of = {
        place: [
            Measured(**job.__dict__, **further) if job.agent == "ppg" else job
            for job in jobs(comparison, turns_of(comparison))
        ]
        for place, comparison in wanted.items()
    }
    for place, runs in runs_of.items():
        check(runs, place)
    return runs_of


def turns_by_domain(request: Request) -> dict[str, int]:
    """Return the turns of a conversation, by domain: the K of full planning."""
    return turns_of(plan(request))


def check(wanted: Sequence[Job], out: Path) -> None:
    """Refuse a folder with other runs.

    Raises:
        ConfigError: A run in it has other settings, or has trained past the size to measure.
    """
    for job in wanted:
        folder = folder_of(job, out)
        if not is_run(folder):
            continue
        check_settings(job, folder)
        run = Run.open(folder)
        latest = run.checkpoints()[-1:]
        if len(results(job, folder)) == len(job.sizes) and not job.measured(folder) and latest:
            done = job.sizes[-1] // run.config.batch
            if latest[0][0] > done:
                raise ConfigError(
                    f"expected a policy of {job.sizes[-1]} conversations in {folder}, got one of "
                    f"{latest[0][0] * run.config.batch}; add --sizes up to that, or choose another --out"
                )
