"""Many runs at a time: processes on this machine, or tasks on a Ray cluster.

A run that fails is written down with its last words and does not stop the others. Nothing here knows what a run does.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from ppg_agents.compare import child as held
from ppg_agents.compare.cell import FILES, STOPPED, finished, to_json
from ppg_agents.compare.plan import Job, check_models
from ppg_agents.runs.files import lock
from ppg_agents.terminal.interrupt import terminable
from ppg_agents.terminal.progress import Progress, say

CELLS, LOG, FAILED = "cells", "log.txt", "failed.txt"
OWN = re.compile(r"^ppg_(?:agents|gym)[\w.]*: ")
"""How a traceback begins the words of an error of ours, which say enough."""
Done = Callable[[Job, str | None], None]


def folder_of(job: Job, out: Path) -> Path:
    """Return where a run is kept."""
    return out / CELLS / job.name


def missing(jobs: Sequence[Job], out: Path) -> list[Job]:
    """Return the runs whose cells are not all filled."""
    return [job for job in jobs if not finished(job, folder_of(job, out))]


def failure(job: Job, out: Path) -> str | None:
    """Return why a run failed last, in one line; None when it did not, or has been finished since."""
    folder = folder_of(job, out)
    path = folder.with_suffix(f".{FAILED}")
    if path.exists() and finished(job, folder):
        path.unlink()
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def run_all(
    what: str, left: Mapping[Path, Sequence[Job]], total: int, *, engine: str, workers: int, again: str
) -> bool:
    """Run what is missing, and show how far it is.

    Args:
        what: The word before the progress bar.
        left: The runs, by the folder that keeps them, which nobody else may be running in.
        total: Runs in all, those that are there already included.
        engine: ``processes`` or ``ray``.
        workers: Runs at a time.
        again: The command line that goes on, for a user who stops.

    Returns:
        Whether a run failed.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: A model that no run would find.
        RunError: Somebody else is running in a folder.
        KeyboardInterrupt: The user stopped; it says how to go on.
    """
    if not any(left.values()):
        return False
    if engine == "processes":  # the machines of a cluster may have other folders
        check_models(job for jobs in left.values() for job in jobs)
    start = run_on_ray if engine == "ray" else run_here
    count, failed = total - sum(map(len, left.values())), False
    with contextlib.ExitStack() as locks, Progress(what, total, start=count) as progress:

        def done(job: Job, why: str | None) -> None:
            nonlocal count, failed
            count, failed = count + 1, failed or why is not None
            progress.advance(count, job.name)
            if why is not None:
                say(f"{job.name} failed: {why}")

        try:
            for folder, jobs in left.items():
                if jobs:
                    folder.mkdir(parents=True, exist_ok=True)
                    locks.enter_context(lock(folder))
                    start(jobs, folder, workers, done)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; go on with: {again}") from None
    return failed


def run_here(jobs: Sequence[Job], out: Path, workers: int, done: Done) -> None:
    """Run in so many processes at a time.

    Args:
        jobs: What to run.
        out: The comparison's folder.
        workers: Processes.
        done: Called with each run that has ended, and why it failed, None when it did not.

    Raises:
        KeyboardInterrupt: The user stopped; the processes save their runs and end.
    """
    running = Running()

    def one(job: Job) -> str | None:
        if running.stopped:
            return None
        folder = folder_of(job, out)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            return _note(job, out, *_process(job, folder, running))
        except (OSError, ValueError) as error:  # a full disk, a damaged file: this run's own misfortune
            return f"{type(error).__name__}: {error}"

    pool = ThreadPoolExecutor(workers)
    with terminable():
        waiting = {pool.submit(one, job): job for job in jobs}
        try:
            while waiting:
                ended, _ = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in ended:
                    done(waiting.pop(future), future.result())
        except KeyboardInterrupt:
            if count := running.interrupt():
                say(f"stopping {count} run{'' if count == 1 else 's'}; once more to stop at once")
            try:
                wait(waiting)
            except KeyboardInterrupt:
                running.interrupt()  # once more: at once
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class Running:
    """The processes at work: all of them are told when the user stops, those that begin just then too."""

    def __init__(self) -> None:
        self.stopped = False
        self._processes = set[subprocess.Popen[str]]()
        self._lock = threading.Lock()

    def add(self, process: subprocess.Popen[str]) -> None:
        """Take in a process that has begun."""
        with self._lock:
            self._processes.add(process)
            if self.stopped:
                process.send_signal(signal.SIGINT)

    def discard(self, process: subprocess.Popen[str]) -> None:
        """Forget a process that has ended."""
        with self._lock:
            self._processes.discard(process)

    def interrupt(self) -> int:
        """Send SIGINT to all; return how many they are."""
        with self._lock:
            self.stopped = True
            for process in self._processes:
                process.send_signal(signal.SIGINT)
            return len(self._processes)


def run_on_ray(jobs: Sequence[Job], out: Path, workers: int, done: Done) -> None:
    """Run as Ray tasks of one CPU each, on the cluster that ``RAY_ADDRESS`` names, else on this machine.

    A task works in a folder of its own machine and sends back what its cells need, so that no file system is shared.
    A task that is lost begins anew.

    Args:
        jobs: What to run.
        out: The comparison's folder.
        workers: Tasks at a time.
        done: As in `run_here`.
    """
    import ray

    with _cluster(workers), terminable():  # in this order: Ray takes the signal over when it starts
        task = ray.remote(num_cpus=1)(_away)
        queue = list(reversed(jobs))
        waiting: dict[Any, Job] = {}
        while queue or waiting:
            while queue and len(waiting) < workers:
                job = queue.pop()
                waiting[task.remote(job)] = job
            ended, _ = ray.wait(list(waiting), num_returns=1)
            for reference in ended:
                job = waiting.pop(reference)
                try:
                    code, log, files = ray.get(reference)
                except ray.exceptions.RayError as error:
                    code, log, files = 1, " ".join(str(error).split()), {}
                folder = folder_of(job, out)
                (folder / "checkpoints").mkdir(parents=True, exist_ok=True)  # a run's folder, without its weights
                for name, content in files.items():
                    (folder / name).write_bytes(content)
                done(job, _note(job, out, code, log))


@contextlib.contextmanager
def _cluster(workers: int) -> Iterator[None]:
    import ray

    ours = not ray.is_initialized()
    if ours:
        os.environ.setdefault("RAY_worker_niceness", "0")  # else its workers, and so the runs, get what others leave
        this_machine: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False}
        ray.init(log_to_driver=False, **({} if os.environ.get("RAY_ADDRESS") else this_machine))
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def _away(job: Job) -> tuple[int, str, dict[str, bytes]]:
    """Run on whatever machine this is; return exit code, last words, and the files that cells are read from."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / job.name
        code, log = _process(job, folder, Running())
        files = (*FILES, *job.further)
        return code, log, {name: (folder / name).read_bytes() for name in files if (folder / name).exists()}


def _process(job: Job, folder: Path, running: Running) -> tuple[int, str]:
    """Run a job in a process of its own; return its exit code and what it said."""
    with tempfile.TemporaryDirectory() as place:
        order = Path(place) / "job.json"
        order.write_text(to_json(job), encoding="utf-8")
        command = [sys.executable, "-m", held.__name__, job.module, str(order), str(folder)]
        theirs, ours = os.pipe()  # ours is closed when this process ends in whatever way, and so they end too
        try:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=theirs,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    env={"OMP_NUM_THREADS": "1", **os.environ},
                    start_new_session=True,  # the terminal's Ctrl-C reaches it through us alone
                )
            finally:
                os.close(theirs)
            running.add(process)
            try:
                _, log = process.communicate()
            finally:
                running.discard(process)
        finally:
            os.close(ours)
    return process.returncode, log


def _note(job: Job, out: Path, code: int, log: str) -> str | None:
    """Keep what a run said, and return why it failed, None when it did not."""
    folder = folder_of(job, out)
    folder.with_suffix(f".{LOG}").write_text(log, encoding="utf-8")
    path = folder.with_suffix(f".{FAILED}")
    if code == 0 and finished(job, folder):
        path.unlink(missing_ok=True)
        return None
    if code in (STOPPED, -signal.SIGINT):
        return "stopped"
    lines = [line for line in log.splitlines() if line.strip()]
    why = OWN.sub("", lines[-1].strip()) if lines else "no word"
    reason = f"exit code {code}: {why}"[:1000]
    path.write_text(reason + "\n", encoding="utf-8")
    return reason
