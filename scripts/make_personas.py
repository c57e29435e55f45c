"""Make the persona files of every embedded domain from the value lists of its slots.

Run after changing those lists: ``python scripts/make_personas.py``. Seeded by the domain; writes
``envs/<domain>/personas-{train,held-out}.jsonl``. No set of facts occurs twice, in either file.
"""

from __future__ import annotations

from pathlib import Path

from ppg_gym.data.records import save_personas
from ppg_gym.domain.cast import drawn_personas
from ppg_gym.domain.loading import DOMAINS, load


def main() -> None:
    """Write the persona files."""
    root = Path(__file__).resolve().parent.parent / "envs"
    for name in DOMAINS:
        for split, personas in drawn_personas(load(name)).items():
            save_personas(root / name / f"personas-{split}.jsonl", personas)


if __name__ == "__main__":
    main()
