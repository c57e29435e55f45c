"""One event loop per process, in its own thread, so that code without a loop can wait for coroutines.

Connections live only as long as their loop, so one loop lasts for the whole process. Hand what you open on it to
``adopt``, and it is closed before the interpreter ends.
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import os
import threading
import weakref
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Closable(Protocol):
    """Something that must be closed on the loop it was made on."""

    async def aclose(self) -> None:
        """Close it; a second time does nothing."""
        ...


class _Background:
    """The loop, its thread, and the things to close before they end."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.adopted: weakref.WeakSet[Closable] = weakref.WeakSet()
        self.thread = threading.Thread(target=self._work, name="ppg-gym-background", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.run_until_complete(self._finish())
        self.loop.close()

    async def _finish(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.gather(*(closable.aclose() for closable in list(self.adopted)), return_exceptions=True)
        await self.loop.shutdown_asyncgens()
        await self.loop.shutdown_default_executor()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5.0)


_lock = threading.Lock()
_current: _Background | None = None
_ended = False


def _background() -> _Background:
    global _current
    with _lock:
        if _ended:
            raise RuntimeError("expected a running interpreter, got one that is shutting down; wait before it ends")
        if _current is None:
            _current = _Background()
        return _current


def run(coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop | None = None) -> T:
    """Run a coroutine on the process's background loop and wait for it; several threads may do so at once.

    An exception in the waiting thread (``KeyboardInterrupt``) cancels the coroutine, and is raised once it has ended.

    Args:
        coroutine: The work to do.
        loop: A running loop to use instead of the background one.

    Returns:
        The coroutine's result.

    Raises:
        RuntimeError: Called on that loop itself, where waiting would never end.
    """
    try:
        if loop is None:
            loop = _background().loop
        if loop is _running():
            raise RuntimeError("expected a call from outside the event loop, got one on it; await the coroutine there")
    except RuntimeError:
        coroutine.close()
        raise
    ended = threading.Event()
    tasks: list[asyncio.Task[T]] = []

    def start() -> None:
        task = loop.create_task(coroutine)
        task.add_done_callback(lambda _: ended.set())
        tasks.append(task)

    loop.call_soon_threadsafe(start)
    try:
        ended.wait()
    except BaseException:
        loop.call_soon_threadsafe(lambda: tasks[0].cancel())
        ended.wait()
        if not tasks[0].cancelled():
            tasks[0].exception()  # retrieve it, or asyncio warns; what we raise is the interruption
        raise
    return tasks[0].result()


def adopt(closable: Closable) -> None:
    """Have this closed before the interpreter ends; does nothing on any other loop than the background one."""
    if _current is not None and _current.loop is _running():
        _current.adopted.add(closable)


def close_on(loop: asyncio.AbstractEventLoop, pid: int, closable: Closable) -> None:
    """Close something on its loop without waiting, from any thread; leave alone what a parent process made."""
    if pid != os.getpid():
        keep(closable)
        return
    if not loop.is_running():
        return
    tasks: set[asyncio.Task[None]] = set()

    def start() -> None:
        task = loop.create_task(_close(closable))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    loop.call_soon_threadsafe(start)


async def _close(closable: Closable) -> None:
    await closable.aclose()


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def keep(thing: object) -> None:
    """Keep something alive for ever, even past the interpreter's end: it belongs to the parent of this process.

    Closing an inherited connection or loop would disturb the parent, and dropping it would warn.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _after_fork() -> None:
    global _lock, _current
    if _current is not None:
        keep((_current, *_current.adopted))
    _lock, _current = threading.Lock(), None


def _at_exit() -> None:
    global _ended
    with _lock:
        _ended = True
    if _current is not None:
        _current.stop()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
