"""`chatflow evaluate`: the real pipeline on labelled chats, and what its results are worth."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from chatflow.errors import FAILED, UsageError
from chatflow.evaluation.bias import fit_constants
from chatflow.evaluation.figures import figures
from chatflow.evaluation.history import append, entry, fall, read_history
from chatflow.evaluation.labels import read_labels
from chatflow.evaluation.measures import CLASSES
from chatflow.evaluation.page import write_page
from chatflow.evaluation.tables import show
from chatflow.evaluation.variants import Ran, Variant, run, variants_of
from chatflow.prompts.questions import AnalysisPrompt
from chatflow.prompts.routes import Routed


def evaluate(parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    """The command: runs all variants, prints tables or one line of JSON.

    Returns:
      the exit code: 1 where the accuracy fell since the newest line of --history.

    Raises:
      UsageError: a wrong flag or file, before anything runs; or there is nothing to fit to.
      SystemExit: with code 1, when a pipeline fails.
    """
    labels = read_labels(parsed.labelled)
    if parsed.fit_bias and len({label.sentiment for label in labels.values()}) < len(CLASSES):
        raise UsageError(f"--fit_bias: {parsed.labelled!r} must have labels of all three tones")
    if parsed.fit_bias and parsed.inference == "remote":
        raise UsageError("--fit_bias: remote models give no scores to fit it to")
    for name in ("report", "history"):
        if (path := getattr(parsed, name)) and not Path(path).absolute().parent.is_dir():
            raise UsageError(f"--{name}={path}: there is no such folder")
    history = read_history(parsed.history) if parsed.history else []
    with tempfile.TemporaryDirectory(prefix="chatflow-evaluate-") as scratch:
        variants = variants_of(parsed, flags, scratch)
        if parsed.fit_bias:
            _to_fit(variants[0])
        ran = []
        for number, variant in enumerate(variants, 1):
            if len(variants) > 1:
                of = f"{number} of {len(variants)}: {variant.name}"
                Console(stderr=True).print(of, highlight=False, markup=False)
            ran.append(run(variant, labels, flags))
    report: dict[str, Any] = {
        "labelled": parsed.labelled,
        "chats": len(labels),
        "variants": [figures(each, ran[0] if each is not ran[0] else None) for each in ran],
    }
    if parsed.fit_bias:
        report |= _fitted(ran[0])
    falls = []
    if parsed.history:
        lines = [
            entry(number, each, found, parsed.labelled)
            for number, (each, found) in enumerate(zip(ran, report["variants"], strict=True))
        ]
        falls = list(
            filter(None, (fall(history, line, labels, parsed.tolerance) for line in lines))
        )
        append(parsed.history, lines)
        report["history"] = {
            "file": parsed.history,
            "lines": [_without_answers(line) for line in (*history, *lines)[-10:]],
            "falls": falls,
        }
    if parsed.summary == "json":
        print(json.dumps(report, ensure_ascii=False))
    else:
        show(report)
    if parsed.report:
        write_page(parsed.report, report, ran)
    for text in falls:
        print(f"chatflow: {text}", file=sys.stderr)
    return FAILED if falls else 0


def _without_answers(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "answers"}


def _to_fit(variant: Variant) -> AnalysisPrompt:
    """The prompt whose bias is to be fitted.

    Raises:
      UsageError: there are several, or its answers have no scores.
    """
    assert variant.planned is not None  # the first is no baseline
    prompt = variant.planned.first.analysis
    if isinstance(prompt, Routed):
        raise UsageError("--fit_bias: fits one model; leave --models out")
    if "tone" not in prompt.block_names:
        raise UsageError(f"--fit_bias: {variant.model} does not score tone words")
    return prompt


def _fitted(ran: Ran) -> dict[str, dict[str, Any]]:
    """`tone_bias` and `tone_temperature` of the model, as the prompt template takes them.

    Raises:
      UsageError: no chat was answered.
    """
    prompt = _to_fit(ran.variant)
    scores = [
        (judged.analysis.tone_scores, judged.label.sentiment)
        for judged in ran.judged.values()
        if judged.analysis and judged.analysis.tone_scores
    ]
    if not scores:
        raise UsageError("--fit_bias: no labelled chat has an analysis")
    bias, temperature = fit_constants(scores, prompt.tones)
    name = prompt.result_name
    return {"tone_bias": {name: bias}, "tone_temperature": {name: temperature}}
