"""``ppg-agent reproduce``: the paper's figures, from the runs to the picture.

Only click and the standard library are imported before the command runs; nothing is computed here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import click

FIGURES = ("fig2", "fig3", "fig4", "fig5", "table")


def parse_numbers(_: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """Return the numbers in ``10,20``, in order."""
    if text is None:
        return None
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text) or min(map(int, text.split(","))) < 1:
        raise click.BadParameter("expected numbers such as 10,20,40", param=parameter)
    return tuple(sorted(set(map(int, text.split(",")))))


@click.command()
@click.argument("figure", type=click.Choice(FIGURES))
@click.option("--domain", "domains", multiple=True, metavar="NAME", help="Repeatable. Default: all; --quick: therapy.")
@click.option("--quick", is_flag=True, help="Fewer domains, classes, sizes and seeds: about 2 minutes, proves nothing.")
@click.option("--model", help="tiny (embedded, default), or a Hugging Face model or folder; with one GPU, --jobs 1.")
@click.option("--seeds", type=click.IntRange(1), help="Training seeds. Default: 5.")
@click.option("--sizes", callback=parse_numbers, metavar="N,N,…", help="Training conversations: 80,160,320,640.")
@click.option("--turns", callback=parse_numbers, metavar="N,N,…", help="Lengths for fig5. Default: 10,20,40,60.")
@click.option("--lookaheads", callback=parse_numbers, metavar="K,K,…", help="K of the figures. Default: 1,2,3,4,5.")
@click.option("--train-turns", is_flag=True, help="fig5: also train at each length (hours; extra runs).")
@click.option("--out", type=click.Path(file_okay=False), help="Folder; default: runs/reproduce, or reproduce-quick.")
@click.option("--jobs", type=click.IntRange(1), help="Runs at a time; default: one per core.")
@click.option("--engine", type=click.Choice(["processes", "ray"]), default="processes", show_default=True)
@click.option("--set", "assignments", multiple=True, metavar="A.B=C", help="Set anything, e.g. learning_rate=1e-3.")
@click.option("--draw", "only_draw", is_flag=True, help="Start no run; draw the results so far.")
@click.option("--dry-run", is_flag=True, help="Start no run; list the missing ones.")
def reproduce(
    figure: str,
    domains: tuple[str, ...],
    quick: bool,
    model: str | None,
    seeds: int | None,
    sizes: tuple[int, ...] | None,
    turns: tuple[int, ...] | None,
    lookaheads: tuple[int, ...] | None,
    train_turns: bool,
    out: str | None,
    jobs: int | None,
    engine: str,
    assignments: tuple[str, ...],
    only_draw: bool,
    dry_run: bool,
) -> int:
    """Run what a figure of the paper needs, and draw it with intervals.

    fig2: per-turn residual, K = 1..5; fig3: consistency against training conversations; fig4: the best K; fig5: longer
    conversations; table: methods × domains. Figures 2 to 5 share their runs (the cells of ppg-agent compare, in
    DIR/cells); stopped runs continue, finished ones are kept. Writes a PNG (table: Markdown) and a CSV.

    Example: ppg-agent reproduce fig4 --domain therapy --jobs 2
    """
    if figure != "fig5" and (turns or train_turns):
        raise click.UsageError(f"--turns and --train-turns belong to fig5, got {figure}; leave them out")
    if figure == "table" and lookaheads:
        raise click.UsageError("--lookaheads belongs to the figures, got table; leave it out")
    from ppg_agents.compare import engine as engines
    from ppg_agents.config import settings as configs
    from ppg_agents.reproduce import plans, report

    given = configs.parse_assignments(assignments) | ({} if model is None else {"model": model})
    request = plans.Request(
        figure=figure,
        domains=domains or (plans.QUICK_DOMAINS if quick else plans.DOMAINS),
        sizes=sizes or (plans.QUICK_SIZES if quick else plans.SIZES),
        seeds=seeds or (plans.QUICK_SEEDS if quick else plans.SEEDS),
        turns=turns or (plans.QUICK_TURNS if quick else plans.TURNS),
        lookaheads=lookaheads or (plans.QUICK_LOOKAHEADS if quick else plans.LOOKAHEADS),
        train_turns=train_turns,
        quick=quick,
        settings=given,
    )
    folder = Path(out) if out else Path("runs") / ("reproduce-quick" if quick else "reproduce")
    wanted = plans.planned(request, folder)
    lengths = plans.turns_by_domain(request)
    total = sum(map(len, wanted.values()))
    missing = {place: engines.missing(jobs_there, place) for place, jobs_there in wanted.items()}
    if dry_run:
        click.echo(f"{total} runs, {sum(map(len, missing.values()))} missing")
        for place, left in missing.items():
            for job in left:
                click.echo(str(engines.folder_of(job, place)))
        return 0
    failed = False
    if not only_draw:
        workers, again = jobs or os.cpu_count() or 1, f"ppg-agent reproduce with the same options and --out {folder}"
        failed = engines.run_all(figure, missing, total, engine=engine, workers=workers, again=again)
    files = report.write(request, wanted, lengths, folder)
    if figure == "table":
        click.echo(files[0].read_text(encoding="utf-8"))
    for path in files:
        click.echo(str(path))
    return 1 if failed else 0
