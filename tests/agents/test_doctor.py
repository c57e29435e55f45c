"""``ppg-agent doctor``: it works where things are missing, names what is wrong with a server, and never shows a key."""

from __future__ import annotations

import http.server
import io
import json
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ppg_agents.commands.doctor import doctor as command
from ppg_agents.doctor import packages as doctor_packages
from ppg_agents.doctor import report as doctor
from ppg_agents.doctor import servers as doctor_servers
from ppg_agents.doctor.packages import Requirement, numbers, parse_requirement
from ppg_agents.doctor.servers import Asked, Named, ask, ask_all
from ppg_gym.domain.loading import DOMAINS
from ppg_gym.llm.cache import default_folder
from ppg_gym.llm.loopback import Loopback, Reply

ROOT = Path(__file__).resolve().parent.parent.parent
SECRET = "sk-very-secret-4711"
NOWHERE = "http://127.0.0.1:9/v1"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Import no torch, know no proxy, and keep to a folder of our own."""
    monkeypatch.setattr(doctor.Child, "__init__", lambda self: None)
    facts: dict[str, Any] = {"version": "2.13", "built_for": None, "cuda": [], "mps": False, "threads": 1}
    monkeypatch.setattr(doctor.Child, "facts", lambda self: facts)
    for name in doctor.PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


class VLLM(http.server.BaseHTTPRequestHandler):
    """Answers as vLLM 0.32 does: ``updating`` and ``lora`` say how it was started."""

    updating, lora = True, True

    def do_GET(self) -> None:
        listed = [
            {"id": "base", "owned_by": "vllm", "parent": None},
            {"id": "v1", "owned_by": "vllm", "parent": "base"},
        ]
        body: Any = {"version": "0.32.0"} if self.path == "/version" else {"data": listed}
        self.answer(200, body)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("/completions"):
            assert (body["model"], body["max_tokens"]) == ("base", 1)
            self.answer(200, {"choices": [{"text": "a"}]})
        elif not self.updating:
            self.answer(404, {"detail": "Not Found"})
        elif not body["lora_name"]:
            self.answer(400, {"error": {"message": "Both 'lora_name' and 'lora_path' must be provided."}})
        elif not self.lora:
            self.answer(500, {"error": {"message": "LoRA is not enabled. Use --enable-lora to enable LoRA."}})
        else:
            self.answer(404, {"error": {"message": f"The lora adapter '{body['lora_name']}' does not exist."}})

    def answer(self, status: int, body: Any) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def vllm() -> Iterator[str]:
    """Return the URL of a server that looks like vLLM."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), VLLM) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def by_name(report: doctor.Report) -> dict[str, doctor.Finding]:
    return {f"{finding.section}/{finding.name}": finding for finding in report.findings}


def test_all_is_well_here_and_the_json_is_the_same_as_the_lines() -> None:
    done = CliRunner().invoke(command, ["--json"], standalone_mode=False)
    found = json.loads(done.output)
    assert found["ok"]
    assert done.return_value == 0
    domains = next(one for one in found["findings"] if one["name"] == "domains")
    assert domains["details"]["works"] == list(DOMAINS)
    lines = CliRunner().invoke(command, [], standalone_mode=False).output.splitlines()
    assert lines[-1] == "all well"
    assert [line for line in lines if line.startswith("  ok     base") and "complete" in line]
    assert not any("\x1b" in line for line in lines)


def test_what_is_written_twice_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.embedded_domains() == DOMAINS
    assert doctor.cache_folder() == default_folder()
    monkeypatch.setattr("sys.stdout", shown := io.StringIO())
    with pytest.raises(SystemExit):
        doctor.main(["--help"])
    assert all(option in shown.getvalue() for parameter in command.params for option in parameter.opts)


def test_without_torch_and_the_extras_the_rest_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    light = {"gymnasium", "numpy"}
    original = metadata.version
    missing = metadata.PackageNotFoundError

    def version(name: str) -> str:
        if name not in (*light, "ppg-gym"):
            raise missing(name)
        return original(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(doctor, "Child", None)  # no process is started
    report = doctor.examine()
    found = by_name(report)
    assert report.ok, "nobody asked for an extra"
    assert found["extras/base"].value == "complete"
    assert "torch" in found["extras/[agents]"].value
    assert found["extras/[agents]"].todo == 'pip install "ppg-gym[agents]"'
    assert found["device/torch"].value == "not installed"
    asked = doctor.examine(Asked(judge_urls=(NOWHERE,), judge_model="m"))
    assert by_name(asked)["extras/[llm]"].status == "fault", "an endpoint needs it"


def test_plain_main_runs_where_click_and_torch_are_not(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['click'] = sys.modules['torch'] = None; "
        "from ppg_agents.doctor import report as doctor; "
        "doctor.Child = lambda: type('C', (), {'facts': lambda self: {'error': 'broken'}})(); "
        "code = doctor.main([]); print(code); heavy = {'numpy', 'rich', 'transformers'}; "
        "assert doctor.main(['--torch']) == 0"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "\n1\n" in done.stdout
    assert "  fault  torch           broken" in done.stdout
    assert "torch can not be imported: ModuleNotFoundError" in done.stdout.splitlines()[-1]


def test_importing_the_doctor_imports_the_standard_library_alone() -> None:
    code = (
        "import sys; before = set(sys.modules); import ppg_agents.doctor.report; new = {n.partition('.')[0] for n in "
        "set(sys.modules) - before}; sys.exit(str(new - set(sys.stdlib_module_names) - {'ppg_agents'} or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() in ("", "''"), done.stderr


@pytest.mark.parametrize(("kind", "flag"), [("judge", "--judge-url"), ("rollout", "--rollout-endpoints")])
def test_a_server_that_is_down_is_a_fault(kind: str, flag: str) -> None:
    done = CliRunner().invoke(command, [flag, NOWHERE], standalone_mode=False)
    assert done.return_value == 1
    assert f"fault  {kind} {NOWHERE}" in done.output
    assert "can not be reached: [Errno 111] Connection refused" in done.output
    assert "-> start the server, correct the URL" in done.output
    assert done.output.splitlines()[-1] == "1 fault"


def test_a_judge_that_serves_the_model_is_asked_for_one_token() -> None:
    with Loopback(lambda body: "yes", model=["small", "large"]) as server:
        good, wrong, unnamed = ask_all([Named("judge", server.url, name) for name in ("large", "smal", None)])
    assert good.status == "ok"
    assert good.value.startswith("serves small, large; one token took ")
    assert good.details["models"] == ["small", "large"]
    assert good.details["seconds"] > 0
    assert [request["max_tokens"] for request in server.requests] == [1]
    assert (wrong.status, wrong.todo) == ("fault", "did you mean 'small'?")
    assert (unnamed.status, unnamed.todo) == ("note", "name a model: --judge-model small")


@pytest.mark.parametrize(
    ("updating", "lora", "status", "said"),
    [
        (True, True, "ok", "serves base, v1; vLLM 0.32.0; takes LoRA adapters; one token took"),
        (True, False, "fault", "LoRA is not enabled"),
        (False, True, "fault", "adapters can not be loaded while it runs"),
    ],
)
def test_a_rollout_server_must_take_adapters(
    updating: bool, lora: bool, status: str, said: str, vllm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VLLM, "updating", updating)
    monkeypatch.setattr(VLLM, "lora", lora)
    monkeypatch.setenv("http_proxy", NOWHERE)  # rollouts do not go through a proxy
    for url in (vllm, f"{vllm}/v1", f"{vllm}/v1/"):
        server = ask(Named("rollout", url))
        assert server.status == status, server
        assert said in server.value
        assert ("VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in server.todo) is (status == "fault")
        assert server.details["lora"] == {"updating": updating, "enabled": updating and lora}


def test_a_rollout_server_that_is_not_vllm_is_a_fault() -> None:
    with Loopback(lambda body: "yes") as server:
        found = ask(Named("rollout", server.url))
    assert found.status == "fault"
    assert "expected a vLLM server, got another one" in found.value


def test_a_judge_is_asked_through_the_proxy_as_the_client_does(vllm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", NOWHERE)
    assert "can not be reached" in ask(Named("judge", f"{vllm}/v1", "base")).value
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert "serves base" in ask(Named("judge", f"{vllm}/v1", "base")).value


def test_no_key_and_no_proxy_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in doctor.KEYS:
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("https_proxy", f"http://me:{SECRET}@proxy:1")

    def answer(body: dict[str, Any]) -> Reply:
        return Reply(400, f"the key {SECRET} is fine, the rest is not\n\x1b[31m")

    with Loopback(answer, key=SECRET) as server, Loopback(lambda body: "", key="another") as strict:
        urls = (server.url, strict.url, f"http://me:{SECRET}@127.0.0.1/v1", f"http://127.0.0.1/v1?key={SECRET}")
        asked = Asked(urls, "loopback")
        report = doctor.examine(asked)
    text = json.dumps(report.to_dict()) + "\n".join(line for _, line in doctor.rows(report))
    assert SECRET not in text
    assert "\x1b" not in text
    servers = [one for one in report.findings if one.section == "servers"]
    assert "the key [key] is fine" in servers[0].value
    assert servers[1].value == "refused the key (status 401); OPENAI_API_KEY is set"
    assert [one.name for one in servers[2:]] == ["judge (URL not repeated)"] * 2
    keys = by_name(report)["environment/keys"].details
    assert keys == dict.fromkeys(doctor.KEYS, True)
    assert by_name(report)["environment/proxies"].details["https_proxy"] is True


@pytest.mark.parametrize(
    ("end", "what"),
    [("\r", "a line break"), ("\n", "a line break"), ("\x1b", "a control character"), ("…", "a character that no")],
)
def test_a_key_that_no_header_can_hold_is_said_and_not_shown(
    end: str, what: str, vllm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, name in (("judge", "OPENAI_API_KEY"), ("rollout", "VLLM_API_KEY")):
        monkeypatch.setenv(name, SECRET + end)
        found = ask(Named(kind, f"{vllm}/v1", "base"))  # type: ignore[arg-type]
        assert found.status == "fault"
        assert found.value.startswith(f"the key in {name} holds {what}")
        assert SECRET not in repr(found)


@pytest.mark.parametrize("key", [f" {SECRET} ", "sk-'\"\\-4711"])
def test_a_key_that_is_sent_back_is_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(said: str, body: dict[str, Any]) -> Reply:
        return Reply(400, f"no key {said} here")

    monkeypatch.setenv("OPENAI_API_KEY", key)
    for said in (key.strip(), repr(key.strip()), json.dumps(key.strip())):
        with Loopback(partial(refuse, said)) as server:
            value = ask(Named("judge", server.url, "loopback")).value
        assert "[key]" in value
        assert "4711" not in value


@pytest.mark.parametrize(
    "proxy", [f"http:/user:{SECRET}@proxy:3128", f"http://user:{SECRET}", f"http://me:{SECRET}\n@127.0.0.1:x"]
)
@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY"])
def test_a_proxy_that_can_not_be_read_is_named_and_not_shown(
    proxy: str, name: str, vllm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, proxy)
    found = ask(Named("judge", f"{vllm}/v1", "base"))
    assert (found.status, found.value) == ("fault", f"can not be reached: the proxy URL in {name} can not be read")
    assert name in found.todo
    assert SECRET not in repr(found)
    assert ask(Named("rollout", vllm)).status == "ok", "it is asked past the proxy"
    monkeypatch.delenv(name)
    assert ask(Named("judge", "http://127.0.0.1:9/a b/v1", "base")).value.endswith(": the URL can not be read")


@pytest.mark.parametrize("listed", [["model-id"], "id", {"id": 1}, [None, ["id"]], 3])
def test_a_list_of_models_that_is_none_is_passed_over(
    listed: Any, vllm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VLLM, "do_GET", lambda self: self.answer(200, {"data": listed}))
    judge, rollout = ask_all([Named("judge", f"{vllm}/v1", "base"), Named("rollout", vllm)])
    assert (judge.status, judge.details["models"]) == ("ok", []), judge
    assert (rollout.status, rollout.value[:17]) == ("fault", "no list of models")


def test_what_nobody_expects_is_a_finding_without_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise AttributeError(SECRET)

    monkeypatch.setattr(doctor_servers, "models", fail)
    (found,) = ask_all([Named("judge", NOWHERE, "m")])
    assert (found.status, found.value) == ("fault", "can not be asked: AttributeError")


def test_nothing_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_servers, "LIMIT", 0.1)
    monkeypatch.setattr(doctor_servers, "ALL", 0.4)
    began = time.monotonic()
    with (
        Loopback(lambda body: Reply(text="late", hang=2.0)) as silent,
        Loopback(lambda body: Reply(text="x" * 500, drip=0.05)) as drips,
    ):
        found = ask_all([Named("judge", silent.url, "loopback"), Named("partner", drips.url, "loopback")])
    assert time.monotonic() - began < 2
    assert [one.status for one in found] == ["fault", "fault"]
    assert found[0].value.startswith("no answer within")
    assert found[1].value.startswith("no whole answer within")


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "http:///v1", "http://host:none/v1", ""])
def test_a_url_that_is_none_is_a_fault(url: str) -> None:
    found = ask(Named("judge", url, "m"))
    assert (found.status, found.todo) == ("fault", "give one such as http://localhost:8000/v1")


def test_requirements_are_read_as_the_metadata_writes_them() -> None:
    line = "openai[aiohttp]>=3.50; extra == 'llm'"
    assert parse_requirement(line) == ("openai", Requirement("openai", "3.50", ("aiohttp",)), "llm")
    assert parse_requirement("numpy>=2.0") == ("numpy", Requirement("numpy", "2.0"), "")
    assert numbers("2.13.0+cpu") == numbers("2.13") > numbers("2.7")
    found = {"torch": "2.1.0", "numpy": None}
    assert doctor_packages.lacking(Requirement("torch", "2.7"), found) == ["torch 2.1.0 (2.7 or newer is needed)"]
    assert doctor_packages.lacking(Requirement("numpy"), found) == ["numpy"]
    own = doctor_packages.requirements()
    assert {"", "agents", "llm", "nli", "sb3", "vllm"} <= set(own)
    assert Requirement("openai", "3.50", ("aiohttp",)) in own["llm"]


def test_without_an_installed_distribution_the_sources_say_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    monkeypatch.setattr(metadata, "requires", gone)
    found = doctor_packages.requirements()
    assert {extra: len(several) for extra, several in found.items()} == {
        "": len(project["dependencies"]),
        **{extra: len(lines) for extra, lines in project["optional-dependencies"].items()},
    }
    assert Requirement("openai", "3.50", ("aiohttp",)) in found["llm"]


def test_a_folder_that_can_not_be_written_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    found = {finding.name: finding for finding in doctor.disk()}
    assert (found["current folder"].status, found["answers"].status) == ("fault", "note")
    assert "can not be written (Permission denied)" in found["current folder"].value
