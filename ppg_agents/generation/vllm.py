"""Sampling with a vLLM engine started by this process; its weights are kept equal to the policy's.

All requests for one version name the same adapter (or none, when whole weights are loaded): vLLM would apply the
adapter to every row of a mixed batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ppg_agents.generation.synced import Job, Reply, SyncedSampler
from ppg_agents.generation.versions import Sync, Version, lora_rank
from ppg_agents.policy.policy import TINY, Policy

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the ranks vLLM can make room for
_OURS = ("model", "enable_lora", "max_lora_rank", "max_loras", "logprobs_mode", "generation_config", "dtype")


class VLLMSampler(SyncedSampler):
    """Samples replies for n conversations in lockstep with its own vLLM engine.

    vLLM loads its own copy of the base weights. With ``VLLM_ENABLE_V1_MULTIPROCESSING=1``, the default, the engine
    runs in a separate process.
    """

    def __init__(
        self,
        policy: Policy,
        folder: str | Path,
        max_new_tokens: int = 48,
        temperature: float = 1.0,
        *,
        sync: Sync = "adapter",
        engine: Mapping[str, Any] | None = None,
    ) -> None:
        """Start the engine.

        Args:
            policy: The policy that speaks; its name must be a model that vLLM can load.
            folder: For the versions' files and nothing else.
            max_new_tokens: A reply is cut at this length.
            temperature: Sampling temperature; 0 takes the most likely token.
            sync: ``adapter`` hands vLLM the LoRA adapter, ``merged`` the whole weights with LoRA merged.
            engine: More arguments for ``vllm.LLM``, such as ``gpu_memory_utilization`` (default 0.4, which
                leaves room for the learner), ``max_model_len``, ``tensor_parallel_size``.

        Raises:
            ValueError: See `SyncedSampler`; or ``engine`` holds an argument that the sampler sets itself.
        """
        super().__init__(policy, folder, max_new_tokens, temperature, sync)
        reserved = sorted(set(engine or {}) & set(_OURS))
        if reserved:
            raise ValueError(f"expected engine arguments other than {', '.join(_OURS)}, got {reserved}; drop them")
        from vllm import LLM

        arguments: dict[str, Any] = {
            "gpu_memory_utilization": 0.4,
            "max_model_len": policy.context_length,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            **(engine or {}),
            "model": model_path(policy),
            "dtype": str(policy.model.dtype).removeprefix("torch."),
            "generation_config": "vllm",
            "logprobs_mode": "processed_logprobs",
        }
        if sync == "adapter":
            rank = lora_rank(policy)
            max_rank = next((r for r in _RANKS if r >= rank), None)
            if max_rank is None:
                raise ValueError(f"expected a LoRA rank of at most {_RANKS[-1]}, got {rank}; use sync 'merged'")
            arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": max_rank}
        self._llm = LLM(**arguments)
        self.context_length = min(policy.context_length, int(self._llm.model_config.max_model_len))

    def close(self) -> None:
        """Release the engine and remove the files."""
        del self._llm
        self._version = None
        self._versions.prune(keep=0)

    def _load(self, version: Version, former: Version | None) -> None:
        # An adapter's id is the serial of its version (see `Versions`). Whole weights have no id, so the prefix cache
        # is emptied: no keys and values of the old weights may survive.
        engine = self._llm.llm_engine
        if self._versions.sync == "adapter":
            engine.add_lora(self._request(version))
            if former is not None:
                engine.remove_lora(former.serial)
            return
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(version.path)})
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("expected vLLM to reset its prefix cache, got a refusal; let its requests finish first")

    def _request(self, version: Version) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(version.name, version.serial, str(version.path))

    def _generate(self, jobs: Sequence[Job], version: Version) -> list[Reply]:
        from vllm import SamplingParams

        adapter = self._request(version) if self._versions.sync == "adapter" else None
        prompts = [{"prompt_token_ids": job.tokens, "cache_salt": version.name} for job in jobs]
        parameters = [SamplingParams(detokenize=False, **self._parameters(job.seed)) for job in jobs]
        try:
            outputs = self._llm.generate(prompts, parameters, lora_request=adapter, use_tqdm=False)
        except BaseException:  # else interrupted requests go on, and come back with the next replies
            engine = self._llm.llm_engine
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise
        replies = []
        for output in outputs:
            (completion,) = output.outputs
            tokens = tuple(int(token) for token in completion.token_ids)
            scores = zip(tokens, completion.logprobs or (), strict=False)
            replies.append(Reply(tokens, tuple(float(score[token].logprob) for token, score in scores)))
        return replies


def model_path(policy: Policy) -> str:
    """Return what vLLM loads as the policy's base model: a folder or a hub name."""
    return str(resources.files("ppg_agents.models") / TINY) if policy.name == TINY else policy.name
