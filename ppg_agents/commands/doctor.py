"""``ppg-agent doctor``: what is installed, what would be used, what answers; for newcomers and bug reports.

Flags in, `doctor.report.examine`, findings out. Without click, ``doctor.report.main`` does the same.
"""

from __future__ import annotations

import json

import click

COLOURS = {"ok": "green", "note": "yellow", "fault": "red"}


@click.command()
@click.option("--judge-url", multiple=True, metavar="URL", help="Ask this chat endpoint; repeat it.")
@click.option("--judge-model", metavar="NAME", help="The model that the endpoint should serve.")
@click.option("--partner-url", multiple=True, metavar="URL", help="As --judge-url.")
@click.option("--partner-model", metavar="NAME", help="As --judge-model.")
@click.option("--rollout-endpoints", multiple=True, metavar="URL", help="Ask this vLLM server; repeat it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(
    judge_url: tuple[str, ...],
    judge_model: str | None,
    partner_url: tuple[str, ...],
    partner_model: str | None,
    rollout_endpoints: tuple[str, ...],
    as_json: bool,
) -> int:
    """Say what is installed, what would be used, and whether the named servers answer.

    For bug reports: no key and no proxy is shown. Each server is asked for one token. Exit code 1 when something that
    was asked for does not work.

    Example: ppg-agent doctor --rollout-endpoints http://localhost:8001/v1
    """
    from ppg_agents.doctor.report import examine, rows
    from ppg_agents.doctor.servers import Asked

    asked = Asked(judge_url, judge_model, partner_url, partner_model, rollout_endpoints)
    if wrong := asked.lacking():
        raise click.UsageError(wrong)
    report = examine(asked)
    if as_json:
        click.echo(json.dumps(report.to_dict(), allow_nan=False))
    else:
        for status, line in rows(report):
            mark = f"  {status or '':<5}"
            if not line.startswith(" "):
                line = click.style(line, bold=True, fg=COLOURS.get(status or ""))
            elif status is not None:
                line = click.style(mark, fg=COLOURS[status]) + line.removeprefix(mark)
            click.echo(line)
    return 0 if report.ok else 1
