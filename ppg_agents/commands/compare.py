"""``ppg-agent compare``: a TOML file in, a table with error bars out.

Only click and the standard library are imported before the command runs; nothing is computed here.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import click


@click.command()
@click.argument("file", type=click.Path(dir_okay=False), metavar="FILE.toml")
@click.option("--out", type=click.Path(file_okay=False), help="Folder; default: runs/ and the file's name.")
@click.option("--jobs", type=click.IntRange(1), help="Runs at a time; default: one per core.")
@click.option("--engine", type=click.Choice(["processes", "ray"]), default="processes", show_default=True)
@click.option("--table", "only_table", is_flag=True, help="Start no run; show what is there.")
@click.option("--dry-run", is_flag=True, help="Start no run; say which are missing.")
def compare(file: str, out: str | None, jobs: int | None, engine: str, only_table: bool, dry_run: bool) -> int:
    """Compare agents and policy classes on the same held-out personas.

    FILE.toml names agents, classes, domains, sizes (training conversations) and seeds; [settings] is any of ppg-agent
    train's, [agent_settings.NAME] the same for one agent. A comparison that was stopped goes on, runs that are there
    are kept, and a run that failed is named in the table and tried again the next time.

    Example: ppg-agent compare examples/compare.toml --jobs 2
    """
    from ppg_agents.compare import engine as engines
    from ppg_agents.compare import report
    from ppg_agents.compare.cell import check, results
    from ppg_agents.compare.plan import check_models, read
    from ppg_agents.compare.plan import jobs as planned
    from ppg_agents.compare.turns import turns_of
    from ppg_agents.runs.files import lock
    from ppg_agents.terminal.progress import Progress

    plan = read(Path(file))
    folder = Path(out) if out else Path("runs") / Path(file).stem
    todo = planned(plan, turns_of(plan))
    for job in todo:
        check(job, engines.folder_of(job, folder))
    missing = [] if only_table else engines.missing(todo, folder)
    if dry_run:
        click.echo(f"{len(todo)} runs, {len(missing)} missing, in {folder}")
        for job in missing:
            click.echo(f"{job.name}  {','.join(map(str, job.sizes))}")
        return 0
    if engine == "processes":  # the machines of a cluster may have other folders
        check_models(missing)
    folder.mkdir(parents=True, exist_ok=True)
    held = click.get_current_context().with_resource(ExitStack())
    if missing:
        held.enter_context(lock(folder))
        run = engines.run_on_ray if engine == "ray" else engines.run_here
        count = len(todo) - len(missing)
        with Progress("comparing", len(todo), start=count) as progress:

            def done(job: object, why: str | None) -> None:
                nonlocal count
                count += 1
                progress.advance(count, f"{getattr(job, 'name', '')}{f' failed: {why}' if why else ''}")

            try:
                run(missing, folder, jobs or os.cpu_count() or 1, done)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"stopped; go on with: ppg-agent compare {file} --out {folder}") from None
    if only_table and (left := len(engines.missing(todo, folder))):
        click.echo(f"{left} of {len(todo)} runs are not finished; leave out --table to go on with them", err=True)
    found = [result for job in todo for result in results(job, engines.folder_of(job, folder))]
    lost = {job.name: why for job in todo if (why := engines.failure(job, folder))}
    report.write(found, lost, folder)
    click.echo((folder / "results.md").read_text(encoding="utf-8"))
    click.echo(str(folder / "results.png"))
    return 1 if lost or (missing and engines.missing(todo, folder)) else 0
