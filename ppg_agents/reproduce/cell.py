"""One run of a figure, in a process of its own: ``python -m ppg_agents.reproduce.cell JOB.json FOLDER``.

Trains if necessary, then measures what the figure needs besides the cells, and writes it into the run's folder.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ppg_agents.compare.cell import ending, fill, filled
from ppg_agents.config.settings import TrainConfig
from ppg_agents.reproduce.plans import LENGTHS, STEPS, Measured, after, from_json, measurements
from ppg_agents.runs.run import Run, RunError

if TYPE_CHECKING:
    from ppg_agents.generation import Sampler
    from ppg_agents.policy.policy import Policy


def measure(job: Measured, folder: Path) -> None:
    """Measure what has not been measured yet, on the policy after the largest size.

    Raises:
        RunError: Its checkpoint is not there.
        ValueError, OSError: As evaluation raises them.
    """
    from ppg_agents.evaluate import evaluate
    from ppg_agents.reproduce.step_level import evaluate_steps

    run = Run.open(folder)
    lengths = measurements(job, folder, LENGTHS)
    missing = [turns for turns in job.turns if str(turns) not in lengths]
    steps = job.steps and not measurements(job, folder, STEPS)
    if not missing and not steps:
        return
    policy, sampler = trained(job, run)
    if steps:
        base = untrained(run.config)
        judged = evaluate_steps(policy, sampler, base, _sampler(base, run.config), run.config)
        _keep(job, run, STEPS, judged.to_dict())
    for turns in missing:
        env = run.config.env
        config = replace(run.config, env=replace(env, max_turns=turns, kwargs={**env.kwargs, "max_turns": turns}))
        _keep(job, run, LENGTHS, {str(turns): evaluate(policy, sampler, config).to_dict()})


def untrained(config: TrainConfig) -> Policy:
    """Return the policy that a run started from."""
    from ppg_agents.building import load_policy

    return load_policy(config)


def trained(job: Measured, run: Run) -> tuple[Policy, Sampler]:
    """Return the policy after the largest size, and its sampler.

    Raises:
        RunError: Its checkpoint is not there.
    """
    wanted = job.sizes[-1] // run.config.batch
    checkpoint = dict(run.checkpoints()).get(wanted)
    if checkpoint is None:
        raise RunError(
            f"expected checkpoint {wanted} in {run.folder}, got {[step for step, _ in run.checkpoints()] or 'none'}; "
            "move the folder away to train it again"
        )
    policy = untrained(run.config)
    run.load_checkpoint(checkpoint, policy.load_weights)
    return policy, _sampler(policy, run.config)


def _sampler(policy: Policy, config: TrainConfig) -> Sampler:
    from ppg_agents.generation.hf import HFSampler

    return HFSampler(policy, config.sampling.max_new_tokens, config.sampling.temperature)


def _keep(job: Measured, run: Run, name: str, measured: dict[str, object]) -> None:
    stored = run.read_json(name) or {}
    run.write_json(name, {**stored, after(job): {**stored.get(after(job), {}), **measured}})


def main(job: str, folder: str) -> int:
    """Train and measure; return the process's exit code."""
    return ending(lambda: work(from_json(Path(job).read_text(encoding="utf-8")), Path(folder)))


def work(job: Measured, folder: Path) -> None:
    """Train until the cells are filled and the policy is saved, then measure it."""
    import torch

    if not filled(job, folder):
        fill(job, folder)
    torch.set_num_threads(job.config.get("threads") or 1)
    measure(job, folder)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
