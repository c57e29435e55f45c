"""The learned judge: a calibrated logistic regression, fitted to the verdicts of logged dialogues, scores replies.

Quick, offline and deterministic: a line's score does not depend on what is judged beside it. It imitates the judge
whose verdicts it was fitted to, as far as `ppg_gym.judges.fitting` found on personas that it had not seen; that
report lies beside the weights. A model is plain arrays and JSON, never a pickle.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ppg_gym.conversation import Conversation, Persona, Verdict
from ppg_gym.judges import features
from ppg_gym.judges.features import Encoder, Floats
from ppg_gym.judges.options import check_options
from ppg_gym.judges.rules import apply_rules

KIND = "ppg-gym learned judge"
SCHEMA = 1
KINDS = ("text", "embeddings")
"""Kinds of features: without and with a sentence encoder."""

_JSON, _ARRAYS = "model.json", "weights.npz"
_VECTORS = ("mean", "scale", "dense", "sparse")
_NUMBERS = ("strength", "intercept", "slope", "offset")


@dataclass(frozen=True)
class DomainModel:
    """One domain's regression and its calibration.

    Attributes:
        blocks: The blocks of features that it uses, in the order of the weights.
        strength: Inverse strength of the L2 penalty that it was fitted with.
        mean: Of every dense column; subtracted.
        scale: Of every dense column; divided by.
        dense: Weights of the dense columns.
        sparse: Weights of the hashed columns; empty without n-grams.
        intercept: Of the regression, less the log-odds of "consistent" in its lines.
        slope: Of the calibration, at least 0; 0 when the features tell nothing about unseen personas.
        offset: Of the calibration.
    """

    blocks: tuple[str, ...]
    strength: float
    mean: Floats
    scale: Floats
    dense: Floats
    sparse: Floats
    intercept: float
    slope: float = 1.0
    offset: float = 0.0

    def logits(self, extracted: Mapping[str, Any], rows: int) -> Floats:
        """Return the regression's logits before calibration; each depends on its own row alone."""
        total = np.full(rows, self.intercept)
        dense = [extracted[block] for block in self.blocks if block != "ngrams"]
        if dense:
            total += ((np.hstack(dense) - self.mean) / self.scale * self.dense).sum(axis=1)
        if "ngrams" in self.blocks:
            total += extracted["ngrams"] @ self.sparse
        return total

    def probabilities(self, extracted: Mapping[str, Any], rows: int) -> Floats:
        """Return the calibrated probabilities of "consistent"."""
        return self.calibrated(self.logits(extracted, rows))

    def calibrated(self, logits: Floats) -> Floats:
        """Return the probabilities that belong to the regression's logits."""
        return sigmoid(self.slope * logits + self.offset)


def sigmoid(logits: Floats) -> Floats:
    """Return the probabilities that belong to logits."""
    probabilities: Floats = 0.5 + 0.5 * np.tanh(0.5 * logits)
    return probabilities


@dataclass(frozen=True)
class LearnedModel:
    """What a fit leaves behind.

    Attributes:
        domains: One regression per domain.
        features: ``text`` or ``embeddings``.
        encoder: Name of the sentence encoder; empty for ``text``.
        made_with: Versions of the packages that fitted it, for the record.
        report: The fit's report as plain data.
    """

    domains: Mapping[str, DomainModel]
    features: str = "text"
    encoder: str = ""
    made_with: Mapping[str, str] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``model.json`` and ``weights.npz`` into a folder, which is made when it is not there."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        described = {
            name: {"blocks": list(model.blocks), **{key: getattr(model, key) for key in _NUMBERS}}
            for name, model in self.domains.items()
        }
        content = {
            "kind": KIND,
            "schema": SCHEMA,
            "features": self.features,
            "encoder": self.encoder,
            "columns": _columns(),
            "made_with": dict(self.made_with),
            "domains": described,
            "report": dict(self.report),
        }
        arrays = {f"{name}.{key}": getattr(model, key) for name, model in self.domains.items() for key in _VECTORS}
        np.savez_compressed(folder / _ARRAYS, **arrays)
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / _JSON).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> LearnedModel:
        """Read what `save` wrote.

        Raises:
            ValueError: No such folder, no learned judge in it, or one that this version does not read.
        """
        folder = Path(folder)
        again = 'fit one with "ppg-agent judge fit --labels FILES --out DIR"'
        if not (folder / _JSON).is_file() or not (folder / _ARRAYS).is_file():
            found = "no such folder" if not folder.is_dir() else f"{sorted(p.name for p in folder.iterdir())[:5]}"
            raise ValueError(f"{folder}: expected a learned judge ({_JSON} and {_ARRAYS}), got {found}; {again}")
        try:
            content = json.loads((folder / _JSON).read_text(encoding="utf-8"))
            with (folder / _ARRAYS).open("rb") as file, np.load(file, allow_pickle=False) as stored:
                arrays = dict(stored)
        except (OSError, ValueError, TypeError, RecursionError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{folder}: expected a readable learned judge, got {error}; {again}") from error
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise ValueError(f"{folder / _JSON}: expected kind {KIND!r}, got another file; {again}")
        if content.get("schema") != SCHEMA or content.get("columns") != _columns():
            raise ValueError(
                f"{folder / _JSON}: expected schema {SCHEMA} with this version's features, got schema"
                f" {content.get('schema')!r} with others; {again}"
            )
        try:
            domains = {name: _domain(name, entry, arrays) for name, entry in content["domains"].items()}
            if content["features"] not in KINDS or not domains:
                raise ValueError(f"features {content['features']!r} and domains {list(domains)}")
            return cls(domains, content["features"], content["encoder"], content["made_with"], content["report"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{folder}: expected a whole learned judge, got {error!r}; {again}") from error


def _columns() -> dict[str, Any]:
    """Return what a stored model's weights take for granted of the features."""
    return {"plain": list(features.PLAIN), "hashed": features.HASHED, "ngram_scale": features.NGRAM_SCALE}


def _domain(name: str, entry: Mapping[str, Any], arrays: Mapping[str, Any]) -> DomainModel:
    values: dict[str, Any] = {key: float(entry[key]) for key in _NUMBERS}
    values |= {key: arrays[f"{name}.{key}"] for key in _VECTORS}
    model = DomainModel(blocks=tuple(entry["blocks"]), **values)
    sizes = {key: getattr(model, key).shape for key in _VECTORS}
    hashed = 2 * features.HASHED if "ngrams" in model.blocks else 0
    plain = len(features.PLAIN) if "plain" in model.blocks else 0
    fits = sizes["mean"] == sizes["scale"] == sizes["dense"] and sizes["sparse"] == (hashed,)
    fits = fits and ("embeddings" in model.blocks or sizes["dense"] == (plain,))
    finite = all(np.isfinite(value).all() for value in values.values())
    if not fits or not finite or not set(model.blocks) <= {"plain", "ngrams", "embeddings"}:
        raise ValueError(f"unfit weights of shapes {sizes} for the blocks {list(model.blocks)} of domain {name!r}")
    return model


class LearnedJudge:
    """Judges by a fitted model: the calibrated probability that the logged judge would say "consistent".

    Options: ``path``, the folder that a fit has written.

    Args:
        domain: Name of a domain that the model was fitted on.
        options: See above.

    Raises:
        ValueError: An option is not what it should be, no model is in the folder, or it does not know the domain.
        ModuleNotFoundError: scikit-learn (or the sentence encoder's package) is missing.
    """

    waits = False

    def __init__(self, domain: str, options: Mapping[str, Any]) -> None:
        check_options("learned", options, ("path",), required=("path",))
        model = LearnedModel.load(options["path"])
        if domain not in model.domains:
            raise ValueError(
                f"{options['path']}: expected a learned judge of domain {domain!r}, got one of"
                f" {', '.join(sorted(model.domains))}; fit it on dialogues of that domain"
            )
        self.domain = domain
        self._model = model.domains[domain]
        self._encoder = Encoder(model.encoder) if "embeddings" in self._model.blocks else None
        self.judge([Conversation(Persona("try", "Somebody.")).add("policy", "A line to try the features on.")])

    def check(self, persona: Persona) -> None:
        """Refuse a persona of another domain, and one without an instruction.

        Raises:
            ValueError: See above.
        """
        if persona.domain not in ("", self.domain):
            raise ValueError(
                f"the learned judge of {self.domain!r} expected a persona of this domain, got {persona.id!r} of"
                f" {persona.domain!r}; make the judge for that domain"
            )
        if not persona.instruction.strip():
            raise ValueError(f"the learned judge expected a persona with an instruction, {persona.id!r} has none")

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        """Return one verdict per conversation: by rule, or by the model."""
        verdicts, open_ = apply_rules(conversations)
        if open_:
            extracted = features.extract([conversations[i] for i in open_], self._model.blocks, self._encoder)
            for i, score in zip(open_, self._model.probabilities(extracted, len(open_)).tolist(), strict=True):
                if math.isfinite(score):
                    why = f"The fitted model gives consistency a probability of {score:.2f}."
                    verdicts[i] = Verdict("scored", min(max(score, 0.0), 1.0), why)
                else:
                    verdicts[i] = Verdict("error", None, "The fitted model gave no finite score.")
        return [verdict for verdict in verdicts if verdict is not None]
