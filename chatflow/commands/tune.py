"""`chatflow tune`: trains LoRA on labelled chats, for the choice among the tone words."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from chatflow.errors import UsageError, one_line
from chatflow.options import Parser, add_flags, number

if TYPE_CHECKING:
    from chatflow.models.gemma.tuner import Checked

DESCRIPTION = """
Trains LoRA matrices, a small addition to the weights of a Gemma, by which it finds the
tone of chats like yours; on a GPU where there is one. What was best on a part that it
did not learn from is kept.

  chatflow tune labelled.jsonl --adapter_output tone.lora.h5
  chatflow run --adapter tone.lora.h5 --input 'chats/*.jsonl' --output results
"""

PASSES_FLAGS_ON = False


def add_arguments(parser: Parser) -> None:
    parser.add_argument("labelled", metavar="LABELLED.jsonl", help="chats with labels")
    parser.add_argument(
        "--adapter_output", default="tone.lora.h5", help="the file to write (default: %(default)s)"
    )
    parser.add_argument(
        "--validation", default="", help="labelled chats to check it by; default: a part of them"
    )
    parser.add_argument(
        "--validation_share", type=number(most=1), default=0.1, help="(default: 0.1)"
    )
    parser.add_argument(
        "--apart_from",
        default="",
        help="labelled chats for a later evaluation: what shares text with them is left out",
    )
    for name, kind, default, help in (
        ("epochs", number(int), 3, "times that it sees each chat, at most"),
        ("patience", number(int), 3, "checks without a lower loss after which it stops"),
        ("learning_rate", number(), 1e-3, "at its highest"),
        ("rank", number(int), 4, "of the matrices; that of --adapter, if it begins with one"),
        ("batch", number(int), 16, "chats in a step"),
        ("seed", int, 1, "of the division into parts, the order and the first values"),
        (
            "strength",
            number(most=1),
            1.0,
            "share of what was learned that is kept; less for other texts",
        ),
    ):
        parser.add_argument(
            f"--{name}", type=kind, default=default, help=f"{help} (default: {default})"
        )
    add_flags(
        parser,
        only=("model", "model_kind", "prompts", "max_prompt_tokens", "adapter", "dtype", "summary"),
    )


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    """Trains an adapter; prints how the model answered before and after; returns the exit code."""
    from rich.console import Console

    from chatflow.evaluation.tuning import bar, check_model, examples_of, parts_of, report_of, show
    from chatflow.options import from_flags
    from chatflow.pipeline import plan
    from chatflow.prompts.routes import Routed
    from chatflow.running.runner import quieten
    from chatflow.sinks.files import check_writable
    from chatflow.weights.adapters import ENDS, local_adapter
    from chatflow.weights.presets import local_preset, use_jax

    quieten(local=True)
    if not parsed.adapter_output.endswith(ENDS):
        raise UsageError(f"--adapter_output={parsed.adapter_output}: must end in {ENDS}")
    if "://" in parsed.adapter_output:
        raise UsageError(f"--adapter_output={parsed.adapter_output}: must be on this machine")
    options = dataclasses.replace(from_flags(parsed), input=parsed.labelled, output="unused")
    planned = plan(options)
    spec, prompt = planned.routes.specs[0], planned.first.analysis
    assert not isinstance(prompt, Routed)  # only --models makes one; it is not among the flags
    check_model(spec)
    use_jax()  # before anything imports keras
    parts = parts_of(parsed)
    # The template's constants for the initial adapter do not apply to the new one.
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
    preset = local_preset(spec.name, console.print)
    adapter = local_adapter(spec.own_adapter, console.print) if spec.own_adapter else ""
    schedule = Schedule(**{name: value for name, value in vars(parsed).items() if name in names})
    try:
        tuner = Tuner(preset, schedule, spec.instruct, options.dtype, adapter)
    except (OSError, ValueError) as error:  # keras_hub's, for files that are not a model
        said = f"--model={spec.name}: cannot be loaded: {one_line(error)}"
        raise UsageError(said) from error
    checks: list[Checked] = []
    with bar(console, checks) as progress:

        def checked(now: Checked) -> None:
            if now.improved:
                tuner.save(parsed.adapter_output)  # an interrupted run keeps the best so far
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
