"""The sampler against the model itself: same log-probs, same distribution, no influence between rows."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from transformers import Gemma2Config, Gemma2ForCausalLM

from ppg_agents.generation import GenerationError, Sample, make_sampler
from ppg_agents.generation.endpoints import ServerRefusedError, ServersGoneError
from ppg_agents.generation.hf import HFSampler
from ppg_agents.generation.servers import VLLMServerSampler
from ppg_agents.policy import LoraSettings, Policy, add_lora


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (length,), generator=generator(seed)).tolist()


def sliding_policy(byte_tokenizer: Callable[..., Any]) -> Policy:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return Policy(add_lora(Gemma2ForCausalLM(config), LoraSettings(rank=2)), byte_tokenizer())


@pytest.mark.parametrize("kind", ["full", "sliding"])
@pytest.mark.parametrize("merged", [True, False])
def test_log_probs_equal_one_pass_over_the_final_sequence(
    policy: Policy, byte_tokenizer: Callable[..., Any], kind: str, merged: bool
) -> None:
    """Prompts of different lengths, conversations that end at different turns, a cache that grows."""
    policy = policy if kind == "full" else sliding_policy(byte_tokenizer)
    sampler = HFSampler(policy, max_new_tokens=9, temperature=1.3)
    ends = [4, 1, 6, 2, 6]
    ids: list[list[int]] = [[] for _ in ends]
    scores: list[list[float]] = [[] for _ in ends]
    sampler.start(len(ends))
    random = generator()

    def talk() -> None:
        for turn in range(6):
            prompts = [
                prompt(3 + (7 * i + 5 * turn) % 30, 10 * i + turn) if turn < end else None for i, end in enumerate(ends)
            ]
            for i, sample in enumerate(sampler.reply(prompts, random)):
                given = prompts[i]
                assert (sample is None) == (given is None)
                if sample is not None and given is not None:
                    ids[i] += [*given, *sample.token_ids]
                    scores[i] += [0.0] * len(given) + list(sample.log_probs)

    if merged:
        with policy.merged():
            talk()
    else:
        talk()
    assert max(map(len, ids)) > 128  # the cache has grown
    for row, expected in zip(ids, scores, strict=True):
        tensor = torch.tensor([row])
        with torch.no_grad():
            got = policy.log_probs(tensor, torch.ones_like(tensor), temperature=1.3)[0]
        want = torch.tensor(expected)
        torch.testing.assert_close(got[want != 0], want[want != 0], rtol=0, atol=1e-4)


def test_greedy_is_the_models_own_generate(policy: Policy) -> None:
    sampler = HFSampler(policy, max_new_tokens=20, temperature=0)
    prompts = [prompt(5, 1), prompt(17, 2), prompt(11, 3)]
    sampler.start(3)
    for given, sample in zip(prompts, sampler.reply(prompts), strict=True):
        reference = policy.model.generate(
            input_ids=torch.tensor([given]),
            attention_mask=torch.ones(1, len(given), dtype=torch.long),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=policy.end_of_turn_id,
            pad_token_id=policy.pad_id,
        )
        assert sample is not None
        assert list(sample.token_ids) == reference[0, len(given) :].tolist()


def test_rows_do_not_influence_each_other(policy: Policy) -> None:
    turns = [[prompt(4 + i + 9 * t, 10 * i + t) for i in range(4)] for t in range(3)]

    def talk(rows: list[int]) -> list[list[Sample | None]]:
        sampler = HFSampler(policy, max_new_tokens=8, temperature=0)
        sampler.start(len(rows))
        return [sampler.reply([turn[i] for i in rows]) for turn in turns]

    together = talk([0, 1, 2, 3])
    for i in range(4):
        for turn, (alone,) in zip(together, talk([i]), strict=True):
            sample = turn[i]
            assert sample is not None
            assert alone is not None
            assert sample.token_ids == alone.token_ids


def test_draws_follow_the_distribution(policy: Policy) -> None:
    n = 8_000
    sampler = HFSampler(policy, max_new_tokens=1)
    sampler.start(n)
    counts = torch.zeros(policy.config.vocab_size)
    for sample in sampler.reply([[65, 66, 67]] * n, generator()):
        assert sample is not None
        counts[sample.token_ids[0]] += 1
    logits = policy.model(input_ids=torch.tensor([[65, 66, 67]])).logits[0, -1].detach()
    p = logits.double().softmax(-1)
    chi2 = float((((counts - n * p) ** 2) / (n * p)).sum())
    k = policy.config.vocab_size - 1
    assert abs(chi2 - k) < 5 * (2 * k) ** 0.5


def test_a_reply_ends_at_end_of_turn_or_at_the_limit(policy: Policy) -> None:
    head = policy.model.get_output_embeddings()
    with torch.no_grad():
        head.weight[policy.end_of_turn_id] = 0.02 * head.weight[:256].sum(0)
    sampler = HFSampler(policy, max_new_tokens=6)
    sampler.start(64)
    samples = [s for s in sampler.reply([prompt(5, i) for i in range(64)], generator()) if s is not None]
    assert {s.ended for s in samples} == {True, False}
    for sample in samples:
        assert len(sample.token_ids) == len(sample.log_probs) <= 6
        assert policy.end_of_turn_id not in sample.token_ids[:-1]
        assert sample.ended == (sample.token_ids[-1] == policy.end_of_turn_id)
        assert sample.ended or len(sample.token_ids) == 6


def test_same_generator_seed_same_replies(policy: Policy) -> None:
    def talk(seed: int) -> list[Sample | None]:
        sampler = HFSampler(policy, max_new_tokens=5)
        sampler.start(3)
        return sampler.reply([prompt(5, 0)] * 3, generator(seed))

    assert talk(1) == talk(1)
    assert talk(1) != talk(2)


def test_refusals(policy: Policy) -> None:
    with pytest.raises(ValueError, match="max_new_tokens >= 1"):
        HFSampler(policy, max_new_tokens=0)
    sampler = HFSampler(policy)
    sampler.start(2)
    with pytest.raises(ValueError, match="expected 2 prompts"):
        sampler.reply([[1]], generator())
    with pytest.raises(ValueError, match="generator"):
        sampler.reply([[1], [2]])
    with pytest.raises(ValueError, match="at least one token"):
        sampler.reply([[1], []], generator())
    assert sampler.reply([None, None], generator()) == [None, None]
    policy.version += 1
    with pytest.raises(RuntimeError, match="after learning"):
        sampler.reply([[1], [2]], generator())
    policy.config.layer_types = ["linear_attention"]
    with pytest.raises(ValueError, match="sliding-window attention"):
        HFSampler(policy)


def test_a_sample_says_whose_it_is(policy: Policy) -> None:
    policy.version = 4
    sampler = HFSampler(policy, max_new_tokens=2, temperature=0.7)
    sampler.start(1)
    (sample,) = sampler.reply([[65]], generator())
    assert sample is not None
    assert (sample.policy_version, sample.temperature, sample.sampler) == (4, 0.7, "hf")


class FakeServer:
    """Speaks vLLM's protocol: loads adapters, gives the policy's own first log-probs and made-up replies."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.raw, self.short = policy, False, False
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

    def stop(self) -> None:
        self.run(self.runner.cleanup())
        self.adapters.clear()

    def close(self) -> None:
        self.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def models(self, _: web.Request) -> web.Response:
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
    with policy.merged(), pytest.raises(RuntimeError, match=r"outside of policy\.merged"):
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


@dataclass(frozen=True)
class Wanted:
    """Settings of a run, as `make_sampler` reads them."""

    max_new_tokens: int = 5
    temperature: float = 0.5
    backend: str = "hf"
    endpoints: tuple[str, ...] = ()
    sync: str = "adapter"
    timeout: float = 10.0
    patience: float = 5.0
    api_key_env: str = "VLLM_API_KEY"
    engine: dict[str, Any] = field(default_factory=dict)


def test_the_settings_name_the_sampler(
    policy: Policy, make_policy: Callable[..., Policy], servers: list[FakeServer], tmp_path: Path
) -> None:
    sampler = make_sampler(policy, Wanted(), tmp_path)
    assert isinstance(sampler, HFSampler)
    assert (sampler.max_new_tokens, sampler.temperature) == (5, 0.5)
    urls = (servers[0].url, servers[1].url)
    remote = make_sampler(policy, Wanted(backend="vllm", endpoints=urls), tmp_path)
    assert isinstance(remote, VLLMServerSampler)
    remote.close()
    for wrong, message in (
        (Wanted(backend="vlm"), "did you mean 'vllm'"),
        (Wanted(endpoints=urls), "expected backend 'vllm' with endpoints"),
        (Wanted(backend="vllm", endpoints=urls, sync="merge"), "did you mean 'merged'"),
        (Wanted(backend="vllm", endpoints=(urls[0], urls[0])), "none twice"),
        (Wanted(backend="vllm", endpoints=("localhost:8000",)), "such as http://"),
        (Wanted(backend="vllm", endpoints=urls, temperature=2.5), "temperature in"),
    ):
        with pytest.raises(ValueError, match=message):
            make_sampler(policy, wrong, tmp_path)
    with pytest.raises(ValueError, match="expected a policy with LoRA"):
        make_sampler(make_policy(lora=False), Wanted(backend="vllm", endpoints=urls), tmp_path)
