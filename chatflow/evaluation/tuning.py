"""Divides labelled chats to train an adapter and validate it, and reports its worth."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from chatflow.errors import BadInputError, UsageError
from chatflow.evaluation.labels import Label, near_copies, read_labels
from chatflow.evaluation.measures import CLASSES, compare, intervals
from chatflow.models.spec import ModelSpec
from chatflow.prompts.questions import AnalysisPrompt
from chatflow.records import Sentiment

if TYPE_CHECKING:
    from chatflow.models.gemma.tuner import Checked, Example


LabelledT = TypeVar("LabelledT", bound=Any)
"""A labelled chat, with the field `chat`."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """Chats to train on and validate on; `near` counts those left out because they share text."""

    training: Sequence[Label]
    validation: Sequence[Label]
    near: int


def check_model(spec: ModelSpec) -> None:
    """Raises `UsageError` if a model cannot be tuned here."""
    if not spec.kind.adaptable(spec):
        raise UsageError(
            f"--model={spec.name}: cannot be tuned here; give a Gemma 1 to 3 on the workers"
        )


def parts_of(parsed: argparse.Namespace) -> Parts:
    """Reads the labelled chats and divides them.

    Training chats that share text with a validation chat or one of `--apart_from` are left out.

    Raises:
      UsageError: a file cannot be read, or a part lacks a sentiment.
    """
    labels = list(read_labels(parsed.labelled).values())
    if parsed.validation:
        training, validation = labels, list(read_labels(parsed.validation).values())
    else:
        training, validation = divided(labels, parsed.validation_share, parsed.seed)
    others = list(validation)
    if parsed.apart_from:
        others += read_labels(parsed.apart_from).values()
    kept, near = apart(training, others)
    judged_by = parsed.validation or f"{parsed.labelled}, a share of it,"
    for path, name, part in (
        (parsed.labelled, "to learn from", kept),
        (judged_by, "to check it by", validation),
    ):
        missing = [tone.name.lower() for tone in CLASSES if tone not in {x.sentiment for x in part}]
        if missing:
            raise UsageError(
                f"{path}: {len(part)} chats {name}, and none that is "
                f"{' or '.join(missing)}; label more"
            )
    return Parts(kept, validation, near)


def apart(labelled: Sequence[LabelledT], others: Iterable[Label]) -> tuple[list[LabelledT], int]:
    """Returns the labelled chats that share no text with others, and how many do."""
    chats = [one.chat for one in labelled]
    near = {copy.chat_id for copy in near_copies(chats, [other.chat for other in others])}
    kept = [one for one in labelled if one.chat.chat_id not in near]
    return kept, len(labelled) - len(kept)


def divided(labels: Sequence[Label], share: float, seed: int) -> tuple[list[Label], list[Label]]:
    """Returns two random parts; the second has `share` of each sentiment, at least one chat."""
    by_tone: dict[Sentiment, list[Label]] = collections.defaultdict(list)
    for label in labels:
        by_tone[label.sentiment].append(label)
    rng = random.Random(seed)
    first: list[Label] = []
    second: list[Label] = []
    for tone in CLASSES:
        some = by_tone[tone]
        rng.shuffle(some)
        count = max(1, round(len(some) * share))
        first += some[count:]
        second += some[:count]
    return first, second


def examples_of(prompt: AnalysisPrompt, labels: Sequence[Label]) -> list[Example]:
    """Returns the prompts with which a pipeline asks for the tone, and the right choices.

    Raises:
      UsageError: the prompts do not ask for the tone as a choice, or fail on a chat.
    """
    from chatflow.models.gemma.handler import row_of
    from chatflow.models.gemma.tuner import Example

    made = []
    for label in labels:
        try:
            question = prompt.question(label.chat, label.user_id)
        except BadInputError as error:
            raise UsageError(f"chat {label.chat.chat_id!r}: {error}") from None
        part = next((part for part in question.request.parts if part.choices), None)
        if part is None:
            raise UsageError("--prompts: analysis.jinja has no block tone, which tuning needs")
        made.append(Example(row_of(part), part.values.index(label.sentiment), part.values))
    return made


@contextlib.contextmanager
def bar(console: Console, checks: Sequence[Checked]) -> Iterator[Callable[[int, int, float], None]]:
    """Shows a progress bar; yields the function to call after each step."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as shown:
        task = shown.add_task("before the first step", total=None)

        def progress(step: int, steps: int, loss: float) -> None:
            best = min(checks, key=lambda check: check.loss)
            shown.update(
                task,
                completed=step,
                total=steps,
                description=f"loss {loss:.2f}; validation {checks[-1].loss:.3f}, "
                f"lowest {best.loss:.3f} at step {best.step}",
            )

        yield progress


def report_of(
    path: str, parts: Parts, checks: Sequence[Checked], first: Checked, best: Checked
) -> dict[str, Any]:
    """Returns the results on the validation part, before and after training."""
    labels = [label.sentiment for label in parts.validation]
    before, after = (list(map(Sentiment, check.answers)) for check in (first, best))

    def figures(answers: Sequence[Sentiment]) -> dict[str, Any]:
        found = intervals(list(zip(labels, answers, strict=True)))
        return {name: interval.to_dict() for name, interval in found.items()}

    return {
        "adapter": path,
        "bytes": os.path.getsize(path),
        "training": len(parts.training),
        "validation": len(parts.validation),
        "left_out": parts.near,
        "best_step": best.step,
        "checks": [
            {"step": c.step, "train_loss": round(c.train_loss, 4), "loss": round(c.loss, 4)}
            for c in checks
        ],
        "before": figures(before),
        "after": figures(after),
        "difference": compare(labels, before, after).to_dict(),
    }


def show(report: Mapping[str, Any], parsed: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    table = Table(title=f"{report['validation']} validation chats, with 95 % intervals")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for name, title in (
        ("accuracy", "accuracy"), ("macro_f1", "macro-F1"),
        ("angry_recall", "recall of angry"), ("angry_precision", "precision of angry"),
    ):  # fmt: skip
        cells = (report[when][name] for when in ("before", "after"))
        table.add_row(
            title,
            *(f"{cell['value']:.3f} ({cell['low']:.2f} to {cell['high']:.2f})" for cell in cells),
        )
    console.print(table)
    console.print(f"The difference in accuracy is {report['difference']['verdict']}.")
    path = report["adapter"]
    console.print(
        f"{path}: {report['bytes']:,} bytes, of step {report['best_step']}. Use it with "
        f"--adapter={path} --heads=none; compare all answers with\n"
        f"  chatflow evaluate LABELLED.jsonl --model={parsed.model} --adapter={path} --heads=none "
        "--compare adapter=",
        soft_wrap=True,
    )
