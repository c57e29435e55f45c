"""What a bug report needs and a newcomer asks: what is installed, what would be used, what answers.

Everything is looked at without importing torch or any extra here: versions come from the packages' metadata, devices
from a child process that may fail or hang, servers are asked in threads with a limit. Only the standard library is
imported, so that this works where nothing else does. Nothing is changed, and no finding holds the value of a key or
of a proxy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ppg_agents.doctor.packages import DISTRIBUTION, installed, lacking, requirements, version_of
from ppg_agents.doctor.servers import Asked, Server, ask_all

Status = Literal["ok", "note", "fault"]

IMPORT_SECONDS = 60.0
"""How long importing torch and starting its devices may take."""
SCARCE = 2 * 2**30
"""Bytes of free disk below which a note is due: a few checkpoints of a small model."""
PURPOSE = "Say what is installed, what would be used, and whether the named servers answer."
KEYS = ("OPENAI_API_KEY", "VLLM_API_KEY", "HF_TOKEN", "WANDB_API_KEY")
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
SHOWN = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")
"""Variables whose values hold no secret and explain much."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        section: What it belongs to.
        name: What was looked at.
        status: ``ok``; ``note``: something is missing that nobody asked for; ``fault``: something asked for fails.
        value: What was found, for people.
        todo: What to do about it; empty when there is nothing to do.
        details: What was found, as plain JSON.
    """

    section: str
    name: str
    status: Status
    value: str
    todo: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All findings, in the order in which they are shown."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether all that was asked for works."""
        return all(finding.status != "fault" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {"ok": self.ok, "findings": [asdict(finding) for finding in self.findings]}


def examine(asked: Asked | None = None) -> Report:
    """Look at everything.

    Args:
        asked: The servers that the command line names; None for none.

    Returns:
        The findings. A fault is something that the base package, this machine or a named server can not do.
    """
    asked = asked or Asked()
    found = installed(requirements())
    child = Child() if found.get("torch") else None
    servers = ask_all(asked.servers())  # at the same time as the child imports torch
    facts = child.facts() if child else {}
    sections = (
        versions(found),
        extras(found, asked),
        devices(found, facts),
        used(facts, asked),
        disk(),
        variables(),
        (finding(server) for server in servers),
    )
    return Report(tuple(found for section in sections for found in section))


def versions(found: Mapping[str, str | None]) -> Iterable[Finding]:
    """Yield the versions of everything."""
    own = version_of(DISTRIBUTION)
    todo = "" if own else "install it to have all commands: pip install -e '.[agents]'"
    yield Finding("versions", DISTRIBUTION, "ok" if own else "note", own or "runs from its sources", todo)
    ok: Status = "ok" if sys.version_info >= (3, 11) else "fault"
    yield Finding("versions", "Python", ok, platform.python_version(), "" if ok == "ok" else "use 3.11 or newer")
    yield Finding("versions", "platform", "ok", platform.platform())
    there = {name: version for name, version in found.items() if version}
    text = ", ".join(f"{name} {version}" for name, version in sorted(there.items(), key=lambda item: item[0].lower()))
    yield Finding("versions", "packages", "ok", text or "none", details=dict(found))


def extras(found: Mapping[str, str | None], asked: Asked) -> Iterable[Finding]:
    """Yield for every extra whether it is complete; one that a named server needs must be."""
    for extra, several in requirements().items():
        lacks = [what for requirement in several for what in lacking(requirement, found)]
        name = f"[{extra}]" if extra else "base"
        if not lacks:
            yield Finding("extras", name, "ok", "complete", details={"lacks": []})
            continue
        wanted = f"{DISTRIBUTION}[{extra}]" if extra else DISTRIBUTION
        needed = not extra or extra in asked.extras()
        value, todo = f"lacks {', '.join(lacks)}", f'pip install "{wanted}"'
        yield Finding("extras", name, "fault" if needed else "note", value, todo, {"lacks": lacks})


class Child:
    """A process that imports torch and says what it sees; it may crash or hang and this one goes on."""

    def __init__(self) -> None:
        path = os.pathsep.join(part for part in sys.path if part)
        command = [sys.executable, "-P", "-m", "ppg_agents.doctor.report", "--torch"]
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )

    def facts(self) -> dict[str, Any]:
        """Return `torch_facts`, or ``{"error": …}``."""
        try:
            out, err = self._process.communicate(timeout=IMPORT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return {"error": f"importing torch and looking for devices took more than {IMPORT_SECONDS:.0f} s"}
        try:
            return dict(json.loads(out.splitlines()[-1]))
        except (ValueError, LookupError, TypeError):
            said = " ".join((err.strip().splitlines() or ["nothing"])[-1].split())[:200]
            return {"error": f"importing torch ended with exit code {self._process.returncode}: {said}"}


def torch_facts() -> dict[str, Any]:
    """Import torch and return what it sees."""
    try:
        import torch
    except Exception as error:  # a broken build raises what it likes
        return {"error": f"torch can not be imported: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    cuda = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        cuda.append({"name": properties.name, "memory": total, "free": free, "bf16": bf16})
    return {
        "version": torch.__version__,
        "built_for": torch.version.cuda and f"CUDA {torch.version.cuda}",
        "cuda": cuda,
        "mps": torch.backends.mps.is_available(),
        "threads": torch.get_num_threads(),
    }


def devices(found: Mapping[str, str | None], facts: Mapping[str, Any]) -> Iterable[Finding]:
    """Yield what there is to compute with."""
    cards = graphics_cards()
    if not found.get("torch"):
        yield Finding("device", "torch", "note", "not installed", f'pip install "{DISTRIBUTION}[agents]"')
    elif "error" in facts:
        yield Finding("device", "torch", "fault", facts["error"], "install torch anew: https://pytorch.org/get-started")
    for index, card in enumerate(facts.get("cuda", ())):
        value = f"{card['name']}, {size(card['free'])} free of {size(card['memory'])}, bfloat16 {yes(card['bf16'])}"
        yield Finding("device", f"cuda:{index}", "ok", value, details=card)
    if "cuda" in facts and not facts["cuda"]:
        built = facts["built_for"] or "the CPU alone"
        status: Status = "note" if cards else "ok"
        todo = "install a torch for the driver's CUDA version: https://pytorch.org/get-started" if cards else ""
        value = f"no CUDA device (torch is built for {built})"
        value += f", though the driver lists {', '.join(cards)}" if cards else ""
        yield Finding("device", "cuda", status, value, todo, {"driver": cards})
    if "mps" in facts:
        yield Finding("device", "mps", "ok", "there, not used" if facts["mps"] else "no")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = f", {facts['threads']} threads of torch" if "threads" in facts else ""
    counts = {"cores": os.cpu_count(), "usable": usable, "threads": facts.get("threads")}
    yield Finding("device", "CPU", "ok", f"{usable} of {os.cpu_count()} cores usable{threads}", details=counts)
    total, free = memory()
    yield Finding("device", "RAM", "ok", f"{size(free)} free of {size(total)}", details={"total": total, "free": free})


def graphics_cards() -> list[str]:
    """Return the NVIDIA cards that the driver lists, torch or no torch."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [" ".join(line.split()) for line in done.stdout.splitlines() if line.strip()]


def memory() -> tuple[int | None, int | None]:
    """Return the bytes of RAM that this process may use, and those that are free; None where it can not be told."""
    total: int | None = None
    free: int | None = None
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        total = min(total, int(limit)) if limit.isdecimal() else total
    except (ValueError, OSError, AttributeError):
        pass
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (ValueError, OSError, LookupError):
        pass
    return total, min(free, total) if free is not None and total is not None else free


def used(facts: Mapping[str, Any], asked: Asked) -> Iterable[Finding]:
    """Yield what a run would use, and whether it works: every embedded domain is played for a turn."""
    if "cuda" in facts:
        device, dtype = ("cuda", "bfloat16") if facts["cuda"] else ("cpu", "float32")
        yield Finding(
            "would use", "device, dtype", "ok", f"{device}, {dtype}", details={"device": device, "dtype": dtype}
        )
    else:
        yield Finding("would use", "device, dtype", "ok", "none: without torch there is the environment alone")
    backend = "vllm servers" if asked.rollout_urls else "hf: the learner's own model"
    yield Finding("would use", "sampling", "ok", backend)
    folder = Path(__file__).resolve().parents[1] / "models" / "tiny"
    missing = [name for name in ("config.json", "tokenizer.json", "model.safetensors") if not (folder / name).is_file()]
    todo = f"install the package: pip install {DISTRIBUTION}, or in its source tree: pip install -e ."
    if missing:
        yield Finding("would use", "embedded model", "fault", f"lacks {', '.join(missing)}", todo)
    else:
        yield Finding("would use", "embedded model", "ok", "there")
    works, broken = [], []
    for domain in embedded_domains():
        try:
            play(domain)
            works.append(domain)
        except Exception as error:  # whatever it is, it belongs into the report
            broken.append(f"{domain}: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
    value = "; ".join([*([", ".join(works)] if works else []), *broken])
    yield Finding("would use", "domains", "fault" if broken else "ok", value, todo if broken else "", {"works": works})


def embedded_domains() -> tuple[str, ...]:
    """Return the names of the embedded domains; the default one's alone where the package can not be imported."""
    try:
        import ppg_gym
    except ImportError:
        return ("chatting",)  # which says what is wrong when it is played
    return ppg_gym.DOMAINS


def play(domain: str) -> None:
    """Play one turn in an embedded domain."""
    import gymnasium as gym

    env = gym.make("ppg_gym:PersonaChat-v0", domain=domain)
    env.reset(seed=0)
    env.step("Hello.")
    env.close()


def cache_folder() -> Path:
    """Return where the answers of servers are kept by default."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(os.path.expanduser("~"))
    usual = home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"
    return (Path(given) if os.path.isabs(given) else usual) / "ppg-gym" / "answers"


def disk() -> Iterable[Finding]:
    """Yield where files would go: whether that can be written, and how much room there is."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    hub = Path(os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")).expanduser()
    for name, folder, todo in (
        ("current folder", Path.cwd(), "work in a folder of yours"),
        ("answers", cache_folder(), "set XDG_CACHE_HOME to a folder of yours, or use --no-cache"),
        ("models", hub, "set HF_HOME to a folder of yours"),
    ):
        there = next(place for place in (folder, *folder.parents) if os.path.exists(place))
        why, room = unwritable(there), shutil.disk_usage(there).free
        home = Path(os.path.expanduser("~"))
        shown = f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder)
        value = f"{shown}: {why or 'can be written'}, {size(room)} free"
        details = {"free": room, "writable": not why}
        if why:
            yield Finding("disk", name, "fault" if name == "current folder" else "note", value, todo, details)
        elif room < SCARCE:
            yield Finding("disk", name, "note", value, "make room: checkpoints and models are large", details)
        else:
            yield Finding("disk", name, "ok", value, "", details)


def unwritable(folder: Path) -> str:
    """Return why nothing can be written in a folder, "" when a file could be."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"can not be written ({error.strerror})"


def variables() -> Iterable[Finding]:
    """Yield which variables are set; never the value of a key or of a proxy."""
    for name, several in (("keys", KEYS), ("proxies", PROXIES)):
        state = {v: bool(os.environ.get(v) or os.environ.get(v.upper())) for v in several}
        value = ", ".join(f"{variable} {'set' if there else 'unset'}" for variable, there in state.items())
        yield Finding("environment", name, "ok", value, details=state)
    shown = {variable: os.environ.get(variable) for variable in SHOWN}
    value = ", ".join(
        f"{variable} {text!r}" if text is not None else f"{variable} unset" for variable, text in shown.items()
    )
    yield Finding("environment", "others", "ok", value, details=shown)


def finding(server: Server) -> Finding:
    """Return what a server said as a finding."""
    return Finding("servers", server.name, server.status, server.value, server.todo, server.details)


def size(count: int | None) -> str:
    """Return bytes for people."""
    if count is None:
        return "?"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def yes(value: object) -> str:
    """Return a truth for people."""
    return "yes" if value else "no"


def rows(report: Report) -> list[tuple[Status | None, str]]:
    """Return the report as lines, each with the status it shows; None for a heading and for what to do."""
    lines: list[tuple[Status | None, str]] = []
    width = max(len(one.name) for one in report.findings)
    section = ""
    for one in report.findings:
        if one.section != section:
            section = one.section
            lines.append((None, section))
        lines.append((one.status, f"  {one.status:<5}  {one.name:<{width}}  {one.value}"))
        if one.todo:
            lines.append((None, f"  {'':<5}  {'':<{width}}  -> {one.todo}"))
    faults = sum(one.status == "fault" for one in report.findings)
    lines.append(("fault" if faults else "ok", f"{faults} fault{'' if faults == 1 else 's'}" if faults else "all well"))
    return lines


def main(arguments: Sequence[str] | None = None, echo: Callable[[str], object] = print) -> int:
    """Run without click: the same flags, plain lines.

    Args:
        arguments: Without the command's name; None for the real ones.
        echo: Takes the lines.

    Returns:
        0 when all that was asked for works, else 1.
    """
    parser = argparse.ArgumentParser(prog="ppg-agent doctor", description=PURPOSE)
    for part in ("judge", "partner"):
        parser.add_argument(f"--{part}-url", action="append", default=[], metavar="URL")
        parser.add_argument(f"--{part}-model", metavar="NAME")
    parser.add_argument("--rollout-endpoints", action="append", default=[], metavar="URL")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--torch", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.torch:
        echo(json.dumps(torch_facts()))
        return 0
    asked = Asked(
        tuple(given.judge_url),
        given.judge_model,
        tuple(given.partner_url),
        given.partner_model,
        tuple(given.rollout_endpoints),
    )
    if wrong := asked.lacking():
        parser.error(wrong)
    report = examine(asked)
    if given.json:
        echo(json.dumps(report.to_dict(), allow_nan=False))
    else:
        for _, line in rows(report):
            echo(line)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
