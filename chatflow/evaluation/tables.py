"""Prints an evaluation in the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from chatflow.running.terminal import plain


def show(report: Mapping[str, Any]) -> None:
    """Prints a report: variants side by side, then the first in detail."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    variants = report["variants"]
    first = variants[0]
    console.print(figures_table(variants))
    console.print(confusion_table(first))
    console.print(groups_table(first))
    if first.get("escalation") is not None:
        console.print(escalation_table(first["escalation"]))
    wrong = len(first["wrong"])
    if wrong:
        console.print(f"wrong answers: {wrong}; --summary=json lists them, --report shows them")
    for name in ("tone_bias", "tone_temperature"):
        if name in report:
            console.print(f"{name} fitted on these chats: {json.dumps(report[name])}")
    if "history" in report:
        console.print(history_table(report["history"]))


def figures_table(variants: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("Figures, with 95 % intervals", [plain(v["name"]) for v in variants])
    columns = [dict(rows(variant)) for variant in variants]
    names = dict.fromkeys(name for column in columns for name in column)
    for name in names:
        table.add_row(name, *(plain(column.get(name, "")) for column in columns))
    return table


def escalation_table(found: Mapping[str, Any]) -> Table:
    table = _table(
        f"A second opinion below each confidence; best: {found['best']:g}",
        ["asked", "accuracy", "macro-F1", "put right", "put wrong"],
    )
    for row in found["rows"]:
        table.add_row(
            f"{row['below']:g}",
            f"{row['asked']} ({row['share']:.0%})",
            f"{row['accuracy']:.3f}",
            f"{row['macro_f1']:.3f}",
            str(row["better"]),
            str(row["worse"]),
        )
    return table


def rows(variant: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields a variant's figures as (name, text), for people to read."""
    yield "chats", str(variant["chats"])
    for name, key in INTERVALS.items():
        yield name, interval(variant[key])
    if (sure := variant["calibration"]) is not None:
        yield "calibration error, Brier score", f"{sure['ece']:.3f}, {sure['brier']:.3f}"
    answers = variant["answers"]
    yield (
        "answered at once, repaired, not",
        f"{answers['at_once']}, {answers['repaired']}, "
        + (f"{answers['none']}{_reasons(answers['reasons'])}"),
    )
    if (summaries := variant["summaries"]) is not None:
        yield from _summary_rows(summaries)
    if (drafts := variant["drafts"]) is not None:
        yield from _draft_rows(drafts)
    if (told := variant.get("told")) is not None:
        yield from _told_rows(told)
    run = variant["run"]
    yield "time", f"{run['seconds']:,.1f} s, {run['chats_per_second']:,.2f} chats/s"
    if run.get("prompt_tokens"):
        yield "tokens read, written", f"{run['prompt_tokens']:,}, {run['answer_tokens']:,}"
    if run.get("cost_usd") is not None:
        yield "cost", f"about ${run['cost_usd']:,.4f}"
    if (against := variant.get("against_first")) is not None:
        yield "accuracy minus the first's", interval(against["accuracy"], "+")
        yield "macro-F1 minus the first's", interval(against["macro_f1"], "+")
        yield "compared with the first", against["verdict"]


INTERVALS = {
    "accuracy": "accuracy",
    "macro-F1": "macro_f1",
    "recall of angry": "angry_recall",
    "precision of angry": "angry_precision",
}


def _summary_rows(summaries: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    every, own = summaries["all"], summaries["models_own"]
    yield "summaries: model's own, composed", f"{summaries['by_model']}, {summaries['composed']}"
    yield "  words not in chat: of all, own", f"{every['ungrounded']:.1%}, {own['ungrounded']:.1%}"
    yield (
        "  own: longest copy, nothing else",
        f"{own['copied_words_mean']:.1f} words, {own['only_copied']:.0%}",
    )
    yield "  with unknown names, numbers", f"{every['with_names']}, {every['with_numbers']}"
    yield "  copies of the prompt", str(every["copies_of_prompt"])
    yield "  characters: mean, longest", _length(every)


def _draft_rows(drafts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "drafts", f"{drafts['drafted']} of {drafts['asked']}{_reasons(drafts['not_drafted'])}"
    if drafts["drafted"]:
        yield "  that apologise, promise", f"{drafts['apologise']}, {drafts['promise']}"
        yield "  words not in their chat", f"{drafts['ungrounded']:.1%}"
        yield "  with unknown names, numbers", f"{drafts['with_names']}, {drafts['with_numbers']}"
        yield "  characters of a draft", _length(drafts)


def _told_rows(told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if told["key_points"]:
        yield "key points told", f"{told['key_points_told']:.0%} of {told['key_points']}"
    parts = {name: share for name, share in told["parts_told"].items() if share is not None}
    if parts:
        yield "parts told", ", ".join(f"{name} {share:.0%}" for name, share in parts.items())
    yield "openings, false ones", f"{told['openings']}, {told['false_openings']}"
    yield "drafts that promise", str(told["promising"])


def _length(of: Mapping[str, Any]) -> str:
    return f"{of['characters_mean']:.0f}, {of['characters_longest']}"


def _reasons(reasons: Mapping[str, int]) -> str:
    return "".join(f"\n{name}: {count}" for name, count in sorted(reasons.items()))


def interval(of: Mapping[str, float], sign: str = "") -> str:
    """Formats a figure and its interval: `.707 (.652 to .759)`; `sign` is `+` for differences."""
    value, low, high = (f"{of[k]:{sign}.3f}".replace("0.", ".") for k in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def confusion_table(variant: Mapping[str, Any]) -> Table:
    confusion = variant["confusion"]
    answers = list(next(iter(confusion.values())))
    table = _table(
        f"Labels (rows) and answers (columns) of {plain(variant['name'])}",
        [*answers, "precision", "recall", "F1"],
    )
    for label, counts in confusion.items():
        numbers = variant["classes"][label]
        table.add_row(
            label,
            *(f"[bold]{n}[/]" if answer == label else str(n) for answer, n in counts.items()),
            *(f"{numbers[name]:.3f}" for name in ("precision", "recall", "f1")),
        )
    return table


def groups_table(variant: Mapping[str, Any]) -> Table:
    table = _table(
        "By source, and by what the user wrote",
        ["chats", "accuracy", "macro-F1", "recall of angry"],
    )
    for groups in (variant["sources"], variant["lengths"]):
        for name, group in groups.items():
            table.add_row(
                plain(name),
                str(group["chats"]),
                *(_cell(group[figure]) for figure in ("accuracy", "macro_f1", "angry_recall")),
            )
        table.add_section()
    return table


def history_table(history: Mapping[str, Any]) -> Table:
    table = _table(f"History: {plain(history['file'])}", list(_HISTORY.values()))
    table.box = box.SIMPLE_HEAD
    for line in history["lines"]:
        cells = [_cell(line.get(name)) for name in _HISTORY]
        table.add_row(_cell(line.get("date"))[:16].replace("T", " "), *cells)
    return table


_HISTORY = {
    "labelled": "chats of",
    "name": "variant",
    "commit": "commit",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "angry_recall": "angry",
    "ungrounded": "invented",
    "drafts": "drafts",
}
"""Fields of a history line that are shown, with their titles."""


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else plain(str(value))


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", style="bold", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table
