"""Make the embedded language model, ``ppg_agents/models/tiny``.

    python scripts/build_tiny_model.py            # about 30 minutes on two cores

A byte-level BPE tokenizer and a four-layer Llama of about a million parameters, pretrained on conversations
that the embedded domains' own partner and reply templates produce. First come short cards (a few facts, a
truthful answer about each), then whole conversations in which every reply keeps to the persona, so that the
model learns to look facts up; then replies of every kind occur, in the mixture that each
``domain.toml`` states, so that there is something left to learn. The loss is on the replies alone. The
personas are drawn from the value lists; those of the held-out files never occur.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ppg_gym.conversation import Conversation, Persona
from ppg_gym.domain.cast import personas
from ppg_gym.domain.loading import DOMAINS, Domain, load
from ppg_gym.domain.reading import reader
from ppg_gym.domain.saying import say
from ppg_gym.partners.scripted import ScriptedPartner, pick

FOLDER = Path(__file__).resolve().parent.parent / "ppg_agents" / "models" / "tiny"
SPECIAL = ["<|pad|>", "<|begin|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SINCERE = {
    "chatting": {"truth": 1.0},
    "therapy": {"disclose": 0.5, "tentative": 0.5},
    "education": {"parrot": 0.3, "request": 0.4, "apply": 0.3},
}
NAMES = sorted({persona.name for name in DOMAINS for persona in personas(name, "train")})


@dataclass(frozen=True)
class Phase:
    """A stretch of training: its data, length, learning rate and the loss weight of a fact's token."""

    name: str
    steps: int
    rate: float
    batch: int
    fact_weight: float


PHASES = (
    Phase("cards", 300, 4e-3, 72, 5.0),
    Phase("sincere", 300, 3e-3, 36, 3.0),
    Phase("mixed", 280, 2e-3, 36, 1.0),
)


class Speaker:
    """Draws personas and conversations of one domain."""

    def __init__(self, name: str) -> None:
        self.domain: Domain = load(name)
        self.reader = reader(name)
        self.partner = ScriptedPartner(name)
        self.held_out = {tuple(sorted(p.facts.items())) for p in personas(name, "held-out")}

    def persona(self, rng: np.random.Generator) -> Persona:
        """Return a persona that is not among the held-out ones."""
        while True:
            facts = {slot: str(rng.choice(list(values))) for slot, values in self.domain.slots.items()}
            if tuple(sorted(facts.items())) not in self.held_out:
                name = str(rng.choice(NAMES))
                return Persona("drawn", self.domain.instruct(name, facts), facts, self.domain.name, name)

    def card(self, rng: np.random.Generator) -> Conversation:
        """Return a short conversation: a few facts, and a truthful answer about each of them."""
        persona = self.persona(rng)
        if "ask" not in self.domain.lines:
            return self.talk(rng, sincere=True, turns=2, persona=persona)
        order = rng.permutation(len(self.domain.slots))[: rng.integers(2, 5)]
        slots = [list(self.domain.slots)[i] for i in sorted(order)]
        said = " ".join(self.domain.statements[slot].format(**persona.facts) for slot in slots)
        conversation = Conversation(
            Persona("card", self.domain.instruction.format(name=persona.name, facts=said), persona.facts)
        )
        for slot in rng.permutation(slots):
            conversation = conversation.add("partner", pick(self.domain.lines["ask"][slot], rng))
            kind = pick(list(SINCERE[self.domain.name]), rng)
            conversation = conversation.add("policy", say(self.reader, kind, conversation, rng))
        return conversation

    def talk(
        self, rng: np.random.Generator, *, sincere: bool, turns: int | None = None, persona: Persona | None = None
    ) -> Conversation:
        """Return a conversation with the partner, sincere or with replies of every kind."""
        conversation = Conversation(persona or self.persona(rng))
        for _ in range(turns or self.domain.turns):
            conversation = conversation.add("partner", self.partner.speak([conversation], [rng])[0].text)
            state = self.reader.track(conversation).state
            mix = SINCERE[self.domain.name] if sincere else self.domain.mix_in(state)
            kind = str(rng.choice(list(mix), p=list(mix.values())))
            conversation = conversation.add("policy", say(self.reader, kind, conversation, rng))
        return conversation


def train_tokenizer(rng: np.random.Generator, vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on conversations."""
    texts = [f" {word}" for name in DOMAINS for text in load(name).words() for word in text.split()] * 30
    for name in DOMAINS:
        speaker = Speaker(name)
        for _ in range(800):
            conversation = speaker.talk(rng, sincere=False)
            texts += [conversation.persona.instruction, *(line.text for line in conversation.lines)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast.chat_template = TEMPLATE
    return fast


class Encoder:
    """Turns a conversation into token ids and a mask over the replies."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.special = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
        self.cache: dict[str, list[int]] = {}

    def text(self, text: str) -> list[int]:
        """Return the tokens of a text, from the cache where it was seen before."""
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self.cache[text]

    def conversation(self, conversation: Conversation, fact_weight: float) -> tuple[list[int], list[float]]:
        """Return ids and the weight of each in the loss: 0 outside replies, more on the persona's own facts."""
        facts = {self.text(f" {value}")[0] for value in conversation.persona.facts.values()}
        end = self.special["<|end|>"]
        ids = [self.special["<|begin|>"], self.special["<|system|>"], *self.text(conversation.persona.instruction), end]
        weights = [0.0] * len(ids)
        for line in conversation.lines:
            role = "<|user|>" if line.speaker == "partner" else "<|assistant|>"
            said = [*self.text(line.text), end]
            ids += [self.special[role], *said]
            weights += [0.0] + [
                (fact_weight if token in facts else 1.0) if line.speaker == "policy" else 0.0 for token in said
            ]
        return ids, weights


def batches(encoder: Encoder, rng: np.random.Generator, phase: Phase) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield ids, attention masks and loss weights [B, L], a third of the batch from each domain."""
    speakers = [Speaker(name) for name in DOMAINS]
    while True:
        rows = []
        for i in range(phase.batch):
            speaker = speakers[i % len(speakers)]
            sincere = phase.name != "mixed"
            talk = speaker.card(rng) if phase.name == "cards" else speaker.talk(rng, sincere=sincere)
            rows.append(encoder.conversation(talk, phase.fact_weight))
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(phase.batch, longest, dtype=torch.long)
        attention = torch.zeros(phase.batch, longest, dtype=torch.long)
        weights = torch.zeros(phase.batch, longest)
        for row, (tokens, weight) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            attention[row, : len(tokens)] = 1
            weights[row, : len(tokens)] = torch.tensor(weight)
        yield ids, attention, weights


def optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for everything else."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr=rate, momentum=0.95, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def pretrain(model: LlamaForCausalLM, encoder: Encoder, phase: Phase, seed: int) -> list[dict[str, float | str]]:
    """Train for one phase (warm-up, constant, linear decay) and return its log.

    ``loss`` is the mean over reply tokens, ``fact_loss`` over those that name one of the persona's facts.
    """
    log: list[dict[str, float | str]] = []
    began = time.monotonic()
    optimisers = optimizers(model, phase.rate)
    source = batches(encoder, np.random.default_rng([seed, *phase.name.encode()]), phase)
    for step in range(phase.steps):
        now = phase.rate * min(1.0, (step + 1) / 50, 0.02 + (phase.steps - step) / (0.4 * phase.steps))
        ids, attention, weights = next(source)
        hidden = model.model(input_ids=ids, attention_mask=attention).last_hidden_state[:, :-1]
        weight = weights[:, 1:]
        chosen = weight > 0
        target, weight = ids[:, 1:][chosen], weight[chosen]
        losses = torch.nn.functional.cross_entropy(model.lm_head(hidden[chosen]), target, reduction="none")
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = now
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"expected a finite loss, got {loss.item()} at step {step}")
        if step % 25 == 0 or step == phase.steps - 1:
            facts = losses[weight > 1].mean().item() if phase.fact_weight > 1 else math.nan
            entry: dict[str, float | str] = {"phase": phase.name, "step": step, "loss": round(losses.mean().item(), 4)}
            entry |= {} if math.isnan(facts) else {"fact_loss": round(facts, 4)}
            log.append(entry | {"seconds": round(time.monotonic() - began, 1)})
            print(json.dumps(log[-1]), flush=True)
    return log


def main() -> None:
    """Train the tokenizer and the model and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=3, default=[phase.steps for phase in PHASES])
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--keep", type=Path, help="also keep the checkpoint before the mixed phase, here")
    parser.add_argument("--start-from", type=Path, help="only the mixed phase, from a checkpoint that --keep left")
    settings = parser.parse_args(namespace=SimpleNamespace())
    torch.manual_seed(settings.seed)
    if settings.start_from:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(settings.start_from)
    else:
        tokenizer = train_tokenizer(np.random.default_rng([settings.seed, 1]), settings.vocabulary)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM.from_pretrained(settings.start_from) if settings.start_from else LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    encoder, log = Encoder(tokenizer), []
    for phase, steps in zip(PHASES, settings.steps, strict=True):
        if settings.start_from and phase.name != "mixed":
            continue
        if settings.keep and phase.name == "mixed":
            save(model, tokenizer, log, settings.keep)
        log += pretrain(model, encoder, replace(phase, steps=steps), settings.seed)
    save(model, tokenizer, log, settings.out)


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, log: list[dict[str, float | str]], folder: Path
) -> None:
    """Write checkpoint, tokenizer and log."""
    model.generation_config.update(do_sample=True, temperature=1.0, max_new_tokens=48)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "pretraining.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))


if __name__ == "__main__":
    main()
