"""Sampling with vLLM servers, played by one that speaks their protocol; and which sampler a run's settings name."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web

from ppg_agents.config import SamplingSettings
from ppg_agents.generation import GenerationError, make_sampler
from ppg_agents.generation.endpoints import ServerRefusedError, ServersGoneError
from ppg_agents.generation.hf import HFSampler
from ppg_agents.generation.servers import VLLMServerSampler
from ppg_agents.policy import Policy


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (length,), generator=generator(seed)).tolist()


class FakeServer:
    """Speaks vLLM's protocol: loads adapters, gives the policy's own first log-probs and made-up replies."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.raw, self.short = policy, False, False
        self.listed: tuple[int, str] | None = None  # status and text in place of the list of models
        self.adapters: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.hold, self.dropped = False, threading.Event()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.port = 0
        self.run(self.begin())
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    async def begin(self) -> None:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/load_lora_adapter", self.load)
        app.router.add_post("/v1/unload_lora_adapter", self.unload)
        app.router.add_post("/v1/completions", self.complete)
        self.runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    async def end(self) -> None:
        await self.runner.cleanup()
        await asyncio.sleep(0.01)  # transports close in the loop's next rounds: one that stopped first would leave them

    def stop(self) -> None:
        self.run(self.end())
        self.adapters.clear()

    def close(self) -> None:
        self.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def models(self, _: web.Request) -> web.Response:
        if self.listed is not None:
            return web.Response(status=self.listed[0], text=self.listed[1], content_type="text/html")
        return web.json_response({"data": [{"id": "base", "max_model_len": 300, "parent": None}]})

    async def load(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert (Path(body["lora_path"]) / "adapter_model.safetensors").is_file()
        self.adapters.append(body["lora_name"])
        return web.Response(text="Success")

    async def unload(self, request: web.Request) -> web.Response:
        self.adapters.remove((await request.json())["lora_name"])
        return web.Response(text="Success")

    async def complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["model"] not in self.adapters:
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        if body["logprobs"]:
            temperature = 1.0 if self.raw else body["temperature"]
            with torch.no_grad():
                logits = self.policy.model(input_ids=torch.tensor([body["prompt"]])).logits[0, -1]
            top = (logits / temperature).log_softmax(-1).topk(body["logprobs"])
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            scores: dict[str, Any] = {"top_logprobs": [{f"token_id:{i}": p for i, p in pairs}]}
            choice = {"token_ids": [0], "logprobs": scores}
            return web.json_response({"model": body["model"], "choices": [choice]})
        self.asked.append(body)
        if self.hold:
            try:
                await asyncio.sleep(30)
            finally:
                self.dropped.set()
        tokens = [97 + (sum(body["prompt"]) + (body["seed"] or 0) + k) % 26 for k in range(3)]
        tokens += [] if self.short else [self.policy.end_of_turn_id]
        choice = {
            "token_ids": tokens,
            "prompt_token_ids": body["prompt"],
            "logprobs": {"token_logprobs": [-0.5] * len(tokens)},
        }
        return web.json_response({"model": body["model"], "choices": [choice]})


@pytest.fixture
def servers(policy: Policy) -> Iterator[list[FakeServer]]:
    running = [FakeServer(policy) for _ in range(2)]
    yield running
    for server in running:
        server.close()


@pytest.fixture
def connect(policy: Policy, servers: list[FakeServer], tmp_path: Path) -> Iterator[Callable[..., VLLMServerSampler]]:
    made = []

    def make(*which: FakeServer, **options: Any) -> VLLMServerSampler:
        urls = [server.url for server in which or servers]
        options = {"max_new_tokens": 8, "patience": 5.0, "timeout": 10.0, **options}
        sampler = VLLMServerSampler(policy, tmp_path / "versions", urls, **options)
        made.append(sampler)
        return sampler

    yield make
    for sampler in made:
        sampler.close()


def test_servers_get_whole_conversations_and_every_setting_that_changes_the_distribution(
    policy: Policy, servers: list[FakeServer], connect: Callable[..., VLLMServerSampler]
) -> None:
    sampler = connect(temperature=1.3)
    sampler.sync(policy)
    assert sampler.context_length == 300
    sampler.start(5)
    random = generator()
    first = sampler.reply([prompt(4, i) for i in range(5)], random)
    second = sampler.reply([[7], [7], None, [7], [7]], random)
    assert [s is None for s in second] == [False, False, True, False, False]
    homes = [{body["prompt"][0] for body in server.asked} for server in servers]
    assert [len(server.asked) for server in servers] == [5, 4]  # conversations 0, 2, 4 and 1, 3
    assert not homes[0] & homes[1]
    assert first[0] is not None
    assert [*prompt(4, 0), *first[0].token_ids, 7] in [body["prompt"] for body in servers[0].asked]
    for body in (body for server in servers for body in server.asked):
        neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0}
        assert neutral.items() <= body.items()
        assert (body["temperature"], body["max_tokens"], body["frequency_penalty"]) == (1.3, 8, 0.0)
        assert (body["stop_token_ids"], body["ignore_eos"]) == ([policy.end_of_turn_id], True)
        assert body["model"] == servers[0].adapters[0]  # never the base model
    assert len({body["seed"] for server in servers for body in server.asked}) == 9
    sample = second[0]
    assert sample is not None
    assert (sample.policy_version, sample.temperature, sample.sampler, sample.ended) == (0, 1.3, "vllm", True)


def test_every_version_has_a_name_and_a_path_of_its_own(
    policy: Policy, servers: list[FakeServer], connect: Callable[..., VLLMServerSampler], tmp_path: Path
) -> None:
    sampler = connect()
    sampler.start(1)
    with pytest.raises(RuntimeError, match="version 0, got none; call sync"):
        sampler.reply([[65]], generator())
    names = []
    for version in range(3):
        policy.version = version
        with torch.no_grad():
            policy.parameters()[0].add_(0.01)
        if version:
            with pytest.raises(RuntimeError, match=f"version {version}, got version {version - 1}"):
                sampler.reply([[65]], generator())
        sampler.sync(policy)
        sampler.sync(policy)  # nothing has changed
        assert [server.adapters for server in servers] == [servers[0].adapters] * 2
        (name,) = servers[0].adapters
        names.append(name)
        assert [path.name for path in (tmp_path / "versions").iterdir()] == [name]
        (sample,) = sampler.reply([[65]], generator())
        assert sample is not None
        assert sample.policy_version == version
    assert len(set(names)) == 3
    with torch.no_grad():
        policy.parameters()[0].add_(0.01)  # other weights under the same number, as when a checkpoint is read
    sampler.sync(policy)
    assert servers[0].adapters != [names[-1]]
    with policy.merged(), pytest.raises(RuntimeError, match=r"outside policy\.merged"):
        sampler.sync(policy)
    sampler.close()
    assert not list((tmp_path / "versions").iterdir())


def test_a_server_that_is_gone_hands_its_conversations_over_and_is_taken_back(
    policy: Policy, servers: list[FakeServer], connect: Callable[..., VLLMServerSampler]
) -> None:
    sampler = connect()
    sampler.sync(policy)
    sampler.start(4)
    sampler.reply([[65], [66], [67], [68]], generator())
    servers[0].stop()
    assert all(sampler.reply([[1], [1], [1], [1]], generator()))
    servers[0].run(servers[0].begin())  # it has forgotten the adapter
    servers[0].asked.clear()
    deadline = time.monotonic() + 10
    while not servers[0].asked and time.monotonic() < deadline:
        sampler.reply([[1], None, None, None], generator())
    assert servers[0].asked
    assert servers[0].adapters == servers[1].adapters
    servers[0].adapters.clear()  # as if it had started anew between two calls
    assert sampler.reply([[1], None, None, None], generator())[0]
    assert servers[0].adapters == servers[1].adapters


def test_when_all_are_gone_the_error_says_which_and_for_how_long(
    policy: Policy, servers: list[FakeServer], connect: Callable[..., VLLMServerSampler], tmp_path: Path
) -> None:
    sampler = connect(patience=0.4)
    sampler.sync(policy)
    sampler.start(2)
    for server in servers:
        server.stop()
    with pytest.raises(ServersGoneError, match=r"got none for 0\.\d s .*start them again") as error:
        sampler.reply([[65], [66]], generator())
    assert all(server.url.removesuffix("/v1") in str(error.value) for server in servers)
    with pytest.raises(ServersGoneError, match="rollout servers"):
        VLLMServerSampler(policy, tmp_path / "other", [servers[0].url], patience=0.0)
    for server in servers:
        server.run(server.begin())
    sampler.start(2)
    assert all(sampler.reply([[65], [66]], generator()))


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (200, "<!doctype html>\n<p>Hi", r"list of models, got '<!doctype html> <p>Hi'; check the URL, .* /v1$"),
        (200, "", "list of models, got ''; check the URL"),
        (200, '{"object": "list"}', "list of models, got '{.*; check the URL"),
        (200, '{"data": [3]}', "list of models, got '{.*; check the URL"),
        (200, '{"data": [{"id": "llama3", "object": "model"}]}', "max_model_len, got 'llama3' with id, object; roll"),
        (401, '{"error": "Unauthorized"}', "HTTP 401: Unauthorized; check the key: .* VLLM_API_KEY is not set$"),
        (404, "<p>\nNot Found", "HTTP 404: <p> Not Found; check the URL, which must end in /v1$"),
    ],
)
def test_what_is_no_server_of_a_model_is_refused_at_once_with_what_to_do(
    status: int,
    text: str,
    said: str,
    servers: list[FakeServer],
    connect: Callable[..., VLLMServerSampler],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    servers[0].listed = status, text
    with pytest.raises(ServerRefusedError, match=f"^http://127.0.0.1:{servers[0].port}/v1/models: .*{said}") as error:
        connect()
    assert "\n" not in str(error.value)


def test_whoever_waits_for_a_server_is_told_for_which(
    servers: list[FakeServer],
    connect: Callable[..., VLLMServerSampler],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("ppg_agents.generation.servers.QUIET", 0.1)
    servers[0].stop()
    threading.Timer(0.4, lambda: servers[0].run(servers[0].begin())).start()  # it was still loading
    assert connect().context_length == 300
    where = servers[0].url.removesuffix("/v1")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"waiting up to 5 s for the rollout server {where}: ClientConnectorError")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/v1"
        with pytest.raises(ServersGoneError, match=r"got none for 0\.\d s .*: no answer\); start"):
            VLLMServerSampler(servers[0].policy, tmp_path, [url], patience=0.3)
    assert "which does not answer" in capfd.readouterr().err


def test_a_server_of_another_distribution_is_refused(
    policy: Policy,
    make_policy: Callable[..., Policy],
    servers: list[FakeServer],
    connect: Callable[..., VLLMServerSampler],
) -> None:
    servers[1].raw = True
    with pytest.raises(ServerRefusedError, match=f"{servers[1].port}.*processed_logprobs"):
        connect(temperature=1.3).sync(policy)
    connect(temperature=1.0).sync(policy)
    servers[1].policy = make_policy(seed=5)
    with pytest.raises(ServerRefusedError, match="got others"):
        connect().sync(policy)
    servers[0].short = True
    sampler = connect(servers[0])
    sampler.sync(policy)
    sampler.start(1)
    with pytest.raises(GenerationError, match="--generation-config vllm"):
        sampler.reply([[65]], generator())


def test_a_reply_under_way_can_be_cancelled_and_the_server_notices(
    policy: Policy,
    servers: list[FakeServer],
    connect: Callable[..., VLLMServerSampler],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampler = connect(servers[0])
    sampler.sync(policy)
    sampler.start(2)
    servers[0].hold = True
    raised: list[BaseException] = []
    start = asyncio.run_coroutine_threadsafe

    def start_slowly(*arguments: Any) -> Any:  # the server has the request before this thread goes on
        future = start(*arguments)
        time.sleep(0.2)
        return future

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", start_slowly)

    def speak(i: int) -> None:
        try:
            sampler.reply_one(i, [65], 1)
        except GenerationError as error:
            raised.append(error)

    threads = [threading.Thread(target=speak, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    while len(servers[0].asked) < 2:
        time.sleep(0.01)
    sampler.cancel()
    for thread in threads:
        thread.join(5)
    assert len(raised) == 2
    assert servers[0].dropped.wait(5)
    servers[0].hold = False
    assert sampler.reply_one(0, [65], 1).ended
    with pytest.raises(ValueError, match="a seed"):
        sampler.reply_one(0, [65], None)


def wanted(**changes: Any) -> SamplingSettings:
    return SamplingSettings(**{"max_new_tokens": 5, "temperature": 0.5, "timeout": 10.0, "patience": 5.0, **changes})


def test_the_settings_name_the_sampler(
    policy: Policy, make_policy: Callable[..., Policy], servers: list[FakeServer], tmp_path: Path
) -> None:
    sampler = make_sampler(policy, wanted(), tmp_path)
    assert isinstance(sampler, HFSampler)
    assert (sampler.max_new_tokens, sampler.temperature) == (5, 0.5)
    urls = (servers[0].url, servers[1].url)
    remote = make_sampler(policy, wanted(backend="vllm", endpoints=urls), tmp_path)
    assert isinstance(remote, VLLMServerSampler)
    remote.close()
    for wrong, message in (
        (wanted(backend="vlm"), "did you mean 'vllm'"),
        (wanted(endpoints=urls), "expected backend 'vllm' with endpoints"),
        (wanted(backend="vllm", endpoints=urls, sync="merge"), "did you mean 'merged'"),
        (wanted(backend="vllm", endpoints=(urls[0], urls[0])), "none twice"),
        (wanted(backend="vllm", endpoints=("localhost:8000",)), "such as http://"),
        (wanted(backend="vllm", endpoints=("http://localhost:80a/v1",)), "such as http://"),
        (wanted(backend="vllm", endpoints=urls, temperature=2.5), "temperature in"),
    ):
        with pytest.raises(ValueError, match=message):
            make_sampler(policy, wrong, tmp_path)
    with pytest.raises(ValueError, match="expected a policy with LoRA"):
        make_sampler(make_policy(lora=False), wanted(backend="vllm", endpoints=urls), tmp_path)
