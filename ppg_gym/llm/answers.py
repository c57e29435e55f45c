"""What chat servers send back: completions in the forms that servers give them, and errors with what they are about.

Pure functions over the bodies of responses. Nothing here sends, counts or repeats.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ppg_gym.sanitise import has_reasoning

UNSENT = 8  # tokens; a server that counts more of them and sends no text has kept the model's thoughts to itself

_CUT = frozenset(("length", "max_tokens", "max_output_tokens", "model_length"))
_FILTERED = frozenset((
    "content_filter", "content_filtered", "safety", "prohibited_content", "blocklist", "spii", "recitation", "refusal",
    "sensitive", "guardrail_intervened",
))  # fmt: skip
_THOUGHT_PARTS = frozenset(("thinking", "thought", "reasoning", "reasoning_text", "redacted_thinking", "summary_text"))
# What services call a filter: OpenAI and Azure, OpenRouter, Alibaba, DeepSeek, Moonshot, Zhipu (1301), Google, Amazon.
_FILTER_CODE = re.compile(
    r"content_?(?:filter|policy|moderation)|responsible_?ai|moderation|data_?inspection_?failed|invalid_prompt"
    r"|prohibited_?content|guardrail|^safety$|^sensitive|^1301$",
    re.IGNORECASE,
)
_FILTER_WORDS = re.compile(
    r"content (?:management |usage )?(?:policy|policies|filter|moderation)|content exists risk|usage polic(?:y|ies)"
    r"|\b(?:was|were|been|is|are) flagged\b|inappropriate content|considered high risk|safety (?:system|filter|polic)",
    re.IGNORECASE,
)
_PARAMETER = re.compile(r"(?<![A-Za-z0-9])(max_tokens|max_completion_tokens|temperature|seed)(?![A-Za-z0-9])")


class FormError(ValueError):
    """A whole message in a form that we do not know; the server would send the same again."""


@dataclass(frozen=True)
class Completion:
    """A well-formed answer of a server.

    Attributes:
        text: May be empty.
        finish: ``stop``, ``length`` (it was cut off), ``content_filter``, or what else the server calls it.
        refusal: The model's own words when it refused.
        tokens: Of prompt and answer; None when the server reports no usage.
        thought: Whether the model thought before it answered, or instead.
    """

    text: str
    finish: str
    refusal: str
    tokens: tuple[int, int] | None
    thought: bool = False


@dataclass(frozen=True)
class Fault:
    """An error that a server told.

    Attributes:
        message: The server's words.
        code: The HTTP status that the body states, if it does.
        named: The parameters of our request that it is about.
        filtered: Whether a content filter refused the request.
    """

    message: str
    code: int | None
    named: frozenset[str]
    filtered: bool


def completion(text: str) -> Completion | Fault:
    """Read the body of a successful response, which may hold an error all the same.

    Raises:
        json.JSONDecodeError: It is not JSON.
        FormError: The message's content is neither a text nor a list of parts.
        ValueError: It holds no message.
    """
    body = json.loads(text, parse_constant=_no_constant)
    if isinstance(body, dict) and "choices" not in body and isinstance(body.get("error"), Mapping | str):
        return fault(body)
    try:
        choice = body["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
    except (TypeError, LookupError, AttributeError) as error:
        if isinstance(body, dict) and body.get("choices") and isinstance(body["choices"][0], dict):
            told = body["choices"][0].get("error")
            if isinstance(told, Mapping):
                return fault({"error": told})
        raise ValueError(f"expected choices with a message, got {text[:80]!r}") from error
    said, refused, thought = _content(content)
    finish = choice.get("finish_reason")
    ended = finish.lower() if isinstance(finish, str) else ""
    ended = "length" if ended in _CUT else "content_filter" if ended in _FILTERED else ended
    tokens, hidden = _usage(body.get("usage"))
    thought = thought or hidden or any(message.get(key) for key in ("reasoning_content", "reasoning"))
    if not said.strip():
        thought = thought or (tokens is not None and tokens[1] > UNSENT)
    elif not said.lstrip().startswith(("{", "```")):
        thought = thought or has_reasoning(said)
    return Completion(said, ended, refusal if isinstance(refusal, str) else refused, tokens, thought)


def fault(body: Any) -> Fault:
    """Read the body of an error: OpenAI's form, FastAPI's ``detail``, or anything else as it is."""
    error = body.get("error", body) if isinstance(body, Mapping) else body
    if not isinstance(error, Mapping):
        error = {"message": error}
    message = error.get("message") or error.get("detail") or dict(error)
    words = message if isinstance(message, str) else json.dumps(message, ensure_ascii=False, default=str)
    code = error.get("code")
    inner = error.get("innererror")
    kinds = [code, error.get("type"), inner.get("code") if isinstance(inner, Mapping) else None]
    filtered = any(_FILTER_CODE.search(str(kind)) for kind in kinds if kind is not None)
    return Fault(
        words,
        code if isinstance(code, int) and 400 <= code < 600 else None,
        _named(error.get("param"), message, words),
        filtered or _FILTER_WORDS.search(words) is not None,
    )


def _content(content: Any) -> tuple[str, str, bool]:
    """Return text, refusal, and whether there are thoughts, of a text or a list of parts.

    Raises:
        FormError: It is neither.
    """
    if content is None or isinstance(content, str):
        return content or "", "", False
    said, refused, thought = [], [], False
    for part in _parts(content):
        kind = str(part.get("type") or "text")
        if kind in _THOUGHT_PARTS or part.get("thought") is True:
            thought = True
        elif kind == "refusal":
            refused.append(str(part.get("refusal") or ""))
        else:
            text = part.get("text")
            text = text.get("value") if isinstance(text, Mapping) else text
            said.append(text if isinstance(text, str) else "")
    return "".join(said), "".join(refused), thought


def _parts(content: Any) -> Iterator[Mapping[str, Any]]:
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            yield {"text": part}
        elif isinstance(part, Mapping):
            yield part
        else:
            raise FormError(f"expected a text, a list of parts or null as content, got {part!r:.60}")


def _usage(usage: Any) -> tuple[tuple[int, int] | None, bool]:
    """Return the tokens of prompt and answer, None if not reported, and whether some were thoughts."""
    if not isinstance(usage, Mapping):
        return None, False
    prompt, written = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
    details = usage.get("completion_tokens_details")
    hidden = details.get("reasoning_tokens") if isinstance(details, Mapping) else None
    if type(prompt) is not int or type(written) is not int or min(prompt, written) < 0:
        return None, bool(hidden)
    return (prompt, written), bool(hidden)


def _named(param: Any, message: Any, words: str) -> frozenset[str]:
    if isinstance(param, str) and param.lower() not in ("", "none", "null"):
        return frozenset(_PARAMETER.findall(param))
    if isinstance(message, list):  # FastAPI: what is wrong stands beside a copy of what was sent
        places = [str(name) for item in message if isinstance(item, Mapping) for name in item.get("loc") or ()]
        return frozenset(_PARAMETER.findall(" ".join(places)))
    return frozenset(_PARAMETER.findall(words))


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"expected JSON, got {name}")
