"""``ppg-agent inspect`` and ``ppg-agent report``: a run in, a page or a Markdown file out, its path on stdout.

Only click and the standard library are imported before a command runs. ``ppg_agents.inspect`` does the work.
"""

from __future__ import annotations

from pathlib import Path

import click

CONVERSATIONS = 200
REPORT, PICTURES = "report.md", ("curve.png", "credit.png")
"""The files of a report."""


@click.command("inspect")
@click.argument("target", metavar="RUN")
@click.option("--out", type=click.Path(dir_okay=False), metavar="FILE", help="The page; default: RUN/report.html.")
@click.option(
    "--conversations", type=click.IntRange(1), default=CONVERSATIONS, show_default=True, metavar="N",
    help="The most to show: failed verdicts, personas met early and late, the first and last ones.",
)  # fmt: skip
@click.option("--tokenizer", metavar="RUN_OR_FOLDER", help="Whose tokenizer to use; default: the run's. Also: tiny.")
def inspect_(target: str, out: str | None, conversations: int, tokenizer: str | None) -> None:
    """Write one HTML page that shows a run: curves, conversations, verdicts, credit, tokens.

    The page needs no network and no server: open it in a browser. RUN is a run folder, or a file that ppg-agent
    rollout wrote.

    Example: ppg-agent inspect runs/NAME
    """
    from ppg_agents.runs import run as runs

    page = Path(out) if out else None
    if page is not None:  # fail now rather than after the work
        runs.check_file(page)

    from ppg_agents.inspect.page import write_page

    click.echo(str(write_page(Path(target), page, conversations=conversations, tokenizer=tokenizer)))


@click.command()
@click.argument("target", metavar="RUN")
@click.option("--out", type=click.Path(file_okay=False), metavar="DIR", help="A folder; default: RUN/report.")
def report(target: str, out: str | None) -> None:
    """Write a run as a short Markdown file with figures, for a paper's appendix.

    DIR is created if needed, and may hold other files; an existing report is overwritten.

    Example: ppg-agent report runs/NAME --out appendix
    """
    if out:
        check_folder(Path(out))

    from ppg_agents.inspect.report import write_report

    click.echo(str(write_report(Path(target), Path(out) if out else None)))


def check_folder(folder: Path) -> None:
    """Refuse a folder where a report would overwrite another picture, such as a run's own curve.

    Raises:
        click.UsageError: It holds a picture of the same name, and no report.
    """
    lost = [name for name in PICTURES if (folder / name).exists()]
    if lost and not (folder / REPORT).exists():
        raise click.UsageError(
            f"--out: expected a folder whose files a report leaves alone, got {folder} with {' and '.join(lost)}, "
            "which would be lost; name another folder with --out"
        )
