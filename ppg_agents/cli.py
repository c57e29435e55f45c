"""The entry point of ``ppg-agent``: runs a command, and says in one line what went wrong.

The commands are in ``ppg_agents.commands``. This module imports the standard library alone, so that a
missing extra is named instead of a traceback, and may not compute anything itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

_AGENTS = ("click", "torch", "transformers", "tokenizers", "peft", "accelerate", "safetensors")
EXTRAS = {
    "agents": (*_AGENTS, "rich", "matplotlib", "scipy", "tomli_w"),
    "vllm": ("vllm",),
    "llm": ("openai", "tenacity", "diskcache", "aiohttp"),
    "quantised": ("bitsandbytes",),
    "kernels": ("liger_kernel",),
    "learned": ("sklearn", "joblib"),
    "sb3": ("stable_baselines3",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``ppg-agent``.

    Args:
        arguments: The command line without the program's name; None for the real one.

    Returns:
        The exit code: 0 done, 1 an error, 2 a wrong command line, 130 stopped by the user.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        from ppg_agents.commands import run

        return run(arguments)
    except ModuleNotFoundError as error:
        extra = missing_extra(error)
        if extra is None:
            raise
        return fail(f'{error.name} is not installed; run: pip install "ppg-gym[{extra}]"')
    except KeyboardInterrupt as stop:
        return fail(str(stop) or "stopped", 130)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        own = type(error).__module__.partition(".")[0] in ("ppg_gym", "ppg_agents")
        if os.environ.get("PPG_TRACEBACK") or (isinstance(error, RuntimeError) and not own):
            raise
        return fail(" ".join(str(error).split()) or type(error).__name__)


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """Return the extra of the distribution that brings the missing module, None when it is no extra's."""
    package = (error.name or "").partition(".")[0]
    return next((extra for extra, packages in EXTRAS.items() if package in packages), None)


def fail(message: str, code: int = 1) -> int:
    """Print one line to stderr and return the exit code."""
    print(f"ppg-agent: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
