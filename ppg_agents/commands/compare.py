"""``ppg-agent compare``: a TOML file in, a table with error bars out.

Only click and the standard library are imported before the command runs; nothing is computed here.
"""

from __future__ import annotations

import os
from pathlib import Path

import click


@click.command()
@click.argument("file", type=click.Path(dir_okay=False), metavar="FILE.toml")
@click.option("--out", type=click.Path(file_okay=False), help="Folder; default: runs/ plus the file's name.")
@click.option("--jobs", type=click.IntRange(1), help="Runs at a time; default: one per core.")
@click.option("--engine", type=click.Choice(["processes", "ray"]), default="processes", show_default=True)
@click.option("--table", "only_table", is_flag=True, help="Start no run; show the results so far.")
@click.option("--dry-run", is_flag=True, help="Start no run; list the missing ones.")
def compare(file: str, out: str | None, jobs: int | None, engine: str, only_table: bool, dry_run: bool) -> int:
    """Compare agents and policy classes on the same held-out personas.

    FILE.toml names agents, classes, domains, sizes (training conversations) and seeds; [settings] is any of ppg-agent
    train's, [agent_settings.NAME] the same for one agent. A stopped comparison continues, finished runs are kept,
    and a failed run is named in the table and tried again next time.

    Example: ppg-agent compare examples/compare.toml --jobs 2
    """
    from ppg_agents.compare import engine as engines
    from ppg_agents.compare import report
    from ppg_agents.compare.cell import check, results, turns_of
    from ppg_agents.compare.plan import jobs as planned
    from ppg_agents.compare.plan import read

    plan = read(Path(file))
    folder = Path(out) if out else Path("runs") / Path(file).stem
    wanted = planned(plan, turns_of(plan))
    for job in wanted:
        check(job, engines.folder_of(job, folder))
    missing = engines.missing(wanted, folder)
    if dry_run:
        click.echo(f"{len(wanted)} runs, {len(missing)} missing, in {folder}")
        for job in missing:
            click.echo(f"{job.name}  {','.join(map(str, job.sizes))}")
        return 0
    failed = False
    if only_table:
        folder.mkdir(parents=True, exist_ok=True)
        if missing:
            unfinished = f"{len(missing)} of {len(wanted)} runs are not finished"
            click.echo(f"{unfinished}; leave out --table to go on with them", err=True)
    else:
        workers, again = jobs or os.cpu_count() or 1, f"ppg-agent compare {file} --out {folder}"
        failed = engines.run_all(
            "comparing", {folder: missing}, len(wanted), engine=engine, workers=workers, again=again
        )
    cells = [result for job in wanted for result in results(job, engines.folder_of(job, folder))]
    lost = {job.name: why for job in wanted if (why := engines.failure(job, folder))}
    report.write(cells, lost, folder)
    click.echo((folder / "results.md").read_text(encoding="utf-8"))
    click.echo(str(folder / "results.png"))
    return 1 if lost or failed else 0
