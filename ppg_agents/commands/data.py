"""``ppg-agent data``: reads, checks, counts, writes and makes personas and dialogues.

Flags in, one call of ``ppg_gym.data``, results to stdout, everything else to stderr. Only click and the standard
library are imported before a command runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ppg_gym.data import LoggedDialogue

_FORMATS = """
Formats (detected from the content, unless --format names one): consistent-llms, consistent-llms-personas,
synthetic-persona-chat, persona-chat, personas, dialogues, trajectories.
"""

FEW = 10_000
"""This many personas take a second or two, so no progress is shown."""

files_argument = click.argument("files", nargs=-1, required=True, type=click.Path(), metavar="FILES…")
format_option = click.option("--format", default="auto", help="Format of the files; default: detected.")
domain_option = click.option("--domain", help="Domain of files that name none; files that name another are refused.")


@click.group(epilog=_FORMATS)
def data() -> None:
    """Read, check and write personas and dialogues.

    Example: ppg-agent data stats dialogues/*.json
    """


@data.command("import", epilog=_FORMATS)
@files_argument
@click.option("--out", required=True, type=click.Path(), metavar="OUT.jsonl", help="Dialogues of this project.")
@click.option("--personas", type=click.Path(), metavar="OUT2.jsonl", help="Also write every persona, once.")
@domain_option
@format_option
def import_files(files: tuple[str, ...], out: str, personas: str | None, domain: str | None, format: str) -> None:
    """Write dialogues, and personas, in this project's own formats.

    If all FILES are persona files, the personas go to --out.

    Example: ppg-agent data import chats/*.json --out dialogues.jsonl
    """
    from ppg_gym.data import collect, save_personas, table, write_dialogues

    _different(files, out=out, personas=personas)
    collected = collect(files, format, domain)
    click.echo(table(collected.reports), err=True)
    if collected.listed and collected.dialogues and personas is None:
        raise click.UsageError("some files hold personas; say where to write them with --personas")
    if collected.listed and not collected.dialogues and personas is not None:
        raise click.UsageError("all files hold personas: give --out alone, and they go there")
    if not collected.listed and not collected.dialogues:
        raise ValueError("expected at least one usable dialogue, got none; nothing is written")
    notes = list(collected.notes)
    target = personas if collected.dialogues else out
    people, persona_notes = ([], []) if target is None else collected.personas()
    notes += persona_notes
    if collected.dialogues:
        write_dialogues(out, collected.dialogues)
        notes.append(f"wrote {len(collected.dialogues)} dialogues (one per speaker) to {out}")
    if target is not None:
        save_personas(target, people)
        notes.append(f"wrote {len(people)} personas to {target}")
    click.echo("\n".join(notes), err=True)


@data.command(epilog=_FORMATS, short_help="List what is unusable, as FILE:LINE.")
@files_argument
@domain_option
@format_option
@click.pass_context
def validate(context: click.Context, files: tuple[str, ...], domain: str | None, format: str) -> None:
    """List everything unusable in the files, as FILE:LINE; exit code 1 if there is any.

    Example: ppg-agent data validate dialogues/*.json
    """
    from ppg_gym.data import validate as check

    failed = False
    for path in files:
        problems = check(path, format, domain)
        for problem in problems:
            click.echo(f"{path}:{problem.line}: {problem}")
        failed |= bool(problems)
        click.echo(f"{path}: problems: {len(problems)}" if problems else f"{path}: ok", err=True)
    if failed:
        context.exit(1)


@data.command(epilog=_FORMATS, short_help="Count dialogues, judged lines, scores, personas.")
@files_argument
@domain_option
@format_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list, one object per file, in order.")
def stats(files: tuple[str, ...], domain: str | None, format: str, as_json: bool) -> None:
    """Count what is in the files: dialogues, judged lines, scores, personas.

    "consistent" is the mean score. An unparsed verdict has no score: the judge gave no clear answer.

    Example: ppg-agent data stats dialogues/*.json --json
    """
    from ppg_gym.data import read, table

    reports = [read(path, format, domain)[1] for path in files]
    if as_json:
        click.echo(json.dumps([report.to_dict() for report in reports], allow_nan=False))
    else:
        click.echo(table(reports))


@data.command(epilog=_FORMATS, short_help="Write dialogues as chat messages, for trainers.")
@files_argument
@click.option("--out", required=True, type=click.Path(), metavar="OUT.jsonl", help="Chat messages, one row per line.")
@click.option("--min-score", type=click.FloatRange(0, 1), help="Keep dialogues whose mean score is at least this.")
@click.option(
    "--split-by-persona", "share", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="SHARE",
    help="Hold out this share of the personas; their dialogues go to --out-test.",
)  # fmt: skip
@click.option("--out-test", type=click.Path(), metavar="TEST.jsonl", help="Where the held-out dialogues go.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the split.")
@click.option("--opening", help='The user\'s message where the persona speaks first; default: "(You speak first.)".')
@domain_option
@format_option
def export(
    files: tuple[str, ...],
    out: str,
    min_score: float | None,
    share: float | None,
    out_test: str | None,
    seed: int,
    opening: str | None,
    domain: str | None,
    format: str,
) -> None:
    """Write dialogues as chat messages, as Hugging Face's datasets and TRL read them.

    Each line holds "messages" (system, then user and assistant in turn), the persona's id, the domain and one score
    or null per assistant message.

    Example: ppg-agent data export dialogues/*.json --out sft.jsonl
    """
    from ppg_gym.data import OPENING, collect, split_by_persona, table, write_rows
    from ppg_gym.data import export as to_rows

    if (share is None) != (out_test is None):
        raise click.UsageError("--split-by-persona and --out-test go together")
    _different(files, out=out, out_test=out_test)
    collected = collect(files, format, domain, dialogues_only=True)
    click.echo(table(collected.reports), err=True)
    notes = list(collected.notes)
    parts: list[tuple[str, Sequence[LoggedDialogue]]] = [(out, collected.dialogues)]
    if share is not None and out_test is not None:
        train, test = split_by_persona(collected.dialogues, share, seed)
        parts = [(out, train), (out_test, test)]
    exported = [(path, to_rows(dialogues, min_score, opening or OPENING)) for path, dialogues in parts]
    for path, part in exported:
        if not part.rows:
            raise ValueError(f"expected dialogues for {path}, got none ({'; '.join(part.notes) or 'no dialogue read'})")
    for path, part in exported:
        write_rows(path, part.rows)
        notes += [f"{path}: {note}" for note in part.notes]
        notes.append(f"wrote {len(part.rows)} conversations to {path}")
    click.echo("\n".join(notes), err=True)


@data.command(short_help="Make more personas for a domain.")
@click.option("--domain", required=True, help="chatting, education, therapy, or your own FILE.toml.")
@click.option("-n", "--count", required=True, type=click.IntRange(1), help="How many.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Same seed, same personas.")
@click.option("--out", required=True, type=click.Path(), metavar="FILE.jsonl", help="The persona file.")
@click.option("--exclude", multiple=True, metavar="FILES…", help="Make none of these files' personas.")
@click.option("--allow-embedded", is_flag=True, help="Allow the facts of the domain's own personas.")
@click.argument("more", nargs=-1, metavar="")
def personas(
    domain: str, count: int, seed: int, out: str, exclude: tuple[str, ...], allow_embedded: bool, more: tuple[str, ...]
) -> None:
    """Make more personas for a domain; no set of facts repeats.

    None has the facts of one of the domain's own personas, for training or held out.

    Example: ppg-agent data personas --domain therapy -n 500 --out more.jsonl
    """
    if more and not exclude:
        raise click.UsageError(f"unexpected argument {more[0]!r}; files go after --exclude")

    from ppg_agents.terminal.progress import Progress
    from ppg_gym.data import collect, make_personas, save_personas

    _different([*exclude, *more], out=out)
    collected = collect([*exclude, *more])
    known = [*collected.listed, *(dialogue.persona for dialogue in collected.dialogues)]
    with Progress("making personas", count) as progress:
        done = progress.advance if count > FEW else None
        made = make_personas(domain, count, seed, known, allow_embedded, done)
    save_personas(out, made)
    click.echo(f"wrote {count} personas to {out}", err=True)


def _different(files: Sequence[str], **targets: str | None) -> None:
    """Refuse options that name the same file, or an input file, which writing would destroy."""
    named = {f"--{name.replace('_', '-')}": Path(target) for name, target in targets.items() if target is not None}
    if len({path.resolve() for path in named.values()}) < len(named):
        raise click.UsageError(f"{' and '.join(named)} name the same file")
    inputs = {Path(file).resolve() for file in files}
    for option, path in named.items():
        if path.resolve() in inputs:
            raise click.UsageError(f"{option}: expected a file other than the input files, got {path}")
