"""Loads a causal language model and its tokenizer.

Never runs code that comes with a model. Adding LoRA and rendering prompts happen elsewhere.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from ppg_agents.models.finding import locate

Quantisation = Literal["none", "4bit"]
Kernels = Literal["none", "liger"]


def load_base(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantisation: Quantisation = "none",
    adapter: Path | None = None,
    chat_template: str | None = None,
    kernels: Kernels = "none",
) -> tuple[Any, Any]:
    """Load a model and its tokenizer.

    Args:
        name: ``"tiny"``, a model folder or a hub name.
        device: Where the weights go.
        dtype: Of the weights; of the computation if they are quantised.
        quantisation: ``"4bit"`` stores the weights as NF4 with double quantisation (arXiv 2305.14314).
        adapter: A PEFT folder; its tokenizer, if it has one, is used, with the template it was trained on.
        chat_template: Jinja text, or a path to it; replaces the tokenizer's own.
        kernels: ``"liger"`` swaps this model's norms and MLPs for liger-kernel's fused ones.

    Raises:
        FileNotFoundError: The name is neither a model folder nor a model on the hub.
        ConnectionError: The hub cannot be reached, and the model is not in the local cache.
        ModuleNotFoundError: An option needs a package that is not installed.
        ValueError: An option is unknown or needs a CUDA device, or the tokenizer cannot be loaded.
    """
    path = locate(name)  # before transformers is imported, which takes seconds
    options = _options(quantisation, kernels, device, dtype)
    trained_with = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    tokenizer = _tokenizer(str(adapter) if trained_with else path)

    from transformers import AutoModelForCausalLM

    if chat_template is not None:
        is_path = "{" not in chat_template and Path(chat_template).is_file()
        tokenizer.chat_template = Path(chat_template).read_text() if is_path else chat_template
    with quiet(Path(path).is_dir()):  # a download keeps its progress bar
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False, **options)
    if not options:
        model = model.to(device)
    if kernels == "liger":
        _use_liger(model)
    return model, tokenizer


def _options(quantisation: str, kernels: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the keyword arguments of a quantised load; raise for an option that does not work here."""
    for option, value, known, package in (
        ("quantisation", quantisation, "4bit", "bitsandbytes"),
        ("kernels", kernels, "liger", "liger_kernel"),
    ):
        if value not in ("none", known):
            raise ValueError(f"{option}: expected 'none' or {known!r}, got {value!r}")
        if value == "none":
            continue
        if importlib.util.find_spec(package) is None:
            install = package.replace("_", "-")
            todo = f"pip install {install}"
            if device.type != "cuda":  # installing would not help
                todo += f", on a machine with a CUDA device (this run's is {device}), or use {option} 'none'"
            raise ModuleNotFoundError(
                f"{option} {value!r} needs {install}, which is not installed; {todo}", name=package
            )
        if device.type != "cuda":
            raise ValueError(f"{option} {value!r}: expected a CUDA device, got {device}; use {option} 'none'")
    if quantisation == "none":
        return {}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _use_liger(model: Any) -> None:
    """Swap this model's norms and MLPs; swapping rotary embeddings would change every model of its family."""
    liger = importlib.import_module("liger_kernel.transformers.monkey_patch")
    if (kind := model.config.model_type) not in liger.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"kernels 'liger': expected a family that liger-kernel knows, got {kind!r}; use kernels 'none'"
        )
    liger._apply_liger_kernel_to_instance(
        model=model, rope=False, cross_entropy=False, fused_linear_cross_entropy=False
    )


def _tokenizer(path: str) -> Any:
    """Load a tokenizer; name the folder if it is broken, which transformers' own error does not."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason if len(reason) <= 160 else reason[:160] + "…"
        raise ValueError(
            f"{path}: expected a tokenizer that transformers can load, got {reason}; put the model's "
            "tokenizer.json and tokenizer_config.json there, and check that config.json is the model's"
        ) from error


@contextmanager
def quiet(active: bool = True) -> Iterator[None]:
    """Hide the progress bar of reading or writing weights, if ``active``."""
    from transformers.utils import logging as progress

    if not active or not progress.is_progress_bar_enabled():
        yield
        return
    progress.disable_progress_bar()
    try:
        yield
    finally:
        progress.enable_progress_bar()
