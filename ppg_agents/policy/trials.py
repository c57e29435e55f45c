"""What a model is tried on when it is loaded, so that one that cannot be used is refused in one line, before any work.

Pure functions over a model and its tokenizer; nothing here is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ppg_agents.policy.prompts import PromptFormat


def check_tokens(tokenizer: Any, form: PromptFormat, rows: int) -> None:
    """Raise unless every token that a conversation can contain has an embedding.

    A tokenizer may have more special tokens than the model has rows (an image token in a text model, padding): those
    that no prompt contains never get through `PromptFormat.plain`.

    Args:
        tokenizer: The tokenizer.
        form: Its prompts.
        rows: Embeddings of the model.

    Raises:
        ValueError: A token has none; the message names it.
    """
    prompt = form.first("i", "m") + form.lead + form.end_of_turn + form.next("m")
    harmless = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content not in prompt}
    missing = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows and token not in harmless}
    if missing:
        token = min(missing, key=lambda name: missing[name])
        raise ValueError(
            f"expected an embedding for every token, got {rows} embeddings and token {token!r} with id "
            f"{missing[token]} ({len(missing)} such tokens); use the tokenizer that belongs to this model, or call the "
            "model's resize_token_embeddings and save it"
        )


def check_head(lm: Any, transformer: Callable[..., Tensor], logits: Callable[[Tensor], Tensor], *, lora: bool) -> None:
    """Raise unless the model runs on four tokens, and ``logits`` of ``transformer`` are what it returns.

    Raises:
        ValueError: It does not; the message says why.
    """
    ids = _four_tokens(lm)
    with _refusing(lm, "runs", lora), torch.no_grad():
        expected = lm(input_ids=ids, use_cache=False).logits.float()
        got = logits(transformer(input_ids=ids, use_cache=False)).float()
    if expected.shape != got.shape or not torch.allclose(expected, got, rtol=1e-2, atol=1e-2):
        raise ValueError(
            f"expected a causal LM whose logits are its head on the last hidden state, got {type(lm).__name__}, whose "
            "logits differ; choose another architecture"
        )


def check_learning(
    lm: Any, parameters: Sequence[nn.Parameter], log_probs: Callable[[Tensor, Tensor], Tensor], *, lora: bool
) -> None:
    """Raise unless a gradient can be computed on four tokens; leaves the random state and all gradients alone.

    Raises:
        ValueError: It cannot; the message says why.
    """
    ids = _four_tokens(lm)
    # The gradient of an early weight passes through all that follow, and is small.
    with _refusing(lm, "learns", lora), torch.random.fork_rng([ids.device] if ids.device.type == "cuda" else []):
        torch.autograd.grad(log_probs(ids, torch.ones_like(ids)).sum(), parameters[:1], allow_unused=True)


def _four_tokens(lm: Any) -> Tensor:
    rows = len(lm.get_input_embeddings().weight)
    return torch.arange(4, device=next(lm.parameters()).device)[None] % rows


@contextmanager
def _refusing(lm: Any, verb: str, lora: bool) -> Iterator[None]:
    """Turn what a model raises into one line that says what to do."""
    try:
        yield
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        advice = "name other layers in lora.targets, or set lora.rank=0" if lora else "choose another architecture"
        raise ValueError(
            f"expected a causal LM that {verb} on four tokens, got {type(lm).__name__}, which raises "
            f"{type(error).__name__}: {' '.join(str(error).split())[:160]}; {advice}"
        ) from error
