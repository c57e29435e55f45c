"""A run as a short Markdown file with two figures, for a paper's appendix.

Every text from models, judges and personas goes through `text.markdown`: it reads the same, but is never markup.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ppg_agents.credit import Mask, PolicyClass, credit
from ppg_agents.inspect import method
from ppg_agents.inspect.page import changes, counted, early_and_late, evaluations, facts, own_classes
from ppg_agents.inspect.source import Conversation, HeldOut, Source, read, status
from ppg_agents.inspect.text import markdown, markdown_line
from ppg_agents.plotting import BLUE, new_figure, save, tidy
from ppg_agents.runs.files import replace, writing
from ppg_agents.terminal.progress import interval, number
from ppg_agents.terminal.table import in_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READ = 400
"""How many conversations to choose the printed ones from."""

_SCORED = ("persona_consistency", "mean reward")
_LOGGED = ("weighted_token_log_prob", "reward-weighted log-prob per token")


def write_report(path: Path, out: Path | None = None) -> Path:
    """Write ``report.md`` and its figures.

    Args:
        path: The run folder, or a file of trajectories.
        out: The folder; default ``report`` in the run folder, or beside the file, named after it.

    Returns:
        The Markdown file's path.

    Raises:
        RunError: The path is neither a run nor a file of trajectories, or a file cannot be written.
        ValueError: A line is damaged.
    """
    source = read(path, READ)
    out = out or (path / "report" if source.config else path.with_name(f"{path.stem}-report"))
    pictures: dict[str, Figure] = {}
    if source.config is not None and (source.metrics or source.evaluations):
        pictures["curve.png"] = curve_picture(source)
    printed = chosen(source)
    classes = compared(source)
    if printed:
        pictures["credit.png"] = credit_picture(printed[-1][1], classes, _discount(source))
    with writing(out, "{todo}, or change --out"):
        out.mkdir(parents=True, exist_ok=True)
        for name, figure in pictures.items():
            save(figure, out / name, dpi=130)
        replace(out / "report.md", "\n".join(lines(source, printed, classes, set(pictures))) + "\n")
    return out / "report.md"


def chosen(source: Source) -> list[tuple[str, Conversation]]:
    """Return two or three conversations, each with a label: one persona before and after, and one that failed.

    The pair is the held-out one with the median change; if there is none, a persona met early and late.
    """
    shown, held_out = source.shown, source.held_out
    typical = held_out.typical() if held_out else None
    if not shown and not typical:
        return []
    both = early_and_late(shown)
    if typical:
        picked = [("Held out, before", typical.before), ("Held out, the same persona after", typical.after)]
    elif both:
        picked = [("Early", shown[both[0][0]]), ("Late, the same persona", shown[both[0][1]])]
    elif len(shown) > 1:
        picked = [("The first one", shown[0]), ("The last one, another persona", shown[-1])]
        if shown[0].trajectory.persona == shown[-1].trajectory.persona:
            picked[1] = ("The last one, the same persona", shown[-1])
    else:
        picked = [("The only one", shown[0])]
    failed = [c for c in shown if any(status(turn) != "scored" for turn in c.trajectory.turns)]
    others = [c for c in failed if all(c is not other for _, other in picked)]
    return [("With a failed verdict", others[0]), *picked] if others else picked


def compared(source: Source) -> list[PolicyClass]:
    """Return the policy classes whose credit is printed: greedy, 3-step, the run's own, full planning."""
    last = own_classes(source.config, source.metrics, [])[-1]
    n = max(source.turns, last.turns or 0)
    distinct = {counted(c, n): c for c in (*map(PolicyClass.parse, ("greedy", "3-step", "full")), last)}
    return [distinct[rows] for rows in sorted(distinct, key=lambda rows: sum(rows.ends))]


def lines(
    source: Source, printed: Sequence[tuple[str, Conversation]], classes: Sequence[PolicyClass], pictures: set[str]
) -> Iterator[str]:
    """Yield the Markdown file line by line."""
    yield f"# {'Run' if source.config else 'File'} {markdown(source.name)}"
    yield ""
    yield (
        "A partner talks to a persona, and a judge gives every reply a reward. The credit of the reply at turn t is "
        "the sum of the rewards that the policy class counts for it."
    )
    for note in source.notes:
        yield f"\n{markdown_line(note)}"
    if source.config is not None:
        yield "\n## Settings\n"
        yield from table(("setting", "value"), facts(source.config))
        yield "\n## Held-out evaluation\n"
        yield from _evaluation(source)
    if "curve.png" in pictures:
        yield "\n![learning curve, and held-out results before and after](curve.png)"
    yield "\n## What failed\n"
    yield from _failures(source)
    if printed:
        yield "\n## Conversations\n"
        if source.held_out and printed[-1][1].held_out:
            yield _held_out_words(source.held_out)
        trained = sum(not c.held_out for _, c in printed)
        share = f"{trained} of the {source.counts.conversations:,} that were learned from. " if trained else ""
        yield f"{share}{_credit_words(source)}"
        learned_with = own_classes(source.config, source.metrics, [c.iteration for _, c in printed])
        reads_credit = source.config is not None and method.reads_credit(source.config)
        for (label, conversation), own in zip(printed, learned_with, strict=False):
            yield from _conversation(label, conversation, classes, own if reads_credit else None, _discount(source))
    if "credit.png" in pictures:
        last = f"conversation {printed[-1][1].number}"
        yield f"\n![masks, and credit in {last}](credit.png)"
        yield f"\nThe mask of each policy class, and the credit it gives the replies of {last}."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table whose cells are texts, not Markdown."""
    return in_markdown(list(map(markdown, head)), [list(map(markdown, row)) for row in rows])


def _evaluation(source: Source) -> Iterator[str]:
    results = evaluations(source.evaluations)
    if not results:
        yield "None yet."
        return
    key, name = _LOGGED if source.offline else _SCORED
    head = ["", "iteration", name, *([] if source.offline else ["95% interval", "reachable", "personas"])]
    rows = []
    for result in results:
        row = [str(result["when"]), str(result.get("iteration", "-")), number(result.get(key))]
        if not source.offline:
            row += [_interval(result.get("ci95")), number(result.get("reachable")), str(result.get("n_personas", "-"))]
        rows.append([*row, str(result.get("conversations", "-"))])
    yield from table([*head, "conversations"], rows)
    ends = [result for result in results if result["when"] in ("before", "after") and result.get("per_turn")]
    if ends:
        yield "\nMean reward of each turn, with 95% intervals over personas:\n"
        n = max(len(result["per_turn"]) for result in ends)
        turns = [[str(t + 1), *(_per_turn(result, t) for result in ends)] for t in range(n)]
        yield from table(["turn", *(str(result["when"]) for result in ends)], turns)


def _per_turn(result: Mapping[str, Any], t: int) -> str:
    values, intervals = result["per_turn"], result.get("per_turn_ci95") or []
    if t >= len(values):
        return "-"
    return f"{number(values[t])} {_interval(intervals[t] if t < len(intervals) else None)}".strip()


def _interval(ends: Sequence[float | None] | None) -> str:
    return interval(ends) if ends else ""


def _failures(source: Source) -> Iterator[str]:
    counts = source.counts
    rows = [(f"verdict: {name}", f"{n:,} of {counts.turns:,} replies") for name, n in counts.statuses.most_common()]
    total = f"of {counts.conversations:,} conversations"
    rows += [(f"partner: {name}", f"{n:,} {total}") for name, n in counts.partners.most_common()]
    rows += [("cut short", f"{counts.truncated:,} {total}"), ("without a turn", f"{counts.empty:,} {total}")]
    yield from table(("what", "how many"), rows)


def _held_out_words(held_out: HeldOut) -> str:
    counts = changes(held_out)
    return (
        f"Of {counts['pairs']} held-out conversations, played before and after with the same personas and seeds, "
        f"{counts['up']} have a higher mean reward after, {counts['same']} the same, {counts['down']} a lower one; "
        f"mean change {counts['mean']:+.3f}. Printed is the one whose change is the median of the first "
        f"{len(held_out.pairs)}.\n"
    )


def _credit_words(source: Source) -> str:
    discount = _discount(source)
    far = "" if discount == 1 else f" A reward d turns later counts {discount:g} to the power of d."
    note = method.note(source.config) if source.config else ""
    before = "Credit is before any baseline is subtracted; a" if not note else f"{markdown(note)} A"
    return f"{before} reply without a score is masked.{far}"


def _conversation(
    label: str, conversation: Conversation, classes: Sequence[PolicyClass], own: PolicyClass | None, discount: float
) -> Iterator[str]:
    trajectory = conversation.trajectory
    at = "" if conversation.iteration is None else f", iteration {conversation.iteration}"
    yield f"\n### {label}: conversation {conversation.number}{at}\n"
    ending = "cut short" if trajectory.truncated else "whole"
    fault = "" if trajectory.partner_status == "ok" else f", partner: {markdown(trajectory.partner_status)}"
    yield f"Persona {markdown(trajectory.persona) or 'not named'}, {markdown(trajectory.domain)}; {ending}{fault}."
    yield f"\n> {markdown_line(trajectory.instruction)}\n" if trajectory.instruction else ""
    columns = [f"{c.label} (own)" if own is not None and c.label == own.label else c.label for c in classes]
    credits = [_credits(conversation, c, discount) for c in classes]
    rows = []
    for t, turn in enumerate(trajectory.turns):
        judged = math.isfinite(turn.reward)
        verdict = turn.verdict.get("kind") or "scored" if status(turn) == "scored" else f"no score: {status(turn)}"
        why = str(turn.verdict.get("rationale") or "")
        rows.append(
            [
                str(t + 1),
                turn.message,
                turn.reply,
                f"{verdict}. {why}" if why else str(verdict),
                f"{turn.reward:.2f}" if judged else "none",
                *(f"{column[t]:.2f}" if judged else "masked" for column in credits),
            ]
        )
    if rows:
        head = ("turn", "partner", "persona", "verdict", "reward", *(f"credit, {column}" for column in columns))
        yield from table(head, rows)
    else:
        yield "No turns: not even the first prompt fitted into the context."


def _credits(conversation: Conversation, planning: PolicyClass, discount: float) -> list[float]:
    rewards = np.array([[turn.reward for turn in conversation.trajectory.turns]], dtype=np.float64)
    n = rewards.shape[1]
    if not n:
        return []
    return [float(c) for c in credit(rewards, _mask(planning, n), np.isfinite(rewards), discount)[0]]


def _mask(planning: PolicyClass, n: int) -> Mask:
    """Return a class's mask of the first n turns; the class may be made for more."""
    mask: Mask = planning.mask(max(n, planning.turns or 0))[:n, :n]
    return mask


def _discount(source: Source) -> float:
    return source.config.discount if source.config else 1.0


def curve_picture(source: Source) -> Figure:
    """Draw the learning curve and the held-out results, as in the run's ``curve.png``."""
    from ppg_agents.runs.curve import draw_results

    figure = new_figure(11, 4.6)
    draw_results(figure, source.metrics, source.evaluations, offline=source.offline)
    return figure


def credit_picture(conversation: Conversation, classes: Sequence[PolicyClass], discount: float) -> Figure:
    """Draw each class's mask, and below it the credit it gives the conversation's replies."""
    n = max(len(conversation.trajectory.turns), 1)
    figure = new_figure(2.6 * len(classes) + 0.6, 4.4)
    grid = figure.subplots(2, len(classes), squeeze=False, height_ratios=(3, 2))
    least, most = 0.0, 1.0
    for k, planning in enumerate(classes):
        above, below = grid[0][k], grid[1][k]
        mask = _mask(planning, n)
        shown = np.where(mask, mask, np.nan)
        scale = 1.6 * (np.abs(mask.astype(float)).max() or 1.0)  # blue counts for a reply, red against it
        above.imshow(shown, cmap="RdBu", vmin=-scale, vmax=scale, aspect="equal")
        above.set_title(planning.label, fontsize=11)
        above.set(xlabel="reward of turn", ylabel="reply at turn" if k == 0 else "")
        ticks = range(0, n, max(1, math.ceil(n / 6)))
        names = [str(t + 1) for t in ticks]
        above.set_xticks(ticks, names)
        above.set_yticks(ticks, names)
        values = _credits(conversation, planning, discount)
        below.bar(range(len(values)), values, color=BLUE)
        below.set(xlabel="turn", ylabel="credit" if k == 0 else "", xlim=(-0.6, n - 0.4))
        below.set_xticks(ticks, names)
        tidy(below, grid=None)
        least, most = min(least, *values, least), max(most, *values, most)
    for ax in grid[1]:
        ax.set_ylim(1.05 * least, 1.05 * most)
    return figure
