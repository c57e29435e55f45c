"""The policy's weights as files that another process can load, every version in its own folder.

Nothing here samples or learns.
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
        serial: Counts the versions published, from 1; never used twice in a run.
        name: Never used twice, in any run.
        path: The folder, absolute; never used twice.
    """

    number: int
    serial: int
    name: str
    path: Path


class Versions:
    """Writes a policy's weights whenever they have changed, and removes old versions."""

    # vLLM caches by name: a known adapter id keeps its old weights, and the prefix cache is keyed by (adapter name,
    # path), so a name used twice would continue from keys and values of older weights. Hence a new serial (the id),
    # name and path for every version, with the run in the name because servers outlive runs.

    def __init__(
        self, policy: Policy, folder: str | Path, sync: Sync, *, run: str | None = None, write: bool = True
    ) -> None:
        """Set what is written where; nothing is written yet.

        Args:
            policy: The policy whose weights are written.
            folder: Used for nothing else; versions that an earlier run left in it are removed.
            sync: ``adapter`` writes the LoRA adapter, ``merged`` the whole weights with LoRA merged.
            run: Part of every name; random by default. Processes that learn together share one.
            write: Whether this process writes; False where another process of the same ``run`` does.

        Raises:
            ValueError: ``sync`` is unknown or does not suit the policy.
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
        self._written: list[Version] = []

    def publish(self) -> Version:
        """Return the version of the current weights, written now unless it already was.

        Raises:
            RuntimeError: LoRA is merged at the moment, so there is no adapter to write.
            OSError: The folder cannot be written.
        """
        parameters = self.policy.parameters()
        if not parameters:
            raise RuntimeError("expected trainable weights, got none; call sync() outside policy.merged()")
        state = (self.policy.version, *(parameter._version for parameter in parameters))
        if self.current is not None and state == self._state:
            return self.current
        serial = self.current.serial + 1 if self.current else 1
        name = f"{_PREFIX}{self.run}-{self.policy.version}.{serial}"
        version = Version(self.policy.version, serial, name, self.folder / name)
        if self._write:
            self._save(version)
        self._written.append(version)
        self.current, self._state = version, state
        return version

    def prune(self, keep: int = 1) -> None:
        """Remove the folders of all but the newest ``keep`` versions."""
        while len(self._written) > keep:
            version = self._written.pop(0)
            if self._write:
                shutil.rmtree(version.path, ignore_errors=True)

    def _save(self, version: Version) -> None:
        if not self._written:
            for leftover in self.folder.glob(f"{_PREFIX}*"):
                shutil.rmtree(leftover, ignore_errors=True)
        version.path.mkdir(parents=True)
        with quiet():  # this runs at every learning step
            (self.policy.save if self.sync == "adapter" else self.policy.save_merged)(version.path)


def lora_rank(policy: Policy) -> int:
    """Return the largest LoRA rank of the policy; 0 without LoRA."""
    configs = getattr(policy.model, "peft_config", {}).values()
    return max((r for c in configs for r in (c.r, *(c.rank_pattern or {}).values())), default=0)


def _check_adapter(policy: Policy) -> None:
    configs = list(getattr(policy.model, "peft_config", {}).values())
    if not configs:
        raise ValueError("expected a policy with LoRA for sync 'adapter', got one without; use sync 'merged'")
    for config in configs:
        if any(getattr(config, more, None) for more in ("use_dora", "modules_to_save", "target_parameters")):
            raise ValueError(
                "expected plain LoRA on linear layers for sync 'adapter', got DoRA, saved modules or experts; use sync "
                "'merged'"
            )
