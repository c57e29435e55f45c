"""A module as a child that ends with its parent: ``python -m ppg_agents.compare.child MODULE ARGUMENT …``.

Standard input is the parent's end of a pipe, which nobody writes to. It closes when the parent is gone, in whatever
way: killed, or a cluster's worker that was shut down. Then the child is told to stop, as by Ctrl-C.
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
    signal.signal(signal.SIGINT, signal.default_int_handler)  # one that a job in the background ignores is heard here
    watch(sys.stdin.fileno())
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
