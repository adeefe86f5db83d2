"""Measures answers: confusion matrix, intervals, comparison of two models, calibration."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from chatflow.records import Sentiment

CLASSES = tuple(Sentiment)  # angry, neutral, happy
ANSWERS = (*CLASSES, None)
"""Possible answers; `None` (no answer) counts as wrong."""

Pair = tuple[Sentiment, Sentiment | None]
"""(label, answer)."""

RESAMPLES, SEED = 2000, 0


def name_of(answer: Sentiment | None) -> str:
    return "none" if answer is None else answer.name.lower()


@dataclasses.dataclass(frozen=True)
class Confusion:
    """A confusion matrix, as counts by (label, answer)."""

    counts: Mapping[Pair, int]

    @classmethod
    def of(cls, pairs: Iterable[Pair]) -> Confusion:
        return cls(Counter(pairs))

    def count(self, label: Sentiment, answer: Sentiment | None) -> int:
        return self.counts.get((label, answer), 0)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def accuracy(self) -> float:
        return sum(self.count(c, c) for c in CLASSES) / max(self.total, 1)

    def labelled(self, of: Sentiment) -> int:
        return sum(self.count(of, answer) for answer in ANSWERS)

    def precision(self, of: Sentiment) -> float:
        return self.count(of, of) / max(sum(self.count(label, of) for label in CLASSES), 1)

    def recall(self, of: Sentiment) -> float:
        return self.count(of, of) / max(self.labelled(of), 1)

    def f1(self, of: Sentiment) -> float:
        precision, recall = self.precision(of), self.recall(of)
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0

    @property
    def macro_f1(self) -> float:
        """Returns the mean F1 of the three classes, including those that do not occur."""
        return sum(map(self.f1, CLASSES)) / len(CLASSES)

    def to_dict(self) -> dict[str, Any]:
        return {
            "classes": {
                name_of(c): {
                    "chats": self.labelled(c),
                    "precision": round(self.precision(c), 4),
                    "recall": round(self.recall(c), 4),
                    "f1": round(self.f1(c), 4),
                }
                for c in CLASSES
            },
            "confusion": {
                name_of(label): {name_of(answer): self.count(label, answer) for answer in ANSWERS}
                for label in CLASSES
            },
        }


class Interval(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in self._asdict().items()}


def intervals(pairs: Sequence[Pair]) -> dict[str, Interval]:
    """Returns accuracy, macro-F1, and angry recall and precision, with bootstrap 95 % intervals."""
    counts = np.zeros((3, 4), int)
    for label, answer in pairs:
        counts[_CELL[label], _CELL[answer]] += 1
    drawn = _figures(_resampled(counts))
    return {name: _interval(float(of), drawn[name]) for name, of in _figures(counts).items()}


class Comparison(NamedTuple):
    """A second model compared with a first on the same chats.

    Attributes:
      accuracy, macro_f1: the second's minus the first's.
      better, worse: number of chats that only the second, or only the first, answered correctly.
      p_value: of McNemar's exact test: the probability of a split of these chats that is at least
        this uneven, if both were right equally often.
    """

    accuracy: Interval
    macro_f1: Interval
    better: int
    worse: int
    p_value: float

    @property
    def verdict(self) -> str:
        """Says in words whether the second is better or worse by more than chance."""
        if self.p_value >= 0.05:
            return f"no more than chance (p = {self.p_value:.2f})"
        said = "p < 0.001" if self.p_value < 0.001 else f"p = {self.p_value:.3f}"
        return f"{'better' if self.better > self.worse else 'worse'}, more than chance ({said})"

    def to_dict(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy.to_dict(),
            "macro_f1": self.macro_f1.to_dict(),
            "better": self.better,
            "worse": self.worse,
            "p_value": round(self.p_value, 6),
            "verdict": self.verdict,
        }


def compare(
    labels: Sequence[Sentiment],
    first: Sequence[Sentiment | None],
    second: Sequence[Sentiment | None],
) -> Comparison:
    """Compares two models' answers to the same chats; intervals are from a paired bootstrap."""
    counts = np.zeros((3, 4, 4), int)  # label, first answer, second answer
    better = worse = 0
    for label, one, other in zip(labels, first, second, strict=True):
        counts[_CELL[label], _CELL[one], _CELL[other]] += 1
        better += one != label == other
        worse += one == label != other
    drawn = _resampled(counts)
    before, after = (_figures(counts.sum(axis)) for axis in (-1, -2))
    drawn_before, drawn_after = (_figures(drawn.sum(axis)) for axis in (-1, -2))
    differences = {
        name: _interval(float(after[name] - before[name]), drawn_after[name] - drawn_before[name])
        for name in ("accuracy", "macro_f1")
    }
    return Comparison(**differences, better=better, worse=worse, p_value=mcnemar(better, worse))


def mcnemar(better: int, worse: int) -> float:
    """Returns the two-sided p-value: a fair coin for each chat that only one model got right."""
    n, few = better + worse, min(better, worse)
    return float(min(1.0, 2 * sum(math.comb(n, k) for k in range(few + 1)) / 2**n))


_CELL: Mapping[Sentiment | None, int] = {answer: cell for cell, answer in enumerate(ANSWERS)}


def _resampled(counts: Any) -> Any:
    """Returns counts of chats drawn with replacement: [resamples, *counts.shape].

    Only a chat's cell matters, so the number of drawn chats in each cell is multinomial.
    """
    n = counts.sum()
    shares = counts.ravel() / n if n else np.full(counts.size, 1 / counts.size)
    drawn = np.random.default_rng(SEED).multinomial(n, shares, size=RESAMPLES)
    return drawn.reshape(RESAMPLES, *counts.shape)


def _figures(counts: Any) -> dict[str, Any]:
    """Computes the figures of `Confusion` for many at once: [..., label, answer] to [...]."""
    right = np.diagonal(counts, axis1=-2, axis2=-1)  # [..., 3]
    recall = right / np.maximum(counts.sum(-1), 1)
    precision = right / np.maximum(counts.sum(-2)[..., :3], 1)
    both = precision + recall
    f1 = 2 * precision * recall / np.where(both > 0, both, 1)
    return {
        "accuracy": right.sum(-1) / np.maximum(counts.sum((-2, -1)), 1),
        "macro_f1": f1.mean(-1),
        "angry_recall": recall[..., 0],
        "angry_precision": precision[..., 0],
    }


def _interval(value: float, drawn: Any) -> Interval:
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Interval(value, float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Bin:
    """Answers with a confidence above `low` and at most `high`."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How well a model's confidence matches its accuracy.

    Attributes:
      ece: expected calibration error: the mean distance between confidence and accuracy of a
        bin, weighted by its count (Guo et al. 2017, https://arxiv.org/abs/1706.04599).
      brier: mean squared distance of the confidence from 1 if the answer is right, 0 if wrong.
      bins: those that have answers.
    """

    count: int
    ece: float
    brier: float
    bins: tuple[Bin, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "ece": round(self.ece, 4),
            "brier": round(self.brier, 4),
            "bins": [
                {name: round(value, 4) for name, value in dataclasses.asdict(part).items()}
                for part in self.bins
            ],
        }


def calibration(answers: Sequence[tuple[float, bool]], bins: int = 10) -> Calibration | None:
    """Returns the calibration of (confidence, right) pairs, or None if there are none."""
    if not answers:
        return None
    sure, right = (np.array(values, float) for values in zip(*answers, strict=True))
    place = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    parts = tuple(
        Bin(
            index / bins,
            (index + 1) / bins,
            int((place == index).sum()),
            float(sure[place == index].mean()),
            float(right[place == index].mean()),
        )
        for index in sorted(set(place.tolist()))
    )
    n = len(answers)
    return Calibration(
        n,
        sum(part.count * abs(part.accuracy - part.confidence) for part in parts) / n,
        float(((sure - right) ** 2).mean()),
        parts,
    )
