"""Writes the files of a figure, the picture and its numbers, from the runs so far. Starts no run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ppg_agents.compare.cell import Result, finished
from ppg_agents.compare.engine import failure, folder_of
from ppg_agents.compare.plan import Job, config_of
from ppg_agents.compare.report import rows
from ppg_agents.intervals import FEWEST_SEEDS
from ppg_agents.reproduce import numbers, tables
from ppg_agents.reproduce.plans import Request
from ppg_agents.runs.run import RunError

Wanted = Mapping[Path, Sequence[Job]]


def write(request: Request, wanted: Wanted, turns: Mapping[str, int], out: Path) -> list[Path]:
    """Write a figure's files.

    Args:
        request: What to draw.
        wanted: Its runs, by the folder that keeps them.
        turns: Turns of a conversation, by domain.
        out: The folder to write into.

    Returns:
        The files.

    Raises:
        RunError: Nothing has been measured yet.
    """
    out.mkdir(parents=True, exist_ok=True)
    make = {"fig2": _fig2, "fig3": _fig3, "fig4": _fig4, "fig5": _fig5, "table": _table}[request.figure]
    return make(request, wanted, turns, out)


def lost(wanted: Wanted) -> dict[str, str]:
    """Return why runs failed, by name."""
    return {job.name: why for place, jobs in wanted.items() for job in jobs if (why := failure(job, place))}


def _fig2(request: Request, wanted: Wanted, turns: Mapping[str, int], out: Path) -> list[Path]:
    size = max(request.sizes)
    levels = {
        numbers.ROLLOUT: _gather(numbers.cells, wanted, size),
        numbers.STEP: _gather(numbers.steps, wanted, size),
    }
    points, scale = numbers.residuals(levels, turns)
    _need(points, request, out)
    from ppg_agents.reproduce.figures import draw_residuals

    title = f"Figure 2: residual of persona consistency against the step, after {size:,} training conversations"
    caption = (
        "Residual (our definition): a class's consistency at a turn less the mean over the classes at that turn, "
        f"divided by the largest absolute value in the picture, {scale:.3f}. Rollout-level: the policy plays the whole "
        "conversation. Step-level (our definition): the untrained model plays up to the turn, the policy speaks there."
    )
    draw_residuals(points, scale, out / "fig2.png", **_words(request, wanted, title, caption, _seeds(points)))
    return _csv(points, out, "fig2", "turn")


def _fig3(request: Request, wanted: Wanted, turns: Mapping[str, int], out: Path) -> list[Path]:
    cells = _gather(numbers.cells, wanted)
    points = numbers.curves([(cell.size, cell) for cell in (*cells, *_gather(numbers.untrained, wanted))], turns)
    _need(cells, request, out)
    from ppg_agents.reproduce.figures import draw_curves

    title = "Figure 3: persona consistency against the number of training conversations"
    caption = "Rollout-level, held-out personas. One run per class and seed, evaluated on its way."
    words = _words(request, wanted, title, caption, _seeds(points))
    draw_curves(points, out / "fig3.png", xlabel="training conversations", **words)
    return _csv(points, out, "fig3", "conversations")


def _fig4(request: Request, wanted: Wanted, turns: Mapping[str, int], out: Path) -> list[Path]:
    table = numbers.standings(_gather(numbers.cells, wanted), turns)
    _need(table, request, out)
    from ppg_agents.reproduce.figures import draw_standings

    title = "Figure 4: the best lookahead K against the number of training conversations"
    caption = (
        "Shade and number: share of bootstrap resamples in which K is the best. Bold in a thick frame: highest mean. "
        "Thin frame: not significantly worse (paired, 5%, Holm-corrected over a column's pairs). Full planning is "
        "K = turns."
    )
    words = _words(request, wanted, title, caption, [one.seeds for one in table])
    draw_standings(table, out / "fig4.png", **words)
    return _csv(table, out, "fig4", "conversations")


def _fig5(request: Request, wanted: Wanted, turns: Mapping[str, int], out: Path) -> list[Path]:
    size = max(request.sizes)
    by_length: list[tuple[int, Result]] = []
    for place, jobs in wanted.items():
        trained = _gather(numbers.cells, {place: jobs}, size)
        if request.train_turns:
            length = {job.name: config_of(job).env.max_turns or turns[job.domain] for job in jobs}
            by_length += [(length[cell.job.name], cell) for cell in trained]
        else:
            by_length += [(n, cell) for n, cell in numbers.lengths(jobs, place) if n in request.turns]
            by_length += [(n, cell) for cell in trained if (n := turns[cell.job.domain]) not in request.turns]
    points = numbers.curves(by_length, turns)
    _need(points, request, out)
    from ppg_agents.reproduce.figures import draw_curves

    how = "each length" if request.train_turns else "the domain's own"
    title = f"Figure 5: persona consistency by length of the conversation; trained on {how}"
    caption = f"After {size:,} training conversations; rollout-level, held-out personas."
    if not request.train_turns:
        trained_on = ", ".join(f"{turns[domain]} turns in {domain}" for domain in request.domains)
        caption += f" Trained on conversations of {trained_on}; only the evaluation is longer or shorter."
    words = _words(request, wanted, title, caption, _seeds(points))
    draw_curves(points, out / "fig5.png", xlabel="turns of a conversation", **words)
    return _csv(points, out, "fig5", "turns")


def _table(request: Request, wanted: Wanted, turns: Mapping[str, int], out: Path) -> list[Path]:
    size = max(request.sizes)
    cells = _gather(numbers.cells, wanted, size)
    _need(cells, request, out)
    why = lost(wanted)
    table = rows(cells)
    failed = tables.failed_methods([job for jobs in wanted.values() for job in jobs], table, why)
    words = _words(
        request,
        wanted,
        f"Persona consistency after {size:,} training conversations",
        "Bold: the best of a domain, and what is not significantly worse (paired, 5%, Holm-corrected over a domain's "
        "pairs).",
        [tuple(range(row.seeds)) for row in table],
    )
    text = f"### {words['title']}\n\n{tables.to_markdown(table, failed, why)}\n{words['caption']}\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    (out / "table.csv").write_text(tables.to_long_csv(table, failed, size), encoding="utf-8")
    return [out / "table.md", out / "table.csv"]


def _gather(
    read: Callable[[Sequence[Job], Path], list[Result]], wanted: Wanted, size: int | None = None
) -> list[Result]:
    """Return the cells of all folders, of one size or of all."""
    cells = [cell for place, jobs in wanted.items() for cell in read(jobs, place)]
    return [cell for cell in cells if size in (None, cell.size)]


def _seeds(points: Sequence[numbers.Point]) -> list[tuple[int, ...]]:
    return [point.seeds for point in points]


def _words(
    request: Request, wanted: Wanted, title: str, caption: str, seeds: Sequence[tuple[int, ...]]
) -> dict[str, str]:
    """Return title and caption, with the seeds, runs and model that the numbers come from."""
    config = next(config_of(job) for jobs in wanted.values() for job in jobs)
    counts = sorted({len(each) for each in seeds})
    count = "1 seed" if counts == [1] else "–".join(map(str, dict.fromkeys((counts[0], counts[-1])))) + " seeds"
    runs = [(job, folder_of(job, place)) for place, jobs in wanted.items() for job in jobs]
    there = sum(finished(job, folder) for job, folder in runs)
    if request.quick:
        span = f"{min(request.sizes):,}–{max(request.sizes):,}"
        title = f"QUICK LOOK ({count}, {span} conversations). {title}"
    if there < len(runs):
        title = f"UNFINISHED ({there} of {len(runs)} runs). {title}"
    caption += (
        f" Model {Path(config.model).name}; {count}; {config.evaluation.conversations} held-out conversations per "
        "evaluation; intervals: 95%, clustered by seed and persona."
    )
    if counts[0] < FEWEST_SEEDS:
        caption += f" With fewer than {FEWEST_SEEDS} seeds there are too few to say, and no interval is drawn."
    return {"title": title, "caption": caption}


def _csv(table: Sequence[numbers.Point | numbers.Standing], out: Path, name: str, x: str) -> list[Path]:
    (out / f"{name}.csv").write_text(numbers.to_csv(table, x), encoding="utf-8")
    return [out / f"{name}.png", out / f"{name}.csv"]


def _need(cells: Sequence[object], request: Request, out: Path) -> None:
    if not cells:
        raise RunError(
            f"expected runs to draw {request.figure} from in {out}, got none that is finished; see {out}/cells/*.txt"
        )
