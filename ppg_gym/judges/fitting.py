"""Fit the learned judge to logged verdicts, and find out how much of them it can tell on personas it has not seen.

Whole personas are held out, and every choice (features, penalty, calibration) is made by cross-validation over the
others, folds of whole personas too. One regression per domain: sharing weights between domains was no better on
the benchmark's training personas, and domains differ in what counts as consistent.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppg_gym.conversation import Conversation, Persona
from ppg_gym.data.dialogues import LoggedDialogue, split_by_persona
from ppg_gym.domain.personas import persona_key
from ppg_gym.extras import need
from ppg_gym.judges.features import Encoder, Floats, extract
from ppg_gym.judges.fit_report import FEW_PERSONAS, DomainReport, Evaluation, FileCheck, FitReport, auc, evaluate
from ppg_gym.judges.lab.agreement import THRESHOLD, Estimate
from ppg_gym.judges.learned import KINDS, DomainModel, LearnedModel, sigmoid
from ppg_gym.judges.rules import rule_verdict

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
STRENGTHS = (0.003, 0.03, 0.1)
"""Inverse strengths of the L2 penalty to choose from."""

CANDIDATES = {
    "text": (("plain",), ("ngrams",), ("plain", "ngrams")),
    "embeddings": (("plain",), ("embeddings",), ("plain", "embeddings")),
}
"""Blocks of features to choose from."""

FOLDS = 5
_FEWEST = 10  # training lines of either label
_FEWEST_PERSONAS = 4  # in training: an outer fold leaves at least three, an inner one two
_CALIBRATION_STRENGTH = 10.0
_PERSONA_MATTERS = 0.5  # share of the AUC above chance that another persona has to cost
_RARE = 3  # lines that an n-gram has to be in to get a weight

Index = NDArray[np.intp]


@dataclass(frozen=True)
class _Lines:
    """Labelled lines of one domain; every array has one entry per line."""

    conversations: Sequence[Conversation]
    labels: NDArray[np.bool_]
    personas: NDArray[np.str_]
    dialogues: NDArray[np.str_]
    sources: NDArray[np.str_]
    extracted: Mapping[str, Any]

    def rows(self, index: Index) -> dict[str, Any]:
        """Return the features of some lines."""
        return {block: matrix[index] for block, matrix in self.extracted.items()}


def fit(
    dialogues: Sequence[LoggedDialogue],
    *,
    seed: int = 0,
    held_out: float = 0.2,
    features: str = "text",
    encoder: str = ENCODER,
    progress: Callable[[str], None] = lambda message: None,
) -> tuple[LearnedModel, FitReport]:
    """Fit one regression per domain to the logged verdicts.

    Verdicts without a score are left out and counted, lines that the rules judge too. A logged score of at least 0.5
    is "consistent". The calibration is Platt's (a logistic function of the logit) on logits of personas that the
    regression had not seen: two numbers, where an isotonic function would follow the few personas.

    Args:
        dialogues: Of any number of domains.
        seed: Of the split, the folds and the bootstrap.
        held_out: Share of every domain's personas that no part of the fit sees.
        features: ``text``, or ``embeddings`` to choose among sentence embeddings instead of n-grams.
        encoder: Folder or hub name of the sentence encoder, for ``embeddings``.
        progress: Told what is done next, in a few words.

    Returns:
        The model, fitted on the training personas alone, and the report.

    Raises:
        ValueError: Unknown features, or a domain with too few lines of either label or too few personas.
        ModuleNotFoundError: scikit-learn (or the sentence encoder's package) is not installed.
    """
    if features not in KINDS:
        raise ValueError(f"expected features out of {', '.join(KINDS)}, got {features!r}")
    if not dialogues:
        raise ValueError("expected at least one logged dialogue, got none; give files of judged dialogues")
    sklearn = need("sklearn", "learned")
    encoding = Encoder(encoder) if features == "embeddings" else None
    models: dict[str, DomainModel] = {}
    reports: list[DomainReport] = []
    for domain in sorted({dialogue.domain for dialogue in dialogues}):
        progress(f"{domain}: reading the lines")
        chosen = [dialogue for dialogue in dialogues if dialogue.domain == domain]
        models[domain], report = _Fit(domain, chosen, seed, held_out, features, encoding, progress).run()
        reports.append(report)
    whole = FitReport(seed, held_out, features, tuple(reports))
    made_with = {"scikit-learn": sklearn.__version__, "numpy": np.__version__}
    name = encoder if encoding else ""
    return LearnedModel(models, features, name, made_with, whole.to_dict()), whole


class _Fit:
    """The fit of one domain."""

    def __init__(
        self,
        domain: str,
        dialogues: Sequence[LoggedDialogue],
        seed: int,
        held_out: float,
        features: str,
        encoder: Encoder | None,
        progress: Callable[[str], None],
    ) -> None:
        self._domain, self._seed, self._progress = domain, seed, progress
        try:
            train, test = split_by_persona(dialogues, held_out, seed)
        except ValueError as error:
            raise ValueError(f"domain {domain}: {error}") from error
        self._blocks = CANDIDATES[features]
        self._without: Counter[str] = Counter()
        self._by_rule: dict[str, list[bool]] = {}
        needed = tuple(dict.fromkeys(itertools.chain(*self._blocks)))
        self._encoder = encoder
        self._train = self._lines(train, needed, encoder)
        self._test = self._lines(test, needed, encoder)
        self._held_out = tuple(sorted({dialogue.persona.id for dialogue in test}))
        personas = len(set(self._train.personas))
        counts = np.bincount(self._train.labels, minlength=2)
        if personas < _FEWEST_PERSONAS or counts.min() < _FEWEST or not self._test.labels.size:
            raise ValueError(
                f"domain {domain}: expected at least {_FEWEST} training lines of either label by at least"
                f" {_FEWEST_PERSONAS} personas and some held-out lines, got {counts[1]} consistent and {counts[0]}"
                f" inconsistent lines by {personas} personas, and {self._test.labels.size} held-out lines;"
                " add files, or hold out another share"
            )

    def run(self) -> tuple[DomainModel, DomainReport]:
        """Fit, cross-validate the whole fit, and score the held-out personas once."""
        train, everything = self._train, np.arange(len(self._train.labels))
        self._progress(f"{self._domain}: fitting {len(everything)} lines")
        model = self._model(everything)
        probabilities, scores = np.zeros(len(everything)), np.zeros(len(everything))
        outer = self._folds(everything)
        for number, (seen, unseen) in enumerate(outer):
            self._progress(f"{self._domain}: cross-validating, fold {number + 1} of {len(outer)}")
            without = self._model(seen)
            logits = without.logits(train.rows(unseen), len(unseen))
            scores[unseen] = without.slope * logits
            probabilities[unseen] = without.calibrated(logits)
        cross_validated = self._evaluate(train, probabilities, scores)
        logits = model.logits(self._test.extracted, len(self._test.labels))
        held_out = self._evaluate(self._test, model.calibrated(logits), model.slope * logits)
        other = self._other_personas(model)
        files = self._files(model.strength, scores, outer)
        return model, DomainReport(
            domain=self._domain,
            lines=len(everything),
            personas=len(set(train.personas)),
            held_out_personas=self._held_out,
            without_score=dict(self._without),
            by_rule={kind: (len(found), float(np.mean(found))) for kind, found in self._by_rule.items()},
            blocks=model.blocks,
            strength=model.strength,
            slope=model.slope,
            cross_validated=cross_validated,
            held_out=held_out,
            auc_other_persona=other,
            files=files,
            warnings=tuple(_warnings(model, cross_validated, held_out, other, files)),
        )

    def _lines(self, dialogues: Sequence[LoggedDialogue], blocks: Sequence[str], encoder: Encoder | None) -> _Lines:
        conversations: list[Conversation] = []
        rows: list[tuple[bool, str, str, str]] = []
        for dialogue in dialogues:
            key = persona_key(dialogue.persona.instruction)
            place = f"{dialogue.source}:{dialogue.index}"
            conversation = Conversation(dialogue.persona)
            for turn in dialogue.turns:
                if turn.message:
                    conversation = conversation.add("partner", turn.message)
                conversation = conversation.add("policy", turn.reply)
                if turn.verdict.score is None:
                    self._without[turn.verdict.status] += 1
                    continue
                label = turn.verdict.score >= THRESHOLD
                ruled = rule_verdict(conversation)
                if ruled is not None:
                    self._by_rule.setdefault(ruled.kind, []).append(label)
                    continue
                conversations.append(conversation)
                rows.append((label, key, place, dialogue.source))
        labels, personas, places, sources = zip(*rows, strict=True) if rows else ((), (), (), ())
        return _Lines(
            conversations,
            np.array(labels, dtype=bool),
            np.array(personas, dtype=str),
            np.array(places, dtype=str),
            np.array(sources, dtype=str),
            extract(conversations, blocks, encoder) if rows else {},
        )

    def _folds(self, index: Index) -> list[tuple[Index, Index]]:
        """Return (seen, unseen) lines per fold; no persona is in both."""
        groups = self._train.personas[index]
        split = need("sklearn.model_selection", "learned").GroupKFold
        folds = split(min(FOLDS, len(set(groups))), shuffle=True, random_state=self._seed)
        return [(index[seen], index[unseen]) for seen, unseen in folds.split(index, groups=groups)]

    def _model(self, index: Index) -> DomainModel:
        """Choose features and penalty, calibrate and fit, all on these lines."""
        folds = self._folds(index)
        labels = self._train.labels[index]
        at = {line: position for position, line in enumerate(index.tolist())}
        best: tuple[float, tuple[str, ...], float, float, float] | None = None
        for blocks, strength in itertools.product(self._blocks, STRENGTHS):
            logits = np.zeros(len(index))
            for seen, unseen in folds:
                model = self._regress(seen, blocks, strength)
                logits[[at[line] for line in unseen.tolist()]] = model.logits(self._train.rows(unseen), len(unseen))
            slope, offset = _calibrate(logits, labels)
            chances = np.clip(sigmoid(slope * logits + offset), 1e-9, 1 - 1e-9)
            loss = float(-np.log(np.where(labels, chances, 1 - chances)).mean())
            if best is None or loss < best[0]:
                best = (loss, blocks, strength, slope, offset)
        if best is None:
            raise ValueError("expected at least one candidate to choose from, got none")
        _, blocks, strength, slope, offset = best
        raw = self._regress(index, blocks, strength)
        return DomainModel(
            raw.blocks, strength, raw.mean, raw.scale, raw.dense, raw.sparse, raw.intercept, slope, offset
        )

    def _regress(self, index: Index, blocks: tuple[str, ...], strength: float) -> DomainModel:
        """Return an uncalibrated regression.

        Its logits are against the base rate of its own lines. A fold whose unseen personas are rarely consistent
        has seen the others, so that plain logits of several folds would be ordered by that alone, and wrongly.
        """
        labels = self._train.labels[index]
        if labels.all() or not labels.any():
            raise ValueError(
                f"domain {self._domain}: expected lines of either label outside every fold of personas, got"
                f" {'consistent' if labels.all() else 'inconsistent'} ones only; add files with more personas"
            )
        sparse = need("scipy.sparse", "learned")
        rows = self._train.rows(index)
        parts = [rows[block] for block in blocks if block != "ngrams"]
        dense = np.hstack(parts) if parts else np.zeros((len(index), 0))
        mean, scale = dense.mean(axis=0), dense.std(axis=0)
        scale[scale < 1e-9] = 1.0
        columns = (dense - mean) / scale
        width = columns.shape[1]
        matrix, kept, hashed = columns, np.zeros(0, dtype=np.intp), 0
        if "ngrams" in blocks:
            hashed = rows["ngrams"].shape[1]
            kept = np.flatnonzero(np.bincount(rows["ngrams"].indices, minlength=hashed) >= _RARE)
            matrix = sparse.hstack([sparse.csr_matrix(columns), rows["ngrams"][:, kept]], format="csr")
        regression = need("sklearn.linear_model", "learned").LogisticRegression
        fitted = regression(C=strength, max_iter=2000).fit(matrix, labels)
        ngrams = np.zeros(hashed)
        ngrams[kept] = fitted.coef_[0, width:]
        weights = fitted.coef_[0, :width].copy()
        intercept = float(fitted.intercept_[0]) - _logit(float(labels.mean()))
        return DomainModel(blocks, strength, mean, scale, weights, ngrams, intercept)

    def _evaluate(self, lines: _Lines, probabilities: Floats, scores: Floats) -> Evaluation:
        base_rate = float(self._train.labels.mean())
        named = (lines.personas.tolist(), lines.dialogues.tolist(), lines.sources.tolist())
        return evaluate(probabilities, scores, lines.labels, *named, base_rate, self._seed)

    def _other_personas(self, model: DomainModel) -> Estimate:
        """Return the AUC on the held-out lines when every dialogue gets a training persona in place of its own."""
        rng = np.random.default_rng(self._seed)
        pool = sorted({conversation.persona.instruction for conversation in self._train.conversations})
        drawn: dict[tuple[str, str], Persona] = {}
        swapped = []
        for conversation, dialogue in zip(self._test.conversations, self._test.dialogues.tolist(), strict=True):
            side = (dialogue, conversation.persona.id)
            if side not in drawn:
                drawn[side] = replace(conversation.persona, instruction=pool[rng.integers(len(pool))])
            swapped.append(replace(conversation, persona=drawn[side]))
        logits = model.logits(extract(swapped, model.blocks, self._encoder), len(swapped))
        return auc(model.slope * logits, self._test.labels, self._test.dialogues.tolist(), self._seed)

    def _files(
        self, strength: float, scores: Floats, folds: Sequence[tuple[Index, Index]]
    ) -> tuple[FileCheck, ...]:
        """Return how well every file's verdicts can be told with and without lines of the same file.

        Without them, all features are used: a choice among them has seen the file.
        """
        train = self._train
        names = np.unique(train.sources).tolist()
        checks = []
        for name in names if len(names) > 1 else ():
            inside = train.sources == name
            logits = np.full(len(inside), np.nan)
            for seen, unseen in folds:
                others, own = seen[~inside[seen]], unseen[inside[unseen]]
                if own.size and len(set(train.labels[others])) == 2:
                    regression = self._regress(others, self._blocks[-1], strength)
                    logits[own] = regression.logits(train.rows(own), len(own))
            told = np.isfinite(logits)
            estimates = [
                auc(values[rows], train.labels[rows], train.dialogues[rows].tolist(), self._seed)
                for values, rows in ((scores, inside), (logits, told))
            ]
            checks.append(FileCheck(name, int(inside.sum()), float(train.labels[inside].mean()), *estimates))
        return tuple(checks)


def _calibrate(logits: Floats, labels: NDArray[np.bool_]) -> tuple[float, float]:
    """Return slope and offset of Platt's calibration; the base rate's constant when the logits point the wrong way."""
    regression = need("sklearn.linear_model", "learned").LogisticRegression
    fitted = regression(C=_CALIBRATION_STRENGTH, max_iter=2000).fit(logits[:, None], labels)
    slope, offset = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    if slope > 0:
        return slope, offset
    return 0.0, _logit(float(labels.mean()))


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def _warnings(
    model: DomainModel,
    cross_validated: Evaluation,
    held_out: Evaluation,
    other: Estimate,
    files: Sequence[FileCheck],
) -> list[str]:
    found = []
    if model.slope == 0:
        found.append("no feature tells anything about unseen personas: every line scores the base rate")
    if held_out.personas < FEW_PERSONAS:
        found.append(f"{held_out.personas} held-out personas are too few for an interval over personas")
    for name, figures in (("held-out", held_out), ("cross-validated", cross_validated)):
        low = figures.judge.auc.low
        if low is not None and low <= 0.5:
            found.append(f"{name}: the AUC's interval reaches down to {low:.2f}: the judge may tell nothing")
        if figures.judge.log_loss >= figures.base_rate.log_loss:
            found.append(f"{name}: no better than the base rate in log-loss; use another judge as a reward")
    real = held_out.judge.auc.value or 0.5
    if other.value is not None and real > 0.5 and real - other.value < _PERSONA_MATTERS * (real - 0.5):
        found.append(
            f"with another persona in place the AUC is {other.value:.2f} (own: {real:.2f}): the judge goes by how a"
            " reply sounds more than by the persona"
        )
    for check in files:
        high, within = check.auc_left_out.high, check.auc_left_out.value
        if high is not None and high < 0.5:
            found.append(
                f"{check.source}: regressions on the other files order its lines the wrong way round"
                f" (AUC {within:.2f}); check what its verdicts mean before using it"
            )
    return found
