"""Runs the variants (the given flags and each --compare) and collects each chat's results."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from chatflow.errors import UsageError
from chatflow.evaluation.baselines import vader
from chatflow.evaluation.labels import Key, Label
from chatflow.options import Options, Parser, add_flags, from_flags
from chatflow.pipeline import Plan, plan
from chatflow.records import Analysis, DeadLetter, Draft, Sentiment
from chatflow.running.launch import execute
from chatflow.running.runner import beam_options, cloud_of
from chatflow.running.summary import Summary, read_records

VADER = "vader"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to answer the chats.

    Attributes:
      name: the value of --compare; for the first variant, its model.
      planned: what its pipeline is built from; None for a baseline, which has a `tone` function.
    """

    name: str
    planned: Plan | None = None
    tone: Callable[[Label], Sentiment] | None = None

    @property
    def model(self) -> str:
        """Returns the model's name as in results, with its adapter."""
        if not self.planned:
            return self.name
        return ", ".join(spec.result_name for spec in self.planned.routes.specs)


@dataclasses.dataclass(frozen=True)
class Judged:
    """A labelled chat and its results.

    Attributes:
      answer: None if there is no analysis; `unanswered` is its dead letter's stage and reason.
      undrafted: why there is no draft, if the answer is angry.
    """

    label: Label
    answer: Sentiment | None
    analysis: Analysis | None = None
    draft: Draft | None = None
    unanswered: str = ""
    undrafted: str = ""

    @property
    def right(self) -> bool:
        return self.answer == self.label.sentiment

    @property
    def confidence(self) -> float | None:
        return self.analysis.confidence if self.analysis else None


@dataclasses.dataclass(frozen=True)
class Ran:
    """A variant after its run; `counts` is its summary; see `running.summary.Summary`."""

    variant: Variant
    judged: Mapping[Key, Judged]
    counts: Mapping[str, Any]


def variants_of(
    parsed: argparse.Namespace, flags: Sequence[str], scratch: str, leave_out: Sequence[str]
) -> list[Variant]:
    """Returns a variant with the given flags, and one per --compare, which replaces some flags.

    Args:
      flags: Beam's flags.
      scratch: a folder for the results of variants without an --output.
      leave_out: flags that a --compare cannot have.

    Raises:
      UsageError: a flag of any variant is wrong.
    """
    parsed.input, parsed.output = parsed.labelled, parsed.output or f"{scratch}/0"
    variants = [_planned(from_flags(parsed), flags)]
    for number, value in enumerate(parsed.compare, 1):
        if value.strip() == VADER:
            variants.append(Variant(VADER, tone=vader()))
            continue
        try:
            replaced = _replaced(parsed, value, f"{scratch}/{number}", leave_out)
            variants.append(_planned(replaced, flags, " ".join(value.split())))
        except UsageError as error:
            raise UsageError(f"--compare={value!r}: {error}") from None
    return variants


def _planned(options: Options, flags: Sequence[str], name: str = "") -> Variant:
    cloud = cloud_of(beam_options(flags, shown=options.flags()), options)
    return Variant(name or options.model, plan(options, cloud))


def _replaced(
    parsed: argparse.Namespace, value: str, output: str, leave_out: Sequence[str]
) -> Options:
    """Returns the given flags with those of a --compare in their place, and a separate output."""
    parser = Parser(prog="--compare", add_help=False, allow_abbrev=False)
    add_flags(parser, leave_out=(*leave_out, "summary"))
    parser.set_defaults(**{**vars(parsed), "output": output})
    try:
        words = shlex.split(value)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not words or not all("=" in word for word in words):
        raise UsageError("give flags without dashes as FLAG=VALUE, or vader")
    replaced, unknown = parser.parse_known_args([f"--{word}" for word in words])
    if unknown:
        raise UsageError(f"unknown flag {unknown[0].split('=')[0].removeprefix('--')}")
    return from_flags(replaced)


def answered(variant: Variant, labels: Mapping[Key, Label], flags: Sequence[str]) -> Ran:
    """Answers all chats; raises the errors of `running.launch.execute`."""
    if variant.planned is None:
        return _baseline(variant, labels)
    summary = execute(variant.planned.options, flags)
    return Ran(variant, judge(labels, summary), summary.to_dict())


def judge(labels: Mapping[Key, Label], summary: Summary) -> dict[Key, Judged]:
    """Returns each labelled chat with its results from a run's files."""
    analyses = {
        (a.chat_id, a.user_id): a for a in read_records(Analysis, summary.files("analyses"))
    }
    drafts = {(d.chat_id, d.user_id): d for d in read_records(Draft, summary.files("drafts"))}
    reasons: dict[tuple[str | None, bool], str] = {}
    for letter in read_records(DeadLetter, summary.files("dead_letters")):
        of_draft = letter.stage.startswith("draft_")
        reasons[letter.chat_id, of_draft] = f"{letter.stage}/{letter.reason}"
    judged = {}
    for key, label in labels.items():
        analysis, draft = analyses.get(key), drafts.get(key)
        answer = analysis.sentiment if analysis else None
        flag = draft.flag if draft else None
        undrafted = ""
        if answer == Sentiment.ANGRY and (draft is None or flag):
            undrafted = flag or reasons.get((label.chat.chat_id, True), "unknown")
        judged[key] = Judged(
            label,
            answer,
            analysis,
            None if flag else draft,
            "" if analysis else reasons.get((label.chat.chat_id, False), "unknown"),
            undrafted,
        )
    return judged


def _baseline(variant: Variant, labels: Mapping[Key, Label]) -> Ran:
    assert variant.tone is not None
    started = time.monotonic()
    judged = {key: Judged(label, variant.tone(label)) for key, label in labels.items()}
    seconds = max(time.monotonic() - started, 1e-9)
    rate = round(len(labels) / seconds, 3)
    return Ran(variant, judged, {"seconds": round(seconds, 2), "chats_per_second": rate})
