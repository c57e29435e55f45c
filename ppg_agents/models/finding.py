"""Finds a causal language model: in the package, in a folder or on the hub. Loads nothing, and never imports torch."""

from __future__ import annotations

import json
import logging
from importlib import resources
from pathlib import Path

from ppg_agents.nearest import did_you_mean

log = logging.getLogger(__name__)

TINY = "tiny"
_PROBE_SECONDS = 10.0


def base_of(name_or_path: str | Path) -> tuple[str, Path | None]:
    """Return the base model's name, and the adapter's folder if a PEFT folder was named.

    A folder becomes an absolute path, so that whatever is saved with it loads from anywhere.
    """
    name, adapter = str(name_or_path), None
    if (Path(name) / "adapter_config.json").is_file():
        adapter = Path(name)
        name = str(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])
    is_folder = name != TINY and bool(name.strip()) and Path(name).is_dir()
    return (str(Path(name).resolve()) if is_folder else name), adapter


def locate(name: str) -> str:
    """Return the folder or the hub name under which transformers finds the model.

    The hub is asked once, with a short timeout; without a connection, transformers itself would retry each file for
    most of a minute.

    Raises:
        FileNotFoundError: It is neither a model folder nor a model on the hub.
        PermissionError: Its licence has not been accepted.
        ConnectionError: The hub cannot be reached, and the model is not in the local cache.
    """
    if name == TINY:
        return str(resources.files("ppg_agents.models") / TINY)
    expected = f"expected {TINY!r}, a model folder or a hub name, got {name!r}"
    if name.strip() and Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise FileNotFoundError(
                f"{expected}: the folder has no config.json; name one with a model's config.json, tokenizer and "
                "weights, or a run's folder with config.toml and checkpoints/"
            )
        return name
    hint = _nearest(name)
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_PROBE_SECONDS)
    except HFValidationError:
        raise FileNotFoundError(f"{expected}: no such folder{hint}") from None
    except GatedRepoError:
        raise PermissionError(f"{name}: its licence must be accepted on the hub first, then log in there") from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(f"{expected}: the hub has no such model, or it is private{hint}") from None
    except EntryNotFoundError:
        raise FileNotFoundError(f"{expected}: there is no config.json; an adapter is given as a folder") from None
    except Exception as error:  # versions of the hub's client raise different errors for a failed connection
        if isinstance(cached := try_to_load_from_cache(name, "config.json"), str):
            log.info("the hub cannot be reached; reading %s from the local cache", name)
            return str(Path(cached).parent)
        if isinstance(error, HfHubHTTPError):
            why = f"answered with status {error.response.status_code}"
        else:
            why = "is switched off" if isinstance(error, OfflineModeIsEnabled) else f"cannot be reached ({error})"
        raise ConnectionError(
            f"{expected}: no such folder, not in the local cache, and the hub {why}; download it and name the "
            f"folder{hint}"
        ) from None
    return name


def _nearest(name: str) -> str:
    """Suggest what was probably meant: the embedded model, or a folder beside the one named."""
    parent = Path(name).parent
    folders = [str(path) for path in parent.iterdir() if path.is_dir()] if name.strip() and parent.is_dir() else []
    return did_you_mean(Path(name), [TINY, *folders])
