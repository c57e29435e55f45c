"""Options that several commands share, and how they become settings.

Only click and the standard library are imported before a command runs, which keeps ``--help`` quick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from ppg_agents.commands.judge import LOCAL_JUDGES

if TYPE_CHECKING:
    from ppg_agents.config.settings import TrainConfig

F = TypeVar("F", bound=Callable[..., Any])
SERVERS = ("judge", "judge_url", "judge_model", "partner", "partner_url", "partner_model", "no_cache")


def parse_segments(_: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """Return the lengths in ``3,3,2``."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter("expected turns per segment such as 3,3,2", param=parameter) from error


def shared(*names: str) -> Callable[[F], F]:
    """Return a decorator that adds the named options."""
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
        "judge_model": click.option("--judge-model", metavar="NAME", help="The model the endpoint serves."),
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


def settings(
    base: Path | None,
    assignments: tuple[str, ...],
    flags: dict[str, Any],
    *,
    recipe: str | None = None,
    training: bool = False,
) -> TrainConfig:
    """Return the settings of a file with ``--set`` and flags on top.

    ``--judge-url`` implies the judge ``llm``. A judge or partner that differs from the file's starts without options.

    Args:
        base: A TOML file, or None.
        assignments: ``a.b=c`` as given.
        flags: Flags by name; those not given are None, empty or False.
        recipe: Read before the file.
        training: Whether it is for training, which asks no judge or partner where the dialogues are logged.
    """
    from ppg_agents.config import settings as configs

    flags = dict(flags)
    no_cache = flags.pop("no_cache", False)
    fresh: dict[str, Any] = {}
    parts: tuple[Literal["judge", "partner"], ...] = ("judge", "partner")
    for part in parts:
        name, urls = flags.pop(part, None), list(flags.pop(f"{part}_url", ()))
        name = name or ("llm" if urls else None)
        if name and name != configs.speaker(part, base, recipe):
            fresh[f"env.{part}_options"] = {}
        flags[f"env.{part}"] = name
        flags[f"env.{part}_options.base_url"] = urls or None
        flags[f"env.{part}_options.model"] = flags.pop(f"{part}_model", None)
    given = {key: value for key, value in flags.items() if value is not None}
    config = configs.load(base, fresh | configs.parse_assignments(assignments) | given, recipe)
    for part, embedded in (("judge", "facts"), ("partner", "scripted")):
        if f"env.{part}_options.model" in given and getattr(config.env, part) == embedded:
            raise click.UsageError(f"--{part}-model names a model on an endpoint; give --{part}-url too")
    if not (training and config.offline.files):
        check_servers(config)
    for part in ("judge", "partner") if no_cache else ():
        if getattr(config.env, part) == "llm":
            uncached = {f"{part}_options": getattr(config.env, f"{part}_options") | {"cache": False}}
            config = replace(config, env=replace(config.env, **uncached))
    return config


def target_config(target: str, assignments: tuple[str, ...], **flags: Any) -> TrainConfig:
    """Return the settings of a run folder, or the defaults for a model, with flags on top."""
    from ppg_agents.runs.run import is_run

    if is_run(Path(target)):
        return settings(Path(target) / "config.toml", assignments, flags)
    return settings(None, assignments, {"model": target, **flags})


def check_servers(config: TrainConfig) -> None:
    """Refuse a judge or partner that lacks a required option, in terms of the command line.

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
        flag = f"--set env.judge_options.{lacks}=FOLDER"
        raise click.UsageError(f"the judge {config.env.judge} is a model that runs here; give {flag}")
