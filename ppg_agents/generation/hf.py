"""Sampling with the transformers model itself; its key-value cache is kept from turn to turn.

Nothing here learns or talks to an environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ppg_agents.generation import Sample
from ppg_agents.policy.policy import Policy

_SLOTS = 128  # per row at first; doubled when a conversation outgrows them
_TRIAL = {True: 1e-2, False: 0.2}  # nats per token that rounding alone does not reach, in 32 bits and in fewer
_TRIAL_TOKENS = 16
_FEW = 1 / 3  # finished rows ride along until so few are left that gathering those is cheaper


# Why slots: conversations have prompts and replies of different lengths, so a cache that only appends would leave
# padding between the turns of the shorter ones. Slot j of a row always holds token j of that conversation, so positions
# need no correction and no turn is read twice. Padding goes past the row's end: the causal mask hides it there, and the
# row's next tokens overwrite it.
class SlotCache(Cache):  # type: ignore[misc]
    """Keys and values of n conversations, addressed by (row, slot).

    `aim` sets where the next forward pass writes and how far it reads; the model then calls `update` once per layer.
    """

    def __init__(self, n: int) -> None:
        super().__init__(layers=[])
        self.n = n
        self.slots = _SLOTS
        self._stores: list[tuple[Tensor, Tensor]] = []
        self._rows: Tensor | None = None
        self._positions = torch.empty(0, 0, dtype=torch.long)
        self._cells: Tensor | None = None
        self._width = 0

    def aim(self, rows: Tensor | None, positions: Tensor, width: int) -> None:
        """Set the cells of the next pass.

        Args:
            rows: Conversations in the pass, long [A]; None for all of them in order.
            positions: Slots to write, long [A, Q].
            width: Slots to read, from slot 0; every slot written lies below it.
        """
        if width > self.slots:
            self._grow(width)
        self._rows = rows
        self._positions = positions
        self._cells = None
        self._width = width

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values [A, H, Q, D]; return those to attend to, [A, H, width, D]."""
        if layer_idx == len(self._stores):
            self._stores.append((self._empty(key_states), self._empty(value_states)))
        keys, values = self._stores[layer_idx]
        return self._through(keys, key_states), self._through(values, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many slots the longest conversation uses."""
        return self._width

    def _through(self, store: Tensor, states: Tensor) -> Tensor:
        if self._cells is None or len(self._cells) != states.shape[:3].numel():
            self._cells = self._index(heads=states.shape[1])
        store.view(-1, store.shape[3]).index_copy_(0, self._cells, states.reshape(-1, store.shape[3]))
        visible = store[:, :, : self._width]
        return visible if self._rows is None else visible.index_select(0, self._rows)

    def _index(self, heads: int) -> Tensor:
        """Return where states [A, H, Q, D] go in a store viewed as [n * H * slots, D]."""
        device = self._positions.device
        rows = torch.arange(self.n, device=device) if self._rows is None else self._rows
        lines = rows[:, None] * heads + torch.arange(heads, device=device)
        return (lines[:, :, None] * self.slots + self._positions[:, None, :]).view(-1)

    def _empty(self, states: Tensor) -> Tensor:
        _, heads, _, size = states.shape
        return states.new_zeros(self.n, heads, self.slots, size)

    def _grow(self, width: int) -> None:
        slots = max(width, 2 * self.slots)
        grown = []
        for pair in self._stores:
            wider = tuple(s.new_zeros(self.n, s.shape[1], slots, s.shape[3]) for s in pair)
            for new, old in zip(wider, pair, strict=True):
                new[:, :, : self.slots] = old
            grown.append((wider[0], wider[1]))
        self._stores, self.slots = grown, slots


def _unfit(policy: Policy, got: str) -> str:
    """Return the message for a model that cannot be sampled with `SlotCache`."""
    return (
        f"expected a model whose key-value cache holds all that it remembers (full or sliding-window attention), got "
        f"{policy.config.model_type!r} with {got}; let vLLM sample in training: "
        "--set sampling.backend=vllm"
    )


class HFSampler:
    """Samples replies for n conversations in lockstep.

    Log-probabilities are those of the distribution sampled from, temperature applied. Sample inside
    `Policy.merged` for speed.
    """

    own_model = True

    def __init__(self, policy: Policy, max_new_tokens: int = 48, temperature: float = 1.0) -> None:
        """Make a sampler.

        Args:
            policy: The policy that speaks.
            max_new_tokens: A reply is cut at this length.
            temperature: Sampling temperature; 0 takes the most likely token.

        Raises:
            ValueError: A limit is out of range, or the model computes something else with this cache than without
                (it has layers other than full and sliding-window attention).
        """
        if max_new_tokens >= policy.context_length:
            raise ValueError(
                f"expected replies that leave room for a conversation in a context of {policy.context_length} tokens, "
                f"got max_new_tokens = {max_new_tokens}; lower sampling.max_new_tokens"
            )
        if max_new_tokens < 1 or temperature < 0:
            raise ValueError(
                f"expected max_new_tokens >= 1 and temperature >= 0, got {max_new_tokens} and {temperature}"
            )
        kinds = set(getattr(policy.config, "layer_types", None) or ())
        if kinds - {"full_attention", "sliding_attention"}:
            raise ValueError(_unfit(policy, f"layers of the kinds {', '.join(sorted(kinds))}"))
        self.policy = policy
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.context_length = policy.context_length
        self._kinds = kinds
        self._window: int | None = getattr(policy.config, "sliding_window", None)
        if policy.context_length >= _TRIAL_TOKENS:
            self._try_cache()
        self.start(0)

    @torch.inference_mode()
    def _try_cache(self) -> None:
        """Raise unless two short conversations of two turns get the log-probs that the learner gives them.

        Not every model says what kinds of layers it has: one that keeps a state of its own between tokens (RWKV), or
        reads an encoder, would be sampled from another distribution than is learned.
        """
        generator = torch.Generator(self.policy.device).manual_seed(0)
        turns = [([1, 2, 3, 4, 5, 6, 7], [2, 4]), ([1, 3, 5], [5, 6, 7, 8])]  # of unequal lengths: some is padding
        length, self.max_new_tokens = self.max_new_tokens, min(2, self.max_new_tokens)
        rows: list[list[int]] = [[], []]
        apart = []
        try:
            self.start(2)
            for prompts in turns:
                for row, prompt, sample in zip(rows, prompts, self.reply(prompts, generator), strict=True):
                    assert sample is not None  # both conversations were asked
                    row += [*prompt, *sample.token_ids]
                    ids = torch.tensor([row])
                    learner = self.policy.log_probs(ids, torch.ones_like(ids), temperature=self.temperature or 1.0)
                    own = torch.tensor(sample.log_probs, device=learner.device)
                    apart.append((learner[0, -len(own) :] - own).abs().mean())
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = " ".join(str(error).split())[:120]
            raise ValueError(_unfit(self.policy, f"{type(error).__name__}: {reason}")) from error
        finally:
            self.max_new_tokens = length
        mean = float(torch.stack(apart).mean())
        if not mean <= _TRIAL[torch.finfo(self.policy.model.dtype).bits >= 32] / min(1.0, self.temperature or 1.0):
            raise ValueError(_unfit(self.policy, f"log-probs {mean:.2g} nats apart"))

    def start(self, n: int) -> None:
        """Start n new conversations and forget the old ones."""
        self._cache = SlotCache(n)
        self._lengths = [0] * n
        self._pending: list[list[int]] = [[] for _ in range(n)]
        self._version = self.policy.version

    def sync(self, policy: Policy | None = None) -> None:
        """Do nothing: the policy's own model samples."""

    def close(self) -> None:
        """Do nothing: there is nothing to release."""

    @torch.inference_mode()
    def reply(
        self, prompts: Sequence[Sequence[int] | None], generator: torch.Generator | None = None
    ) -> list[Sample | None]:
        """Return one sampled reply per conversation; None in, None out.

        Args:
            prompts: n token lists: what was added since the conversation's last sampled token (the sampler
                remembers everything before it); None when the conversation is finished.
            generator: On the policy's device; may be None at temperature 0.

        Raises:
            ValueError: Not n prompts, an empty prompt, or no generator.
            RuntimeError: The policy has learned since `start`, so the cache is stale.
        """
        if len(prompts) != len(self._lengths):
            raise ValueError(f"expected {len(self._lengths)} prompts, as started, got {len(prompts)}")
        if generator is None and self.temperature > 0:
            raise ValueError("expected a generator for sampling, got None; pass one or use temperature 0")
        if self._version != self.policy.version:
            raise RuntimeError("expected the policy as it was at the start; call start(n) after learning")
        rows = [i for i, prompt in enumerate(prompts) if prompt is not None]
        if not rows:
            return [None] * len(prompts)
        if not all(prompts[i] for i in rows):
            raise ValueError("expected at least one token in every prompt, got an empty one")
        fed = [[*self._pending[i], *(prompts[i] or ())] for i in rows]
        hidden = self._prefill(rows, fed)
        tokens, log_probs = self._decode(rows, hidden, generator)
        result: list[Sample | None] = [None] * len(prompts)
        for i, new, scores in zip(rows, tokens, log_probs, strict=True):
            self._pending[i] = new[-1:]
            ended = new[-1] == self.policy.end_of_turn_id
            result[i] = Sample(tuple(new), tuple(scores), ended, self._version, self.temperature, "hf")
        return result

    def _prefill(self, rows: list[int], fed: list[list[int]]) -> Tensor:
        """Read the new tokens of all rows; return the hidden state of each row's last one [A, hidden]."""
        device = self.policy.device
        counts = torch.tensor([len(tokens) for tokens in fed], device=device)
        width = max(len(tokens) for tokens in fed)
        pad = self.policy.pad_id
        ids = torch.tensor([t + [pad] * (width - len(t)) for t in fed], device=device)
        start = torch.tensor([self._lengths[i] for i in rows], device=device)
        hidden = self._forward(rows, ids, start[:, None] + torch.arange(width, device=device))
        for i, tokens in zip(rows, fed, strict=True):
            self._lengths[i] += len(tokens)
        return hidden[torch.arange(len(rows), device=device), counts - 1]

    def _decode(
        self, rows: list[int], hidden: Tensor, generator: torch.Generator | None
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Sample token by token until every row is done; return tokens and log-probs per row."""
        tokens: list[list[int]] = [[] for _ in rows]
        scores: list[list[float]] = [[] for _ in rows]
        passing = list(range(len(rows)))
        while True:
            new, new_scores = self._sample(self.policy.logits(hidden), generator)
            going = []
            for k, (token, score) in enumerate(zip(new.tolist(), new_scores.tolist(), strict=True)):
                a = passing[k]
                if tokens[a] and tokens[a][-1] == self.policy.end_of_turn_id:
                    continue
                tokens[a].append(token)
                scores[a].append(score)
                if token != self.policy.end_of_turn_id and len(tokens[a]) < self.max_new_tokens:
                    going.append(k)
            if not going:
                return tokens, scores
            gathered = len(passing) < len(self._lengths)
            if gathered or len(going) <= len(self._lengths) * _FEW:
                passing = [passing[k] for k in going]
                new = new[going]
                going = list(range(len(passing)))
            inside = [rows[a] for a in passing]
            positions = torch.tensor([[self._lengths[i]] for i in inside], device=new.device)
            hidden = self._forward(inside, new[:, None], positions)[:, 0]
            for k in going:
                self._lengths[inside[k]] += 1

    def _sample(self, logits: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draw one token per row from logits [A, vocab]; return tokens and log-probs [A]."""
        log_probs = (logits / (self.temperature or 1.0)).log_softmax(-1)
        if self.temperature == 0:
            token = log_probs.argmax(-1)
        else:
            total = log_probs.double().exp_().cumsum(-1)
            point = torch.rand(len(total), 1, dtype=total.dtype, device=total.device, generator=generator)
            token = torch.searchsorted(total, point * total[:, -1:], right=True)[:, 0]
            token = token.clamp_(max=total.shape[1] - 1)
        return token, log_probs.gather(-1, token[:, None])[:, 0]

    def _forward(self, rows: list[int], ids: Tensor, positions: Tensor) -> Tensor:
        """Run tokens [A, Q] at positions [A, Q] of the given rows; return hidden states [A, Q, hidden]."""
        width = max(self._lengths[i] for i in rows) + ids.shape[1]
        all_rows = len(rows) == len(self._lengths)
        index = None if all_rows else torch.tensor(rows, device=ids.device)
        self._cache.aim(index, positions, width)
        return self.policy.transformer(
            input_ids=ids,
            position_ids=positions.clamp(max=self.policy.context_length - 1),  # only padding is clamped
            attention_mask=self._mask(positions, width),
            past_key_values=self._cache,
            use_cache=True,
        )

    def _mask(self, positions: Tensor, width: int) -> Tensor | dict[str, Tensor]:
        """Return the additive mask [A, 1, Q, width]: a token sees its own slot and those before it."""
        dtype = self.policy.model.dtype
        ahead = torch.arange(width, device=positions.device) - positions[:, None, :, None]
        full = torch.zeros(ahead.shape, dtype=dtype, device=ahead.device)
        full.masked_fill_(ahead > 0, float("-inf"))
        if self._window is None or not (self._kinds & {"sliding_attention"} or not self._kinds):
            return full
        sliding = full.masked_fill(ahead <= -self._window, float("-inf"))
        return {"full_attention": full, "sliding_attention": sliding} if self._kinds else sliding
