"""How a conversation becomes text for a chat model: the pieces of the chat template around the content.

A template that cannot be cut into such pieces is replaced by its training variant, or refused with the reason.
Nothing here touches weights or samples anything.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

log = logging.getLogger(__name__)

REASONING = (
    ("<think>", "</think>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
)
"""What opens and closes the reasoning in a reply, for the model families that have any."""

_INSTRUCTION = "zqINSTRUCTIONqz"
_ADVICE = (
    "pass chat_template= with a variant that leaves earlier tokens alone, or template_options= that turn the "
    "rewriting off"
)
_DEFAULTS: dict[str, Any] = {
    "enable_thinking": False,
    "strftime_now": lambda form: date(2024, 7, 26).strftime(form),
}
"""Variables for every template: no reasoning, and a fixed date instead of today's, so that runs can be repeated."""


@dataclass(frozen=True)
class PromptFormat:
    """The text of a chat template around the content.

    Attributes:
        opening: Text before the instruction, between it and the first message, and from that message to the start of
            the first reply, its prompt included.
        alone: Text before and after the instruction when the first message is empty.
        bare: Text before and after the first message when the instruction is empty: then there is no system message,
            or one that the template puts in by itself.
        between: Text from a reply's end-of-turn token to the partner's message, and from that message to the start of
            the next reply, its prompt included.
        lead: What a reply without reasoning starts with: white space, an empty reasoning block, or nothing.
        end_of_turn: The control token that closes a reply.
        control: Matches every control token, so that `plain` can break it up; None when there is none.
        reasoning: What opens and closes the reasoning in a reply; None when the model has none.
        reasons: Whether the prompt of a reply leaves the reasoning open.
    """

    opening: tuple[str, str, str]
    alone: tuple[str, str]
    bare: tuple[str, str]
    between: tuple[str, str]
    lead: str
    end_of_turn: str
    control: re.Pattern[str] | None
    reasoning: tuple[str, str] | None = None
    reasons: bool = False

    def first(self, instruction: str, message: str) -> str:
        """Return the text from the start of the conversation to the first reply."""
        instruction, message = self.plain(instruction), self.plain(message)
        if not instruction:
            return message.join(self.bare)
        if not message:
            return instruction.join(self.alone)
        before, middle, after = self.opening
        return f"{before}{instruction}{middle}{message}{after}"

    def next(self, message: str) -> str:
        """Return the text between a reply's end-of-turn token and the next reply."""
        before, after = self.between
        return f"{before}{self.plain(message)}{after}"

    def plain(self, content: str) -> str:
        """Return ``content`` without surrounding white space and without working control tokens.

        A control token inside content gets a space after its first character.
        """
        content = content.strip()
        if self.control is None or not self.control.search(content):
            return content
        content = self.control.sub(lambda m: f"{m[0][0]} {m[0][1:]}", content)
        while self.control.search(content):
            content = self.control.sub("", content)
        return content

    def control_free(self, text: str) -> str:
        """Return ``text`` without control tokens."""
        return text if self.control is None else self.control.sub("", text)

    def heard(self, reply: str) -> str:
        """Return what the partner hears of a reply: everything but its reasoning, closed or not."""
        if self.reasoning is None:
            return reply
        opens, closes = self.reasoning
        _, closed, speech = reply.rpartition(closes)
        if not closed and self.reasons:
            return ""
        speech, unclosed, _ = speech.partition(opens)
        return speech.strip() if closed or unclosed else speech


def trainable_format(tokenizer: Any, options: Mapping[str, Any] | None = None) -> PromptFormat:
    """Derive the prompt format; replace a template that cannot be trained on by TRL's training variant.

    The variant becomes the tokenizer's chat template and is logged. It is saved with the tokenizer, so the trained
    model is later prompted as it was trained.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        options: Extra variables for the template.

    Raises:
        ValueError: See `prompt_format`; and there is no variant, it fails too, or TRL is not installed.
    """
    try:
        return prompt_format(tokenizer, options)
    except ValueError as reason:
        original = tokenizer.chat_template
        if not original:
            raise
        if importlib.util.find_spec("trl") is None:
            raise ValueError(f"{reason}; or pip install trl, which has training variants of known templates") from None
        from trl import chat_template_utils

        try:
            variant = chat_template_utils.get_training_chat_template(tokenizer)
        except ValueError:
            raise reason from None
        if variant is None:
            raise
        tokenizer.chat_template = variant
        try:
            form = prompt_format(tokenizer, options)
        except ValueError as still:
            tokenizer.chat_template = original
            raise ValueError(f"{still} (in TRL's training variant of the template too)") from None
        title = next(name for name, text in vars(chat_template_utils).items() if text == variant)
        log.warning("chat template replaced by TRL's %s, because: %s", title, reason)
        return form


def prompt_format(tokenizer: Any, options: Mapping[str, Any] | None = None) -> PromptFormat:
    """Derive the prompt format from a tokenizer's chat template and check that it can be trained on.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        options: Extra variables for the template, such as ``{"enable_thinking": True}``, without which reasoning is
            off. A template that prints the date prints 26 July 2024.

    Returns:
        The format. If the template has no system role, the instruction goes at the top of the first message.

    Raises:
        ValueError: The tokenizer has no chat template; or the template fails on a plain conversation, rewrites earlier
            turns (is not prefix-preserving), drops content, or does not close a reply with a control token.
    """
    # Why cut: rendering and encoding the whole conversation at every turn can change earlier tokens (decode and encode
    # do not round-trip, many templates drop old reasoning). Then the tokens trained on are not the ones sampled. So the
    # template is rendered with placeholders and cut around them, and later turns only ever append to the sequence.
    # That is right only if each rendering starts with the one before it, which is checked here.
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("expected a tokenizer with a chat template, got none; pass chat_template=")
    variables = {**_DEFAULTS, **(options or {})}

    def render(messages: Sequence[Mapping[str, str]], generation: bool = True) -> str:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation, **variables
        )
        return str(text)

    system = _has_system_role(render)
    special, added = _control_tokens(tokenizer)
    try:
        prompts, closed = _renderings(render, system, _reply)
        alone = render(_conversation(0, system, _reply, opening=""))
        bare = render([{"role": "user", "content": _message(1)}])
    except Exception as error:
        raise ValueError(
            f"expected a chat template that renders alternating user and assistant turns, got "
            f"{type(error).__name__}: {error}; pass chat_template="
        ) from error

    reasoning = _reasoning(tokenizer, added + special)
    lead = _lead(prompts, reasoning)
    gap = _gap(prompts, closed, lambda turn: lead + _reply(turn))
    opened = _left_open(prompts[0], reasoning)
    if reasoning and (opened or reasoning[1] in lead or variables["enable_thinking"]):

        def thought(turn: int) -> str:
            return f"{reasoning[0]}\nzqTHOUGHT{turn}qz\n{reasoning[1]}\n\n{_reply(turn)}"

        with_thoughts = _renderings(render, system, thought)
        if _gap(*with_thoughts, lambda turn: thought(turn).removeprefix(opened)) != gap:
            raise ValueError(f"expected the same text after a reply with and without reasoning; {_ADVICE}")

    end_of_turn = next((t for t in special + added if gap.lstrip().startswith(t)), None)
    if end_of_turn is None or not closed[len(prompts[0] + lead + _reply(1)) :].lstrip().startswith(end_of_turn):
        raise ValueError(
            f"expected the chat template to close a reply with a control token (the end-of-turn that is "
            f"trained), got {gap[:40]!r} after a reply; {_ADVICE}"
        )
    before, middle, after = _split(prompts[0], _INSTRUCTION, _message(1))
    head, tail = _split(gap.lstrip()[len(end_of_turn) :], _message(2))
    skeleton = "".join((before, middle, after, head, tail, end_of_turn, *(reasoning or ())))
    control = special + [token for token in added if token in skeleton] + list(reasoning or ())
    pattern = "|".join(re.escape(token) for token in sorted(set(control), key=len, reverse=True))
    first, last = _split(alone, _INSTRUCTION)
    start, rest = _split(bare, _message(1))
    return PromptFormat(
        opening=(before, middle, after),
        alone=(first, last),
        bare=(start, rest),
        between=(head, tail),
        lead=lead,
        end_of_turn=end_of_turn,
        control=re.compile(pattern) if pattern else None,
        reasoning=reasoning,
        reasons=bool(opened),
    )


def _message(turn: int) -> str:
    return f"zqMESSAGE{turn}qz"


def _reply(turn: int) -> str:
    return f"zqREPLY{turn}qz"


def _conversation(
    replies: int, system: bool, reply: Callable[[int], str], opening: str | None = None
) -> list[dict[str, str]]:
    """Return a conversation that is waiting for its next reply."""
    opening = _message(1) if opening is None else opening
    messages = [{"role": "system", "content": _INSTRUCTION}] if system else []
    messages.append({"role": "user", "content": opening if system else f"{_INSTRUCTION}\n\n{opening}"})
    for turn in range(1, replies + 1):
        messages.append({"role": "assistant", "content": reply(turn)})
        messages.append({"role": "user", "content": _message(turn + 1)})
    return messages


def _renderings(render: Any, system: bool, reply: Callable[[int], str]) -> tuple[list[str], str]:
    """Return conversations with 0, 1 and 2 replies, each up to the next reply, and one that ends with a reply."""
    prompts = [render(_conversation(n, system, reply)) for n in range(3)]
    return prompts, render(_conversation(1, system, reply)[:-1], False)


def _gap(prompts: Sequence[str], closed: str, reply: Callable[[int], str]) -> str:
    """Return the text between two replies; raise unless it is the same everywhere and earlier text is kept."""
    for turn in (1, 2):
        _require_prefix(prompts[turn - 1] + reply(turn), prompts[turn])
    _require_prefix(prompts[0] + reply(1), closed)
    gaps = [prompts[turn][len(prompts[turn - 1] + reply(turn)) :] for turn in (1, 2)]
    if gaps[0].replace(_message(2), _message(3)) != gaps[1]:
        raise ValueError(f"expected the same text between any two replies, got {gaps}; {_ADVICE}")
    return gaps[0]


def _reasoning(tokenizer: Any, tokens: Sequence[str]) -> tuple[str, str] | None:
    """Return the reasoning markers that the chat template writes, or that are added tokens."""
    template = str(tokenizer.chat_template)
    written = [pair for pair in REASONING if pair[1] in template]
    return next(iter(written + [pair for pair in REASONING if set(pair) <= set(tokens)]), None)


def _lead(prompts: Sequence[str], reasoning: tuple[str, str] | None) -> str:
    """Return what the template itself puts before a reply, if it is only white space and markers."""
    lead, shown, _ = prompts[1][len(prompts[0]) :].partition(_reply(1))
    frame = lead
    for marker in reasoning or ():
        frame = frame.replace(marker, "")
    return lead if shown and prompts[1].startswith(prompts[0]) and not frame.strip() else ""


def _left_open(prompt: str, reasoning: tuple[str, str] | None) -> str:
    """Return the end of a prompt, from where it opens the reply's reasoning; "" if it does not."""
    if reasoning is None:
        return ""
    _, opens, rest = prompt.rpartition(reasoning[0])
    return opens + rest if opens and not rest.strip() else ""


def _has_system_role(render: Any) -> bool:
    """Return whether the template shows a system message (some raise on it, some drop it)."""
    try:
        return _INSTRUCTION in render(_conversation(0, True, _reply))
    except Exception:
        return False


def _control_tokens(tokenizer: Any) -> tuple[list[str], list[str]]:
    """Return the special tokens and the other added tokens of two or more visible characters, longest first."""
    tokens = list(tokenizer.added_tokens_decoder.values())
    special = {t.content for t in tokens if t.special} | set(tokenizer.all_special_tokens)
    other = {t.content for t in tokens if not t.special and len(t.content.strip()) > 1}
    return sorted(special, key=len, reverse=True), sorted(other - special, key=len, reverse=True)


def _require_prefix(prefix: str, text: str) -> None:
    """Raise unless ``text`` starts with ``prefix``; the message shows where they differ."""
    if text.startswith(prefix):
        return
    at = next((i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), len(text))
    raise ValueError(
        f"expected a prefix-preserving chat template, got one that rewrites an earlier turn: "
        f"{prefix[max(0, at - 20) : at + 40]!r} becomes {text[max(0, at - 20) : at + 40]!r}; {_ADVICE}"
    )


def _split(text: str, *placeholders: str) -> list[str]:
    """Cut ``text`` at placeholders that must appear once each, in order."""
    pieces = []
    for placeholder in placeholders:
        if text.count(placeholder) != 1:
            raise ValueError(
                f"expected the chat template to show the instruction and every message once, in order, got "
                f"{text!r}; pass chat_template="
            )
        piece, text = text.split(placeholder)
        pieces.append(piece)
    return [*pieces, text]
