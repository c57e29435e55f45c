"""The commands of ``ppg-agent``: flags in, one call of the library, results out.

Results go to stdout, everything else to stderr. Only click and the standard library are imported before a
command runs, so that ``--help`` is quick; nothing is computed here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ppg_agents.commands.compare import compare
from ppg_agents.commands.data import data
from ppg_agents.commands.doctor import doctor
from ppg_agents.commands.horizon import horizon
from ppg_agents.commands.inspect import inspect_, report
from ppg_agents.commands.judge import LOCAL_JUDGES, judge
from ppg_agents.commands.reproduce import reproduce

if TYPE_CHECKING:
    from ppg_agents.config.settings import TrainConfig

F = TypeVar("F", bound=Callable[..., Any])


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; errors other than click's own are raised."""
    try:
        result = cli.main(
            args=None if arguments is None else list(arguments),
            prog_name="ppg-agent",
            standalone_mode=False,
        )
    except click.Abort as abort:
        raise KeyboardInterrupt(*getattr(abort.__cause__, "args", ())) from abort  # with its words: how to go on
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


for command, words in (  # as the list of all commands shows them, uncut on a terminal of 80 columns
    (data, "Read, check and write personas and dialogues."),
    (judge, "Measure judges: labels, verdicts, tricks; fit one."),
    (horizon, "Say how far ahead to plan, from one batch."),
    (compare, "Compare agents and policy classes, with intervals."),
    (inspect_, "Write one HTML page that shows a run."),
    (report, "Write a run as Markdown with figures."),
    (reproduce, "Run and draw what a figure of the paper needs."),
    (doctor, "Say what is installed, would be used, and answers."),
):
    command.short_help = words
    cli.add_command(command)


def parse_segments(_: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """Return the lengths in ``3,3,2``."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter("expected turns per segment such as 3,3,2", param=parameter) from error


def shared(*names: str) -> Callable[[F], F]:
    """Return a decorator that adds the named options, which several commands have."""
    options = {
        "domain": click.option("--domain", help="chatting, education, therapy, or your own FILE.toml."),
        "personas": click.option("--personas", help="train, held-out, or a persona file."),
        "conversations": click.option("--conversations", type=click.IntRange(1), help="How many to play."),
        "seed": click.option("--seed", type=click.IntRange(0), help="Same seed, same result."),
        "set": click.option(
            "--set", "assignments", multiple=True, metavar="A.B=C", help="Set anything, e.g. lora.rank=8."
        ),
        "judge": click.option("--judge", help="facts (embedded), llm, nli, or package.module:Class."),
        "judge_url": click.option("--judge-url", multiple=True, metavar="URL", help="Chat endpoint; implies llm."),
        "judge_model": click.option("--judge-model", metavar="NAME", help="The model that the endpoint serves."),
        "partner": click.option("--partner", help="scripted (embedded), llm, or package.module:Class."),
        "partner_url": click.option("--partner-url", multiple=True, metavar="URL", help="As --judge-url."),
        "partner_model": click.option("--partner-model", metavar="NAME", help="As --judge-model."),
        "no_cache": click.option("--no-cache", is_flag=True, help="Neither read nor keep answers of endpoints."),
    }

    def add(command: F) -> F:
        for name in reversed(names):
            command = options[name](command)
        return command

    return add


SERVERS = ("judge", "judge_url", "judge_model", "partner", "partner_url", "partner_model", "no_cache")


def settings(base: Path | None, assignments: tuple[str, ...], flags: dict[str, Any]) -> TrainConfig:
    """Return the settings of a file with ``--set`` and flags on top.

    ``--judge-url`` implies the judge ``llm``. Another judge than the file's begins without options; so does
    another partner.

    Args:
        base: A TOML file, or None.
        assignments: ``a.b=c`` as given.
        flags: Flags by name; those that were not given are None, empty or False.
    """
    from ppg_agents.config import settings as configs

    flags = dict(flags)
    no_cache = flags.pop("no_cache", False)
    fresh: dict[str, Any] = {}
    for part in ("judge", "partner"):
        name, urls = flags.pop(part, None), list(flags.pop(f"{part}_url", ()))
        name = name or ("llm" if urls else None)
        if name and base is not None and name != getattr(configs.load(base).env, part):
            fresh[f"env.{part}_options"] = {}
        flags[f"env.{part}"] = name
        flags[f"env.{part}_options.base_url"] = urls or None
        flags[f"env.{part}_options.model"] = flags.pop(f"{part}_model", None)
    given = {key: value for key, value in flags.items() if value is not None}
    config = configs.load(base, fresh | configs.parse_assignments(assignments) | given)
    for part, embedded in (("judge", "facts"), ("partner", "scripted")):
        if f"env.{part}_options.model" in given and getattr(config.env, part) == embedded:
            raise click.UsageError(f"--{part}-model names a model that an endpoint serves; give --{part}-url too")
    check_servers(config)
    for part in ("judge", "partner") if no_cache else ():
        if getattr(config.env, part) == "llm":
            uncached = {f"{part}_options": getattr(config.env, f"{part}_options") | {"cache": False}}
            config = replace(config, env=replace(config.env, **uncached))
    return config


def check_servers(config: TrainConfig) -> None:
    """Refuse a judge or partner that lacks what it can not do without, in the words of the command line.

    Raises:
        click.UsageError: An option is missing; the message names the flag.
    """
    from ppg_agents.config.settings import PERSONA_CHAT

    if config.env.id != PERSONA_CHAT:
        return
    for part in ("judge", "partner"):
        name, options = getattr(config.env, part), getattr(config.env, f"{part}_options")
        if name == "llm" and not (options.get("base_url") and options.get("model")):
            flags = [flag for flag, key in (("url URL", "base_url"), ("model NAME", "model")) if not options.get(key)]
            lacking = " and ".join(f"--{part}-{flag}" for flag in flags)
            raise click.UsageError(f"the {part} llm asks an endpoint; give {lacking}")
    if (lacks := LOCAL_JUDGES.get(config.env.judge)) and lacks not in config.env.judge_options:
        what = f"--set env.judge_options.{lacks}=FOLDER"
        raise click.UsageError(f"the judge {config.env.judge} is a model that runs here; give {what}")


@cli.command(short_help="Train a policy; evaluate it before and after.")
@shared("domain")
@click.option("--policy-class", metavar="CLASS", help="greedy, 3, full, segment:3,3,2, auto, matrix, module:function.")
@click.option("--lookahead", type=int, metavar="K", help="The class k-step: a reply is credited with K rewards.")
@click.option("--segments", callback=parse_segments, metavar="N,N,…", help="The class segment: turns in each.")
@click.option("--agent", metavar="NAME", help="Who learns: ppg (default), ppo, grpo, …, or an installed one.")
@click.option("--offline", multiple=True, metavar="FILES…", help="Learn from logged, judged dialogues.")
@click.option("--model", help="tiny (embedded), or a Hugging Face model or folder.")
@shared("personas")
@shared(*SERVERS)
@click.option("--rollout-endpoints", multiple=True, metavar="URL", help="vLLM servers that sample; repeat it.")
@click.option("--iterations", type=int, help="Gradient steps, online.")
@click.option("--batch", type=int, help="Conversations per step.")
@shared("seed")
@click.option("--out", type=click.Path(), help="Run folder; default: a new one under runs/.")
@click.option("--report-to", multiple=True, metavar="NAME", help="tensorboard, wandb or trackio as well.")
@click.option("--config", "file", type=click.Path(), metavar="FILE.toml", help="Settings; flags come on top.")
@shared("set")
@click.option("--resume", is_flag=False, flag_value="", metavar="[RUN]", help="Go on with a run; default: the newest.")
@click.argument("more", nargs=-1, metavar="")
def train(
    offline: tuple[str, ...],
    out: str | None,
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
    from ppg_agents.runs import run as runs

    endpoints = list(flags.pop("rollout_endpoints"))
    flags |= {"sampling.endpoints": endpoints, "sampling.backend": "vllm"} if endpoints else {}
    flags["offline.files"] = [*offline, *more] or None
    flags["report_to"] = list(report_to) or None
    folder = None if resume is None else Path(resume or out or runs.newest_run())
    base = Path(file) if file else None
    if resume and out and Path(resume).resolve() != Path(out).resolve():
        raise click.UsageError(f"--resume {resume} goes on in that folder; leave out --out {out}")
    if folder is not None and base is None:
        base = runs.Run.open(folder).folder / "config.toml"
    config = settings(base, assignments, flags)
    if folder is None:
        folder = Path(out or config.out or runs.default_folder(config))
        if os.environ.get("RANK", "0") == "0":  # at once, not when the model is loaded; other ranks may see it made
            runs.check_new(folder)

    from ppg_agents.terminal.interrupt import Interrupted
    from ppg_agents.terminal.progress import say
    from ppg_agents.train import train as start

    newest = runs.Run.open(folder).latest_checkpoint() if resume is not None and not config.offline.files else None
    if newest and newest[0] >= config.iterations and os.environ.get("RANK", "0") == "0":
        say(f"all {newest[0]} iterations are done; go further with --iterations and a larger number")
    try:
        finished = start(config, folder, resume=resume is not None)
    except Interrupted as stop:
        click.echo(str(stop), err=True)
        return 130
    click.echo(str(finished.folder / "curve.png"))
    return 0


@cli.command()
@click.argument("target", metavar="RUN_OR_MODEL")
@shared("domain", "personas", *SERVERS, "conversations", "seed", "set")
@click.option("--best-of", type=click.IntRange(1), metavar="N", help="Play each N times; the best one counts.")
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

    from ppg_agents.evaluate import evaluate as measure
    from ppg_agents.evaluate import load_target
    from ppg_agents.terminal.progress import Progress, number, sparkline

    policy, sampler, speaker = load_target(target, config)
    best_of = best_of or (int(config.agent_options.get("n", 4)) if config.agent == "best-of-n" else 1)
    with Progress("evaluating", config.evaluation.conversations) as progress:
        result = measure(
            policy, sampler, config, personas=personas, best_of=best_of, done=progress.advance, speaker=speaker
        )
    if as_json:
        where = {"target": target, "domain": config.world, "personas": personas}
        click.echo(json.dumps({**result.to_dict(), **where, "seed": config.evaluation.seed}, allow_nan=False))
        return
    low, high = result.ci95
    click.echo(f"persona consistency  {number(result.persona_consistency)}  [{number(low)}, {number(high)}] 95% CI")
    click.echo(f"reachable            {number(result.reachable)}")
    click.echo(f"per turn             {' '.join(map(number, result.per_turn))}  {sparkline(result.per_turn)}")
    click.echo(f"personas             {result.n_personas} in {result.conversations} conversations")
    click.echo(f"not judged           {result.judge_failures} replies ({result.judge_failure_rate:.1%})")
    faults = "".join(f"; {fault}: {count}" for fault, count in result.partner_failures.items())
    click.echo(f"partner failed       {sum(result.partner_failures.values())} conversations{faults}")


@cli.command(short_help="Write conversations as trajectories (JSONL).")
@click.argument("target", metavar="RUN_OR_MODEL")
@shared("domain", "personas", *SERVERS, "conversations", "seed", "set")
@click.option("--out", type=click.Path(), default="-", help="JSONL file; default: stdout.")
def rollout(target: str, conversations: int | None, seed: int | None, out: str, **flags: Any) -> None:
    """Write conversations as trajectories, one JSON object per line.

    Example: ppg-agent rollout runs/NAME --conversations 64 --out talks.jsonl
    """
    personas = flags.pop("personas") or "train"
    from ppg_agents.runs import run as runs

    if out != "-":
        runs.check_file(Path(out))
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


@cli.command(short_help="Talk to a persona, with the judge's verdicts.")
@click.argument("target", metavar="RUN_OR_MODEL", default="tiny")
@shared("domain", "personas", "judge", "judge_url", "judge_model", "no_cache")
@click.option("--persona", help="Id of the persona; default: one is drawn.")
@shared("seed", "set")
def chat(target: str, persona: str | None, seed: int | None, **flags: Any) -> None:
    """Talk to a persona; the judge's verdict stands under each of its lines.

    You play the partner. An empty line or Ctrl-D ends the conversation.

    Example: ppg-agent chat runs/NAME --persona therapy-held-out-007
    """
    personas = flags.pop("personas") or "held-out"
    config = target_config(target, **flags)

    from ppg_agents.commands.talk import talk
    from ppg_agents.evaluate import load_target

    talk(load_target(target, config), config, personas=personas, persona=persona, seed=seed)


@cli.command(short_help="Write a run as one plain model, LoRA folded in.")
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


LAUNCH = 'accelerate launch --config_file "$(ppg-agent accelerate-config ddp-2)" -m ppg_agents.cli train'


@cli.command(
    "accelerate-config",
    short_help="Print the path of an accelerate config.",
    epilog=f"\b\nExample:\n  {LAUNCH}",
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


def target_config(target: str, assignments: tuple[str, ...], **flags: Any) -> TrainConfig:
    """Return the settings of a run folder, or the defaults for a model, with flags on top."""
    from ppg_agents.runs import run as runs

    if runs.is_run(Path(target)):
        return settings(Path(target) / "config.toml", assignments, flags)
    return settings(None, assignments, {"model": target, **flags})
