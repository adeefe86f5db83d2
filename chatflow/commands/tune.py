"""`chatflow tune`: LoRA on labelled chats, for the choice among the tone words."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from chatflow.errors import BadInputError, UsageError
from chatflow.evaluation.labels import Label, near_copies, read_labels
from chatflow.evaluation.measures import CLASSES, compare, intervals
from chatflow.records import Sentiment

if TYPE_CHECKING:
    from rich.console import Console

    from chatflow.models.gemma.tuner import Checked, Example
    from chatflow.models.spec import ModelSpec
    from chatflow.prompts.questions import AnalysisPrompt


@dataclasses.dataclass(frozen=True)
class Parts:
    """What is learned from, and what it is judged by.

    Attributes:
      near: labelled chats that were left out, for they share text with others.
    """

    training: Sequence[Label]
    validation: Sequence[Label]
    near: int


def tune(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    """The command: trains an adapter, and prints how it answers beside the model as it was."""
    from rich.console import Console

    from chatflow.options import from_flags
    from chatflow.pipeline import plan
    from chatflow.prompts.routes import Routed
    from chatflow.running.launch import quieten
    from chatflow.sinks.files import check_writable
    from chatflow.weights.adapters import ENDS, local_adapter
    from chatflow.weights.presets import local_preset, use_jax

    quieten(local=True)
    if rest:
        raise UsageError(f"unknown flag {rest[0]}; see chatflow tune --help")
    if not parsed.adapter_output.endswith(ENDS):
        raise UsageError(f"--adapter_output={parsed.adapter_output}: must end in {ENDS}")
    if "://" in parsed.adapter_output:
        raise UsageError(f"--adapter_output={parsed.adapter_output}: must be on this machine")
    options = dataclasses.replace(from_flags(parsed), input=parsed.labelled, output="unused")
    planned = plan(options)
    spec, prompt = planned.routes.specs[0], planned.first.analysis
    assert not isinstance(prompt, Routed)  # which --models would make; it is none of the flags
    check_model(spec)
    use_jax()  # before anything imports keras
    parts = parts_of(parsed)
    # Constants of the template that belong to the adapter it begins with are not the new one's.
    learning = dataclasses.replace(prompt, model=dataclasses.replace(spec, adapter="none"))
    training = examples_of(learning, parts.training)
    validation = examples_of(learning, parts.validation)

    console = Console(stderr=True, highlight=False)
    console.print(
        f"{len(training)} chats to learn from, {len(validation)} to check it by; "
        f"{parts.near} left out, for they share text with others",
        soft_wrap=True,
    )
    check_writable(os.path.dirname(parsed.adapter_output) or ".", "--adapter_output")
    from chatflow.models.gemma.tuner import Schedule, Tuner

    names = {field.name for field in dataclasses.fields(Schedule)}
    tuner = Tuner(
        local_preset(spec.name, console.print),
        Schedule(**{name: value for name, value in vars(parsed).items() if name in names}),
        spec.instruct,
        options.dtype,
        local_adapter(spec.own_adapter, console.print) if spec.own_adapter else "",
    )
    checks: list[Checked] = []
    with bar(console, checks) as progress:

        def checked(now: Checked) -> None:
            if now.improved:
                tuner.save(parsed.adapter_output)  # so that who interrupts it has the best so far
            checks.append(now)
            right = sum(
                a == e.values[e.label] for a, e in zip(now.answers, validation, strict=True)
            )
            console.print(
                f"step {now.step} of {now.steps}: validation loss {now.loss:.3f}, "
                f"{right} of {len(validation)} right"
            )

        asked = examples_of(prompt, parts.validation)
        before = None if asked == validation else tuner.check(asked)
        best = tuner.train(training, validation, progress, checked)
    tuner.save(parsed.adapter_output)
    report = report_of(parsed.adapter_output, parts, checks, before or checks[0], best)
    if options.summary == "json":
        print(json.dumps(report))
    else:
        show(report, parsed)
    return 0


def check_model(spec: ModelSpec) -> None:
    """Raises `UsageError` where a model's weights are not Gemma's, and so not ours to tune."""
    if spec.is_scripted or spec.is_torch or spec.is_vllm or spec.is_remote:
        raise UsageError(
            f"--model={spec.name}: cannot be tuned here; give a Gemma that runs on the workers"
        )


def parts_of(parsed: argparse.Namespace) -> Parts:
    """Reads and divides the labelled chats.

    Those that share text with a validation chat, or with one of `--apart_from`, are left out of
    what is learned from.

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
    chats = [label.chat for label in training]
    near = {copy.chat_id for copy in near_copies(chats, [label.chat for label in others])}
    kept = [label for label in training if label.chat.chat_id not in near]
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
    return Parts(kept, validation, len(training) - len(kept))


def divided(labels: Sequence[Label], share: float, seed: int) -> tuple[list[Label], list[Label]]:
    """Two parts at random, the second with a share of each sentiment, at least one."""
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
    """The prompts by which a pipeline would ask for the tone, and the right choices.

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
            raise UsageError("--prompts: analysis.jinja has no block tone, whose choice is tuned")
        made.append(Example(row_of(part), part.values.index(label.sentiment), part.values))
    return made


@contextlib.contextmanager
def bar(console: Console, checks: Sequence[Checked]) -> Iterator[Callable[[int, int, float], None]]:
    """A progress bar; gives what tells it of a step."""
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
    """What came out on the validation part, before it learned and after."""
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
        f"--adapter={path}; compare all answers with\n"
        f"  chatflow evaluate LABELLED.jsonl --model={parsed.model} --adapter={path} "
        "--compare adapter=none",
        soft_wrap=True,
    )
