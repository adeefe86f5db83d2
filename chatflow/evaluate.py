"""`chatflow evaluate`: the sentiment of the real pipeline against labels."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from apache_beam.io.filesystems import FileSystems

from chatflow.errors import BadInputError, UsageError
from chatflow.records import Analysis, Sentiment, load_object, read_chat
from chatflow.routes import Routed

CLASSES = tuple(Sentiment)  # angry, neutral, happy


@dataclasses.dataclass(frozen=True)
class Confusion:
    """How often a label got an answer.

    Attributes:
      counts: by (label, answer); the answer is None where there is no analysis, which
        counts as wrong.
    """

    counts: Mapping[tuple[Sentiment, Sentiment | None], int]

    @classmethod
    def of(cls, pairs: Sequence[tuple[Sentiment, Sentiment | None]]) -> Confusion:
        counts: dict[tuple[Sentiment, Sentiment | None], int] = {}
        for pair in pairs:
            counts[pair] = counts.get(pair, 0) + 1
        return cls(counts)

    def count(self, label: Sentiment, answer: Sentiment | None) -> int:
        return self.counts.get((label, answer), 0)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def accuracy(self) -> float:
        return sum(self.count(c, c) for c in CLASSES) / max(self.total, 1)

    def precision(self, of: Sentiment) -> float:
        return self.count(of, of) / max(sum(self.count(label, of) for label in CLASSES), 1)

    def recall(self, of: Sentiment) -> float:
        return self.count(of, of) / max(
            sum(n for (label, _), n in self.counts.items() if label == of), 1
        )

    def f1(self, of: Sentiment) -> float:
        precision, recall = self.precision(of), self.recall(of)
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0

    @property
    def macro_f1(self) -> float:
        """The mean F1 of the three classes, whether or not a class occurs."""
        return sum(map(self.f1, CLASSES)) / len(CLASSES)

    def to_dict(self) -> dict[str, Any]:
        def name(sentiment: Sentiment | None) -> str:
            return "none" if sentiment is None else sentiment.name.lower()

        return {
            "chats": self.total,
            "accuracy": round(self.accuracy, 4),
            "macro_f1": round(self.macro_f1, 4),
            "classes": {
                name(c): {
                    "precision": round(self.precision(c), 4),
                    "recall": round(self.recall(c), 4),
                    "f1": round(self.f1(c), 4),
                }
                for c in CLASSES
            },
            "confusion": {
                name(label): {
                    name(answer): self.count(label, answer) for answer in (*CLASSES, None)
                }
                for label in CLASSES
            },
        }


@dataclasses.dataclass(frozen=True)
class Label:
    sentiment: Sentiment
    source: str


def read_labels(path: str) -> dict[tuple[str, str], Label]:
    """The labels of a file of chats by (chat, user).

    Raises:
      UsageError: the file cannot be read, or a line has no usable label; with its number.
    """
    try:
        with FileSystems.open(path) as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise UsageError(f"{path!r} cannot be read: {error}") from None
    labels = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = load_object(line)
            chat = read_chat(value).chat
            if "sentiment" not in value:
                continue
            label = Label(Sentiment(value["sentiment"]), str(value.get("source", "")).split("-")[0])
        except (BadInputError, ValueError) as error:
            raise UsageError(f"{path}:{number}: {error}") from None
        if len(chat.users()) != 1:
            raise UsageError(f"{path}:{number}: has a label and several customers; give user_id")
        labels[chat.chat_id, chat.users()[0]] = label
    if not labels:
        raise UsageError(f"{path!r} has no chat with a label; a label is the field sentiment")
    return labels


def fit_bias(
    scores: Sequence[tuple[Mapping[str, float], Sentiment]], tones: Mapping[str, Sentiment]
) -> dict[str, float]:
    """Constants for the tone words that give the best macro-F1 on labelled chats.

    The neutral word's is 0. Among equally good ones the middle is taken: it is the
    least touched by small changes of the scores.

    Args:
      scores: log-probability of each tone word, and the label, by chat.
    """
    order = sorted(tones, key=lambda word: tones[word])  # angry, neutral, happy
    steps = [step / 10 for step in range(-50, 51)]
    tried = []
    for angry, happy in itertools.product(steps, steps):
        bias = dict(zip(order, (angry, 0.0, happy), strict=True))
        pairs = [(label, _best(of, bias, tones)) for of, label in scores]
        tried.append((round(Confusion.of(pairs).macro_f1, 6), angry, happy))
    best = max(score for score, _, _ in tried)
    near = [(angry, happy) for score, angry, happy in tried if score >= best - 0.005]
    middle = [sum(values) / len(near) for values in zip(*near, strict=True)]
    angry, happy = min(near, key=lambda at: abs(at[0] - middle[0]) + abs(at[1] - middle[1]))
    return dict(zip(order, (angry, 0.0, happy), strict=True))


def _best(
    scores: Mapping[str, float], bias: Mapping[str, float], tones: Mapping[str, Sentiment]
) -> Sentiment:
    return tones[max(tones, key=lambda word: scores[word] - bias[word])]


def evaluate(parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    """The command: runs the pipeline, prints the confusion matrix or one line of JSON."""
    from chatflow.options import from_flags
    from chatflow.pipeline import plan
    from chatflow.report import read_records
    from chatflow.run import execute

    labels = read_labels(parsed.labelled)
    with tempfile.TemporaryDirectory(prefix="chatflow-evaluate-") as scratch:
        parsed.input, parsed.output = parsed.labelled, parsed.output or scratch
        options = from_flags(parsed)
        if parsed.fit_bias and options.inference == "remote":
            raise UsageError("--fit_bias: remote models give no scores to fit it to")
        summary = execute(options, flags, drafts=False)
        files = summary.files("analyses")
        analyses = {(a.chat_id, a.user_id): a for a in read_records(Analysis, files)}
        counts = summary.to_dict()
    pairs = {
        key: (label, analyses[key].sentiment if key in analyses else None)
        for key, label in labels.items()
    }

    def confusion(source: str | None = None) -> Confusion:
        return Confusion.of(
            [
                (label.sentiment, answer)
                for label, answer in pairs.values()
                if source in (None, label.source)
            ]
        )

    report: dict[str, Any] = {"all": confusion().to_dict()}
    sources = sorted({label.source for label in labels.values()})
    if len(sources) > 1:
        report["sources"] = {source: confusion(source).to_dict() for source in sources}
    report["run"] = {
        k: counts[k] for k in ("asked", "analysed", "summaries", "dead_letters", "lost", "seconds")
    }
    if parsed.fit_bias:
        prompt = plan(options).first.analysis
        if isinstance(prompt, Routed):
            raise UsageError("--fit_bias: fits one model; leave --models out")
        tones = prompt.tones
        scores = [
            (analyses[key].tone_scores, label.sentiment)
            for key, label in labels.items()
            if key in analyses and analyses[key].tone_scores
        ]
        if not scores:
            raise UsageError(f"--fit_bias: {options.model} does not score tone words")
        report["tone_bias"] = {options.model: fit_bias(scores, tones)}
    if options.summary == "json":
        print(json.dumps(report))
    else:
        _print(report)
    return 0


def _print(report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    values = report["all"]
    names = list(values["classes"])
    answers = [*names, "none"]
    table = Table(title="Labels (rows) and answers (columns)")
    for column in ("", *answers, "precision", "recall", "F1"):
        table.add_column(column, justify="left" if not column else "right")
    for label in names:
        numbers = values["classes"][label]
        table.add_row(
            f"[bold]{label}[/]",
            *(str(values["confusion"][label][answer]) for answer in answers),
            *(f"{numbers[name]:.2f}" for name in ("precision", "recall", "f1")),
        )
    console.print(table)

    table = Table()
    for column in ("", "chats", "accuracy", "macro-F1", "recall of angry"):
        table.add_column(column, justify="left" if not column else "right")
    rows = {"all": values, **report.get("sources", {})}
    for name, row in rows.items():
        table.add_row(
            name or "(no source)",
            str(row["chats"]),
            f"{row['accuracy']:.3f}",
            f"{row['macro_f1']:.3f}",
            f"{row['classes']['angry']['recall']:.3f}",
        )
    console.print(table)
    if "tone_bias" in report:
        console.print(f"tone_bias fitted on these chats: {json.dumps(report['tone_bias'])}")
    run = report["run"]
    console.print(
        f"{run['analysed']} of {run['asked']} analysed in {run['seconds']} s, "
        f"{run['dead_letters']} dead letters, {run['lost']} lost; summaries: {run['summaries']}"
    )
