"""``ppg-agent judge``: how good a judge is, against labels, recorded verdicts and tricks.

Flags in, one call of the library, results to stdout, progress to stderr. Only click is imported before a command
runs, and only an attack's success rate is computed here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

UNCACHED = ("facts", "nli")
"""Judges that ask no server, so there are no answers to cache."""

LOCAL_JUDGES = {"nli": "model"}
"""Judges that run a model here, and the option that names its folder."""


def example(line: str) -> str:
    """Return a command's example, printed unchanged at the end of its help."""
    return f"\b\nExample:\n  {line}"


@click.group()
def judge() -> None:
    """Measure judges against labels, recorded verdicts and tricks.

    Example: ppg-agent judge attack --judge facts --domain therapy
    """


def judge_flags(command: F) -> F:
    """Add the flags that name a judge."""
    flags = (
        click.option("--judge", "name", help="facts (embedded, default), llm, nli, or package.module:Class."),
        click.option("--judge-url", "urls", multiple=True, metavar="URL", help="Chat endpoint; implies llm."),
        click.option("--judge-model", "model", metavar="NAME", help="The model the endpoint serves."),
        click.option(
            *("--judge-option", "--judge-options", "options"),
            multiple=True,
            metavar="KEY=VALUE",
            help="Option of the judge, or all of them as a JSON object. Budgets count per domain.",
        ),
        click.option("--no-cache", is_flag=True, help="Do not cache an endpoint's answers."),
    )
    for flag in reversed(flags):
        command = flag(command)
    return command


def chosen(
    name: str | None, urls: tuple[str, ...], model: str | None, options: tuple[str, ...], no_cache: bool
) -> tuple[str, dict[str, Any]]:
    """Return the judge's name and options.

    Raises:
        click.UsageError: An option is neither KEY=VALUE nor a JSON object, or ``--no-cache`` has nothing to cache.
    """
    from ppg_agents.config.settings import parse_assignments

    given: dict[str, Any] = {}
    for text in options:
        if text.lstrip().startswith("{"):
            try:
                given |= json.loads(text)
            except json.JSONDecodeError as error:
                raise click.UsageError(f"--judge-options: expected a JSON object, got {text!r} ({error})") from error
        elif text.partition("=")[0].strip() and "=" in text:
            given |= parse_assignments([text])
        else:
            raise click.UsageError(f"--judge-option: expected KEY=VALUE such as samples=3, got {text!r}")
    if urls:
        given["base_url"] = list(urls)
    if model:
        given["model"] = model
    name = name or ("llm" if urls else "facts")
    check_options(name, given)
    if no_cache:
        if name in UNCACHED:
            raise click.UsageError(f"--no-cache: expected a judge that asks an endpoint, got {name!r}")
        given["cache"] = False
    return name, given


def check_options(name: str, options: dict[str, Any]) -> None:
    """Refuse a judge whose required options are missing, in terms of the command line.

    Raises:
        click.UsageError: An option is missing, or names a model but no endpoint; the flag is named.
    """
    if name == "facts" and set(options) == {"model"}:
        raise click.UsageError("--judge-model names a model on an endpoint; give --judge-url too")
    needed = {"base_url": "--judge-url URL", "model": "--judge-model NAME"}
    lacking = [flag for key, flag in needed.items() if not options.get(key)]
    if name == "llm" and lacking:
        raise click.UsageError(f"the judge llm asks an endpoint; give {' and '.join(lacking)}")
    if (key := LOCAL_JUDGES.get(name)) and key not in options:
        raise click.UsageError(f"the judge {name} is a model that runs here; give --judge-option {key}=FOLDER")


@judge.command(
    epilog=example("ppg-agent judge validate --labels dialogues/*.json --judge nli --judge-option model=FOLDER")
)
@click.option("--labels", multiple=True, required=True, metavar="FILES…", help="Judged dialogues, or a CSV.")
@judge_flags
@click.option("--domain", help="Only this domain; the domain of a CSV without that column.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Judge at most N labelled replies, drawn at random.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of the draw.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.argument("more", nargs=-1, metavar="")
def validate(
    labels: tuple[str, ...],
    more: tuple[str, ...],
    domain: str | None,
    limit: int | None,
    seed: int,
    as_json: bool,
    **flags: Any,
) -> None:
    """Compare a judge with labels.

    Prints agreement, Cohen's kappa and ROC AUC, per domain, with intervals, beside "always consistent". Replies the
    judge did not score are counted and left out.

    Labels are the verdicts recorded in dialogues (benchmark JSON, the project's JSONL, a run folder, an export of
    rescore), or a CSV of human labels, one row per reply, with the columns persona (an id or a description), history
    (JSON list of the earlier lines), reply, label (0 to 1, 1 is consistent), domain, and optionally dialogue.
    """
    name, options = chosen(**flags)

    from ppg_agents.terminal.progress import Progress
    from ppg_gym.judges.lab.recorded import read_labels
    from ppg_gym.judges.lab.validation import validate as measure

    read = read_labels([*labels, *more], domain)
    total = sum(turn.verdict.score is not None for dialogue in read.dialogues for turn in dialogue.turns)
    with Progress("judging", min(total, limit or total)) as progress:
        measured = measure(read, name, options, limit=limit, seed=seed, done=progress.advance)
    if as_json:
        result = {**measured.to_dict(), "files": [*labels, *more], "seed": seed}
        click.echo(json.dumps(result, allow_nan=False, ensure_ascii=False))
    else:
        click.echo(measured.table())


@judge.command(
    epilog=example("ppg-agent judge rescore runs/quickstart --judge-url http://127.0.0.1:8000/v1 --judge-model MODEL")
)
@click.argument("source", metavar="RUN")
@judge_flags
@click.option("--domain", help="Judge in this domain; default: as recorded.")
@click.option("--out", type=click.Path(dir_okay=False), help="JSONL file; default: beside the trajectories.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N conversations.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def rescore(source: str, domain: str | None, out: str | None, limit: int | None, as_json: bool, **flags: Any) -> None:
    """Judge saved conversations again.

    Writes both verdicts, one row per turn, and compares them. RUN is a run folder, or a file of trajectories or judged
    dialogues. An endpoint's answers are cached, so a stopped command resumes where it was.
    """
    name, options = chosen(**flags)

    from ppg_agents.terminal.progress import Progress
    from ppg_gym.data.files import write_lines
    from ppg_gym.judges.lab import rescoring
    from ppg_gym.judges.lab.recorded import read_recorded

    target = Path(out) if out else rescoring.default_file(source, name)
    rescoring.check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)  # fail now rather than after the work
    dialogues = read_recorded(source, domain)[:limit]
    with Progress("judging", sum(len(dialogue.turns) for dialogue in dialogues)) as progress:
        rescored = rescoring.rescore(dialogues, name, options, progress.advance)
    write_lines(target, rescored.rows())
    parts = rescored.parts()
    if as_json:
        result = {"judge": name, "file": str(target), "parts": [part.to_dict() for part in parts]}
        click.echo(json.dumps(result, allow_nan=False, ensure_ascii=False))
        return
    click.echo(rescoring.table(parts))
    click.echo(str(target))


@judge.command(epilog=example("ppg-agent judge attack --judge facts --domain therapy --max-success 0.05"))
@judge_flags
@click.option("--domain", default="chatting", show_default=True, help="Whose personas play; also your own FILE.toml.")
@click.option("--personas", type=click.IntRange(1), default=2, show_default=True, help="Personas that try each attack.")
@click.option("--max-success", type=click.FloatRange(0, 1), metavar="RATE", help="Exit with 1 above this success rate.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Draws personas and questions.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def attack(domain: str, personas: int, max_success: float | None, seed: int, as_json: bool, **flags: Any) -> int:
    """Try to fool a judge with trick replies.

    Prints how often it rewards them, per family of tricks, and the replies it rewarded. The success rate counts only
    replies with a score; with --max-success, no score at all is a failure too.
    """
    name, options = chosen(**flags)

    from ppg_gym import judges
    from ppg_gym.columns import align
    from ppg_gym.data.files import shorten
    from ppg_gym.domain.cast import personas as personas_of
    from ppg_gym.judges.lab.attacks import FOOLED_AT, run_attacks

    available = len(personas_of(domain, "held-out"))
    if personas > available:
        raise click.UsageError(
            f"--personas: expected at most {available}, {domain}'s held-out personas, got {personas}; ask for fewer"
        )
    made = judges.make(name, domain, options)
    try:
        by_family = run_attacks(made, domain, seed, per_attack=personas)
    finally:
        if callable(close := getattr(made, "close", None)):
            close()
    n, scored, paid = (sum(getattr(row, key) for row in by_family) for key in ("n", "scored", "successes"))
    rate = paid / scored if scored else None
    if as_json:
        families = [
            {**asdict(row), "rate": row.successes / row.scored, "highest": row.highest}
            if row.scored
            else {**asdict(row), "rate": None, "highest": None}
            for row in by_family
        ]
        total = {"n": n, "scored": scored, "successes": paid, "failures": n - scored, "rate": rate}
        result = {"judge": name, "domain": domain, "seed": seed, "families": families, "total": total}
        click.echo(json.dumps(result, allow_nan=False, ensure_ascii=False))
    else:
        rows = [("family", "n", "without a score", "successes", "rate", "")]
        counted = [(row.family, row.n, row.scored, row.successes) for row in by_family]
        for family, tried, got, won in [*counted, ("total", n, scored, paid)]:
            rows.append((family, str(tried), str(tried - got), str(won), f"{won / got:.3f}" if got else "-", ""))
        click.echo("\n".join(align(rows)))
        if scored < n:
            where = f"the rate is of the other {scored}, which rules may have scored" if scored else "there is no rate"
            click.echo(f"{n - scored} of {n} replies got no score: {where}; check the judge", err=True)
        for row in by_family:
            for reply in row.fooled_by:
                click.echo(f"{row.family}: scored at least {FOOLED_AT}: {shorten(reply, 80)}")
    if max_success is None or (rate is not None and rate <= max_success):
        return 0
    got = "no score at all" if rate is None else f"{rate:.3f}"
    click.echo(f"ppg-agent: expected a success rate of at most {max_success}, got {got}", err=True)
    return 1
