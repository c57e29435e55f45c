"""``ppg-agent evaluate``, ``rollout``, ``chat`` and ``merge``: use an existing policy.

Results go to stdout, everything else to stderr. Only click and the standard library are imported before a command
runs; nothing is computed here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from ppg_agents.commands.options import SERVERS, shared, target_config


@click.command()
@click.argument("target", metavar="RUN_OR_MODEL")
@shared("domain", "personas", *SERVERS, "conversations", "seed", "set")
@click.option("--best-of", type=click.IntRange(1), metavar="N", help="Play each one N times; the best counts.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(target: str, conversations: int | None, best_of: int | None, as_json: bool, **flags: Any) -> None:
    """Measure persona consistency on held-out personas.

    RUN_OR_MODEL is a run folder (its newest checkpoint, its settings), tiny (the embedded model), or a
    Hugging Face model or folder.

    Example: ppg-agent evaluate runs/NAME --conversations 128 --json
    """
    personas = flags.pop("personas") or "held-out"
    flags["evaluation.seed"] = flags.pop("seed")
    flags["evaluation.conversations"] = conversations
    config = target_config(target, **flags)

    from ppg_agents.agents.methods import METHODS
    from ppg_agents.evaluate import evaluate as measure
    from ppg_agents.evaluate import load_target
    from ppg_agents.terminal.progress import Progress, interval, number, sparkline

    policy, sampler, speaker = load_target(target, config)
    method = METHODS.get(config.agent)
    options = method.fill(config.agent, config.agent_options) if method else {}
    best_of = best_of or int(options.get("n", 1))
    with Progress("evaluating", config.evaluation.conversations) as progress:
        result = measure(
            policy, sampler, config, personas=personas, best_of=best_of, done=progress.advance, speaker=speaker
        )
    if as_json:
        where = {"target": target, "domain": config.world, "personas": personas}
        click.echo(json.dumps({**result.to_dict(), **where, "seed": config.evaluation.seed}, allow_nan=False))
        return
    sure = interval(result.ci95) + ("" if math.isnan(result.ci95[0]) else " 95% CI")
    click.echo(f"persona consistency  {number(result.persona_consistency)}  {sure}")
    click.echo(f"reachable            {number(result.reachable)}")
    click.echo(f"per turn             {' '.join(map(number, result.per_turn))}  {sparkline(result.per_turn)}")
    click.echo(f"personas             {result.n_personas} in {result.conversations} conversations")
    click.echo(f"not judged           {result.judge_failures} replies ({result.judge_failure_rate:.1%})")
    faults = "".join(f"; {fault}: {count}" for fault, count in result.partner_failures.items())
    click.echo(f"partner failed       {sum(result.partner_failures.values())} conversations{faults}")


@click.command()
@click.argument("target", metavar="RUN_OR_MODEL")
@shared("domain", "personas", *SERVERS, "conversations", "seed", "set")
@click.option("--out", type=click.Path(), default="-", help="JSONL file; default: stdout.")
def rollout(target: str, conversations: int | None, seed: int | None, out: str, **flags: Any) -> None:
    """Write conversations as trajectories, one JSON object per line.

    Example: ppg-agent rollout runs/NAME --conversations 64 --out talks.jsonl
    """
    personas = flags.pop("personas") or "train"
    from ppg_agents.runs.run import check_file

    if out != "-":
        check_file(Path(out))
    config = target_config(target, **flags)

    from ppg_agents.evaluate import load_target, play
    from ppg_agents.runs.files import writing
    from ppg_agents.terminal.progress import Progress
    from ppg_agents.trajectory import to_json, write_jsonl

    policy, sampler, speaker = load_target(target, config)
    count = conversations or config.batch
    with Progress("playing", count) as progress:
        trajectories, _ = play(
            policy,
            sampler,
            config,
            personas=personas,
            conversations=count,
            seed=config.seed if seed is None else seed,
            done=progress.advance,
            speaker=speaker,
        )
    if out == "-":
        for trajectory in trajectories:
            click.echo(to_json(trajectory))
    else:
        with writing(Path(out), "{todo}, or change --out"):
            write_jsonl(out, trajectories)


@click.command()
@click.argument("target", metavar="RUN_OR_MODEL", default="tiny")
@shared("domain", "personas", "judge", "judge_url", "judge_model", "no_cache")
@click.option("--persona", help="Id of the persona; default: drawn at random.")
@shared("seed", "set")
def chat(target: str, persona: str | None, seed: int | None, **flags: Any) -> None:
    """Talk to a persona; the judge's verdict appears under each of its lines.

    You play the partner. An empty line or Ctrl-D ends the conversation.

    Example: ppg-agent chat runs/NAME --persona therapy-held-out-007
    """
    personas = flags.pop("personas") or "held-out"
    config = target_config(target, **flags)

    from ppg_agents.commands.talk import talk
    from ppg_agents.evaluate import load_target

    talk(load_target(target, config), config, personas=personas, persona=persona, seed=seed)


@click.command()
@click.argument("target", metavar="RUN_OR_CHECKPOINT")
@click.option("--out", required=True, type=click.Path(), metavar="DIR", help="A new or empty folder.")
@shared("set")
def merge(target: str, out: str, assignments: tuple[str, ...]) -> None:
    """Write a run's newest checkpoint as one plain model, LoRA folded into the weights.

    Example: ppg-agent merge runs/NAME --out models/NAME
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise click.UsageError(f"--out: expected a new or empty folder, got {out}; choose another")
    config = target_config(target, assignments)

    from ppg_agents.evaluate import load_target

    load_target(target, config).policy.save_merged(folder)
    click.echo(str(folder))
