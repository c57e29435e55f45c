"""Train every domain with the horizon it needs and with one that is too short, and print what was reached.

    python scripts/reach.py                 # 5 settings x 3 seeds, two runs at a time; about 40 minutes
    python scripts/reach.py --seeds 0 1 2 3 4 --jobs 4

Each run is ``ppg-agent train`` with its defaults; a run that is finished is not run again. The table gives the
persona consistency on held-out personas, and as a share of the value that the domain's twin says is reachable: mean
over seeds, lowest and highest seed. Three seeds are too few for an interval (docs/comparison.md).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SETTINGS = {
    ("chatting", "greedy"): ["--policy-class", "greedy"],
    ("therapy", "3-step"): ["--policy-class", "k-step", "--lookahead", "3"],
    ("therapy", "greedy"): ["--policy-class", "greedy"],
    ("education", "full"): ["--policy-class", "full"],
    ("education", "3-step"): ["--policy-class", "k-step", "--lookahead", "3"],
}


def run(folder: Path, domain: str, flags: list[str], seed: int, extra: list[str]) -> dict[str, dict[str, float]]:
    """Train unless the folder holds the finished run; return its evaluations before and after."""
    results = folder / "evaluation.json"
    if not results.exists() or "after" not in json.loads(results.read_text()):
        where = ["--resume", str(folder)] if (folder / "config.toml").exists() else ["--out", str(folder)]
        command = [sys.executable, "-m", "ppg_agents.cli", "train", *where]
        if where[0] == "--out":
            command += ["--domain", domain, *flags, "--seed", str(seed), *extra]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    evaluations: dict[str, dict[str, float]] = json.loads(results.read_text())
    return evaluations


def main() -> None:
    """Run what is missing and print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reach"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--only", help="a domain")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of the runs")
    settings = parser.parse_args()
    extra = ["--set", "threads=1", *(word for pair in settings.set for word in ("--set", pair))]
    chosen = {k: v for k, v in SETTINGS.items() if settings.only in (None, k[0])}
    with ThreadPoolExecutor(settings.jobs) as pool:
        jobs = {
            (*key, seed): pool.submit(run, settings.out / f"{key[0]}-{key[1]}-{seed}", key[0], flags, seed, extra)
            for key, flags in chosen.items()
            for seed in settings.seeds
        }
        found = {key: job.result() for key, job in jobs.items()}
    print("| domain | policy class | reachable | before | after [lowest, highest seed] | share of reachable |")
    print("|---|---|---|---|---|---|")
    for domain, name in chosen:
        rows = [found[domain, name, seed] for seed in settings.seeds]
        after = [row["after"]["persona_consistency"] for row in rows]
        before = statistics.mean(row["before"]["persona_consistency"] for row in rows)
        best = rows[0]["after"]["reachable"]
        shares = [value / best for value in after]
        print(
            f"| {domain} | {name} | {best:.3f} | {before:.3f} ({before / best:.0%})"
            f" | {statistics.mean(after):.3f} [{min(after):.3f}, {max(after):.3f}]"
            f" | {statistics.mean(shares):.1%} [{min(shares):.1%}, {max(shares):.1%}] |"
        )


if __name__ == "__main__":
    main()
