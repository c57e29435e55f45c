"""A causal language model with LoRA as a policy: its prompts and replies as tokens, and their log-probabilities.

One conversation is one token sequence, scored in one forward pass. Replies arrive as the token ids that were
sampled; nothing here draws a token or takes an optimiser step. `models` handles files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ppg_agents.config.settings import LoraSettings
from ppg_agents.models import saving
from ppg_agents.models.finding import TINY, base_of
from ppg_agents.models.loading import Kernels, Quantisation, load_base
from ppg_agents.policy import trials
from ppg_agents.policy.lora import Originals, adapted_layers, add_lora, bypass, dropout, fuse, merge
from ppg_agents.policy.prompts import trainable_format

DEFAULT_LORA = LoraSettings()

__all__ = ["TINY", "LoraSettings", "Policy", "add_lora"]


class Policy:
    """A causal language model that speaks for a persona.

    Attributes:
        model: The transformers model, wrapped by PEFT when it has LoRA.
        tokenizer: Its tokenizer.
        name: Name of the model loaded; saved as the adapter's base model.
        format: The chat template around the content (see `prompts`).
        config: The language model's transformers configuration.
        device: Where the weights are.
        end_of_turn_id: The token that closes a reply.
        pad_id: The token that pads a batch; always one that has an embedding.
        context_length: Longest conversation, in tokens.
        version: Optimiser steps taken; whoever takes a step increments it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "",
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Wrap a model (with or without LoRA) and its tokenizer.

        Args:
            model: A transformers causal LM or a PEFT model around one.
            tokenizer: A tokenizer with a chat template.
            name: Name or path of the base model.
            template_options: Extra variables for the chat template.

        Raises:
            ValueError: The chat template cannot be trained on (see `prompts.trainable_format`), a token of the
                tokenizer has no embedding, the model's head is more than a linear layer with known scalings, or the
                LoRA variant cannot be merged.
        """
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.version = 0
        self.format = trainable_format(tokenizer, template_options)
        self.end_of_turn_id = int(tokenizer.convert_tokens_to_ids(self.format.end_of_turn))
        if self._encode(f"{self.format.end_of_turn}\n")[:1] != [self.end_of_turn_id]:
            raise ValueError(f"expected a tokenizer that encodes {self.format.end_of_turn!r} as one token, got several")
        self._lm = model.get_base_model() if hasattr(model, "peft_config") else model
        rows = len(self._lm.get_input_embeddings().weight)
        trials.check_tokens(tokenizer, self.format, rows)
        pad = tokenizer.pad_token_id
        self.pad_id = int(self.end_of_turn_id if pad is None or pad >= rows else pad)
        self.config = self._lm.config.get_text_config()
        self.context_length = int(getattr(self.config, "max_position_embeddings", None) or 2**31 - 1)
        self.device = next(model.parameters()).device
        base = self._lm.base_model
        self._body = self._lm.model if base is self._lm and hasattr(base, "model") else base  # as in Llama 4
        self._lora = adapted_layers(model)
        self._merged: Originals | None = None
        self._checkpointed: list[nn.Module] = []
        trials.check_head(self._lm, self.transformer, self.logits, lora=bool(self._lora))

    @classmethod
    def load(
        cls,
        name_or_path: str | Path = TINY,
        *,
        lora: LoraSettings | None = DEFAULT_LORA,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        quantisation: Quantisation = "none",
        chat_template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        kernels: Kernels = "none",
    ) -> Policy:
        """Load a model by folder or hub name and put LoRA on it. Code that comes with a model is never run.

        Args:
            name_or_path: ``"tiny"`` (the embedded model), a Hugging Face model, or a folder that `save` wrote,
                whose base model is loaded first.
            lora: LoRA to create, or None to train all weights; ignored for a folder that holds an adapter.
            device: Default: CUDA if available, else CPU.
            dtype: Default: bfloat16 on CUDA, else float32. LoRA weights are float32 either way.
            seed: Seed for LoRA's randomly initialised half.
            quantisation: ``"4bit"`` keeps the base weights in 4 bits (bitsandbytes, CUDA); needs LoRA.
            chat_template: Jinja text, or a path to it, in place of the tokenizer's own.
            template_options: Extra variables for the template; ``{"enable_thinking": True}`` turns
                reasoning on.
            kernels: ``"liger"`` computes norms and MLPs with liger-kernel (CUDA).

        Raises:
            FileNotFoundError: Neither a model folder nor a model on the hub.
            ConnectionError: The hub cannot be reached, and the model is not in the local cache.
            ModuleNotFoundError: An option needs a package that is not installed.
            ValueError: See `Policy`; or an option does not work here.
        """
        name, adapter = base_of(name_or_path)
        if quantisation != "none" and lora is None and adapter is None:
            raise ValueError(f"quantisation {quantisation!r}: expected LoRA, got training of all weights; give a rank")
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model, tokenizer = load_base(
            name,
            device=target,
            dtype=dtype or (torch.bfloat16 if target.type == "cuda" else torch.float32),
            quantisation=quantisation,
            adapter=adapter,
            chat_template=chat_template,
            kernels=kernels,
        )
        if adapter is not None:
            from peft import PeftModel

            try:
                model = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
            except RuntimeError as error:  # torch names every tensor, over many lines
                raise ValueError(
                    f"{adapter}: expected an adapter for {name}, got one with other shapes (for example embeddings of "
                    "added tokens); merge it into its base model with PEFT, and load that"
                ) from error
        elif lora is not None:
            model = add_lora(model, lora, seed)
        return cls(model, tokenizer, name=name, template_options=template_options)

    def first_prompt(self, instruction: str, message: str) -> list[int]:
        """Return the tokens from the start of the conversation to the first reply.

        Args:
            instruction: The role-play instruction.
            message: The partner's opening line; may be empty.
        """
        return self._encode(self.format.first(instruction, message))

    def next_prompt(self, message: str) -> list[int]:
        """Return the tokens between a reply's end-of-turn token and the next reply."""
        return self._encode(self.format.end_of_turn + self.format.next(message))[1:]

    def encode_reply(self, text: str) -> list[int]:
        """Return the tokens of a logged reply, end-of-turn included. Sampled replies have their token ids: use those.

        If the template starts every reply with an empty reasoning block, so does this.
        """
        return [*self._encode(self.format.lead + self.format.plain(text)), self.end_of_turn_id]

    def spoken(self, token_ids: Sequence[int]) -> str:
        """Return what partner and judge hear of a reply: its text without control tokens and reasoning.

        A reply cut off while it reasons says nothing: ``""``.
        """
        if self.format.reasoning is not None:
            text = str(self.tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False))
            heard = self.format.heard(text)
            if heard != text:
                return self.format.control_free(heard)
        plain = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(plain)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def parameters(self) -> list[nn.Parameter]:
        """Return the trainable weights."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def transformer(self, **inputs: Any) -> Tensor:
        """Run the model without its head; return hidden states [B, L, hidden].

        LoRA's dropout and gradient checkpointing are only active while gradients are recorded.
        """
        learning = torch.is_grad_enabled()
        with dropout(self._lora, learning), _training(self._checkpointed if learning else []):
            return cast(Tensor, self._body(**inputs).last_hidden_state)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return next-token logits [..., vocab] of hidden states [..., hidden], in float32 or wider."""
        logits: Tensor = self._lm.get_output_embeddings()(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if scale := getattr(self.config, "logit_scale", None):
            logits = logits * scale
        if scale := getattr(self.config, "logits_scaling", None):
            logits = logits / scale
        if cap := getattr(self.config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    def log_probs(
        self,
        ids: Tensor,
        attention: Tensor,
        token_mask: Tensor | None = None,
        *,
        temperature: float = 1.0,
        chunk: int | None = None,
    ) -> Tensor:
        """Return ``log p(ids[:, i] | ids[:, :i])`` at the selected positions, 0 elsewhere.

        The head runs on selected positions only, in chunks that are recomputed in the backward pass, so logits
        [B, L, vocab] are never held. Differentiable in `parameters`.

        Args:
            ids: Token ids [B, L], padded on the right.
            attention: Bool [B, L], True on real tokens.
            token_mask: Bool [B, L], the positions to score; default every real token. Position 0 has no past and
                is never scored.
            temperature: Logits are divided by it.
            chunk: Positions per chunk; by default as many as fit 32 MiB (CPU) or 512 MiB (CUDA) of logits.

        Returns:
            Float32 (float64 for a float64 model) [B, L].

        Raises:
            ValueError: Shapes differ, or a row is padded on the left.
        """
        ids, token_mask = self._select(ids, attention, attention if token_mask is None else token_mask)
        return self._scores(ids, token_mask, temperature, chunk)[0]

    def log_probs_and_entropies(
        self, ids: Tensor, attention: Tensor, token_mask: Tensor, *, temperature: float = 1.0, learn: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return `log_probs`, and from the same pass the entropy of the distribution that each token was drawn from.

        Args:
            ids: Token ids [B, L], padded on the right.
            attention: Bool [B, L], True on real tokens.
            token_mask: Bool [B, L], the positions to score.
            temperature: Logits are divided by it.
            learn: Whether the entropies are differentiable too, which keeps one more [positions, vocab] per chunk.

        Returns:
            Log-probs and entropies −Σ p·log p over the vocabulary, in nats, both [B, L], 0 elsewhere.
        """
        ids, token_mask = self._select(ids, attention, token_mask)
        log_probs, entropies = self._scores(ids, token_mask, temperature, entropy="learned" if learn else "measured")
        return log_probs, entropies

    def states(self, ids: Tensor, attention: Tensor, token_mask: Tensor) -> Tensor:
        """Return the last hidden states that predict the selected tokens: what a value head reads.

        Args:
            ids: Token ids [B, L], padded on the right.
            attention: Bool [B, L], True on real tokens.
            token_mask: Bool [B, L], N tokens; each one's state is that of the token before it.

        Returns:
            [N, hidden], row by row, in the model's precision.

        Raises:
            ValueError: Shapes differ, or a row is padded on the left.
        """
        return self._states(*self._select(ids, attention, token_mask))

    def _select(self, ids: Tensor, attention: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids and mask on the policy's device, without padding and without each row's first token."""
        if ids.ndim != 2 or attention.shape != ids.shape or token_mask.shape != ids.shape:
            shapes = (tuple(ids.shape), tuple(attention.shape), tuple(token_mask.shape))
            raise ValueError(f"expected ids, attention and token_mask of one shape [B, L], got {shapes}")
        ids, attention, token_mask = (x.to(self.device) for x in (ids, attention.bool(), token_mask.bool()))
        if bool((attention[:, 1:] & ~attention[:, :-1]).any()):
            raise ValueError("expected rows padded on the right, got padding before a token; pad at the end")
        token_mask = token_mask & attention
        token_mask[:, 0] = False
        return ids, token_mask

    def _states(self, ids: Tensor, token_mask: Tensor) -> Tensor:
        with fuse(self._lora):
            return self.transformer(input_ids=ids[:, :-1], use_cache=False)[token_mask[:, 1:]]

    def _scores(
        self,
        ids: Tensor,
        token_mask: Tensor,
        temperature: float,
        chunk: int | None = None,
        entropy: Literal["none", "measured", "learned"] = "none",
    ) -> Tensor:
        """Return log-probs, and if asked for entropies, as one tensor [1 or 2, B, L], 0 outside the mask."""
        kinds = 1 if entropy == "none" else 2
        if not bool(token_mask.any()):
            return torch.zeros((kinds, *ids.shape), device=self.device)
        hidden = self._states(ids, token_mask)
        targets = ids[token_mask]
        size = chunk or max(1, (2**27 if self.device.type == "cuda" else 2**23) // self.config.vocab_size)

        def score(h: Tensor, wanted: Tensor) -> Tensor:
            logits = self.logits(h)
            logits = logits if temperature == 1.0 else logits / temperature
            log_probs = logits.gather(-1, wanted[:, None])[:, 0] - logits.logsumexp(-1)
            if entropy == "none":
                return log_probs[None]
            # Clamped, since a token that is ruled out would give 0 · −∞. In place where nothing is learned: this is as
            # large as the logits.
            if entropy == "learned":
                every = logits.log_softmax(-1).clamp(min=-1e4)
                return torch.stack([log_probs, -(every.exp() * every).sum(-1)])
            every = logits.detach().log_softmax(-1).clamp_(min=-1e4)
            return torch.stack([log_probs, -every.exp().mul_(every).sum(-1)])

        pieces = []
        for i in range(0, len(targets), size):
            some = (hidden[i : i + size], targets[i : i + size])
            if len(targets) > size and torch.is_grad_enabled():
                pieces.append(checkpoint(score, *some, use_reentrant=False, preserve_rng_state=False))
            else:
                pieces.append(score(*some))
        selected = torch.cat(pieces, 1)
        return selected.new_zeros((kinds, *ids.shape)).masked_scatter(token_mask.expand(kinds, *ids.shape), selected)

    @property
    def has_reference(self) -> bool:
        """Whether `reference_log_probs` works: all that learns is LoRA, so the model it started from is still there."""
        trained = (name for name, p in self.model.named_parameters() if p.requires_grad)
        return bool(self._lora) and all("lora_" in name for name in trained)

    def reference_log_probs(
        self,
        ids: Tensor,
        attention: Tensor,
        token_mask: Tensor | None = None,
        *,
        temperature: float = 1.0,
    ) -> Tensor:
        """Return `log_probs` without LoRA and without gradients: those of the reference model of a KL term.

        Uses the same weights with the adapter off; there is no second copy of the model.

        Raises:
            ValueError: The policy trains other weights than LoRA's, so the model it started from is gone.
        """
        if not self.has_reference:
            trained = [name for name, p in self.model.named_parameters() if p.requires_grad and "lora_" not in name]
            raise ValueError(
                f"expected a policy with LoRA, whose base model is the reference, got one that trains {trained[:1]} "
                "and so on; use LoRA, or load the reference as a second policy"
            )
        with torch.no_grad(), bypass(self._lora, self._merged or []):
            return self.log_probs(ids, attention, token_mask, temperature=temperature)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Fold LoRA into the base weights while the context lasts, for fast sampling.

        The base weights come back bit for bit (see `lora.merge`). Holds a second copy of the adapted weights
        meanwhile. Nesting is harmless. Quantised base weights are left alone, so sampling computes what learning
        computes; that costs two more small matrix products per adapted layer and token.
        """
        # A token costs one product per layer instead of three, which pays when thousands are sampled between two
        # updates. `_merged` keeps the originals, so that `reference_log_probs` works in here too.
        if self._merged is not None or not self._lora:
            yield
            return
        try:
            with merge(self._lora) as self._merged:
                yield
        finally:
            self._merged = None

    def gradient_checkpointing(self, active: bool = True) -> None:
        """Keep only each block's input while gradients are recorded, and recompute the block in the backward pass.

        Takes about a third more time per step; sampling and scoring without gradients are not affected.

        Raises:
            ValueError: The architecture does not support it.
        """
        if not active:
            self._lm.gradient_checkpointing_disable()
            self._checkpointed = []
            return
        contexts = lambda: (nullcontext(), fuse(self._lora))  # noqa: E731 (the recomputation is fused too)
        self._lm.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
        self._lm.disable_input_require_grads()  # frozen embeddings need no gradient
        self._checkpointed = [m for m in self._lm.modules() if getattr(m, "gradient_checkpointing", False)]

    def save(self, folder: str | Path) -> None:
        """Write the PEFT adapter (or, without LoRA, the model) and the tokenizer, as safetensors and JSON."""
        if hasattr(self.model, "peft_config"):
            saving.save_adapter(self.model, self.tokenizer, self.name, Path(folder))
        else:
            saving.save_plain(self._lm, self.tokenizer, Path(folder), self.end_of_turn_id)

    def save_merged(self, folder: str | Path) -> None:
        """Write the model with LoRA folded into its weights, and the tokenizer, as a plain Hugging Face folder.

        Raises:
            ValueError: The base weights are quantised.
        """
        if any(layer.quantised for layer in self._lora):
            raise ValueError(
                "expected base weights in 16 or 32 bits to merge into, got quantised ones; "
                "save the adapter and load it without quantisation"
            )
        with self.merged():
            saving.save_plain(self._lm, self.tokenizer, Path(folder), self.end_of_turn_id)

    def load_weights(self, folder: str | Path) -> None:
        """Load what `save` wrote into this policy's weights.

        Raises:
            FileNotFoundError: No weights in the folder.
            ValueError: They belong to another architecture or LoRA.
        """
        saving.read_into(self.model, Path(folder), self.device)

    def try_learning(self) -> None:
        """Compute a gradient on four tokens, so that a model that cannot be trained is refused before any work.

        Raises:
            ValueError: The model cannot be trained with this LoRA; the message has the reason.
        """
        trials.check_learning(self._lm, self.parameters(), self.log_probs, lora=bool(self._lora))


@contextmanager
def _training(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put these modules, but not their children, in training mode."""
    for module in modules:
        module.training = True
    try:
        yield
    finally:
        for module in modules:
            module.training = False
