"""Measures how far a second model helps where the first is not sure, by confidence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from chatflow.evaluation.measures import Confusion
from chatflow.evaluation.variants import Judged
from chatflow.records import Sentiment

THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


class _Opinions(NamedTuple):
    """What both models said of a chat; `second` is None where only the first one was asked."""

    label: Sentiment
    first: Sentiment
    confidence: float
    second: Sentiment | None


def escalation(all_judged: Sequence[Judged]) -> dict[str, Any] | None:
    """Returns how the answers change if the second model is asked below each confidence.

    It has only confidences up to which the second model was asked; `tone:1` asks it about all.
    `best` is the confidence with the most right answers; of several, the one that asks least.
    Returns None without a second opinion.
    """
    found = [opinions for judged in all_judged if (opinions := _opinions(judged)) is not None]
    if not any(one.second is not None for one in found):
        return None
    alone = min((one.confidence for one in found if one.second is None), default=2.0)
    rows = [_row(found, below) for below in THRESHOLDS if below <= alone]
    best = max(rows, key=lambda row: (row["right"], -row["asked"]))
    return {"chats": len(found), "rows": rows, "best": best["below"]}


def _opinions(judged: Judged) -> _Opinions | None:
    analysis = judged.analysis
    if analysis is None:
        return None
    first, label = analysis.first, judged.label.sentiment
    if first is not None and first.confidence is not None:
        return _Opinions(label, first.sentiment, first.confidence, analysis.sentiment)
    if first is None and analysis.confidence is not None:
        return _Opinions(label, analysis.sentiment, analysis.confidence, None)
    return None


def _row(found: Sequence[_Opinions], below: float) -> dict[str, Any]:
    pairs, asked, better, worse = [], 0, 0, 0
    for one in found:
        second = one.second if one.confidence < below else None
        asked += second is not None
        answer = one.first if second is None else second
        better += answer == one.label != one.first
        worse += answer != one.label == one.first
        pairs.append((one.label, answer))
    confusion = Confusion.of(pairs)
    return {
        "below": below,
        "asked": asked,
        "share": round(asked / len(found), 4),
        "right": sum(label == answer for label, answer in pairs),
        "accuracy": round(confusion.accuracy, 4),
        "macro_f1": round(confusion.macro_f1, 4),
        "better": better,
        "worse": worse,
    }
