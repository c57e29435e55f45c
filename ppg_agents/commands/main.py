"""The commands of ``ppg-agent``: flags in, one call of the library, results out.

Results go to stdout, everything else to stderr. Only click and the standard library are imported before a
command runs, which keeps ``--help`` quick; nothing is computed here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ppg_agents.commands.compare import compare
from ppg_agents.commands.data import data
from ppg_agents.commands.doctor import doctor
from ppg_agents.commands.horizon import horizon
from ppg_agents.commands.inspect import inspect_, report
from ppg_agents.commands.judge import judge
from ppg_agents.commands.options import SERVERS, parse_segments, settings, shared
from ppg_agents.commands.reproduce import reproduce
from ppg_agents.commands.trained import chat, evaluate, merge, rollout


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; errors other than click's own are raised."""
    try:
        result = cli.main(
            args=None if arguments is None else list(arguments), prog_name="ppg-agent", standalone_mode=False
        )
    except click.Abort as abort:
        raise KeyboardInterrupt(*getattr(abort.__cause__, "args", ())) from abort  # its text tells how to go on
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return result if isinstance(result, int) else 0


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="ppg-gym", message="%(version)s")
def cli() -> None:
    """Train language models to stay in character over long conversations.

    Example: ppg-agent train --policy-class k-step --lookahead 3
    """


for command, words in (  # short enough for the list of commands at 80 columns
    (evaluate, "Measure persona consistency on held-out personas."),
    (rollout, "Write conversations as trajectories (JSONL)."),
    (chat, "Talk to a persona, with the judge's verdicts."),
    (merge, "Write a run as one plain model, LoRA folded in."),
    (data, "Read, check and write personas and dialogues."),
    (judge, "Measure judges: labels, verdicts, tricks; fit one."),
    (horizon, "Show how far ahead to plan, from one batch."),
    (compare, "Compare agents and policy classes, with intervals."),
    (inspect_, "Write one HTML page that shows a run."),
    (report, "Write a run as Markdown with figures."),
    (reproduce, "Run and draw a figure of the paper."),
    (doctor, "Show what is installed, and which servers answer."),
):
    command.short_help = words
    cli.add_command(command)


@cli.command(short_help="Train a policy; evaluate it before and after.")
@shared("domain")
@click.option("--policy-class", metavar="CLASS", help="greedy, 3, full, segment:3,3,2, auto, matrix, module:function.")
@click.option("--lookahead", type=int, metavar="K", help="Class k-step: each reply is credited with K rewards.")
@click.option("--segments", callback=parse_segments, metavar="N,N,…", help="Class segment: turns in each.")
@click.option("--agent", metavar="NAME", help="Who learns: ppg (default), ppo, grpo, …, or an installed one.")
@click.option("--offline", multiple=True, metavar="FILES…", help="Learn from logged, judged dialogues.")
@click.option("--model", help="tiny (embedded), or a Hugging Face model or folder.")
@shared("personas")
@shared(*SERVERS)
@click.option("--rollout-endpoints", multiple=True, metavar="URL", help="vLLM servers that sample; repeatable.")
@click.option("--iterations", type=int, help="Gradient steps, online.")
@click.option("--batch", type=int, help="Conversations per step.")
@shared("seed")
@click.option("--out", type=click.Path(), help="Run folder; default: a new one under runs/.")
@click.option("--report-to", multiple=True, metavar="NAME", help="Also log to tensorboard, wandb or trackio.")
@click.option("--recipe", metavar="NAME", help="paper: train as the paper does; your own settings override it.")
@click.option("--config", "file", type=click.Path(), metavar="FILE.toml", help="Settings; flags override them.")
@shared("set")
@click.option("--resume", is_flag=False, flag_value="", metavar="[RUN]", help="Resume a run; default: the newest.")
@click.argument("more", nargs=-1, metavar="")
def train(
    offline: tuple[str, ...],
    out: str | None,
    recipe: str | None,
    file: str | None,
    assignments: tuple[str, ...],
    resume: str | None,
    report_to: tuple[str, ...],
    more: tuple[str, ...],
    **flags: Any,
) -> int:
    """Train a policy, and evaluate it on held-out personas before and after.

    Without options: the embedded model, in the embedded chatting domain. Everything goes into a run
    folder: settings, metrics, trajectories, checkpoints, and a picture (curve.png).

    Example: ppg-agent train --policy-class k-step --lookahead 3
    """
    if more and not offline:
        raise click.UsageError(f"unexpected argument {more[0]!r}; dialogue files go after --offline")
    if resume is not None and recipe:
        raise click.UsageError("--resume goes on with the run's own settings; leave out --recipe")
    from ppg_agents.runs import run as runs

    endpoints = list(flags.pop("rollout_endpoints"))
    flags |= {"sampling.endpoints": endpoints, "sampling.backend": "vllm"} if endpoints else {}
    flags["offline.files"] = [*offline, *more] or None
    flags["report_to"] = list(report_to) or None
    folder = None if resume is None else Path(resume or out or runs.newest_run())
    base = Path(file) if file else None
    if resume and out and Path(resume).resolve() != Path(out).resolve():
        raise click.UsageError(f"--resume {resume} continues in that folder; leave out --out {out}")
    if folder is not None and base is None:
        base = runs.Run.open(folder).folder / "config.toml"
    config = settings(base, assignments, flags, recipe=recipe, training=True)
    if folder is None:
        folder = Path(out or config.out or runs.default_folder(config))
        if os.environ.get("RANK", "0") == "0":  # before the model loads; other ranks may see the folder appear
            runs.check_new(folder)

    from ppg_agents.terminal.interrupt import Interrupted
    from ppg_agents.terminal.progress import say
    from ppg_agents.train import train as start

    newest = runs.Run.open(folder).latest_checkpoint() if resume is not None and not config.offline.files else None
    if newest and newest[0] >= config.iterations and os.environ.get("RANK", "0") == "0":
        say(f"all {newest[0]} iterations are done; to go further, raise --iterations")
    try:
        finished = start(config, folder, resume=resume is not None)
    except Interrupted as stop:
        click.echo(str(stop), err=True)
        return 130
    click.echo(str(finished.folder / "curve.png"))
    return 0


LAUNCH = 'accelerate launch --config_file "$(ppg-agent accelerate-config ddp-2)" -m ppg_agents.cli train'


@cli.command(
    "accelerate-config", short_help="Print the path of an accelerate config.", epilog=f"\b\nExample:\n  {LAUNCH}"
)
@click.argument("name", required=False)
def accelerate_config(name: str | None) -> None:
    """Print the path of a ready-made accelerate config, or the names of all."""
    from ppg_agents.accelerate_configs import launch_config, launch_configs

    if name is not None:
        click.echo(str(launch_config(name)))
        return
    for known, purpose in launch_configs().items():
        click.echo(f"{known:<12} {purpose}")
