"""How a conversation becomes text for a chat model: the pieces of its chat template around the content.

The template is rendered once, with placeholders, and cut into the text around the instruction and the
partner's messages, so that a conversation is one growing token sequence. A template for which that would
be wrong is refused with the reason. Nothing here touches weights or samples anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_INSTRUCTION = "zqINSTRUCTIONqz"
_ADVICE = (
    "pass chat_template= with a variant of the template that keeps every earlier token as it is, "
    "or template_options= that switch the rewriting off"
)


@dataclass(frozen=True)
class PromptFormat:
    """The text of a chat template around what is said.

    Attributes:
        opening: Text before the instruction, between it and the first message, and after that message, up
            to and including the prompt of the first reply.
        between: Text from just after a reply's end-of-turn token to the partner's message, and from there
            up to and including the prompt of the next reply.
        end_of_turn: The control token that closes a reply.
        control: Matches every control token, so that it can be broken up inside content.
    """

    opening: tuple[str, str, str]
    between: tuple[str, str]
    end_of_turn: str
    control: re.Pattern[str] | None

    def first(self, instruction: str, message: str) -> str:
        """Return the text from the start of the conversation to the first reply."""
        before, middle, after = self.opening
        return f"{before}{self.plain(instruction)}{middle}{self.plain(message)}{after}"

    def next(self, message: str) -> str:
        """Return the text between a reply's end-of-turn token and the next reply."""
        before, after = self.between
        return f"{before}{self.plain(message)}{after}"

    def plain(self, content: str) -> str:
        """Return ``content`` without surrounding white space and without a readable control token.

        A control token inside content is broken up by a space after its first character.
        """
        content = content.strip()
        if self.control is None or not self.control.search(content):
            return content
        content = self.control.sub(lambda m: f"{m[0][0]} {m[0][1:]}", content)
        while self.control.search(content):
            content = self.control.sub("", content)
        return content


def prompt_format(tokenizer: Any, options: Mapping[str, Any] | None = None) -> PromptFormat:
    """Derive the prompt format from a tokenizer's chat template and check that it can be trained on.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        options: Extra variables for the template, such as ``{"enable_thinking": False}``.

    Returns:
        The format. If the template has no system role, the instruction goes to the top of the first message.

    Raises:
        ValueError: The tokenizer has no chat template; the template fails on a plain conversation, rewrites
            earlier turns (is not prefix-preserving), does not show what it is given, or does not close a
            reply with a control token.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("expected a tokenizer with a chat template, got none; pass chat_template=")

    def render(messages: Sequence[Mapping[str, str]], generation: bool) -> str:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation, **(options or {})
        )
        return str(text)

    def conversation(replies: int, system: bool) -> list[dict[str, str]]:
        opening = _said(1) if system else f"{_INSTRUCTION}\n\n{_said(1)}"
        messages = [{"role": "system", "content": _INSTRUCTION}] if system else []
        messages.append({"role": "user", "content": opening})
        for turn in range(1, replies + 1):
            messages.append({"role": "assistant", "content": _replied(turn)})
            messages.append({"role": "user", "content": _said(turn + 1)})
        return messages

    system = _has_system_role(render, conversation(0, True))
    try:
        prompts = [render(conversation(n, system), True) for n in range(3)]
        closed = render(conversation(1, system)[:-1], False)
    except Exception as error:
        raise ValueError(
            f"expected a chat template that renders user and assistant turns in alternation, got "
            f"{type(error).__name__}: {error}; pass chat_template="
        ) from error

    for turn in (1, 2):
        _require_prefix(prompts[turn - 1] + _replied(turn), prompts[turn])
    _require_prefix(prompts[0] + _replied(1), closed)
    gaps = [prompts[turn][len(prompts[turn - 1] + _replied(turn)) :] for turn in (1, 2)]
    if gaps[0].replace(_said(2), _said(3)) != gaps[1]:
        raise ValueError(f"expected the same text between any two replies, got {gaps}; {_ADVICE}")

    special, added = _control_tokens(tokenizer)
    end_of_turn = next((t for t in special if gaps[0].lstrip().startswith(t)), None)
    if end_of_turn is None or not closed[len(prompts[0] + _replied(1)) :].lstrip().startswith(end_of_turn):
        raise ValueError(
            f"expected the chat template to close a reply with a control token (the end-of-turn that is "
            f"trained), got {gaps[0][:40]!r} after a reply; {_ADVICE}"
        )
    before, middle, after = _split(prompts[0], _INSTRUCTION, _said(1))
    head, tail = _split(gaps[0].lstrip()[len(end_of_turn) :], _said(2))
    skeleton = "".join((before, middle, after, head, tail))
    control = special + [token for token in added if token in skeleton]
    pattern = "|".join(re.escape(token) for token in sorted(set(control), key=len, reverse=True))
    return PromptFormat(
        opening=(before, middle, after),
        between=(head, tail),
        end_of_turn=end_of_turn,
        control=re.compile(pattern) if pattern else None,
    )


def _said(turn: int) -> str:
    return f"zqMESSAGE{turn}qz"


def _replied(turn: int) -> str:
    return f"zqREPLY{turn}qz"


def _has_system_role(render: Any, messages: Sequence[Mapping[str, str]]) -> bool:
    """Return whether the template shows a system message (some raise on it, some drop it)."""
    try:
        return _INSTRUCTION in render(messages, True)
    except Exception:
        return False


def _control_tokens(tokenizer: Any) -> tuple[list[str], list[str]]:
    """Return the special tokens, and the other added tokens that hold visible characters; longest first."""
    tokens = list(tokenizer.added_tokens_decoder.values())
    special = {t.content for t in tokens if t.special} | set(tokenizer.all_special_tokens)
    other = {t.content for t in tokens if not t.special and len(t.content.strip()) > 1}
    return sorted(special, key=len, reverse=True), sorted(other - special, key=len, reverse=True)


def _require_prefix(prefix: str, text: str) -> None:
    """Raise unless ``text`` goes on from ``prefix``, showing where they part."""
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
