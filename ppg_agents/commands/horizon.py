"""``ppg-agent horizon``: one batch in; a table, JSON and a picture out.

Results go to stdout, everything else to stderr. Only click and the standard library are imported before the command
runs. ``ppg_agents.horizon.advice`` makes the estimates; here they are only shown.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ppg_agents.plotting import BLUE, GREEN, ORANGE, new_figure, save, tidy
from ppg_agents.terminal.table import aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ppg_agents.config.settings import TrainConfig
    from ppg_agents.credit import PolicyClass
    from ppg_agents.horizon.advice import Horizon, Value
    from ppg_agents.policy.policy import Policy
    from ppg_agents.trajectory import Trajectory

CONVERSATIONS = 64
CLASS, BEST, VARIANCE, LAG = BLUE, GREEN, ORANGE, BLUE


def parse_batches(_: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """Return the sizes in ``32,128``."""
    if text is None:
        return None
    sizes = tuple(int(part) if part.strip().isdecimal() else 0 for part in text.split(","))
    if min(sizes) < 1:
        raise click.BadParameter("expected conversations per step such as 32,128", param=parameter)
    return sizes


def parse_classes(_: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> tuple[PolicyClass, ...]:
    """Return the named policy classes."""
    if not texts:  # --help imports no numpy
        return ()
    from ppg_agents.credit import PolicyClass

    try:
        return tuple(map(PolicyClass.parse, texts))
    except ValueError as error:
        raise click.BadParameter(str(error), param=parameter) from error


@click.command()
@click.argument("target", metavar="RUN_OR_MODEL")
@click.option("--domain", help="chatting, education, therapy, or your own FILE.toml.")
@click.option("--personas", default="train", show_default=True, help="train, held-out, or a persona file.")
@click.option("--offline", multiple=True, metavar="FILES…", help="Use logged, judged dialogues; play none.")
@click.option(
    "--conversations", type=click.IntRange(2), default=CONVERSATIONS, show_default=True, help="How many to read."
)
@click.option(
    "--classes", multiple=True, callback=parse_classes, metavar="CLASS",
    help="Like train's --policy-class; repeatable. Default: every K.",
)  # fmt: skip
@click.option(
    "--batch", "batches", callback=parse_batches, metavar="B,B,…",
    help="Conversations per gradient step, the first for the table. Default: as set, and 1/4, 4, 16 times that.",
)  # fmt: skip
@click.option(
    "--baseline", type=click.Choice(["leave-one-out", "none"]),
    help="Subtracted from the credit. Default: leave-one-out; with --offline none, as in training.",
)  # fmt: skip
@click.option("--centre", is_flag=True, help="Subtract each conversation's mean reward from its rewards (a diagnosis).")
@click.option("--seed", type=click.IntRange(0), help="Same seed, same result.")
@click.option("--set", "assignments", multiple=True, metavar="A.B=C", help="Set anything, e.g. lora.rank=8.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--out", type=click.Path(file_okay=False), metavar="DIR", help="Where horizon.json and horizon.png go.")
@click.argument("more", nargs=-1, metavar="")
def horizon(
    target: str,
    domain: str | None,
    personas: str,
    offline: tuple[str, ...],
    conversations: int,
    classes: tuple[PolicyClass, ...],
    batches: tuple[int, ...] | None,
    baseline: str | None,
    centre: bool,
    seed: int | None,
    assignments: tuple[str, ...],
    as_json: bool,
    out: str | None,
    more: tuple[str, ...],
) -> None:
    """How far ahead should it plan? Compare every policy class on one batch of conversations.

    RUN_OR_MODEL is a run folder (its newest checkpoint, its settings), tiny (the embedded model), or a
    Hugging Face model or folder, with the fresh adapter that training would start from.

    Example: ppg-agent horizon tiny --domain therapy --out horizon
    """
    if more and not offline:
        raise click.UsageError(f"unexpected argument {more[0]!r}; dialogue files go after --offline")
    from ppg_agents.commands.options import target_config

    config = target_config(target, assignments, domain=domain, seed=seed)
    files = (*offline, *more)

    from dataclasses import replace

    import numpy as np

    from ppg_agents.config.checks import check_learning
    from ppg_agents.horizon.advice import advise, own_mean_removed
    from ppg_agents.horizon.choice import default_candidates, distinct, masks
    from ppg_agents.horizon.sketch import sketch
    from ppg_agents.prefixes import rewarded
    from ppg_agents.terminal.progress import Progress

    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)  # fail now rather than after the work
    if files:
        policy, trajectories = read(target, config, files, conversations)
    else:
        check_learning(config)
        policy, trajectories = played(target, config, personas, conversations)
    trajectories = rewarded(trajectories, config.reward)
    temperature = 1.0 if files else config.sampling.temperature
    with Progress("differentiating", len(trajectories)) as progress:
        sketches = sketch(policy, trajectories, seed=config.seed, temperature=temperature, done=progress.advance)
    if centre:
        sketches = replace(sketches, rewards=own_mean_removed(sketches.rewards, sketches.valid))
    n = sketches.valid.shape[1]
    size = config.batch
    first, *others = batches or (size, max(size // 4, 1), 4 * size, 16 * size)
    report = advise(
        sketches,
        masks(distinct(classes or default_candidates(n), n), n),
        batch=first,
        other_batches=others,
        discount=config.discount,
        baseline="none" if (baseline or ("none" if files else "")) == "none" else "leave-one-out",
        rng=np.random.default_rng([config.seed, 1]),
    )
    subject = "logged dialogues" if files else config.world
    record = {"target": target, "what": subject, "centred": centre, "seed": config.seed, **report.to_dict()}
    if out is not None:
        folder = Path(out)
        text = json.dumps(record, indent=2, allow_nan=False)
        (folder / "horizon.json").write_text(text + "\n", encoding="utf-8")
        save(picture(report, f"{subject}, {target}"), folder / "horizon.png", dpi=150)
        click.echo(f"wrote {folder / 'horizon.json'} and {folder / 'horizon.png'}", err=True)
    click.echo(json.dumps(record, allow_nan=False) if as_json else table(report))


def load(target: str, config: TrainConfig) -> tuple[Policy, Any]:
    """Return the policy that would learn, and its sampler: a run's own, or a model with a fresh adapter."""
    from ppg_agents.runs.run import is_run

    if is_run(Path(target)):
        from ppg_agents.evaluate import load_target

        policy, sampler, _ = load_target(target, config)
        return policy, sampler
    from ppg_agents.building import load_policy
    from ppg_agents.generation.hf import HFSampler

    policy = load_policy(config)
    return policy, HFSampler(policy, config.sampling.max_new_tokens, config.sampling.temperature)


def played(target: str, config: TrainConfig, personas: str, conversations: int) -> tuple[Policy, list[Trajectory]]:
    """Load a policy and play conversations."""
    from ppg_agents.evaluate import play
    from ppg_agents.terminal.progress import Progress

    policy, sampler = load(target, config)
    with Progress("playing", conversations) as progress:
        trajectories, _ = play(
            policy,
            sampler,
            config,
            personas=personas,
            conversations=conversations,
            seed=config.seed,
            done=progress.advance,
        )
    return policy, trajectories


def read(target: str, config: TrainConfig, files: Sequence[str], conversations: int) -> tuple[Policy, list[Trajectory]]:
    """Load a policy and read at most ``conversations`` logged dialogues, drawn by the seed.

    Raises:
        ValueError: No dialogue has a judged line that fits into the context.
    """
    from dataclasses import replace

    import numpy as np

    from ppg_agents.offline import read_files
    from ppg_agents.trajectory import from_logged

    dialogues, _ = read_files(replace(config.offline, files=tuple(files)))
    judged = [d for d in dialogues if any(turn.verdict.score is not None for turn in d.turns)]
    order = np.random.default_rng([config.seed, 2]).permutation(len(judged))[:conversations]
    policy, _ = load(target, config)
    trajectories = [t for t in from_logged([judged[i] for i in order], policy, config.offline.max_tokens) if t.judged()]
    if not trajectories:
        raise ValueError("expected dialogues with judged lines that fit into the context, got none; give other files")
    click.echo(f"{len(trajectories)} of {len(dialogues)} logged dialogues", err=True)
    return policy, trajectories


def table(report: Horizon) -> str:
    """Return the report as plain text; every number has its 95% interval."""
    columns = ("class", "|mean|^2", "variance", "signal/noise", "cosine", "progress", "behind the best")
    rows: list[tuple[str, ...]] = [columns]
    for c in report.classes:
        values = (c.mean_square, c.variance, c.snr, c.cosine, c.progress, c.behind)
        rows.append((c.label + (" *" if c.label == report.verdict.recommended else ""), *map(_shown, values)))
    lags = "progress from rewards d turns later: "
    lags += "; ".join(f"{d}: {_shown(value)}" for d, value in enumerate(report.lags))
    verdicts = [f"{v.batch} conversations per step: {v.words()}" for v in report.verdicts]
    head = (
        f"{report.conversations} conversations of {report.personas} personas, at most {report.turns} turns; "
        f"gradient of {report.parameters:,} weights, baseline {report.baseline}, "
        f"{report.batch} conversations per step"
    )
    far = {0: "no reward", 1: "a reply's own reward, none later"}
    reach = f"shown to matter: {far.get(report.reach, f'rewards up to {report.reach - 1} turns later')}"
    same = "points where full planning points: no shorter class is shown to"
    if len(report.aligned) > 1:
        same = f"points where full planning points: {report.aligned[0]} is the shortest class that is shown to"
    return "\n".join([head, "", *aligned(rows), "", lags, reach, same, "", *verdicts])


def _shown(v: Value) -> str:
    value, low, high = ("-" if x != x else f"{x:.3g}" for x in (v.value, v.low, v.high))
    return f"{value} [{low}, {high}]"


def picture(report: Horizon, title: str) -> Figure:
    """Draw direction, variance and progress by class, and where full planning's progress comes from."""
    from ppg_agents.horizon.advice import ALIGNED

    figure = new_figure(11, 8)
    verdict = report.verdict
    undecided = "" if verdict.decided else f", undecided among {len(verdict.undecided)} classes"
    subtitle = f"shortest class that points where full planning points: {report.aligned[0]}"
    subtitle += f"\nbest next step: {verdict.recommended}{undecided}"
    figure.suptitle(f"{title}\n{subtitle}", fontweight="bold", fontsize=11)
    (cosine, middle), (left, right) = figure.subplots(2, 2)
    at = range(len(report.classes))
    for x, c in zip(at, report.classes, strict=True):
        color = BEST if c.label == verdict.recommended else CLASS
        _point(left, x, c.progress, color, filled=c.label in verdict.undecided)
        _point(middle, x, c.variance, VARIANCE)
        same = c.label in report.aligned
        _point(cosine, x, c.cosine, BEST if c.label == report.aligned[0] else CLASS, filled=same)
    for x, value in enumerate(report.lags):
        _point(right, x, value, LAG)
    cosine.axhline(ALIGNED, color="#888888", linewidth=0.8, linestyle="--")
    cosine.set_title("Does a class point where full planning points?", fontsize=11)
    cosine.set_ylabel("cosine of the mean gradients (95% CI)")
    left.set_title(f"Progress of a step, {report.batch} conversations", fontsize=11)
    left.set_ylabel("slope of the value along the step (95% CI)")
    middle.set_title("Variance of one conversation's gradient", fontsize=11)
    middle.set_ylabel("tr Σ (95% CI)")
    middle.set_ylim(bottom=0)
    right.set_title("Full planning's progress by distance", fontsize=11)
    right.set(xlabel="turns from the reply to the reward", ylabel="part of the progress (95% CI)")
    for ax in (cosine, left, middle):
        turned = {"rotation": 45, "ha": "right"} if max(len(c.label) for c in report.classes) > 4 else {}
        ax.set_xticks(list(at), [c.label for c in report.classes], **turned)
        ax.set_xlabel("policy class")
    for ax in (cosine, left, middle, right):
        ax.axhline(0, color="#888888", linewidth=0.8)
        tidy(ax)
    return figure


def _point(ax: Axes, x: int, v: Value, color: str, *, filled: bool = True) -> None:
    """Draw an estimate with its interval; hollow for a class that clearly differs from the best."""
    ax.plot([x, x], [v.low, v.high], color=color, linewidth=1.5)
    face = color if filled else "white"
    ax.plot([x], [v.value], "o", color=color, markerfacecolor=face, markersize=7, zorder=5)
