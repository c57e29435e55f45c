"""How often a 95% interval holds the truth, by simulation: the tables of docs/comparison.md and docs/horizon.md.

- **personas**: ``ppg-agent evaluate``, one policy and other personas; 1 to 3 conversations of 8 turns per persona.
- **seeds**: ``ppg-agent compare``, a method's mean, and the difference of two that are equal; effects of the seed,
  of the persona and of both, the seed's with a standard deviation of 0.03 or 0.2 and of three shapes.
- **cosine**: ``ppg-agent horizon``, a class whose cosine with full planning is exactly 0.9: how often the lower end of
  its interval is above that, which should be 2.5% at most.
- **judges**: ``ppg-agent judge validate``, agreement, kappa and ROC AUC, clustered by dialogue.

    python scripts/coverage.py --keep coverage.jsonl

Every finished cell is a line of the file; a second call goes on where the first one stopped, and prints the tables.
``--part`` names one part. One batch of the cosine takes 0.05 to 0.4 s on one shared core, so take ``--repeats 400``
for it; the others take a few milliseconds at most.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from ppg_agents import credit
from ppg_agents.horizon import advise
from ppg_agents.horizon.sketch import Sketches
from ppg_agents.intervals import FEWEST_SEEDS, Mean, clustered
from ppg_agents.terminal.progress import say
from ppg_agents.terminal.table import in_markdown
from ppg_gym.judges.lab.agreement import compare

Array = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]
Cell = dict[str, Any]
PERSONAS, SEEDS, SIZES = (4, 8, 20, 64), (2, 3, 5, 10), (0.03, 0.2)

OUTCOMES: dict[str, Draw] = {  # a persona's mean score
    "normal": lambda rng, shape: np.clip(rng.normal(0.6, 0.12, shape), 0, 1),
    "skewed": lambda rng, shape: 1 - np.clip(rng.exponential(0.2, shape), 0, 1),
    "bimodal": lambda rng, shape: np.where(rng.random(shape) < 0.5, 0.3, 0.9) + rng.uniform(-0.05, 0.05, shape),
    "0 or 1, evenly": lambda rng, shape: (rng.random(shape) < 0.5).astype(float),
    "3% fail": lambda rng, shape: (rng.random(shape) >= 0.03).astype(float),
    "10% fail": lambda rng, shape: (rng.random(shape) >= 0.1).astype(float),
}
EFFECTS: dict[str, Draw] = {  # of a seed: mean 0, standard deviation 1
    "normal": lambda rng, shape: rng.normal(size=shape),
    "skewed": lambda rng, shape: 1 - rng.exponential(size=shape),
    "bimodal": lambda rng, shape: rng.choice([-1.0, 1.0], shape),
}
SCORES: dict[str, tuple[Draw, Draw]] = {  # the score function, and the noise in the reward
    "normal, normal": (EFFECTS["normal"], EFFECTS["normal"]),
    "two-valued, normal": (EFFECTS["bimodal"], EFFECTS["normal"]),
    "two-valued, skewed": (EFFECTS["bimodal"], EFFECTS["skewed"]),
    "skewed, skewed": (EFFECTS["skewed"], EFFECTS["skewed"]),
}


def wanted() -> Iterator[Cell]:
    """Yield the cells."""
    for personas in PERSONAS:
        yield from ({"part": "personas", "personas": personas, "shape": shape} for shape in OUTCOMES)
    for seeds in SEEDS:
        for personas in PERSONAS:
            for shape in EFFECTS:
                where = {"part": "seeds", "seeds": seeds, "personas": personas, "shape": shape}
                yield from ({**where, "size": size} for size in SIZES)
    for dialogues in PERSONAS:
        yield from ({"part": "judges", "dialogues": dialogues, "right": right} for right in (0.6, 0.9, 0.98))
    for personas in (16, 64):
        for shape in SCORES:
            yield from ({"part": "cosine", "personas": personas, "shape": shape, "noise": n} for n in (0.7, 3.0))


def plain(tables: list[tuple[Array, Array]], factors: list[float]) -> tuple[float, float]:
    """Return the t interval of a mean over seeds, or over personas where there is one seed, as it is usually made."""
    axis = 1 if tables[0][0].shape[0] > 1 else 0
    each = sum(f * scores.sum(axis) / counts.sum(axis) for (scores, counts), f in zip(tables, factors, strict=True))
    values = np.asarray(each)
    half = stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def personas(rng: np.random.Generator, cell: Cell, repeats: int) -> Cell:
    """Return the coverage for one policy."""
    draw = OUTCOMES[cell["shape"]]
    truth = float(draw(rng, (4_000_000,)).mean())
    held = usual = width = 0.0
    for _ in range(repeats):
        counts = 8.0 * rng.integers(1, 4, (1, cell["personas"]))
        tables = [(draw(rng, counts.shape) * counts, counts)]
        low, high = clustered(tables, [1.0], trained=False).ci95
        held, width = held + (low <= truth <= high), width + high - low
        low, high = plain(tables, [1.0])
        usual += low <= truth <= high and low < high
    return {"held": held / repeats, "width": width / repeats, "plain": usual / repeats}


def method(rng: np.random.Generator, cell: Cell, seeds: int, personas: int) -> tuple[Array, Array]:
    """Return a method's scores and counts."""
    effect = cell["size"] * EFFECTS[cell["shape"]](rng, (seeds, 1))
    others = rng.normal(0, 0.08, (1, personas)) + rng.normal(0, 0.08, (seeds, personas))
    counts = 8.0 * rng.integers(1, 4, personas) * np.ones((seeds, 1))
    return np.clip(0.6 + effect + others, 0, 1) * counts, counts


def seeds(rng: np.random.Generator, cell: Cell, repeats: int) -> Cell:
    """Return the coverage of a method's mean and of a difference; that of plain t intervals with few seeds."""
    truth = float(
        np.mean([one.sum() / counts.sum() for one, counts in (method(rng, cell, 500, 500) for _ in "12345678")])
    )
    results: Cell = {}
    few = cell["seeds"] < FEWEST_SEEDS
    for _ in range(repeats):
        a, b = (method(rng, cell, cell["seeds"], cell["personas"]) for _ in "ab")
        for name, tables, factors, true in (("held", [a], [1.0], truth), ("difference", [a, b], [1.0, -1.0], 0.0)):
            found: Mean = clustered(tables, factors, trained=True)
            low, high = plain(tables, factors) if few else found.ci95
            results[name] = results.get(name, 0) + (low <= true <= high) / repeats
            results[f"{name} width"] = results.get(f"{name} width", 0) + (high - low) / repeats
    return results


def judges(rng: np.random.Generator, cell: Cell, repeats: int) -> Cell:
    """Return the coverage of agreement, kappa and AUC; dialogues differ in how often the judge is right."""

    def lines(dialogues: int) -> tuple[Array, Array, Array]:
        rate = np.repeat(rng.beta(8 * cell["right"], 8 * (1 - cell["right"]), dialogues), 8)
        labels = (rng.random(8 * dialogues) < 0.7).astype(float)
        said = np.where(rng.random(8 * dialogues) < rate, labels, 1 - labels)
        scores = np.clip(said * 0.5 + rng.random(8 * dialogues) * 0.499, 0, 1)
        return scores, labels, np.repeat(np.arange(dialogues), 8)

    names = ("agreement", "kappa", "auc")
    whole = [compare(*map(list, lines(1000))) for _ in range(8)]
    truth = {name: float(np.mean([getattr(one, name).value for one in whole])) for name in names}
    held, said = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for _ in range(repeats):
        found = compare(*map(list, lines(cell["dialogues"])))
        for name in names:
            one = getattr(found, name)
            if one.low is not None and one.high is not None:
                said[name] += 1
                held[name] += one.low <= truth[name] <= one.high
    return {name: held[name] / said[name] for name in names if said[name]}


def cosine(rng: np.random.Generator, cell: Cell, repeats: int) -> Cell:
    """Return how often the lower end of the interval is above the truth, 0.9."""
    n, size, (feature, noise) = 4, cell["personas"], SCORES[cell["shape"]]
    # The value's gradient is (1 + x, 1, 1, 1), that of greedy (1, 1, 1, 1); this x makes their cosine 0.9.
    x = next(x for x in np.linspace(0, 10, 100_001) if (4 + x) / (2 * np.sqrt((1 + x) ** 2 + 3)) < 0.9)
    classes = {"greedy": credit.PolicyClass("greedy").mask(n), "full": credit.PolicyClass("full").mask(n)}
    wrong = 0
    for _ in range(repeats):
        scores = feature(rng, (size, n))
        rewards = scores + cell["noise"] * noise(rng, (size, n))
        rewards[:, -1] += x * scores[:, 0]
        vectors = (np.eye(n) * scores[:, :, None]).astype(np.float32)
        names = tuple(f"{i:03}" for i in range(size))
        batch = Sketches(vectors, rewards, np.ones((size, n), dtype=np.bool_), names, n, 0)
        wrong += advise(batch, classes, resamples=1000, rng=rng).classes[0].cosine.low > 0.9
    return {"wrong": wrong / repeats}


PARTS = {"personas": personas, "seeds": seeds, "judges": judges, "cosine": cosine}


def tables(done: list[Cell]) -> str:
    """Return the tables in Markdown."""

    def percent(value: float) -> str:
        return f"{100 * value:.1f}%"

    def where(**keys: object) -> list[Cell]:
        return [cell for cell in done if all(cell.get(key) == value for key, value in keys.items())]

    blocks = []
    for name, key in (("these intervals", "held"), ("a plain t interval", "plain")):
        rows = []
        for shape in OUTCOMES:
            found = [where(part="personas", personas=p, shape=shape) for p in PERSONAS]
            rows.append([shape, *(percent(one[0][key]) if one else "" for one in found)])
        blocks.append(in_markdown([f"personas: {name}", *map(str, PERSONAS)], rows))
    widths = [[where(part="personas", personas=p, shape=s) for p in PERSONAS] for s in OUTCOMES]
    cells = [
        [s, *(f"{one[0]['width']:.2f}" if one else "" for one in row)] for s, row in zip(OUTCOMES, widths, strict=True)
    ]
    blocks.append(in_markdown(["personas: width", *map(str, PERSONAS)], cells))
    for key in ("held", "difference"):
        rows = []
        for count in SEEDS:
            for shape in EFFECTS:
                found = [where(part="seeds", seeds=count, personas=p, shape=shape) for p in PERSONAS]
                rows.append([str(count), shape, *(percent(min(c[key] for c in one)) if one else "" for one in found)])
        blocks.append(in_markdown([f"seeds ({key}, lowest of the sizes)", "shape", *map(str, PERSONAS)], rows))
    rows = []
    for statistic in ("agreement", "kappa", "auc"):
        for right in (0.6, 0.9, 0.98):
            found = [where(part="judges", dialogues=d, right=right) for d in PERSONAS]
            rows.append(
                [statistic, str(right), *(percent(c[0][statistic]) if c and statistic in c[0] else "" for c in found)]
            )
    blocks.append(in_markdown(["judges", "right", *map(str, PERSONAS)], rows))
    rows = []
    for shape in SCORES:
        found = [where(part="cosine", personas=p, shape=shape, noise=n) for p in (16, 64) for n in (0.7, 3.0)]
        rows.append([shape, *(percent(one[0]["wrong"]) if one else "" for one in found)])
    blocks.append(in_markdown(["cosine: wrong", "16, low noise", "16, much", "64, low noise", "64, much"], rows))
    return "\n\n".join("\n".join(block) for block in blocks)


def main() -> None:
    """Fill the missing cells, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, default=Path("coverage.jsonl"), help="file of the finished cells")
    parser.add_argument("--repeats", type=int, default=2000, help="simulated batches per cell (default: 2,000)")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given again")
    given = parser.parse_args()
    text = given.keep.read_text(encoding="utf-8") if given.keep.is_file() else ""
    done: list[Cell] = [json.loads(line) for line in text.splitlines()]
    for number, cell in enumerate(wanted()):
        finished = any(cell.items() <= other.items() for other in done)
        if finished or (given.part and cell["part"] not in given.part):
            continue
        found = PARTS[cell["part"]](np.random.default_rng(number), cell, given.repeats)
        done.append({**cell, "repeats": given.repeats, **found})
        with given.keep.open("a", encoding="utf-8") as file:
            file.write(json.dumps(done[-1]) + "\n")
        say(json.dumps(done[-1]))
    print(tables(done))


if __name__ == "__main__":
    main()
