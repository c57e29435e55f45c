"""Many runs at a time: processes on this machine, or tasks on a Ray cluster.

A run that fails is recorded with the last line of its log, and the others go on. What a run does is up to its module.
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

from ppg_agents.compare import child
from ppg_agents.compare.cell import FILES, STOPPED, finished, to_json
from ppg_agents.compare.plan import Job, check_models
from ppg_agents.runs.files import lock
from ppg_agents.terminal.interrupt import terminable
from ppg_agents.terminal.progress import Progress, say

CELLS, LOG, FAILED = "cells", "log.txt", "failed.txt"
OUR_ERROR = re.compile(r"^ppg_(?:agents|gym)[\w.]*: ")
"""The name of one of our own exceptions at the end of a traceback; its message is enough for a reader."""
Done = Callable[[Job, str | None], None]


def folder_of(job: Job, out: Path) -> Path:
    """Return where a run is kept."""
    return out / CELLS / job.name


def missing(jobs: Sequence[Job], out: Path) -> list[Job]:
    """Return the runs whose cells are not all filled."""
    return [job for job in jobs if not finished(job, folder_of(job, out))]


def failure(job: Job, out: Path) -> str | None:
    """Return in one line why a run's last attempt failed; None when it did not fail or has been finished since."""
    folder = folder_of(job, out)
    path = folder.with_suffix(f".{FAILED}")
    if path.exists() and finished(job, folder):
        path.unlink()
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def run_all(
    what: str, left: Mapping[Path, Sequence[Job]], total: int, *, engine: str, workers: int, again: str
) -> bool:
    """Run what is missing, with a progress bar; each folder is locked while runs work in it.

    Args:
        what: The label of the progress bar.
        left: The missing runs, by the folder that keeps them.
        total: The number of all runs, with those that are finished.
        engine: ``processes`` or ``ray``.
        workers: Runs at a time.
        again: The command line to resume with, for a user who stops.

    Returns:
        Whether a run failed.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: A model cannot be found.
        RunError: Another process is running in one of the folders.
        KeyboardInterrupt: The user stopped; the message says how to resume.
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
    """Run jobs in ``workers`` processes at a time.

    Args:
        jobs: What to run.
        out: The comparison's folder.
        workers: Processes at a time.
        done: Called when a run ends, with the run and why it failed (None if it did not).

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
        except (OSError, ValueError) as error:  # a full disk or a damaged file concerns this run alone
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
                running.interrupt()  # the second Ctrl-C: runs stop without saving
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class Running:
    """The processes at work. Once interrupted, a process that is added later is interrupted too."""

    def __init__(self) -> None:
        self.stopped = False
        self._processes = set[subprocess.Popen[str]]()
        self._lock = threading.Lock()

    def add(self, process: subprocess.Popen[str]) -> None:
        """Add a process that has begun."""
        with self._lock:
            self._processes.add(process)
            if self.stopped:
                process.send_signal(signal.SIGINT)

    def discard(self, process: subprocess.Popen[str]) -> None:
        """Forget a process that has ended."""
        with self._lock:
            self._processes.discard(process)

    def interrupt(self) -> int:
        """Send SIGINT to all; return how many there are."""
        with self._lock:
            self.stopped = True
            for process in self._processes:
                process.send_signal(signal.SIGINT)
            return len(self._processes)


def run_on_ray(jobs: Sequence[Job], out: Path, workers: int, done: Done) -> None:
    """Run jobs as Ray tasks of one CPU each, on the cluster that ``RAY_ADDRESS`` names, else on this machine.

    A task works in a temporary folder and sends back the files that its cells are read from, so that no shared file
    system is needed. A task that is lost is run again from the start.

    Args:
        jobs: What to run.
        out: The comparison's folder.
        workers: Tasks at a time.
        done: As in `run_here`.
    """
    import ray

    with _cluster(workers), terminable():  # in this order: Ray sets its own handler when it starts
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
                (folder / "checkpoints").mkdir(parents=True, exist_ok=True)  # a run's folder has it, empty or not
                for name, content in files.items():
                    (folder / name).write_bytes(content)
                done(job, _note(job, out, code, log))


@contextlib.contextmanager
def _cluster(workers: int) -> Iterator[None]:
    import ray

    ours = not ray.is_initialized()
    if ours:
        os.environ.setdefault("RAY_worker_niceness", "0")  # else Ray lowers the priority of its workers
        this_machine: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False}
        ray.init(log_to_driver=False, **({} if os.environ.get("RAY_ADDRESS") else this_machine))
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def _away(job: Job) -> tuple[int, str, dict[str, bytes]]:
    """Run on the machine that Ray has chosen; return the exit code, the log, and the files that cells are read from."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / job.name
        code, log = _process(job, folder, Running())
        files = (*FILES, *job.further)
        return code, log, {name: (folder / name).read_bytes() for name in files if (folder / name).exists()}


def _process(job: Job, folder: Path, running: Running) -> tuple[int, str]:
    """Run a job in a process of its own; return its exit code and its log."""
    with tempfile.TemporaryDirectory() as place:
        order = Path(place) / "job.json"
        order.write_text(to_json(job), encoding="utf-8")
        command = [sys.executable, "-m", child.__name__, job.module, str(order), str(folder)]
        theirs, ours = os.pipe()  # our end closes however this process ends, which tells the child to stop
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
                    start_new_session=True,  # so that Ctrl-C reaches it from us, once
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
    """Write a run's log; return why it failed, None when it did not."""
    folder = folder_of(job, out)
    folder.with_suffix(f".{LOG}").write_text(log, encoding="utf-8")
    path = folder.with_suffix(f".{FAILED}")
    if code == 0 and finished(job, folder):
        path.unlink(missing_ok=True)
        return None
    if code in (STOPPED, -signal.SIGINT):
        return "stopped"
    lines = [line for line in log.splitlines() if line.strip()]
    why = OUR_ERROR.sub("", lines[-1].strip()) if lines else "its log is empty"
    reason = f"exit code {code}: {why}"[:1000]
    path.write_text(reason + "\n", encoding="utf-8")
    return reason
