"""Ready-made configs of ``accelerate launch``, by name. Nothing here imports more than the standard library.

    accelerate launch --config_file "$(ppg-agent accelerate-config ddp-8)" -m ppg_agents.cli train …

The first line of each file says what it is for. Any other accelerate config will do as well; of its settings the
learner heeds the processes and whether weights are split (FSDP), no mixed precision: weights keep the policy's dtype.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def launch_configs() -> dict[str, str]:
    """Return what every config is for, by name."""
    paths = sorted(FOLDER.glob("*.yaml"))
    return {path.stem: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for path in paths}


def launch_config(name: str) -> Path:
    """Return the file of a config.

    Raises:
        ValueError: No config of that name.
    """
    names = list(launch_configs())
    if name not in names:
        near = get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one of them"
        raise ValueError(f"expected a launch config out of {', '.join(names)}, got {name!r}; {hint}")
    return FOLDER / f"{name}.yaml"
