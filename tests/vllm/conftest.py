"""A real vLLM server on the CPU with the embedded model: started once, ended by its own process id.

These tests run in an environment of their own (``make test-vllm``); elsewhere this folder is left out.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pytest

START, STOP = 300.0, 60.0  # seconds; a loaded machine takes its time
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
}
SHORT = {"backend": "guidance", "disable_any_whitespace": True}

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["*"]


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def stop(self) -> int:
        """End it as a service manager does, by its own process id, and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=STOP)


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(folder: Path) -> Server:
    """Start a server and wait until it is healthy."""
    port, log = free_port(), folder / "server.log"
    model = str(files("ppg_agents.models.tiny"))
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "4096", "--enforce-eager", "--structured-outputs-config", json.dumps(SHORT)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **QUIET}, stdout=file, stderr=subprocess.STDOUT
        )
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return Server(f"http://127.0.0.1:{port}/v1", process, log)
        time.sleep(0.25)
    process.kill()
    process.wait()
    raise RuntimeError(f"expected a healthy server within {START:.0f} s, got:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return a server that all tests share."""
    running = start(tmp_path_factory.mktemp("vllm"))
    yield running
    if running.process.poll() is None:
        running.stop()


@pytest.fixture
def options(server: Server, tmp_path: Path) -> dict[str, object]:
    """Return options of a judge or partner that asks the server; its cache is this test's own."""
    return {"base_url": server.url, "model": "tiny", "timeout": 120.0, "cache": str(tmp_path / "cache")}
