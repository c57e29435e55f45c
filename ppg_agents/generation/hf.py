"""Sampling with the transformers model itself, its key-value cache kept from turn to turn.

Every conversation has a row of slots, slot j holding the key and value of its token j: no holes, whatever
the lengths of prompts and replies. Padding is written past a row's end, where the mask hides it until the
row's next tokens overwrite it. Nothing here learns or talks to an environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ppg_agents.generation import Sample
from ppg_agents.policy.policy import Policy

_SLOTS = 128  # of a row at first; doubled when a conversation outgrows them
_FEW = 1 / 3  # rows that have ended ride along until so few go on that gathering those is cheaper


class SlotCache(Cache):  # type: ignore[misc]
    """Keys and values of n conversations, addressed by (row, slot).

    `aim` chooses where the next forward pass writes and how far it reads; the model then calls `update`
    once per layer.
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
        """Choose the cells of the next pass.

        Args:
            rows: Conversations in the pass, long [A]; None for all of them in order.
            positions: Slots to write, long [A, Q].
            width: Slots to read, counted from 0; all written slots lie below.
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
        """Store [A, H, Q, D] keys and values; return those to attend to, [A, H, width, D]."""
        if layer_idx == len(self._stores):
            self._stores.append((self._empty(key_states), self._empty(value_states)))
        keys, values = self._stores[layer_idx]
        return self._through(keys, key_states), self._through(values, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of slots in use by the longest conversation."""
        return self._width

    def _through(self, store: Tensor, states: Tensor) -> Tensor:
        if self._cells is None or len(self._cells) != states.shape[:3].numel():
            self._cells = self._index(heads=states.shape[1])
        store.view(-1, store.shape[3]).index_copy_(0, self._cells, states.reshape(-1, store.shape[3]))
        seen = store[:, :, : self._width]
        return seen if self._rows is None else seen.index_select(0, self._rows)

    def _index(self, heads: int) -> Tensor:
        """Return where states [A, H, Q, D] go in a store seen as [n * H * slots, D]."""
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


class HFSampler:
    """Samples replies for n conversations in lockstep.

    Log-probabilities are those of the distribution that is sampled from, temperature applied. Sample inside
    `Policy.merged` for speed.
    """

    own_model = True

    def __init__(self, policy: Policy, max_new_tokens: int = 48, temperature: float = 1.0) -> None:
        """Make a sampler.

        Args:
            policy: Who speaks.
            max_new_tokens: A reply is cut at this length.
            temperature: Of sampling; 0 takes the most likely token.

        Raises:
            ValueError: A limit out of range, or an attention pattern other than full and sliding-window.
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
            raise ValueError(f"expected full or sliding-window attention layers, got {sorted(kinds)}")
        self.policy = policy
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.context_length = policy.context_length
        self._kinds = kinds
        self._window: int | None = getattr(policy.config, "sliding_window", None)
        self.start(0)

    def start(self, n: int) -> None:
        """Begin n new conversations and forget the old ones."""
        self._cache = SlotCache(n)
        self._lengths = [0] * n
        self._pending: list[list[int]] = [[] for _ in range(n)]
        self._version = self.policy.version

    def sync(self, policy: Policy | None = None) -> None:
        """The policy's own model samples: there is nothing to bring up to date."""

    def close(self) -> None:
        """Nothing is held."""

    @torch.inference_mode()
    def reply(
        self, prompts: Sequence[Sequence[int] | None], generator: torch.Generator | None = None
    ) -> list[Sample | None]:
        """Return one sampled reply per conversation; None in, None out.

        Args:
            prompts: n token lists: what was added since the conversation's last sampled token (the
                sampler remembers everything before); None when the conversation is finished.
            generator: On the policy's device; may be None when the temperature is 0.

        Raises:
            ValueError: Not n prompts, an empty prompt, or no generator.
            RuntimeError: The policy has learned since `start`: its cache is of another policy.
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
        """Read the new tokens of all rows; return the hidden state of each row's last one, [A, hidden]."""
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
        """Sample token by token until every row has ended; return tokens and log-probs per row."""
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
        everyone = len(rows) == len(self._lengths)
        index = None if everyone else torch.tensor(rows, device=ids.device)
        self._cache.aim(index, positions, width)
        return self.policy.transformer(
            input_ids=ids,
            position_ids=positions.clamp(max=self.policy.context_length - 1),  # of padding only
            attention_mask=self._mask(positions, width),
            past_key_values=self._cache,
            use_cache=True,
        )

    def _mask(self, positions: Tensor, width: int) -> Tensor | dict[str, Tensor]:
        """Return the additive mask [A, 1, Q, width]: a token sees its own slot and the ones before."""
        dtype = self.policy.model.dtype
        ahead = torch.arange(width, device=positions.device) - positions[:, None, :, None]
        full = torch.zeros(ahead.shape, dtype=dtype, device=ahead.device)
        full.masked_fill_(ahead > 0, float("-inf"))
        if self._window is None or not (self._kinds & {"sliding_attention"} or not self._kinds):
            return full
        sliding = full.masked_fill(ahead <= -self._window, float("-inf"))
        return {"full_attention": full, "sliding_attention": sliding} if self._kinds else sliding
