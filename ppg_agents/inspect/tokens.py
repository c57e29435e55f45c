"""The text of each token id in a run's conversations. Encodes nothing and loads no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from ppg_agents.inspect.source import Source
from ppg_agents.runs.run import Run, is_run

_TINY = "tiny"


@dataclass(frozen=True)
class Vocabulary:
    """Some tokens of a tokenizer.

    Attributes:
        texts: Token id -> its text in the middle of a reply. A token that is only part of a character is
            given by the tokenizer's name for it, in ``⟨⟩``.
        control: Ids of tokens that no text can spell, such as the end of a turn.
    """

    texts: Mapping[int, str]
    control: frozenset[int]


def folder(source: Source, named: str | None) -> Path | None:
    """Return the tokenizer's folder: the one named, else the run's newest checkpoint, else a local model's.

    Args:
        source: The run or file.
        named: ``tiny``, a run or a folder with a tokenizer; None if the user named none.

    Raises:
        ValueError: The place named has no tokenizer.
    """
    if named is not None:
        place = _in_run(Path(named)) if is_run(Path(named)) else _place(named)
        if place is None:
            raise ValueError(
                f"--tokenizer: expected tiny, a run with a checkpoint or a folder with tokenizer.json, got {named}"
            )
        return place
    if source.config is None:
        return None
    return _in_run(source.path) or _place(source.config.model)


def read(place: Path, ids: Iterable[int]) -> Vocabulary:
    """Look up tokens in a folder's tokenizer; an id it does not know becomes its number."""
    wanted = sorted(set(ids))
    decode: Callable[[int], str]
    piece: Callable[[int], str | None]
    if (place / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(place / "tokenizer.json"))
        decode = lambda i: str(fast.decode([i], skip_special_tokens=False))  # noqa: E731
        piece = fast.id_to_token
        control = {i for i, token in fast.get_added_tokens_decoder().items() if token.special}
    else:
        from transformers import AutoTokenizer

        slow = AutoTokenizer.from_pretrained(str(place), trust_remote_code=False, local_files_only=True)
        decode = lambda i: str(slow.decode([i], skip_special_tokens=False))  # noqa: E731
        piece = slow.convert_ids_to_tokens
        control = set(slow.all_special_ids)
    return Vocabulary({i: _text(i, decode, piece) for i in wanted}, frozenset(control.intersection(wanted)))


def _text(i: int, decode: Callable[[int], str], piece: Callable[[int], str | None]) -> str:
    name = piece(i) if 0 <= i < 2**32 else None
    if name is None:
        return f"⟨{i}⟩"
    text = decode(i)
    if "\ufffd" in text:
        return f"⟨{name}⟩"
    return f" {text}" if name.startswith("▁") and not text.startswith(" ") else text


def _in_run(run: Path) -> Path | None:
    latest = Run.open(run).latest_checkpoint()
    return _place(str(latest[1])) if latest else None


def _place(name: str) -> Path | None:
    """Return the folder if it holds a tokenizer."""
    place = Path(str(resources.files("ppg_agents.models.tiny"))) if name == _TINY else Path(name)
    has_tokenizer = any((place / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
    return place if has_tokenizer else None
