"""Saves a model's weights (only the adapter, if it has one) and its tokenizer in a folder.

Safetensors and JSON only, no pickles. `loading` loads such a folder again.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ppg_agents.models.loading import quiet

log = logging.getLogger(__name__)


def save_adapter(model: Any, tokenizer: Any, name: str, folder: Path) -> None:
    """Write a PEFT adapter and the tokenizer.

    Args:
        model: A PEFT model around a transformers causal LM.
        tokenizer: Its tokenizer.
        name: The base model's name, by which `loading` finds it again.
        folder: Made if it does not exist.
    """
    for config in model.peft_config.values():
        config.base_model_name_or_path = name
    model.save_pretrained(str(folder), save_embedding_layers=False)  # "auto" asks the network
    tokenizer.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)


def save_plain(model: Any, tokenizer: Any, folder: Path, end_of_turn: int) -> None:
    """Write a whole model and its tokenizer, all of it or nothing.

    Args:
        model: A transformers causal LM.
        tokenizer: Its tokenizer.
        folder: Written beside it first, in ``.<name>.tmp``, and then renamed; if it holds files, moved in among them.
        end_of_turn: The token that closes a reply, at which whoever generates with the model is to stop.
    """
    folder = folder.absolute()
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with _stopping_at(model, end_of_turn):
            model.save_pretrained(str(aside))
        tokenizer.save_pretrained(str(aside))
        if folder.exists() and any(folder.iterdir()):
            for path in aside.iterdir():
                os.replace(path, folder / path.name)
        else:
            os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _stopping_at(model: Any, end_of_turn: int) -> Iterator[None]:
    """Give the model a generation config that can be saved and stops at this token, while the context lasts."""
    # A base model stops at its own end of text, not at the end of a turn that it was taught here: without the token it
    # would go on to write the partner's lines. And some published configs have a temperature without do_sample, which
    # transformers reads, but refuses to write.
    shipped = model.generation_config
    config = type(shipped)(**shipped.to_diff_dict())
    stops = [] if config.eos_token_id is None else config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    config.eos_token_id = [end_of_turn, *(stop for stop in stops if stop != end_of_turn)]
    if not _can_be_saved(config):
        config.do_sample = True
    if not _can_be_saved(config):
        log.warning("the model's generation config is not valid; saving only the tokens at which it stops")
        tokens = {key: getattr(shipped, key) for key in ("bos_token_id", "pad_token_id")}
        config = type(shipped)(eos_token_id=config.eos_token_id, **tokens)
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = shipped


def _can_be_saved(config: Any) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def read_into(model: Any, folder: Path, device: torch.device) -> None:
    """Read back what `save_adapter` or `save_plain` wrote, into a model that is already loaded.

    Raises:
        OSError: The folder has no weights.
        ValueError: The weights belong to another architecture or another LoRA.
    """
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        from safetensors.torch import load_file

        state = load_file(folder / "adapter_model.safetensors", device=str(device))
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        if {k: v.shape for k, v in expected.items()} != {k: v.shape for k, v in state.items()}:
            raise ValueError(f"expected this policy's adapter in {folder}, got other names or shapes")
        set_peft_model_state_dict(model, state)
        return
    # Not the file's tensors by name: transformers saves some models under other names than those of their parameters
    # (experts one by one), and large ones in several files. It alone knows how to read them back.
    with quiet():
        saved, report = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    weights, own = dict(saved.named_parameters()), dict(model.named_parameters())
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if report["missing_keys"] or {name: tuple(weight.shape) for name, weight in own.items()} != shapes:
        raise ValueError(f"expected the weights of this policy in {folder}, got other names or shapes")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
