"""Runs a module in a process that ends with its parent: ``python -m ppg_agents.compare.child MODULE ARGUMENT …``.

Standard input is a pipe to the parent, which nobody writes to. It closes when the parent is gone, even if that
was killed; then the child is interrupted as by Ctrl-C.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading


def watch(pipe: int) -> None:
    """Interrupt this process when the other end of the pipe is closed."""

    def wait() -> None:
        while os.read(pipe, 1):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
    watch(sys.stdin.fileno())
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
