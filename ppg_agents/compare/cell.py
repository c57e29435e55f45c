"""One run of a comparison, in a process of its own: ``python -m ppg_agents.compare.cell JOB.json FOLDER``.

Trains, evaluates and leaves a run folder, from which the results are read. Nothing is compared here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ppg_agents.compare.plan import SB3, UNTRAINED, Job, Plan, config_of, worlds
from ppg_agents.config.parsing import ConfigError
from ppg_agents.config.settings import TrainConfig, differences
from ppg_agents.runs.files import json_object
from ppg_agents.runs.files import replace as replace_file
from ppg_agents.runs.run import Run, is_run
from ppg_agents.terminal.interrupt import Interrupted

RESULT = "result.json"  # of an agent that has no run folder
STOPPED = 130
FILES = ("config.toml", "metrics.jsonl", "evaluation.json", RESULT)


@dataclass(frozen=True)
class Result:
    """One cell of the comparison: a method in a domain, after ``size`` training conversations, with one seed.

    Attributes:
        job: The run that filled it.
        size: Training conversations.
        evaluation: The held-out result.
        judged_turns: Turns that were judged in training.
        seconds: Time spent on training and its sampling.
    """

    job: Job
    size: int
    evaluation: dict[str, Any]
    judged_turns: int
    seconds: float


def results(job: Job, folder: Path) -> list[Result]:
    """Return the cells that a run has filled so far; none when it has not begun."""
    if job.agent.startswith(SB3):
        path = folder / RESULT
        if not path.exists():
            return []
        stored = json_object(path)
        return [Result(job, job.sizes[0], stored["evaluation"], stored["judged_turns"], stored["seconds"])]
    if not is_run(folder):
        return []
    run = Run.open(folder)
    evaluations, batch = run.evaluations(), run.config.batch
    if job.agent in UNTRAINED:
        before = evaluations.get("before")
        return [Result(job, size, before, 0, 0.0) for size in job.sizes] if before else []
    lines, cells = run.metrics(), []
    for size in job.sizes:
        done = size // batch
        evaluation = evaluations.get(f"iteration {done}") or evaluations.get("after", {})
        if evaluation.get("iteration") == done:
            past = [line for line in lines if line["iteration"] <= done]
            seconds = sum(line.get("seconds_sampling", 0.0) + line["seconds_learning"] for line in past)
            cells.append(Result(job, size, evaluation, sum(line["judged_turns"] for line in past), seconds))
    return cells


def check(job: Job, folder: Path) -> None:
    """Check that a folder is empty or holds the job's own run.

    Raises:
        ConfigError: The run there has other settings, each of which is named; or has passed a size that it was not
            evaluated at.
    """
    if is_run(folder):
        before = Run.open(folder).config
    elif (path := folder / RESULT).exists():
        before = config_of(replace(job, config=json_object(path)["config"]))
    else:
        return
    other = differences(before, config_of(job))
    if other:
        raise ConfigError(f"expected the settings of the run in {folder}; {'; '.join(other)}; choose another --out")
    if not is_run(folder) or job.agent in UNTRAINED:
        return
    newest, there = Run.open(folder).latest_checkpoint(), {result.size for result in results(job, folder)}
    past = [size for size in job.sizes if newest and size // before.batch < newest[0] and size not in there]
    if past:
        raise ConfigError(
            f"expected sizes that the run in {folder} was evaluated at or has yet to come to, got {past}; choose "
            "another --out"
        )


def filled(job: Job, folder: Path) -> bool:
    """Return whether all cells of a run are filled and its last policy has been saved."""
    if len(results(job, folder)) < len(job.sizes):
        return False
    if not is_run(folder) or job.agent in UNTRAINED:
        return True
    run = Run.open(folder)
    newest = run.latest_checkpoint()  # none: Ray ran it on another machine and sent no weights
    return newest is None or newest[0] >= job.sizes[-1] // run.config.batch


def finished(job: Job, folder: Path) -> bool:
    """Return whether a run's cells are filled and its further measurements are there."""
    return filled(job, folder) and job.measured(folder)


def fill(job: Job, folder: Path) -> None:
    """Train and evaluate; resume a run that was stopped.

    Raises:
        ConfigError: The folder holds a run with other settings.
        ValueError, RuntimeError, OSError: As training raises them.
    """
    if job.agent.startswith(SB3):
        _fill_sb3(job, folder)
        return
    from ppg_agents.train import train

    train(config_of(job), folder, resume=is_run(folder))


def _fill_sb3(job: Job, folder: Path) -> None:
    from ppg_agents.agents.sb3 import MODEL, evaluate_sb3, train_sb3
    from ppg_agents.rollout.environment import keyword_arguments

    config = config_of(job)
    given = keyword_arguments(config, config.personas)
    for key in ("on_judge_failure", "max_failure_rate"):  # the wrapper has its own rule for failed verdicts
        given.pop(key, None)
    turns = _planned(job.domain, config)
    (folder / MODEL).unlink(missing_ok=True)
    options = {"discount": config.discount, **config.agent_options}
    trained = train_sb3(job.agent, given, timesteps=job.sizes[0] * turns, out=folder, seed=job.seed, **options)
    evaluation = evaluate_sb3(folder, given, conversations=config.evaluation.conversations, seed=config.evaluation.seed)
    record = {
        "evaluation": evaluation.to_dict(),
        "judged_turns": trained.judged_turns,
        "seconds": trained.seconds,
        "config": job.config,
    }
    replace_file(folder / RESULT, json.dumps(record, allow_nan=False) + "\n")


def turns_of(plan: Plan) -> dict[str, int]:
    """Return the turns of a conversation, by domain, or by the id of the plan's own environment; it is asked.

    Raises:
        ConfigError: A wrong setting, or an environment whose conversations have no fixed number of turns.
    """
    return {world: _planned(world, config) for world, config in worlds(plan).items()}


def _planned(world: str, config: TrainConfig) -> int:
    from ppg_agents.rollout.environment import make_envs, planned_turns

    envs = make_envs(config, 1, config.personas)
    try:
        turns = planned_turns(envs, config)
    finally:
        envs.close()
    if turns is None:
        raise ConfigError(f"{world}: expected a planned number of turns, got none; set settings.env.max_turns")
    return turns


def to_json(job: Job) -> str:
    """Return a job as one line of JSON."""
    return json.dumps(asdict(job))


def from_json(text: str) -> Job:
    """Read what `to_json` wrote."""
    fields = json.loads(text)
    return Job(**{**fields, "sizes": tuple(fields["sizes"])})


def main(job: str, folder: str) -> int:
    """Fill the cells of one job; return the process's exit code."""
    return ending(lambda: fill(from_json(Path(job).read_text(encoding="utf-8")), Path(folder)))


def ending(work: Callable[[], None]) -> int:
    """Do the work and return the exit code for it: 0, or `STOPPED` when the user stopped it."""
    try:
        work()
    except (Interrupted, KeyboardInterrupt):
        return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
