"""For bug reports and newcomers: what is installed, what would be used, which servers answer.

Imports only the standard library, so it works when nothing else does: versions come from the packages' metadata, and a
child process, which may crash or hang, imports torch. Keys and proxies are never shown.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ppg_agents.doctor.packages import DISTRIBUTION, lacking, requirements, version_of
from ppg_agents.doctor.servers import Server, Status, ask
from ppg_agents.terminal.table import aligned

IMPORT_SECONDS = 60.0
"""Time limit for importing torch and looking for devices."""
VARIABLES = (
    *("OPENAI_API_KEY", "VLLM_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "http_proxy", "https_proxy", "all_proxy"),
    *("no_proxy", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE"),
)


@dataclass(frozen=True)
class Finding:
    """One check: its heading, its subject, the result, and what to do about it ("" for nothing).

    A note: something is missing that nobody asked for. A fault: something asked for does not work.
    """

    section: str
    name: str
    status: Status
    value: str
    todo: str = ""


def examine(servers: Sequence[Server] = ()) -> list[Finding]:
    """Check everything, and ask the servers; for variables, report only whether they are set."""
    names = [name for name in VARIABLES if os.environ.get(name) or os.environ.get(name.upper())]
    variables = Finding("environment", "variables set", "ok", ", ".join(names) or "none that matter here")
    with ThreadPoolExecutor(max(1, len(servers))) as pool:
        answers = pool.map(ask, servers)  # while torch is imported
        findings = [*versions(), *extras(servers), *devices(), *embedded(), *folders(), variables]
        for server, answer in zip(servers, answers, strict=True):
            where = server.url if server.plain else "(URL not shown)"
            findings.append(Finding("servers", f"{server.kind} {where}", *answer))
    return findings


def versions() -> Iterator[Finding]:
    """Yield the versions of everything."""
    version = version_of(DISTRIBUTION)
    todo = "" if version else "install it to get all commands: pip install -e '.[agents]'"
    yield Finding("versions", DISTRIBUTION, "ok" if version else "note", version or "runs from source", todo)
    yield Finding("versions", "Python", "ok", f"{platform.python_version()} on {platform.platform()}")
    names = sorted({name for needed in requirements().values() for name in needed})
    installed = [f"{name} {found}" for name in names if (found := version_of(name))]
    yield Finding("versions", "packages", "ok", ", ".join(installed) or "none")


def extras(servers: Sequence[Server]) -> Iterator[Finding]:
    """Yield what the base and each extra lack: a fault in the base and in what a named server needs."""
    needed_extras = {""} | ({"llm"} if servers else set())
    needed_extras |= {"agents"} if any(server.kind == "rollout" for server in servers) else set()
    for extra, needed in requirements().items():
        missing, name = lacking(needed), f"{DISTRIBUTION}[{extra}]" if extra else DISTRIBUTION
        status: Status = "ok" if not missing else "fault" if extra in needed_extras else "note"
        value = f"lacks {', '.join(missing)}" if missing else "complete"
        yield Finding("extras", extra or "base", status, value, f'pip install "{name}"' if missing else "")


def devices() -> Iterator[Finding]:
    """Yield the hardware torch can use, and what a run would use."""
    if not version_of("torch"):
        yield Finding("device", "torch", "note", "not installed", f'pip install "{DISTRIBUTION}[agents]"')
        return
    torch, todo = torch_facts(), "install a torch that suits this machine: https://pytorch.org/get-started"
    if "error" in torch:
        yield Finding("device", "torch", "fault", torch["error"], todo)
        return
    unused = not torch["cards"] and shutil.which("nvidia-smi") is not None  # there is a driver, but torch has no CUDA
    built = f"built for {'CUDA ' + torch['cuda'] if torch['cuda'] else 'CPU only'}"
    value = "; ".join([built, *torch["cards"], f"{os.cpu_count()} cores, {torch['threads']} used by torch"])
    yield Finding("device", "torch", "note" if unused else "ok", value, todo if unused else "")
    yield Finding("device", "would use", "ok", "cuda, bfloat16" if torch["cards"] else "cpu, float32")


def torch_facts() -> dict[str, Any]:
    """Return what torch sees, from a child process; or ``{"error": …}``."""
    code = "import json, torch; print(json.dumps({'cuda': torch.version.cuda, 'threads': torch.get_num_threads(), "
    code += "'cards': [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}))"
    try:
        command = [sys.executable, "-P", "-c", code]
        process = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"importing torch took more than {IMPORT_SECONDS:.0f} s"}
    if process.returncode == 0:
        return dict(json.loads(process.stdout.splitlines()[-1]))
    last_line = (process.stderr.strip().splitlines() or [""])[-1][:200]
    return {"error": f"importing torch ended with exit code {process.returncode}: {last_line}"}


def embedded() -> Iterator[Finding]:
    """Yield whether the embedded model is present, and whether a turn can be played in each embedded domain."""
    todo = f"install the package: pip install {DISTRIBUTION}, or in its source tree: pip install -e ."
    folder = Path(__file__).resolve().parents[1] / "models" / "tiny"
    missing = [name for name in ("config.json", "tokenizer.json", "model.safetensors") if not (folder / name).is_file()]
    value = f"lacks {', '.join(missing)}" if missing else "there"
    yield Finding("embedded", "model", "fault" if missing else "ok", value, todo if missing else "")
    try:
        import gymnasium as gym

        import ppg_gym

        for domain in ppg_gym.DOMAINS:
            env = gym.make("PersonaChat-v0", domain=domain)
            env.reset(seed=0)
            env.step("Hello.")
            env.close()
        yield Finding("embedded", "domains", "ok", ", ".join(ppg_gym.DOMAINS))
    except Exception as error:  # any error belongs in the report
        yield Finding("embedded", "domains", "fault", f"{type(error).__name__}: {error}", todo)


def cache_folder() -> Path:
    """Return the default cache folder for servers' answers, the same as ``ppg_gym.llm.cache``."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    default = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return (Path(configured) if os.path.isabs(configured) else default) / "ppg-gym" / "answers"


def folders() -> Iterator[Finding]:
    """Yield where files would go, whether a file can be written there, and the free space."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hub = Path(os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")).expanduser()
    for name, folder, todo in (
        ("current folder", Path.cwd(), "work in a folder you own"),
        ("answers", cache_folder(), "set XDG_CACHE_HOME to a folder you own, or use --no-cache"),
        ("models", hub, "set HF_HOME to a folder you own"),
    ):
        shown = str(folder).replace(str(Path.home()), "~", 1)
        nearest = next(place for place in (folder, *folder.parents) if os.path.exists(place))
        try:
            with tempfile.TemporaryFile(dir=nearest):
                free = shutil.disk_usage(nearest).free / 2**30
            yield Finding("folders", name, "ok", f"{shown}: {free:.1f} GiB free")
        except OSError as error:
            status: Status = "fault" if name == "current folder" else "note"
            yield Finding("folders", name, status, f"{shown}: cannot be written ({error.strerror})", todo)


def lines(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield the findings as aligned lines under headings, each with what to do, then the number of faults."""
    table = aligned([(f"  {finding.status}", finding.name, finding.value) for finding in findings])
    section = ""
    for finding, line in zip(findings, table, strict=True):
        if finding.section != section:
            yield (section := finding.section)
        yield "".join(sign if sign.isprintable() else " " for sign in line)
        if finding.todo:
            yield f"         -> {finding.todo}"
    faults = sum(finding.status == "fault" for finding in findings)
    yield f"{faults} fault{'' if faults == 1 else 's'}" if faults else "all well"


def run(flags: Mapping[str, Any], echo: Callable[[str], object] = print) -> int:
    """Check everything and show the findings; return the exit code, 1 if there is a fault."""
    servers = [
        *(Server("judge", url, flags["judge_model"]) for url in flags["judge_url"]),
        *(Server("partner", url, flags["partner_model"]) for url in flags["partner_url"]),
        *(Server("rollout", url) for url in flags["rollout_endpoints"]),
    ]
    findings = examine(servers)
    ok = all(finding.status != "fault" for finding in findings)
    record = {"ok": ok, "findings": [asdict(finding) for finding in findings]}
    for line in [json.dumps(record)] if flags["as_json"] else lines(findings):
        echo(line)
    return 0 if ok else 1


def main(arguments: Sequence[str]) -> int:
    """Run without click, with the same flags."""
    parser = argparse.ArgumentParser(prog="ppg-agent doctor")
    for flag in ("--judge-url", "--partner-url", "--rollout-endpoints"):
        parser.add_argument(flag, action="append", default=[], metavar="URL")
    for flag in ("--judge-model", "--partner-model"):
        parser.add_argument(flag, metavar="NAME")
    parser.add_argument("--json", action="store_true", dest="as_json")
    return run(vars(parser.parse_args(arguments)))
