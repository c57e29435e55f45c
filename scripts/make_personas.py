"""Make the embedded personas of every domain from the value lists in ``envs/<domain>/facts.toml``.

Run after changing those lists: ``python scripts/make_personas.py``. Seeded; writes
``envs/<domain>/personas-{train,held-out}.jsonl``. No set of facts occurs twice, in either file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ppg_gym.conversation import Persona
from ppg_gym.data.persona_maker import Facts, draw, save_personas
from ppg_gym.domain import DOMAINS, SPLITS, load

COUNTS = {"train": 256, "held-out": 128}
SEED = 20260306


def main() -> None:
    """Write the persona files."""
    root = Path(__file__).resolve().parent.parent / "envs"
    for number, name in enumerate(DOMAINS):
        rng = np.random.default_rng([SEED, number])
        domain = load(name)
        seen: set[Facts] = set()
        for split in SPLITS:
            personas = [
                Persona(f"{name}-{split}-{i:03d}", domain.instruct(called, facts), facts, name, called)
                for i, (called, facts) in enumerate(draw(domain, COUNTS[split], rng, seen))
            ]
            save_personas(root / name / f"personas-{split}.jsonl", personas)


if __name__ == "__main__":
    main()
