"""``ppg-agent doctor``: it works where things are missing, names what is wrong with a server, and never shows a key."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ppg_agents.commands.doctor import doctor as command
from ppg_agents.doctor import packages, report, servers
from ppg_agents.doctor.report import Finding, examine
from ppg_agents.doctor.servers import Server, ask
from ppg_gym.domain.loading import DOMAINS
from ppg_gym.llm.cache import default_folder
from ppg_gym.llm.loopback import Loopback, Reply

SECRET = "sk-very-secret-4711"
NOWHERE = "http://127.0.0.1:9/v1"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Import no torch, know no proxy, and keep to a folder of our own."""
    monkeypatch.setattr(report, "torch_facts", lambda: {"cuda": None, "cards": [], "threads": 1})
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {f"{finding.section}/{finding.name}": finding for finding in findings}


def test_all_is_well_here_and_the_json_is_the_same_as_the_lines() -> None:
    done = CliRunner().invoke(command, ["--json"], standalone_mode=False)
    record = json.loads(done.output)
    assert record["ok"]
    assert done.return_value == 0
    assert [one["value"] for one in record["findings"] if one["name"] == "domains"] == [", ".join(DOMAINS)]
    lines = CliRunner().invoke(command, [], standalone_mode=False).output.splitlines()
    assert lines[-1] == "all well"
    assert [line for line in lines if line.startswith("  ok    base") and line.endswith(" complete")]


def test_the_folder_of_answers_is_that_of_the_environment() -> None:
    assert report.cache_folder() == default_folder()


def test_without_torch_and_the_extras_the_rest_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    original = packages.version_of
    light = ("gymnasium", "numpy", "ppg-gym")
    for module in (packages, report):
        monkeypatch.setattr(module, "version_of", lambda name: original(name) if name in light else None)
    found = by_name(examine())
    assert not [finding for finding in found.values() if finding.status == "fault"], "nobody asked for an extra"
    assert found["extras/base"].value == "complete"
    assert "torch" in found["extras/agents"].value
    assert found["extras/agents"].todo == 'pip install "ppg-gym[agents]"'
    assert found["device/torch"].value == "not installed"
    asked = by_name(examine([Server("judge", NOWHERE, "m")]))
    assert asked["extras/llm"].status == "fault", "an endpoint needs it"


def test_the_plain_program_runs_where_click_and_torch_are_broken(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('broken')")
    code = f"""
import sys
sys.modules["click"] = None
before = set(sys.modules)
from ppg_agents.doctor import report
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
assert new <= {{"ppg_agents", *sys.stdlib_module_names}}, new
report.os.environ["PYTHONPATH"] = {str(tmp_path)!r}
print(report.main([]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n1 fault\n1\n")
    assert "  fault  torch           importing torch ended with exit code 1: OSError: broken" in done.stdout


@pytest.mark.parametrize(("kind", "flag"), [("judge", "--judge-url"), ("rollout", "--rollout-endpoints")])
def test_a_server_that_is_down_is_a_fault(kind: str, flag: str) -> None:
    done = CliRunner().invoke(command, [flag, NOWHERE], standalone_mode=False)
    assert done.return_value == 1
    assert f"fault  {kind} {NOWHERE}" in done.output
    assert "cannot be reached: Connection refused" in done.output
    assert "-> start the server, correct the URL" in done.output
    assert done.output.splitlines()[-1] == "1 fault"


def test_a_server_is_asked_for_its_models() -> None:
    with Loopback(lambda body: "yes", model=["small", "large"]) as server:
        good, wrong, unnamed = (ask(Server("judge", server.url, name)) for name in ("large", "smal", None))
        rollout = ask(Server("rollout", server.url))
        page = ask(Server("judge", server.url.removesuffix("/v1"), "large"))
        assert not server.requests, "no tokens are asked for"
    assert good == ("ok", "serves small, large", "")
    assert (wrong[0], wrong[1]) == ("fault", "serves small, large; expected 'smal'; did you mean 'small'?")
    assert (unnamed[0], unnamed[2]) == ("note", "name the model: --judge-model small")
    assert (rollout[0], rollout[1]) == ("fault", "serves small, large; expected vLLM, got another server")
    assert (page[0], page[1].rpartition(": ")[2]) == ("fault", "status 404")


def test_a_rollout_server_is_vllm_and_is_asked_past_the_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def models(url: str, key: str, *, proxies: bool) -> list[dict[str, Any]]:
        asked.append((url, key, proxies))
        return [{"id": "base", "owned_by": "vllm"}]

    monkeypatch.setattr(servers, "_models", models)
    monkeypatch.setenv("VLLM_API_KEY", "k")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for url in ("http://gpu", "http://gpu/v1/"):
        assert ask(Server("rollout", url)) == ("ok", "serves base", "")
    assert ask(Server("judge", "http://gpu/v1/", "base"))[0] == "ok"
    assert asked == [("http://gpu/v1", "k", False)] * 2 + [("http://gpu/v1", "", True)]


def test_no_key_and_no_proxy_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "VLLM_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, f"{SECRET}\n")  # which no header takes
    with Loopback(lambda body: Reply(400, SECRET), key="another") as server:
        unsendable = ask(Server("judge", server.url, "m"))
        monkeypatch.setenv("OPENAI_API_KEY", SECRET)
        refused = ask(Server("judge", server.url, "m"))
        monkeypatch.setenv("http_proxy", f"http:/me:{SECRET}@proxy:1")
        urls = (server.url, f"http://me:{SECRET}@127.0.0.1/v1", f"http://127.0.0.1/v1?key={SECRET}")
        findings = examine([Server("judge", url, "m") for url in urls])
    assert unsendable[1].endswith("no list of models (ValueError)")
    assert (refused[1].rpartition(": ")[2], refused[2]) == ("status 401", "set OPENAI_API_KEY to its key")
    assert {one.status for one in findings if one.section == "servers"} == {"fault"}
    assert [one.name for one in findings][-2:] == ["judge (URL not shown)"] * 2
    assert SECRET not in repr((unsendable, refused, findings))
    assert "OPENAI_API_KEY" in by_name(findings)["environment/variables set"].value


@pytest.mark.parametrize("listed", ["<html>", {"data": ["base"]}, {"data": 3}, []])
def test_an_answer_that_is_no_list_of_models_is_a_fault(listed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers.json, "loads", lambda text: listed)
    with Loopback(lambda body: "yes") as server:
        status, value, _ = ask(Server("judge", server.url, "m"))
    assert (status, "no list of models" in value) == ("fault", True)


def test_a_server_that_keeps_silent_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "LIMIT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        assert ask(Server("judge", url, "m"))[1] == "no answer within 0 s"


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "http:///v1", "http://a:b/v1", "http://[", ""])
def test_a_url_that_is_none_is_a_fault(url: str) -> None:
    assert ask(Server("judge", url, "m"))[0] == "fault"


def test_requirements_are_read_as_the_metadata_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["numpy>=2.0", "openai[aiohttp]>=3.50; extra == 'llm'", 'torch<3,>=2.7; extra == "llm"', "click"]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    assert packages.requirements() == {"": {"numpy": "2.0", "click": ""}, "llm": {"openai": "3.50", "torch": "2.7"}}
    versions = {"torch": "2.10.0+cpu", "click": "8"}
    monkeypatch.setattr(packages, "version_of", versions.get)
    assert packages.lacking({"torch": "2.7", "click": "", "numpy": "2"}) == ["numpy"]
    assert packages.lacking({"torch": "2.11"}) == ["torch 2.10.0+cpu (2.11 or newer is needed)"]


def test_a_folder_that_can_not_be_written_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    found = {finding.name: finding for finding in report.folders()}
    assert (found["current folder"].status, found["answers"].status) == ("fault", "note")
    assert "cannot be written (Permission denied)" in found["current folder"].value
