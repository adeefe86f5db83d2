"""Reports how good fitted heads are, how sure they are, and whether more labels would help."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from chatflow.choices.declared import Choice
from chatflow.choices.fitting import Labelled, fit
from chatflow.choices.heads import CHAT, ONE, Heads
from chatflow.evaluation.choosing import Example, Fitted, Seen, rows_of

SHARES = (0.125, 0.25, 0.5, 1.0)
"""Parts of the labelled chats for which a learning curve has a point."""
BINS = 5


def report_of(
    parsed: argparse.Namespace,
    examples: Sequence[Example],
    vectors: Sequence[Seen],
    fits: Sequence[Fitted],
    before: Heads | None,
) -> dict[str, Any]:
    """Returns the figures of each head, on chats that were left out while it was fitted."""
    return {
        "heads": parsed.output,
        "bytes": os.path.getsize(parsed.output),
        "chats": len(examples),
        "choices": {
            one.head.name: _figures(one, _scores_before(one, examples, vectors, before), parsed)
            for one in fits
        },
    }


def _scores_before(
    one: Fitted, examples: Sequence[Example], vectors: Sequence[Seen], before: Heads | None
) -> dict[str, Any] | None:
    """Returns the scores of the head before this one, if there was one."""
    head = one.head
    for known in before.heads if before else ():
        if (known.name, known.values) == (head.name, head.values):
            choice = Choice(head.name, head.over, head.kind, "head", dict.fromkeys(head.values, ""))
            data = rows_of(examples, vectors, choice)
            data = data.of(np.flatnonzero(data.known))
            return scores(known.probabilities(data.x), data.y, head.kind)
    return None


def _figures(
    one: Fitted, before: dict[str, Any] | None, parsed: argparse.Namespace
) -> dict[str, Any]:
    head, data = one.head, one.data
    found: dict[str, Any] = {
        "over": head.over,
        "labelled": len(np.unique(data.chat)),
        "after": scores(one.left_out, data.y, head.kind),
        "calibration": calibration(one.left_out, data.y, head.kind),
    }
    if before is not None:
        found["before"] = before
    if head.over == CHAT:
        found["curve"] = curve(one, parsed.seed)
    return found


def scores(probabilities: np.ndarray, y: np.ndarray, kind: str) -> dict[str, Any]:
    """Returns accuracy and macro-F1 of one value, or recall and precision of all that apply."""
    if kind == ONE:
        answers = probabilities.argmax(1)
        f1 = []
        for value in range(probabilities.shape[1]):
            hit = np.sum((answers == value) & (y == value))
            if np.any(y == value):
                f1.append(2 * hit / (np.sum(answers == value) + np.sum(y == value)))
        sure = probabilities.max(1) >= 0.9
        right = answers == y
        return {
            "accuracy": round(float(np.mean(right)), 4),
            "macro_f1": round(float(np.mean(f1)), 4),
            "sure": round(float(np.mean(sure)), 4),
            "right_if_sure": round(float(np.mean(right[sure])), 4) if sure.any() else None,
        }
    said = probabilities >= 0.5
    hit = float(np.sum(said & (y == 1)))
    first = y[np.arange(len(y)), probabilities.argmax(1)] == 1
    some = y.sum(1) > 0
    return {
        "recall": round(hit / max(1.0, float(y.sum())), 4),
        "precision": round(hit / max(1.0, float(said.sum())), 4),
        "likeliest_applies": round(float(np.mean(first[some])), 4) if some.any() else None,
    }


def calibration(p: np.ndarray, y: np.ndarray, kind: str) -> list[dict[str, float]]:
    """Returns, for bins of confidence, how sure the head was and how often it was right."""
    if kind == ONE:
        sure, right = p.max(1), p.argmax(1) == y
    else:
        sure, right = p.ravel(), y.ravel() == 1
    found = []
    for number in range(BINS):
        low, high = number / BINS, (number + 1) / BINS
        here = (sure >= low) & ((sure < high) | (number == BINS - 1))
        if here.any():
            found.append(
                {
                    "share": round(float(here.mean()), 4),
                    "confidence": round(float(sure[here].mean()), 4),
                    "right": round(float(right[here].mean()), 4),
                }
            )
    return found


def curve(one: Fitted, seed: int) -> list[dict[str, float | None]]:
    """Returns the score on a fifth of the chats by how many of the others were learned from."""
    data, head = one.data, one.head
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data.x))
    test, rest = order[: len(order) // 5], order[len(order) // 5 :]
    points = []
    for share in SHARES:
        rows = rest[: max(2 * len(head.values), round(len(rest) * share))]
        some: Labelled = data.of(rows)
        if head.kind == ONE and len(np.unique(some.y)) < len(head.values):
            continue
        made = fit(some, head.name, head.over, head.kind, head.values, one.recipe)
        found = scores(made.probabilities(data.x[test]), data.y[test], head.kind)
        points.append(
            {"chats": len(rows), "score": found.get("macro_f1", found.get("likeliest_applies"))}
        )
    return points


def show(report: Mapping[str, Any]) -> None:
    """Prints a table for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    table = Table(title=f"{report['chats']} chats, each judged by heads that had not seen it")
    for column in (
        "choice",
        "labelled",
        "before",
        "after",
        "sure, right if sure",
        "with more labels",
    ):
        table.add_column(column, justify="left" if column == "choice" else "right")
    for name, found in report["choices"].items():
        table.add_row(
            name,
            f"{found['labelled']:,}",
            _score(found.get("before")),
            _score(found["after"]),
            _sure(found["after"]),
            _trend(found.get("curve")),
        )
    console.print(table)
    path = report["heads"]
    console.print(
        f"{path}: {report['bytes']:,} bytes. Use it with --heads={path}; compare all answers with\n"
        f"  chatflow evaluate LABELLED.jsonl --heads={path} --compare heads=auto",
        soft_wrap=True,
    )


def _score(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    if "macro_f1" in found:
        return f"{found['accuracy']:.3f}, F1 {found['macro_f1']:.3f}"
    return f"{found['recall']:.2f} of them, {found['precision']:.2f} right"


def _sure(found: Mapping[str, Any]) -> str:
    if found.get("right_if_sure") is None:
        return ""
    return f"{found['sure']:.0%}, {found['right_if_sure']:.3f}"


def _trend(points: Sequence[Mapping[str, Any]] | None) -> str:
    if not points or len(points) < 2 or None in (points[-1]["score"], points[-2]["score"]):
        return ""
    gain = points[-1]["score"] - points[-2]["score"]
    return f"{gain:+.3f} by the last {points[-1]['chats'] - points[-2]['chats']:,}"


def write_page(path: str, report: Mapping[str, Any]) -> None:
    """Writes learning curves and calibration as a page without scripts."""
    parts = []
    for name, found in report["choices"].items():
        parts.append(
            f"<section><h2>{escape(name)}</h2>"
            f"<p>{found['labelled']} labelled chats; {_score(found['after'])}</p>"
        )
        points = [
            (point["chats"], point["score"])
            for point in found.get("curve", ())
            if point["score"] is not None
        ]
        if points:
            most = max(x for x, _ in points)
            parts.append(
                _plot([(x / most, y) for x, y in points], "chats learned from", f"{most}", "score")
            )
        bins = [(one["confidence"], one["right"]) for one in found["calibration"]]
        parts.append(_plot(bins, "how sure", "1", "how often right", diagonal=True))
        parts.append("</section>")
    Path(path).write_text(
        _PAGE.format(title=escape(os.path.basename(report["heads"])), body="".join(parts))
    )


def _plot(
    points: Sequence[tuple[float, float]], across: str, most: str, up: str, diagonal: bool = False
) -> str:
    """Returns a plot of points from 0 to 1 as SVG."""
    at = [(30 + 200 * x, 170 - 150 * y) for x, y in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{py:.3f}</title></circle>'
        for (x, y), (_, py) in zip(at, points, strict=True)
    )
    ideal = '<path class="ideal" d="M30 170L230 20"/>' if diagonal else ""
    return (
        f'<svg viewBox="0 0 260 200" role="img" aria-label="{up} by {across}">'
        f'<path d="M30 20V170H230"/>{ideal}<polyline points="{line}"/>{dots}'
        f'<text x="30" y="186">0</text><text x="230" y="186" text-anchor="end">{most}</text>'
        f'<text x="130" y="196" text-anchor="middle">{across}</text>'
        f'<text x="4" y="14">{up}, 0 to 1</text></svg>'
    )


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>:root{{color-scheme:light dark}}
body{{font:16px system-ui;margin:2rem;max-width:60rem}}svg{{width:20rem}}
path{{fill:none;stroke:currentColor}}.ideal{{stroke-dasharray:4}}
polyline{{fill:none;stroke:#c33;stroke-width:2}}circle{{fill:#c33}}
text{{font-size:10px;fill:currentColor}}</style><h1>{title}</h1>{body}</html>
"""
