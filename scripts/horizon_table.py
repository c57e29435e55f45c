"""Three answers to "how far ahead should it plan?", side by side, per domain and sample size.

- **twin, infinite data**: the shortest class within 0.01 per turn of the best final value, when every class follows its
  own exact gradient on the domain's exact twin. No language, no sampling.
- **twin, B per step**: the same, learned from sampled conversations of the twin, B per step, for a fixed number of
  steps; mean over seeds, every class at its own best step size.
- **twin, next step**: the class with the most progress where learning starts, the advisor's own statistic, from 20,000
  conversations of the twin.
- **advisor, N**: what ``ppg-agent horizon`` recommends for B conversations per step from N conversations of the
  untrained embedded model in language; in brackets how many of the classes can not be told from it, it included.
- **reach, N**: the lookahead that holds every reward that those conversations show to matter (0: none).
- **aligned, N**: the shortest class that those conversations show to point where full planning points.

    python scripts/horizon_table.py --domain all --conversations 64 256 --batch 8 32 128

With the table of a comparison in language (``ppg-agent compare``), a row is a domain and a number of training
conversations instead, learned from in steps of the first B:

    python scripts/horizon_table.py --results runs/compare/results.csv --batch 16

- **language**: the policy class with the highest mean of the comparison, and those that can not be told from it.

How many conversations it takes to see it: of the largest N all smaller ones are drawn, without replacement, 50 times:

    python scripts/horizon_table.py --conversations 16 64 256 640 --subsets 50 --keep sketches/

- **shortest aligned class**: how often each class was it; **wrong**: how often its cosine over all N is below 0.9.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ppg_agents import credit
from ppg_agents.baselines import leave_one_out
from ppg_agents.building import load_policy
from ppg_agents.commands.horizon import picture, table
from ppg_agents.config import from_dict
from ppg_agents.evaluate import play
from ppg_agents.generation.hf import HFSampler
from ppg_agents.horizon import ALIGNED, Verdict, advise
from ppg_agents.horizon.choice import default_candidates, distinct, masks
from ppg_agents.horizon.sketch import Sketches, sketch
from ppg_agents.terminal.progress import Progress, say
from ppg_gym.domain.loading import DOMAINS, load
from ppg_gym.domain.twin import Twin, softmax

Array = npt.NDArray[np.float64]
STEP_SIZES = (1.0, 3.0, 10.0, 30.0)


def infinite(name: str, classes: Mapping[str, credit.Mask]) -> dict[str, float]:
    """Return the value per turn that each class reaches with the exact gradient."""
    domain = load(name)
    twin, start = Twin.of(domain.table), Twin.of(domain.table).start(domain, domain.turns)
    return {label: float(twin.rewards(twin.ascend(mask, start, steps=1000)).mean()) for label, mask in classes.items()}


def learn(twin: Twin, start: Array, mask: credit.Mask, batch: int, steps: int, size: float, seeds: int) -> Array:
    """Learn from sampled conversations, and return the exact value per turn of the last policy of every seed, [seeds].

    The gradient is the learner's: credit, leave-one-out baseline, mean over conversations.
    """
    n, states, kinds = start.shape
    rngs = [np.random.default_rng([seed, batch]) for seed in range(seeds)]
    logits = np.broadcast_to(np.log(np.maximum(start, 1e-12)), (seeds, *start.shape)).copy()
    lane, valid = np.arange(seeds)[:, None], np.ones((batch, n), dtype=np.bool_)
    for step in range(steps):
        policy = softmax(logits)
        state = np.zeros((seeds, batch), dtype=np.int64)
        visited, played = (np.zeros((n, seeds, batch), dtype=np.int64) for _ in range(2))
        rewards = np.zeros((seeds, batch, n))
        for t in range(n):
            draws = np.stack([rng.random(batch) for rng in rngs])
            chances = policy[lane, t, state].cumsum(-1)
            action = np.minimum((draws[..., None] > chances).sum(-1), kinds - 1)
            visited[t], played[t], rewards[..., t] = state, action, twin.score[state, action]
            state = twin.step[state, action]
        weight = credit.credit(rewards.reshape(-1, n), mask, np.ones((seeds * batch, n), dtype=np.bool_))
        gradient = np.zeros_like(logits)
        for i, own in enumerate(weight.reshape(seeds, batch, n)):
            advantage = own - leave_one_out(own, valid, [0] * batch)
            for t in range(n):
                np.add.at(gradient[i, t], (visited[t, i], played[t, i]), advantage[:, t] / batch)
                at = np.bincount(visited[t, i], advantage[:, t], states) / batch
                gradient[i, t] -= at[:, None] * policy[i, t]
        logits += size * (1 - step / steps) * gradient
        logits -= logits.max(-1, keepdims=True)
    return np.array([float(twin.rewards(policy).mean()) for policy in softmax(logits)])


def finite(name: str, classes: Mapping[str, credit.Mask], batch: int, steps: int, seeds: int) -> dict[str, float]:
    """Return the mean final value per turn of every class on the twin, at its best step size."""
    domain = load(name)
    twin = Twin.of(domain.table)
    start = twin.start(domain, domain.turns)
    values = {}
    for label, mask in classes.items():
        tried = [learn(twin, start, mask, batch, steps, size, seeds).mean() for size in STEP_SIZES]
        values[label] = float(max(tried))
    say(f"{name}, twin, {batch} per step: " + ", ".join(f"{label} {value:.3f}" for label, value in values.items()))
    return values


def least(values: Mapping[str, float]) -> str:
    """Return the shortest class that is within 0.01 of the best; classes come from short to long."""
    return next(label for label in values if values[label] >= max(values.values()) - 0.01)


def next_step(name: str, classes: Mapping[str, credit.Mask], batch: int, conversations: int = 20_000) -> str:
    """Return the class with the most progress at the twin's own start, from many sampled conversations.

    The advisor's statistic, in the coordinates of the twin's logits [n, S, A]; turns have coordinates of their own.
    """
    domain = load(name)
    twin, rng = Twin.of(domain.table), np.random.default_rng(batch)
    start = twin.start(domain, domain.turns)
    n, _, kinds = start.shape
    state, rewards, scores = np.zeros(conversations, dtype=np.int64), np.zeros((conversations, n)), []
    for t in range(n):
        chances = start[t, state].cumsum(-1)
        action = np.minimum((rng.random(conversations)[:, None] > chances).sum(-1), kinds - 1)
        scores.append((state, np.eye(kinds)[action] - start[t, state]))
        rewards[:, t], state = twin.score[state, action], twin.step[state, action]
    mean, square = {}, {}
    for label, mask in classes.items():
        value = rewards @ mask.T
        advantage = value - value.mean(0)
        mean[label], square[label] = np.zeros(start.shape), 0.0
        for t, (where, score) in enumerate(scores):
            np.add.at(mean[label][t], where, advantage[:, t, None] * score / conversations)
            square[label] += float((advantage[:, t] ** 2 * (score**2).sum(1)).mean())
    length = {label: float((mean[label] ** 2).sum()) for label in classes}
    rms = {label: np.sqrt(length[label] + (square[label] - length[label]) / batch) for label in classes}
    progress = {label: float((mean[label] * mean["full"]).sum() / rms[label]) for label in classes}
    return max(progress, key=lambda label: progress[label])


def language(name: str, conversations: int, seed: int, keep: Path | None = None) -> Sketches:
    """Play and differentiate conversations of the untrained embedded model, as ``ppg-agent horizon tiny`` does.

    With a folder the sketches are kept there, and read from there the next time.
    """
    path = keep / f"{name}-{conversations}-{seed}.npz" if keep else None
    if path is not None and path.is_file():
        with np.load(path) as kept:
            return Sketches(
                kept["vectors"],
                kept["rewards"],
                kept["valid"],
                tuple(kept["personas"].tolist()),
                int(kept["parameters"]),
                int(kept["seed"]),
            )
    config = from_dict({"domain": name, "seed": seed})
    policy = load_policy(config)
    sampler = HFSampler(policy, config.sampling.max_new_tokens, config.sampling.temperature)
    trajectories, _ = play(policy, sampler, config, personas="train", conversations=conversations, seed=seed)
    with Progress(f"{name}, differentiating", conversations) as progress:
        found = sketch(policy, trajectories, seed=seed, done=progress.advance)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **{**vars(found), "personas": np.array(found.personas)})
    return found


def some(sketches: Sketches, rows: npt.NDArray[np.intp]) -> Sketches:
    """Return these conversations."""
    return replace(
        sketches,
        vectors=sketches.vectors[rows],
        rewards=sketches.rewards[rows],
        valid=sketches.valid[rows],
        personas=tuple(np.array(sketches.personas)[rows].tolist()),
    )


def first(sketches: Sketches, count: int) -> Sketches:
    """Return the first conversations."""
    return some(sketches, np.arange(min(count, len(sketches.personas))))


def shown(verdict: Verdict, classes: int) -> str:
    """Return a verdict for a cell of the table."""
    return f"{verdict.recommended} ({len(verdict.undecided)} of {classes})"


def rows(name: str, arguments: argparse.Namespace) -> list[str]:
    """Return a domain's rows."""
    n = load(name).turns
    every = masks(distinct(default_candidates(n), n), n)
    reached = infinite(name, every)
    sketches = language(name, max(arguments.conversations), arguments.seed, arguments.keep)
    verdicts: dict[tuple[int, int], Verdict] = {}
    reach: dict[int, int] = {}
    aligned: dict[int, str] = {}
    for count in arguments.conversations:
        report = advise(first(sketches, count), every, batch=arguments.batch[0], other_batches=arguments.batch[1:])
        verdicts |= {(count, verdict.batch): verdict for verdict in report.verdicts}
        reach[count], aligned[count] = report.reach, report.aligned[0]
        say(f"\n## {name}, {count} conversations\n\n{table(report)}\n")
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            picture(report, f"{name}, {count} conversations").savefig(arguments.out / f"{name}-{count}.png", dpi=110)
    lines = []
    for batch in arguments.batch:
        sampled = least(finite(name, every, batch, arguments.steps, arguments.seeds))
        cells = [shown(verdicts[count, batch], len(every)) for count in arguments.conversations]
        far = [str(reach[count]) for count in arguments.conversations]
        far += [aligned[count] for count in arguments.conversations]
        twins = [least(reached), sampled, next_step(name, every, batch)]
        lines.append(f"| {' | '.join([name, str(batch), *twins, *cells, *far])} |")
    return lines


def learned(path: Path, name: str) -> dict[int, str]:
    """Return the best policy class in language by the number of training conversations, and what may be as good."""
    with path.open(encoding="utf-8") as file:
        found = [row for row in csv.DictReader(file) if row["domain"] == name]
    words = {}
    for size in sorted({int(row["size"]) for row in found}):
        own = [row for row in found if int(row["size"]) == size]
        best = next(row["method"] for row in own if row["verdict"] == "best")
        others = [row["method"] for row in own if row["verdict"] == "undecided"]
        words[size] = best + (f" (or {', '.join(others)})" if others else "")
    return words


def rows_by_size(name: str, arguments: argparse.Namespace) -> list[str]:
    """Return a domain's rows, one for each size of the comparison."""
    n, batch = load(name).turns, arguments.batch[0]
    every = masks(distinct(default_candidates(n), n), n)
    reached, best = infinite(name, every), learned(arguments.results, name)
    sketches = language(name, max(best), arguments.seed, arguments.keep)
    lines = []
    for size, words in best.items():
        report = advise(first(sketches, size), every, batch=batch)
        sampled = finite(name, every, batch, size // batch, arguments.seeds)
        cells = [least(reached), least(sampled), words, shown(report.verdict, len(every)), str(report.reach)]
        cells.append(report.aligned[0])
        lines.append(f"| {' | '.join([name, str(size), *cells])} |")
    return lines


def rows_of_subsets(name: str, arguments: argparse.Namespace) -> list[str]:
    """Return a domain's rows, one for each number of conversations: what so many show, over many draws."""
    n, (*sizes, most) = load(name).turns, sorted(arguments.conversations)
    every = masks(distinct(default_candidates(n), n), n)
    sketches = language(name, most, arguments.seed, arguments.keep)
    whole = advise(sketches, every)
    exact = {c.label: c.cosine.value for c in whole.classes}
    rng, lines = np.random.default_rng(arguments.seed), []
    for size in sizes:
        drawn = [rng.choice(most, size, replace=False) for _ in range(arguments.subsets)]
        found = [advise(some(sketches, rows), every, resamples=500, rng=rng).aligned[0] for rows in drawn]
        shares = [f"{label} {found.count(label) / len(found):.0%}" for label in every if label in found]
        wrong = sum(exact[label] < ALIGNED for label in found) / len(found)
        lines.append(f"| {name} | {size} | {', '.join(shares)} | {wrong:.0%} |")
    cosines = ", ".join(f"{label} {cosine:.3f}" for label, cosine in exact.items())
    return [*lines, f"| {name} | {most} | {whole.aligned[0]} (cosines {cosines}) | |"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=(*DOMAINS, "all"), default="all")
    parser.add_argument("--conversations", type=int, nargs="+", default=[64], help="N that the advisor reads")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32, 128], help="B per gradient step")
    parser.add_argument("--steps", type=int, default=20, help="of learning on the twin (default: 20)")
    parser.add_argument("--seeds", type=int, default=10, help="of learning on the twin (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the conversations in language")
    parser.add_argument("--out", type=Path, help="folder for the pictures")
    parser.add_argument("--subsets", type=int, help="draws of every smaller N out of the largest")
    parser.add_argument("--keep", type=Path, help="folder for the sketches, which are then made once")
    parser.add_argument("--results", type=Path, help="results.csv of ppg-agent compare: a row per size of its runs")
    given = parser.parse_args(arguments)
    if min(*given.conversations, *given.batch, given.seeds) < 2 or given.steps < 1:
        parser.error("expected at least 2 conversations, conversations per step and seeds, and at least 1 step")
    torch.manual_seed(given.seed)
    columns = ["domain", "B", "twin, infinite data", "twin, B per step", "twin, next step"]
    columns += [f"advisor, N = {count}" for count in given.conversations]
    columns += [f"{what}, N = {count}" for what in ("reach", "aligned") for count in given.conversations]
    if given.results:
        kinds = ["twin, infinite data", f"twin, {given.batch[0]} per step", "language", "advisor", "reach", "aligned"]
        columns = ["domain", "conversations", *kinds]
    if given.subsets:
        columns = ["domain", "conversations", "shortest aligned class", "wrong"]
    make = rows_of_subsets if given.subsets else rows_by_size if given.results else rows
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in DOMAINS if given.domain == "all" else (given.domain,):
        lines += make(name, given)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
