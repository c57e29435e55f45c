"""Rollouts on real vLLM: the version that was synced speaks, token for token and log-prob for log-prob.

The engine in process needs settings of the whole process, so its part runs as a script of its own (this file), which
prints what it measured. ``gap`` is the largest difference, in nats, between the sampler's log-probs and the learner's.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch

import ppg_gym  # noqa: F401 (registers the environment)
from ppg_agents.batch import batch
from ppg_agents.generation import Sample
from ppg_agents.generation.endpoints import ServerRefusedError
from ppg_agents.generation.hf import HFSampler
from ppg_agents.generation.servers import VLLMServerSampler
from ppg_agents.generation.vllm import VLLMSampler
from ppg_agents.policy import Policy
from ppg_agents.rollout import collect
from ppg_agents.rollout.threads import collect_each

START, STOP, SCRIPT = 300.0, 60.0, 600.0  # seconds; a loaded machine takes its time
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
REMOTE = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1"}
INSIDE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "LD_PRELOAD": str(Path(sys.prefix) / "lib" / "libiomp5.so"),
    "KMP_BLOCKTIME": "1",
}
SAME, OTHER = 1e-3, 0.05  # nats: the same weights in float32; clearly other weights
TOKENS = 16


def policy_(seed: int = 0) -> Policy:
    """Return the embedded model with an adapter that says something."""
    policy = Policy.load("tiny", seed=1)
    learn(policy, seed)
    policy.version = 0
    return policy


def learn(policy: Policy, seed: int, scale: float = 0.04) -> None:
    """Take a step: other weights, the next version."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    policy.version += 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prompts(policy: Policy) -> list[list[int]]:
    """Return prompts longer than a block of the prefix cache, most of their tokens in common."""
    instruction = "You are a nurse from a small town. " * 20
    found = [policy.first_prompt(instruction, f"What about number {i}?") for i in range(4)]
    assert min(map(len, found)) > 128
    return found


def gap(policy: Policy, asked: list[list[int]], samples: list[Any], temperature: float = 1.0) -> float:
    """Return the largest difference between the samples' log-probs and the policy's."""
    largest = 0.0
    for prompt, sample in zip(asked, samples, strict=False):
        ids = torch.tensor([[*prompt, *sample.token_ids]])
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        mask[:, len(prompt) :] = True
        with torch.no_grad():
            scores = policy.log_probs(ids, torch.ones_like(mask), mask, temperature=temperature)
        own = scores[0, len(prompt) :]
        largest = max(largest, float((own - torch.tensor(sample.log_probs)).abs().max()))
    return largest


def ask(sampler: Any, asked: list[list[int]], seed: int = 0) -> list[Any]:
    sampler.start(len(asked))
    samples = sampler.reply(asked, generator(seed))
    assert all(isinstance(sample, Sample) for sample in samples)
    return list(samples)


def ledger_gap(policy: Policy, trajectories: list[Any], temperature: float) -> float:
    """Return the largest gap over a whole rollout, scored in one pass per conversation."""
    rows = batch(trajectories, policy.pad_id)
    with torch.no_grad():
        scores = policy.log_probs(rows.ids, rows.attention, rows.token_mask, temperature=temperature)
    return float((scores - rows.sampling_log_probs).abs().max())


def versions_speak(policy: Policy, sampler: Any, asked: list[list[int]], steps: int = 2) -> dict[str, Any]:
    """Learn and sync; return the gap to each version itself, and to the one before it, on the same prompts."""
    own, former = [], []
    temperature = sampler.temperature
    for step in range(steps):
        before = copy.deepcopy(policy.model.state_dict())
        learn(policy, 10 + step)
        sampler.sync(policy)
        samples = ask(sampler, asked)
        assert {sample.policy_version for sample in samples} == {policy.version}
        own.append(gap(policy, asked, samples, temperature))
        after = copy.deepcopy(policy.model.state_dict())
        policy.model.load_state_dict(before)
        former.append(gap(policy, asked, samples, temperature))
        policy.model.load_state_dict(after)
    return {"own": max(own), "former": min(former)}


def traps(llm: Any, policy: Policy, asked: list[list[int]], folder: Path) -> dict[str, float]:
    """Return gaps of requests that fall into vLLM's traps on purpose."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    parameters = SamplingParams(max_tokens=TOKENS, temperature=0, logprobs=0, stop_token_ids=[policy.end_of_turn_id])

    def speak(*adapters: Any) -> list[Sample]:
        rows = [{"prompt_token_ids": prompt} for prompt in asked[: len(adapters)]]
        samples = []
        for output in llm.generate(rows, parameters, lora_request=list(adapters), use_tqdm=False):
            tokens = tuple(output.outputs[0].token_ids)
            scores = [p[t].logprob for t, p in zip(tokens, output.outputs[0].logprobs, strict=True)]
            samples.append(Sample(tokens, tuple(scores), True))
        return samples

    one, two = folder / "one", folder / "two"
    policy.save(one)
    fresh = LoRARequest("one", 901, str(one))
    found = {"fresh": gap(policy, asked, speak(*[fresh] * len(asked)))}
    learn(policy, 77)
    policy.save(two)
    known = LoRARequest("two", 901, str(two))  # another name and path, an id that is known
    found["id used twice"] = gap(policy, asked, speak(*[known] * len(asked)))
    policy.save(one)
    over = LoRARequest("one", 901, str(one), load_inplace=True)
    found["path used twice"] = gap(policy, asked, speak(*[over] * len(asked)))
    llm.reset_prefix_cache()
    mixed = speak(None, over, None, over)
    llm.reset_prefix_cache()  # what the mixed batch has left in it is the adapter's too
    alone = speak(None, None)
    learn(policy, 0, scale=0.0)  # the base model
    found["base rows alone"] = gap(policy, asked, alone)
    found["base row beside an adapter's"] = gap(policy, [asked[0], asked[2]], [mixed[0], mixed[2]])
    return found


def play(policy: Policy, sampler: Any, turns: int = 3) -> list[Any]:
    """Hold conversations with the real environment."""
    envs = gym.make_vec("PersonaChat-v0", num_envs=6, domain="chatting", max_turns=turns)
    try:
        return collect(envs, policy, sampler, [5, 5, 6, 7, 8, 9], generator(3), "chatting")
    finally:
        envs.close()


def script(folder: Path) -> dict[str, Any]:
    """Do everything that needs an engine in this process."""
    import vllm

    policy = policy_()
    asked = prompts(policy)
    engine = {"enforce_eager": True, "max_model_len": 2048}
    sampler = VLLMSampler(policy, folder / "adapter", TOKENS, 1.0, engine=engine)
    llm = sampler._llm
    found: dict[str, Any] = {"context": sampler.context_length}
    try:
        ask(sampler, asked)
    except RuntimeError as error:
        found["before sync"] = str(error)
    sampler.sync(policy)
    found["adapter"] = versions_speak(policy, sampler, asked)
    found["loaded"] = len(llm.llm_engine.list_loras())
    found["repeats"] = ask(sampler, asked, 1) == ask(sampler, asked, 1) != ask(sampler, asked, 2)
    said: list[Any] = []
    generate = llm.generate
    llm.generate = lambda *a, **k: (said.append(k["lora_request"].lora_name), generate(*a, **k))[1]
    trajectories = play(policy, sampler)
    found["adapters asked for"] = sorted(set(said))
    llm.generate = generate
    turn = trajectories[0].turns[1]
    found["turn"] = [turn.policy_version, policy.version, turn.sampler, turn.temperature]
    found["turns"] = [len(t.turns) for t in trajectories]
    found["ledger"] = ledger_gap(policy, trajectories, 1.0)
    sampler.temperature = 0.7
    found["temperature"] = gap(policy, asked, ask(sampler, asked), 0.7)
    sampler.temperature = 0.0
    hf = HFSampler(policy, TOKENS, 0.0)
    with policy.merged():
        expected = [sample.token_ids for sample in ask(hf, asked)]
    found["greedy"] = [sample.token_ids for sample in ask(sampler, asked)] == expected
    played = [[turn.reply for turn in t.turns] for t in play(policy, sampler)]
    found["greedy rollout"] = played == [[turn.reply for turn in t.turns] for t in play(policy, hf)]
    found["traps"] = traps(llm, policy, asked, folder)
    maker = vllm.LLM
    vllm.LLM = lambda **_: llm  # a second engine would take its time to start
    whole = VLLMSampler(policy, folder / "merged", TOKENS, 1.0, sync="merged", engine=engine)
    vllm.LLM = maker
    whole.sync(policy)
    found["merged"] = versions_speak(policy, whole, asked)
    whole.close()
    sampler.close()
    found["left"] = sorted(path.name for name in ("adapter", "merged") for path in (folder / name).iterdir())
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the URL of a server that loads adapters and whole weights."""
    folder = tmp_path_factory.mktemp("rollouts")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--served-model-name", "tiny"]
    command += ["--model", str(files("ppg_agents.models.tiny")), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "4096", "--enforce-eager"]
    command += ["--enable-lora", "--max-lora-rank", "16", "--logprobs-mode", "processed_logprobs"]
    with (folder / "log").open("wb") as file:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **QUIET, **REMOTE}, stdout=file, stderr=subprocess.STDOUT
        )
    deadline, healthy = time.monotonic() + START, False
    while not healthy and time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            healthy = True
        time.sleep(0.25)
    try:
        assert healthy, (folder / "log").read_text()[-3000:]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=STOP)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what the script printed."""
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path_factory.mktemp("inside"))],
        env={**os.environ, **QUIET, **INSIDE},
        capture_output=True,
        text=True,
        timeout=SCRIPT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def connect(served: str, tmp_path: Path) -> Iterator[Callable[..., VLLMServerSampler]]:
    made = []

    def make(policy: Policy, **options: Any) -> VLLMServerSampler:
        sampler = VLLMServerSampler(policy, tmp_path / "versions", [served], TOKENS, **options)
        made.append(sampler)
        return sampler

    yield make
    for sampler in made:
        sampler.close()


@pytest.mark.parametrize("sync", ["adapter", "merged"])
def test_in_process_exactly_the_synced_version_speaks(measured: dict[str, Any], sync: str) -> None:
    """Prompts that the version before has left in the prefix cache."""
    assert measured[sync]["own"] < SAME
    assert measured[sync]["former"] > OTHER


def test_vllm_s_traps_are_there_and_the_sampler_is_in_none(measured: dict[str, Any]) -> None:
    found = measured["traps"]
    assert found.pop("fresh") < SAME
    assert found.pop("base rows alone") < SAME
    assert set(found) == {"id used twice", "path used twice", "base row beside an adapter's"}
    assert min(found.values()) > OTHER, found
    assert measured["adapter"]["own"] < SAME
    assert measured["loaded"] == 1  # former versions are removed
    assert len(measured["adapters asked for"]) == 1  # every row of every batch names the adapter


def test_the_ledger_of_a_rollout_is_what_was_sampled(measured: dict[str, Any]) -> None:
    assert measured["turns"] == [3] * 6
    assert measured["ledger"] < SAME
    version, expected, sampler, temperature = measured["turn"]
    assert (version, sampler, temperature) == (expected, "vllm", 1.0)


def test_greedy_equals_the_learner_s_own_and_seeds_repeat(measured: dict[str, Any]) -> None:
    assert measured["greedy"]
    assert measured["greedy rollout"]
    assert measured["repeats"]
    assert measured["temperature"] < SAME
    assert "call sync(policy)" in measured["before sync"]
    assert (measured["context"], measured["left"]) == (2048, [])


def test_on_a_server_exactly_the_synced_version_speaks(connect: Callable[..., VLLMServerSampler]) -> None:
    policy = policy_(4)
    sampler = connect(policy, temperature=1.3)
    sampler.sync(policy)
    found = versions_speak(policy, sampler, prompts(policy))
    assert found["own"] < SAME
    assert found["former"] > OTHER
    learn(policy, 5)
    with pytest.raises(RuntimeError, match="call sync"):
        ask(sampler, prompts(policy))


def test_single_conversations_equal_those_in_lockstep_and_the_learner_s_own(
    connect: Callable[..., VLLMServerSampler],
) -> None:
    policy = policy_(6)
    sampler = connect(policy, temperature=0.0)
    sampler.sync(policy)
    seeds = [5, 5, 6, 7, 8, 9]
    each = collect_each(
        lambda: gym.make("PersonaChat-v0", domain="chatting", max_turns=3).unwrapped,
        policy,
        sampler,
        seeds,
        domain="chatting",
    )
    in_step = play(policy, sampler)
    own = play(policy, HFSampler(policy, TOKENS, 0.0))
    for a, b, c in zip(each, in_step, own, strict=True):
        assert [t.token_ids for t in a.turns] == [t.token_ids for t in b.turns] == [t.token_ids for t in c.turns]
        assert [t.reward for t in a.turns] == [t.reward for t in b.turns] == [t.reward for t in c.turns]


def test_whole_weights_on_a_server_and_what_they_leave_behind(connect: Callable[..., VLLMServerSampler]) -> None:
    policy = policy_(4)
    sampler = connect(policy, temperature=1.3, sync="merged")
    sampler.sync(policy)
    found = versions_speak(policy, sampler, prompts(policy))
    assert found["own"] < SAME
    assert found["former"] > OTHER
    assert ledger_gap(policy, play(policy, sampler), 1.3) < SAME
    with pytest.raises(ServerRefusedError, match="restarted"):  # the adapter would come on top of them
        connect(policy).sync(policy)


def test_a_server_that_cannot_do_it_is_told_from_one_that_can(server: Any, tmp_path: Path) -> None:
    policy = policy_()
    learn(policy, 0, scale=0.0)  # the base model, which the server speaks as it is
    for options, message in (
        ({"sync": "adapter"}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        ({"sync": "merged"}, "VLLM_SERVER_DEV_MODE=1"),
        ({"sync": "merged", "write": False, "temperature": 1.3}, "--logprobs-mode processed_logprobs"),
    ):
        sampler = VLLMServerSampler(policy, tmp_path, [server.url], TOKENS, **options)  # type: ignore[arg-type]
        with pytest.raises(ServerRefusedError, match=message):
            sampler.sync(policy)
        sampler.close()


if __name__ == "__main__":
    print(json.dumps(script(Path(sys.argv[1]))))
