"""The policy's weights as files that another process can load: every version in a folder of its own.

A name and a path are never used twice, because what loads them remembers both: vLLM's prefix cache is keyed by
(adapter name, adapter path), and an adapter id that is known keeps its weights. Nothing here samples or learns.
"""

from __future__ import annotations

import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ppg_agents.models.loading import quiet
from ppg_agents.nearest import not_one_of
from ppg_agents.policy.policy import Policy

Sync = Literal["adapter", "merged"]

_PREFIX = "ppg-"


@dataclass(frozen=True)
class Version:
    """One state of a policy's weights.

    Attributes:
        number: The policy's version: optimiser steps taken.
        serial: Counts what was written, from 1; a serial is given once.
        name: Given once, in any run.
        path: The folder, absolute; given once.
    """

    number: int
    serial: int
    name: str
    path: Path


class Versions:
    """Writes a policy's weights whenever they have changed, and removes what nobody needs any more."""

    def __init__(
        self, policy: Policy, folder: str | Path, sync: Sync, *, run: str | None = None, write: bool = True
    ) -> None:
        """Say what is to be written where.

        Args:
            policy: Whose weights.
            folder: For this alone; what an earlier run left in it is removed.
            sync: ``adapter`` writes the LoRA adapter, ``merged`` the whole weights with LoRA merged.
            run: Part of every name; default random. Processes that learn the same thing together share one.
            write: Whether this process writes; False where another one of the same ``run`` does.

        Raises:
            ValueError: An unknown ``sync``, or one that does not suit the policy.
        """
        if sync not in get_args(Sync):
            raise ValueError(not_one_of("sync", sync, get_args(Sync)))
        if sync == "adapter":
            _check_adapter(policy)
        elif getattr(policy.model, "is_quantized", False):
            raise ValueError(
                "expected full-precision base weights for sync 'merged', got quantised ones; use 'adapter'"
            )
        self.policy = policy
        self.sync: Sync = sync
        self.folder = Path(folder).resolve()
        self.run = run or uuid.uuid4().hex[:8]
        self.current: Version | None = None
        self._write = write
        self._state: tuple[int, ...] = ()
        self._kept: list[Version] = []

    def publish(self) -> Version:
        """Return the version of the weights as they are, written now unless they were already.

        Raises:
            RuntimeError: LoRA is merged at the moment, so that there is no adapter to write.
            OSError: The folder cannot be written.
        """
        parameters = self.policy.parameters()
        if not parameters:
            raise RuntimeError("expected trainable weights, got none; call sync() outside of policy.merged()")
        state = (self.policy.version, *(parameter._version for parameter in parameters))
        if self.current is not None and state == self._state:
            return self.current
        serial = self.current.serial + 1 if self.current else 1
        name = f"{_PREFIX}{self.run}-{self.policy.version}.{serial}"
        version = Version(self.policy.version, serial, name, self.folder / name)
        if self._write:
            self._save(version)
        self._kept.append(version)
        self.current, self._state = version, state
        return version

    def prune(self, keep: int = 1) -> None:
        """Remove the folders of all versions but the newest ``keep``."""
        while len(self._kept) > keep:
            version = self._kept.pop(0)
            if self._write:
                shutil.rmtree(version.path, ignore_errors=True)

    def _save(self, version: Version) -> None:
        if not self._kept:
            for left in self.folder.glob(f"{_PREFIX}*"):
                shutil.rmtree(left, ignore_errors=True)
        version.path.mkdir(parents=True)
        with quiet():  # once per learning step
            (self.policy.save if self.sync == "adapter" else self.policy.save_merged)(version.path)


def lora_rank(policy: Policy) -> int:
    """Return the largest rank of the policy's adapters; 0 without LoRA."""
    configs = getattr(policy.model, "peft_config", {}).values()
    return max((r for c in configs for r in (c.r, *(c.rank_pattern or {}).values())), default=0)


def _check_adapter(policy: Policy) -> None:
    configs = list(getattr(policy.model, "peft_config", {}).values())
    if not configs:
        raise ValueError("expected a policy with LoRA for sync 'adapter', got one without; use sync 'merged'")
    for config in configs:
        if getattr(config, "use_dora", False) or getattr(config, "modules_to_save", None):
            raise ValueError("expected plain LoRA for sync 'adapter', got DoRA or saved modules; use sync 'merged'")
