"""Make the embedded personas of every domain from the value lists in ``envs/<domain>/facts.toml``.

Run after changing those lists: ``python scripts/make_personas.py``. Seeded; writes
``envs/<domain>/personas-{train,held-out}.jsonl``. No set of facts occurs twice, in either file.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ppg_gym.domain import DOMAINS, SPLITS, load

NAMES = [
    "Anna",
    "Ben",
    "Carla",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Hugo",
    "Iris",
    "Jonas",
    "Kira",
    "Leo",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
    "Quinn",
    "Rosa",
    "Sam",
    "Tara",
    "Uma",
    "Victor",
    "Wanda",
    "Yusuf",
]
COUNTS = {"train": 256, "held-out": 128}
SEED = 20260306


def main() -> None:
    """Write the persona files."""
    root = Path(__file__).resolve().parent.parent / "envs"
    for number, name in enumerate(DOMAINS):
        rng = np.random.default_rng([SEED, number])
        domain = load(name)
        seen: set[tuple[str, ...]] = set()
        for split in SPLITS:
            lines = []
            while len(lines) < COUNTS[split]:
                facts = {slot: str(rng.choice(list(values))) for slot, values in domain.slots.items()}
                if tuple(facts.values()) in seen:
                    continue
                seen.add(tuple(facts.values()))
                called = str(rng.choice(NAMES))
                record = {
                    "id": f"{name}-{split}-{len(lines):03d}",
                    "domain": name,
                    "name": called,
                    "instruction": domain.instruct(called, facts),
                    "facts": facts,
                }
                lines.append(json.dumps(record))
            (root / name / f"personas-{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
