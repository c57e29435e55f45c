"""Ready-made configs for ``accelerate launch``, by name. Imports nothing heavy.

    accelerate launch --config_file "$(ppg-agent accelerate-config ddp-8)" -m ppg_agents.cli train …

The first line of each file says what it is for. Any other accelerate config works too; the learner only uses its
number of processes and whether it splits weights (FSDP), not its mixed precision: weights keep the policy's dtype.
"""

from __future__ import annotations

from pathlib import Path

from ppg_agents.nearest import not_one_of

FOLDER = Path(__file__).resolve().parent


def launch_configs() -> dict[str, str]:
    """Return every config's name and what it is for."""
    paths = sorted(FOLDER.glob("*.yaml"))
    return {path.stem: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for path in paths}


def launch_config(name: str) -> Path:
    """Return a config's path.

    Raises:
        ValueError: No config has that name.
    """
    if name not in launch_configs():
        raise ValueError(not_one_of("the launch config", name, launch_configs()))
    return FOLDER / f"{name}.yaml"
