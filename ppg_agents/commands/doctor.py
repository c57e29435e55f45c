"""``ppg-agent doctor``: its flags. Without click, ``doctor.report.main`` takes the same ones."""

from __future__ import annotations

from typing import Any

import click


@click.command()
@click.option("--judge-url", multiple=True, metavar="URL", help="Ask this chat endpoint; repeatable.")
@click.option("--judge-model", metavar="NAME", help="The model the endpoint should serve.")
@click.option("--partner-url", multiple=True, metavar="URL", help="As --judge-url.")
@click.option("--partner-model", metavar="NAME", help="As --judge-model.")
@click.option("--rollout-endpoints", multiple=True, metavar="URL", help="Ask this vLLM server; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(**flags: Any) -> int:
    """Show what is installed, what would be used, and whether the named servers answer.

    For bug reports: shows no keys or proxies. Asks each server for its list of models. Exit code 1 if something you
    asked for does not work.

    Example: ppg-agent doctor --rollout-endpoints http://localhost:8001/v1
    """
    for part in ("judge", "partner"):
        if flags[f"{part}_model"] and not flags[f"{part}_url"]:
            raise click.UsageError(f"--{part}-model names a model on an endpoint; give --{part}-url too")
    from ppg_agents.doctor.report import run

    return run(flags, click.echo)
