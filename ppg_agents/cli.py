"""The entry point of ``ppg-agent``: runs a command, and reports an error in one line.

The commands are in ``ppg_agents.commands.main``. This module imports only the standard library, so that
a missing extra gives a hint instead of a traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

OLDEST = (3, 11)
BASE = ("gymnasium", "numpy", "ppg_gym")
_AGENTS = ("click", "torch", "transformers", "tokenizers", "peft", "accelerate", "safetensors")
EXTRAS = {
    "agents": (*_AGENTS, "rich", "matplotlib", "scipy", "tomli_w"),
    "vllm": ("vllm",),
    "llm": ("openai", "tenacity", "diskcache", "aiohttp"),
    "quantised": ("bitsandbytes",),
    "kernels": ("liger_kernel",),
    "sb3": ("stable_baselines3",),
    "trl": ("datasets", "trl"),
    "ray": ("ray",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}
_PLACE = "make it writable, or name another place"
_ADVICE = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "name a file",
    errno.EEXIST: "name another place",
    errno.EACCES: _PLACE,
    errno.EPERM: _PLACE,
    errno.EROFS: _PLACE,
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room within the quota",
}
_MEMORY = (
    "out of memory: {error}; in training lower micro_batch_tokens or batch, or --set load.gradient_checkpointing=true; "
    "a large model: load.quantisation=4bit; in evaluation lower --conversations or --set batch"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``ppg-agent``.

    Args:
        arguments: The command line without the program's name; None for the real one.

    Returns:
        The exit code: 0 done, 1 an error, 2 a wrong command line, 130 stopped by the user.
    """
    if sys.version_info < OLDEST:
        running, needed = (".".join(map(str, version)) for version in (sys.version_info[:3], OLDEST))
        return fail(f"expected Python {needed} or newer, got {running}; install one, and ppg-gym with its pip")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        from ppg_agents.commands.main import run

        return run(arguments)
    except ModuleNotFoundError as error:
        given = list(sys.argv[1:] if arguments is None else arguments)
        if error.name == "click" and given[:1] == ["doctor"]:
            from ppg_agents.doctor.report import main as doctor

            try:
                code = doctor(given[1:])
                sys.stdout.flush()
            except BrokenPipeError:  # the reader, such as head, has gone; click does the same
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at the end fails no more
                return 1
            return code
        extra = missing_extra(error)
        if (error.name or "").partition(".")[0] in BASE:
            return fail(f"{error.name} is not installed; run: pip install ppg-gym, or in its sources: pip install -e .")
        if extra is None or os.environ.get("PPG_TRACEBACK"):
            raise
        stock = str(error).startswith(("No module named", "import of "))  # Python's own words
        return fail(f'{error.name} is not installed; run: pip install "ppg-gym[{extra}]"' if stock else one_line(error))
    except KeyboardInterrupt as stop:
        return fail(str(stop) or "stopped", 130)
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        ours = type(error).__module__.partition(".")[0] in ("ppg_gym", "ppg_agents")
        memory = not ours and is_memory(error)
        if os.environ.get("PPG_TRACEBACK") or (isinstance(error, RuntimeError) and not ours and not memory):
            raise
        return fail(_MEMORY.format(error=one_line(error)[:200]) if memory else one_line(error))


def one_line(error: BaseException) -> str:
    """Return an error's message on one line; one of the operating system comes with the file and what to do."""
    if isinstance(error, OSError) and error.errno and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        advice = _ADVICE.get(error.errno)
        return f"{where}{error.strerror}{f'; {advice}' if advice else ''}"
    return " ".join(str(error).split()) or type(error).__name__


def is_memory(error: BaseException) -> bool:
    """Return whether an error means that memory has run out; torch says so in its message alone."""
    message = str(error)
    return isinstance(error, MemoryError) or "out of memory" in message or "can't allocate memory" in message


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """Return the extra that installs the missing module, None when no extra does."""
    package = (error.name or "").partition(".")[0]
    return next((extra for extra, packages in EXTRAS.items() if package in packages), None)


def fail(message: str, code: int = 1) -> int:
    """Print one line to stderr and return the exit code."""
    print(f"ppg-agent: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
