"""What a bug report needs and a newcomer asks: what is installed, what would be used, which servers answer.

Imports the standard library alone, so that it works where nothing else does: versions come from the packages'
metadata, and torch is imported by a child process, which may crash or hang. No key and no proxy is ever shown.
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
"""How long torch may take to be imported and to look for devices."""
VARIABLES = (
    *("OPENAI_API_KEY", "VLLM_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "http_proxy", "https_proxy", "all_proxy"),
    *("no_proxy", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE"),
)


@dataclass(frozen=True)
class Finding:
    """What was looked at, under which heading, what was seen, and what to do about it ("" for nothing).

    A note is due for what is missing and nobody asked for, a fault for what was asked for and does not work.
    """

    section: str
    name: str
    status: Status
    value: str
    todo: str = ""


def examine(servers: Sequence[Server] = ()) -> list[Finding]:
    """Look at everything, and ask the servers; of variables, only whether they are set."""
    known = [name for name in VARIABLES if os.environ.get(name) or os.environ.get(name.upper())]
    variables = Finding("environment", "variables set", "ok", ", ".join(known) or "none of those that matter here")
    with ThreadPoolExecutor(max(1, len(servers))) as pool:
        answers = pool.map(ask, servers)  # while torch is imported
        findings = [*versions(), *extras(servers), *devices(), *embedded(), *folders(), variables]
        for server, answer in zip(servers, answers, strict=True):
            where = server.url if server.plain else "(URL not repeated)"
            findings.append(Finding("servers", f"{server.kind} {where}", *answer))
    return findings


def versions() -> Iterator[Finding]:
    """Yield the versions of everything."""
    own = version_of(DISTRIBUTION)
    todo = "" if own else "install it to have all commands: pip install -e '.[agents]'"
    yield Finding("versions", DISTRIBUTION, "ok" if own else "note", own or "runs from its sources", todo)
    yield Finding("versions", "Python", "ok", f"{platform.python_version()} on {platform.platform()}")
    names = sorted({name for needed in requirements().values() for name in needed})
    installed = [f"{name} {version}" for name in names if (version := version_of(name))]
    yield Finding("versions", "packages", "ok", ", ".join(installed) or "none")


def extras(servers: Sequence[Server]) -> Iterator[Finding]:
    """Yield for the base and every extra what it lacks: a fault in the base, and in what a named server needs."""
    asked = {""} | ({"llm"} if servers else set())
    asked |= {"agents"} if any(server.kind == "rollout" for server in servers) else set()
    for extra, needed in requirements().items():
        lacks, name = lacking(needed), f"{DISTRIBUTION}[{extra}]" if extra else DISTRIBUTION
        status: Status = "ok" if not lacks else "fault" if extra in asked else "note"
        value = f"lacks {', '.join(lacks)}" if lacks else "complete"
        yield Finding("extras", extra or "base", status, value, f'pip install "{name}"' if lacks else "")


def devices() -> Iterator[Finding]:
    """Yield what there is to compute with, and what a run would use of it."""
    if not version_of("torch"):
        yield Finding("device", "torch", "note", "not installed", f'pip install "{DISTRIBUTION}[agents]"')
        return
    torch, todo = torch_facts(), "install a torch that suits this machine: https://pytorch.org/get-started"
    if "error" in torch:
        yield Finding("device", "torch", "fault", torch["error"], todo)
        return
    unused = not torch["cards"] and shutil.which("nvidia-smi") is not None  # a driver, and a torch without CUDA
    built = f"built for {'CUDA ' + torch['cuda'] if torch['cuda'] else 'the CPU alone'}"
    value = "; ".join([built, *torch["cards"], f"{os.cpu_count()} cores, {torch['threads']} used by torch"])
    yield Finding("device", "torch", "note" if unused else "ok", value, todo if unused else "")
    yield Finding("device", "would use", "ok", "cuda, bfloat16" if torch["cards"] else "cpu, float32")


def torch_facts() -> dict[str, Any]:
    """Return what torch sees, asked in a child process; or ``{"error": …}``."""
    code = "import json, torch; print(json.dumps({'cuda': torch.version.cuda, 'threads': torch.get_num_threads(), "
    code += "'cards': [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}))"
    try:
        command = [sys.executable, "-P", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"importing torch took more than {IMPORT_SECONDS:.0f} s"}
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    last = (done.stderr.strip().splitlines() or [""])[-1][:200]
    return {"error": f"importing torch ended with exit code {done.returncode}: {last}"}


def embedded() -> Iterator[Finding]:
    """Yield whether the embedded model is there, and whether a turn can be played in every embedded domain."""
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
    except Exception as error:  # whatever it is, it belongs in the report
        yield Finding("embedded", "domains", "fault", f"{type(error).__name__}: {error}", todo)


def cache_folder() -> Path:
    """Return where the answers of servers are kept by default, as ``ppg_gym.llm.cache`` does."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    usual = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return (Path(given) if os.path.isabs(given) else usual) / "ppg-gym" / "answers"


def folders() -> Iterator[Finding]:
    """Yield where files would go: whether a file can be written there, and how much room there is."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hub = Path(os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")).expanduser()
    for name, folder, todo in (
        ("current folder", Path.cwd(), "work in a folder of yours"),
        ("answers", cache_folder(), "set XDG_CACHE_HOME to a folder of yours, or use --no-cache"),
        ("models", hub, "set HF_HOME to a folder of yours"),
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
    """Yield the findings as aligned lines under headings, what to do below each, and how many faults there are."""
    table = aligned([(f"  {one.status}", one.name, one.value) for one in findings])
    section = ""
    for one, line in zip(findings, table, strict=True):
        if one.section != section:
            yield (section := one.section)
        yield "".join(sign if sign.isprintable() else " " for sign in line)
        if one.todo:
            yield f"         -> {one.todo}"
    faults = sum(one.status == "fault" for one in findings)
    yield f"{faults} fault{'' if faults == 1 else 's'}" if faults else "all well"


def run(flags: Mapping[str, Any], echo: Callable[[str], object] = print) -> int:
    """Examine everything and show it; return the exit code, 1 with a fault."""
    servers = [
        *(Server("judge", url, flags["judge_model"]) for url in flags["judge_url"]),
        *(Server("partner", url, flags["partner_model"]) for url in flags["partner_url"]),
        *(Server("rollout", url) for url in flags["rollout_endpoints"]),
    ]
    findings = examine(servers)
    ok = all(one.status != "fault" for one in findings)
    record = {"ok": ok, "findings": [asdict(one) for one in findings]}
    for line in [json.dumps(record)] if flags["as_json"] else lines(findings):
        echo(line)
    return 0 if ok else 1


def main(arguments: Sequence[str]) -> int:
    """Run where click is missing: the same flags."""
    parser = argparse.ArgumentParser(prog="ppg-agent doctor")
    for flag in ("--judge-url", "--partner-url", "--rollout-endpoints"):
        parser.add_argument(flag, action="append", default=[], metavar="URL")
    for flag in ("--judge-model", "--partner-model"):
        parser.add_argument(flag, metavar="NAME")
    parser.add_argument("--json", action="store_true", dest="as_json")
    return run(vars(parser.parse_args(arguments)))
