"""Sampling with vLLM servers: token ids in, token ids out, each conversation at its own pace.

A conversation stays with one server, whose prefix cache holds it, as long as that server answers. A silent server is
tried again while its conversations go to the others; when none answers any more, that is an error. Use these servers
for one run's rollouts and nothing else: requests for the base model that share a batch with an adapter's would get
that adapter. Nothing here learns.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ppg_agents.generation import Sample
from ppg_agents.generation.endpoints import (
    COMPLETIONS,
    Endpoint,
    ServerRefusedError,
    UnknownAdapterError,
    UnreachableError,
    Wire,
    check_patience,
    root,
    together,
)
from ppg_agents.generation.synced import Job, Reply, SyncedSampler
from ppg_agents.generation.versions import Sync, Version
from ppg_agents.policy.policy import Policy
from ppg_agents.terminal.progress import say

log = logging.getLogger(__name__)

_TOKENS, _ALTERNATIVES = 8, 5  # tokens of a server's first reply that are compared, and alternatives to each
_FAR = 0.3  # a mean gap in nats above this means another model

FIRST_LOOK = 15.0
"""Seconds a server has to answer when a run begins; after that its URL is probably wrong."""

QUIET = 2.0
"""Seconds of waiting for a server when a run begins before the terminal says so."""


class VLLMServerSampler(SyncedSampler):
    """Samples replies for n conversations from one or more vLLM servers of the same base model.

    For ``sync="adapter"`` a server needs ``--enable-lora --max-lora-rank R`` and the environment variable
    ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1``; for ``sync="merged"`` it needs ``VLLM_SERVER_DEV_MODE=1``.
    With a temperature other than 1 it needs ``--logprobs-mode processed_logprobs``. All servers
    must see ``folder`` under the same path. A server that has loaded whole weights keeps them until it is restarted.
    """

    def __init__(
        self,
        policy: Policy,
        folder: str | Path,
        endpoints: Sequence[str],
        max_new_tokens: int = 48,
        temperature: float = 1.0,
        *,
        sync: Sync = "adapter",
        timeout: float = 300.0,
        patience: float = 120.0,
        api_key_env: str = "VLLM_API_KEY",
        run: str | None = None,
        write: bool = True,
    ) -> None:
        """Connect to the servers.

        Args:
            policy: The policy that speaks.
            folder: For the versions' files and nothing else; the servers read them there.
            endpoints: URLs such as ``http://localhost:8000/v1``.
            max_new_tokens: A reply is cut at this length.
            temperature: Sampling temperature; 0 takes the most likely token.
            sync: ``adapter`` has the servers load the LoRA adapter, ``merged`` the whole weights.
            timeout: Seconds allowed for one answer.
            patience: Seconds without an answer from any server before it is an error; at most ``FIRST_LOOK`` when
                the run begins.
            api_key_env: Name of the environment variable that holds the servers' key; leave it unset if they need none.
            run: See `make_sampler`.
            write: See `make_sampler`.

        Raises:
            ValueError: See `SyncedSampler`; or there is no endpoint, one is not a URL, or one is given twice.
            GenerationError: A server cannot be reached.
        """
        super().__init__(policy, folder, max_new_tokens, temperature, sync, run=run, write=write)
        roots = [root(url) for url in endpoints]
        if not roots or len(set(roots)) < len(roots):
            raise ValueError(f"expected at least one endpoint and none twice, got {list(endpoints)}")
        if timeout <= 0 or patience < 0:
            raise ValueError(f"expected timeout > 0 and patience >= 0 seconds, got {timeout} and {patience}")
        self._endpoints = [Endpoint(root) for root in roots]
        self._patience = patience
        self._write = write
        self._probed = False
        self._wire = Wire(timeout, api_key_env)
        try:
            lengths = self._wire.run(together(self._meet(endpoint) for endpoint in self._endpoints))
        except BaseException:
            self.close()
            raise
        self.context_length = min([policy.context_length, *lengths])

    def start(self, n: int) -> None:
        """Start n new conversations and forget the old ones."""
        super().start(n)
        for endpoint in self._endpoints:
            endpoint.since = None  # patience starts again

    def reply_one(self, conversation: int, prompt: Sequence[int], seed: int | None) -> Sample:
        """Return one conversation's next reply; several threads may call this, each for another conversation.

        Args:
            conversation: Its number, below the n of `start`.
            prompt: What was added since its last sampled token.
            seed: Seed of this reply; may be None at temperature 0.

        Raises:
            ValueError: An empty prompt, or no seed.
            RuntimeError: The policy has learned since the last `sync`.
            GenerationError: No reply came back, or `cancel` was called.
        """
        if seed is None and self.temperature > 0:
            raise ValueError("expected a seed for sampling, got None; pass one or use temperature 0")
        version = self._synced()
        job = self._job(conversation, prompt, seed)
        return self._sample(job, self._wire.run(self._ask(job, version)), version)

    def cancel(self) -> None:
        """Stop all running calls, on the servers too; each of them raises a GenerationError."""
        self._wire.cancel()

    def close(self) -> None:
        """Close the connections and remove the files."""
        self._wire.close()
        self._version = None
        self._versions.prune(keep=0)

    async def _meet(self, endpoint: Endpoint) -> int:
        """Return a server's context length; if that takes a while, tell the terminal what it waits for."""
        limit = min(self._patience, FIRST_LOOK)
        notice = asyncio.ensure_future(_say_waiting(endpoint, limit))
        began = time.monotonic()
        try:
            while True:
                try:
                    async with asyncio.timeout(limit or None):
                        endpoint.model, length = await self._wire.base_model(endpoint)
                    endpoint.answered()
                    return length
                except TimeoutError:  # it accepts the connection and stays silent
                    endpoint.since, endpoint.reason = began, "no answer"
                    check_patience([endpoint], 0.0)
                except UnreachableError as error:
                    endpoint.silent(error)
                    check_patience([endpoint], limit)
                await asyncio.sleep(endpoint.rest - time.monotonic())
        finally:
            notice.cancel()

    def _load(self, version: Version, former: Version | None) -> None:
        first = self._wire.run(self._load_everywhere(version, former))
        if not self._probed:
            self._check_distribution(version, first)
            self._probed = True

    async def _load_everywhere(self, version: Version, former: Version | None) -> list[Endpoint]:
        """Load a version on every server that answers; return those."""
        for endpoint in self._endpoints:
            endpoint.since = None
        while True:
            for error in await asyncio.gather(
                *(self._ensure(e, version) for e in self._endpoints), return_exceptions=True
            ):
                if isinstance(error, BaseException) and not isinstance(error, UnreachableError):
                    raise error
            ready = [e for e in self._endpoints if e.loaded == version.name]
            if ready:
                break
            check_patience(self._endpoints, self._patience)
            await asyncio.sleep(max(0.0, min(e.rest for e in self._endpoints) - time.monotonic()))
        if former is not None and self._write and self._versions.sync == "adapter":
            await asyncio.gather(*(self._unload(e, former) for e in ready))
        return ready

    async def _ensure(self, endpoint: Endpoint, version: Version) -> None:
        """Have a server load a version, unless it already has."""
        async with endpoint.loading:
            if endpoint.loaded == version.name:
                return
            try:
                if self._versions.sync == "adapter":
                    await self._load_adapter(endpoint, version)
                elif self._write:
                    await self._load_merged(endpoint, version)
            except UnreachableError as error:
                endpoint.silent(error)
                log.warning("server %s does not answer: %s", endpoint.url, error)
                raise
            endpoint.answered()
            endpoint.loaded = version.name

    async def _load_adapter(self, endpoint: Endpoint, version: Version) -> None:
        body = {"lora_name": version.name, "lora_path": str(version.path)}
        try:
            await self._wire.call(endpoint, "POST", "/v1/load_lora_adapter", body)
        except ServerRefusedError as error:
            if "has already been loaded" in str(error):  # another process of this run did, from the same folder
                return
            raise ServerRefusedError(
                f"{error}; start the server with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora and a "
                f"--max-lora-rank that is large enough, on a machine that sees {version.path}"
            ) from None

    async def _load_merged(self, endpoint: Endpoint, version: Version) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(version.path)}}
        try:
            await self._wire.call(endpoint, "POST", "/collective_rpc", body)
            for pause in (0.0, 0.1, 0.5, 2.0, 5.0):  # a cancelled request holds its blocks for a moment
                await asyncio.sleep(pause)
                if (await self._wire.call(endpoint, "POST", "/reset_prefix_cache")).get("success", True):
                    return
        except ServerRefusedError as error:
            raise ServerRefusedError(
                f"{error}; whole weights need a server with VLLM_SERVER_DEV_MODE=1, on a machine that sees "
                f"{version.path}; or use sync 'adapter'"
            ) from None
        raise ServerRefusedError(
            f"{endpoint.url}: expected the prefix cache to be reset, got a refusal; is anyone else using the server?"
        )

    async def _unload(self, endpoint: Endpoint, version: Version) -> None:
        try:
            await self._wire.call(endpoint, "POST", "/v1/unload_lora_adapter", {"lora_name": version.name})
        except (ServerRefusedError, UnreachableError) as error:
            log.debug("%s was not unloaded: %s", version.name, error)

    def _generate(self, jobs: Sequence[Job], version: Version) -> list[Reply]:
        return self._wire.run(together(self._ask(job, version) for job in jobs))

    async def _ask(self, job: Job, version: Version) -> Reply:
        """Return a reply from whichever server gives one."""
        forgotten = 0
        while True:
            endpoint = self._route(job.conversation)
            await asyncio.sleep(max(0.0, endpoint.rest - time.monotonic()))
            try:
                await self._ensure(endpoint, version)
                answer = await self._wire.call(endpoint, "POST", COMPLETIONS, self._body(job, endpoint, version))
            except UnreachableError as error:
                endpoint.silent(error)
                check_patience(self._endpoints, self._patience)
                continue
            except UnknownAdapterError:
                endpoint.loaded, forgotten = "", forgotten + 1
                if forgotten > 2:
                    raise ServerRefusedError(
                        f"{endpoint.url}: expected the server to keep the adapter {version.name}, got a server "
                        "that keeps losing it; is another run using it?"
                    ) from None
                continue
            endpoint.answered()
            return self._read(answer, job, endpoint, version)

    def _route(self, conversation: int) -> Endpoint:
        """Return the conversation's own server or, while that is left alone, the next one that is not."""
        count, now = len(self._endpoints), time.monotonic()
        order = [self._endpoints[(conversation + k) % count] for k in range(count)]
        return next((e for e in order if e.rest <= now), min(order, key=lambda e: e.rest))

    def _model(self, endpoint: Endpoint, version: Version) -> str:
        """Return the name of the model to ask for."""
        return version.name if self._versions.sync == "adapter" else endpoint.model

    def _body(self, job: Job, endpoint: Endpoint, version: Version) -> dict[str, Any]:
        return {
            "model": self._model(endpoint, version),
            "prompt": job.tokens,
            "cache_salt": version.name,
            "add_special_tokens": False,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **self._parameters(job.seed),
        }

    def _read(self, answer: dict[str, Any], job: Job, endpoint: Endpoint, version: Version) -> Reply:
        """Return the reply in an answer, after checking that it answers this job."""
        choice = answer["choices"][0]
        if choice.get("token_ids") is None or choice.get("prompt_token_ids") is None:
            raise ServerRefusedError(f"{endpoint.url}: expected token ids back, got none; the server needs vllm>=0.20")
        if choice["prompt_token_ids"] != job.tokens or answer["model"] != self._model(endpoint, version):
            raise ServerRefusedError(
                f"{endpoint.url}: expected {self._model(endpoint, version)} to answer the tokens that were sent, got "
                f"{answer['model']} or other tokens; use no proxy that changes requests"
            )
        return Reply(tuple(choice["token_ids"]), tuple(float(p) for p in choice["logprobs"]["token_logprobs"]))

    def _check_distribution(self, version: Version, endpoints: Sequence[Endpoint]) -> None:
        """Compare the log-probs of every server's first tokens, and of their alternatives, with the policy's own.

        Raises:
            ServerRefusedError: They come from another model or another temperature.
        """
        prompt = self.policy.first_prompt("You are a persona.", "Hello, how are you?")
        temperature = self.temperature or 1.0
        for endpoint in endpoints:
            body = self._body(Job(0, prompt, 0), endpoint, version)
            body |= {"max_tokens": _TOKENS, "logprobs": _ALTERNATIVES, "temperature": temperature}
            try:
                answer = self._wire.run(self._wire.call(endpoint, "POST", COMPLETIONS, body))
            except (UnreachableError, UnknownAdapterError) as error:
                raise ServerRefusedError(f"{endpoint.url}: expected a first reply, got none: {error}") from None
            choice = answer["choices"][0]
            rows: list[list[int]] = []
            reported: list[float] = []
            for at, tops in enumerate(choice["logprobs"]["top_logprobs"]):
                prefix = [*prompt, *choice["token_ids"][:at]]
                rows += [[*prefix, int(name.partition(":")[2])] for name in tops]
                reported += [float(p) for p in tops.values()]
            theirs = torch.tensor(reported)
            gap = float((theirs - self._policy_log_probs(rows, temperature)).abs().mean())
            gap_at_one = float((theirs - self._policy_log_probs(rows, 1.0)).abs().mean())
            if temperature != 1 and gap > 0.01 and gap_at_one < gap / 2:
                raise ServerRefusedError(
                    f"{endpoint.url}: expected log-probs at temperature {temperature}, got those at 1; start the "
                    "server with --logprobs-mode processed_logprobs"
                )
            if gap > _FAR:
                raise ServerRefusedError(
                    f"{endpoint.url}: expected the log-probs of {self.policy.name}, got others (mean gap {gap:.2f} "
                    "nats); serve that model, restarted if whole weights were loaded into it, with "
                    "--logprobs-mode processed_logprobs"
                )

    def _policy_log_probs(self, rows: list[list[int]], temperature: float) -> torch.Tensor:
        """Return the policy's log-prob of each row's last token."""
        length = max(map(len, rows))
        ids = torch.tensor([row + [self.policy.pad_id] * (length - len(row)) for row in rows])
        ends = torch.tensor([len(row) for row in rows])[:, None]
        places = torch.arange(length)
        with torch.no_grad():
            scores = self.policy.log_probs(ids, places < ends, places == ends - 1, temperature=temperature)
        return scores.sum(1).float().cpu()


async def _say_waiting(endpoint: Endpoint, limit: float) -> None:
    await asyncio.sleep(QUIET)
    why = f": {endpoint.reason}" if endpoint.reason else ", which does not answer"
    say(f"waiting up to {limit:g} s for the rollout server {endpoint.url}{why}")
