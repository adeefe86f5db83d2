"""`chatflow tune`: fits heads, or trains LoRA, on labelled chats."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from chatflow.choices.heads import ENDS as HEADS
from chatflow.errors import UsageError, one_line
from chatflow.options import Options, Parser, add_flags, number
from chatflow.weights.adapters import ENDS as LORA

if TYPE_CHECKING:
    from rich.console import Console

    from chatflow.models.gemma.tuner import Checked

DESCRIPTION = """
Fits heads on labelled chats: small layers that choose tone, fields and sentences from the
states of a Gemma that reads a chat. It takes minutes on a CPU. The states are kept, so an
interrupted run, or one with more labels, does not read the same chats again.

  chatflow tune labelled.jsonl --output mine.heads.npz
  chatflow run --heads mine.heads.npz --input 'chats/*.jsonl' --output results

With --output NAME.lora.h5 it trains LoRA for the tone instead, a small addition to the
weights, on a GPU if there is one.
"""

PASSES_FLAGS_ON = False


def add_arguments(parser: Parser) -> None:
    parser.add_argument("labelled", metavar="LABELLED.jsonl", nargs="+", help="chats with labels")
    parser.add_argument(
        "--output",
        default=f"mine{HEADS}",
        help=f"the file to write: *{HEADS}, or *{LORA} for LoRA (default: %(default)s)",
    )
    parser.add_argument(
        "--apart_from",
        default="",
        help="labelled chats for a later evaluation: chats that share text with them are left out",
    )
    parser.add_argument("--seed", type=int, default=1, help="of every random order (default: 1)")
    heads = parser.add_argument_group("heads")
    heads.add_argument(
        "--choices", default="", help="fit only these of choices.toml, e.g. topic,resolved"
    )
    heads.add_argument(
        "--folds",
        type=number(int),
        default=5,
        help="parts, each of which is left out once to measure (default: 5)",
    )
    heads.add_argument("--report", default="", metavar="FILE.html", help="write a page of curves")
    heads.add_argument(
        "--layers",
        default="",
        help="layers whose states heads use (default: by the model); none: choose sentences by "
        "plain figures, for chats that no model reads",
    )
    lora = parser.add_argument_group("LoRA")
    lora.add_argument(
        "--validation", default="", help="labelled chats to check it with; default: a part of them"
    )
    lora.add_argument("--validation_share", type=number(most=1), default=0.1, help="(default: 0.1)")
    for name, kind, default, help in (
        ("epochs", number(int), 3, "most times that it sees each chat"),
        ("patience", number(int), 3, "checks without a lower loss after which it stops"),
        ("learning_rate", number(), 1e-3, "highest learning rate"),
        ("rank", number(int), 4, "rank of the matrices; as in --adapter, if it begins with one"),
        ("batch", number(int), 16, "chats in a step"),
        (
            "strength",
            number(most=1),
            1.0,
            "share of what was learned to keep; less is better for other texts",
        ),
    ):
        lora.add_argument(
            f"--{name}", type=kind, default=default, help=f"{help} (default: {default})"
        )
    add_flags(
        parser,
        only=(
            "model", "model_kind", "prompts", "max_prompt_tokens", "adapter", "heads", "dtype",
            "summary",
        ),
    )  # fmt: skip


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    """Writes heads or an adapter; prints how good they are; returns the exit code."""
    from rich.console import Console

    from chatflow.evaluation.tuning import check_model
    from chatflow.options import from_flags
    from chatflow.pipeline import plan
    from chatflow.prompts.routes import Routed
    from chatflow.running.runner import quieten
    from chatflow.sinks.files import check_writable
    from chatflow.weights.presets import use_jax

    quieten(local=True)
    if not parsed.output.endswith((HEADS, LORA)):
        raise UsageError(f"--output={parsed.output}: must end in {HEADS} or {LORA}")
    if "://" in parsed.output:
        raise UsageError(f"--output={parsed.output}: must be on this machine")
    check_writable(os.path.dirname(parsed.output) or ".", "--output")
    flags = dataclasses.replace(from_flags(parsed), input=parsed.labelled[0], output="unused")
    if parsed.output.endswith(LORA):
        flags = dataclasses.replace(flags, heads="none")
    planned = plan(flags)
    spec, prompt = planned.routes.specs[0], planned.first.analysis
    assert not isinstance(prompt, Routed)  # only --models makes one; it is not among the flags
    check_model(spec)
    use_jax()  # before anything imports keras
    console = Console(stderr=True, highlight=False)
    if parsed.output.endswith(HEADS):
        return _heads(parsed, flags, prompt, console)
    return _lora(parsed, flags, prompt, console)


def _heads(parsed: argparse.Namespace, options: Options, prompt: Any, console: Console) -> int:
    """Fits a head for each selected choice."""
    from rich.progress import track

    from chatflow.choices.heads import CHAT, Heads
    from chatflow.evaluation.choosing import (
        LAYERS,
        Reduced,
        by_head,
        fitted,
        heads_of,
        read_examples,
        seen,
    )
    from chatflow.evaluation.curves import report_of, show, write_page
    from chatflow.evaluation.labels import read_labels
    from chatflow.evaluation.tuning import apart
    from chatflow.models.gemma.engine import load_engine
    from chatflow.weights.embedded import cache_root
    from chatflow.weights.heads import local_heads
    from chatflow.weights.presets import local_preset

    spec = prompt.model
    if "reading" not in prompt.template.blocks:
        raise UsageError(f"{prompt.template.where}: has no block reading, for heads to look at")
    choices = by_head(prompt.choices)
    names = [choice.name for choice in choices]
    wanted = parsed.choices.split(",") if parsed.choices else names
    if unknown := [name for name in wanted if name not in names]:
        raise UsageError(
            f"--choices: {unknown[0]!r} is not one of {', '.join(names)}, which "
            f'{prompt.template.folder}/choices.toml has by = "head"'
        )
    plain = parsed.layers == "none"
    try:
        layers = tuple(map(int, parsed.layers.split(","))) if parsed.layers else LAYERS
    except ValueError:
        if not plain:
            said = f"--layers={parsed.layers}: must be numbers, e.g. 9,12, or none"
            raise UsageError(said) from None
        layers, choices = (), [choice for choice in choices if choice.over != CHAT]
    given = Heads.load(local_heads(spec.own_heads)) if spec.own_heads and not plain else None
    if given and not parsed.layers:
        layers = given.layers
    examples = read_examples(parsed.labelled, prompt, choices)
    others = read_labels(parsed.apart_from).values() if parsed.apart_from else ()
    examples, near = apart(examples, others)
    labelled = {name for example in examples for name in example.labels}
    chosen = [c for c in choices if c.name in wanted and (parsed.choices or c.name in labelled)]
    console.print(
        f"{len(examples)} labelled chats; {near} left out: they share text with --apart_from"
    )
    kept = {"template": "", "weights": ""}
    engine: Any = None
    if not plain:
        preset = local_preset(spec.name, console.print)
        engine = load_engine(preset, options.dtype, spec.instruct, "none", spec.adapter)
        if not engine.forward.family.learns:
            raise UsageError(f"--model={spec.name}: cannot be tuned here; give a Gemma 1 to 3")
        kept = {"template": prompt.reading_hash, "weights": engine.forward.fingerprint}
    if given and (given.template, given.weights, given.layers) != (*kept.values(), layers):
        console.print("the heads of --heads are for another model, template or layers: left out")
        given = None
    cache = cache_root() / "readings"
    with _reading(console) as progress:
        vectors = seen(examples, engine, layers, cache, progress)
    reduced = Reduced.of(vectors)
    fits = [
        fitted(examples, reduced, choice, parsed.folds, parsed.seed)
        for choice in track(chosen, "fitting", console=console)
    ]
    name = "" if plain else spec.name
    heads = heads_of(fits, given, name, kept["weights"], kept["template"], layers)
    heads.save(parsed.output)
    report = report_of(parsed, examples, vectors, fits, given)
    if parsed.report:
        write_page(parsed.report, report)
    if options.summary == "json":
        print(json.dumps(report))
    else:
        show(report)
    return 0


def _reading(console: Console) -> Any:
    """Returns a context that shows how many chats have been read."""
    import contextlib
    from collections.abc import Iterator

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    @contextlib.contextmanager
    def shown() -> Iterator[Any]:
        columns = ("reading", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("reading", total=None)
            yield lambda done, of: bar.update(task, completed=done, total=of)

    return shown()


def _lora(parsed: argparse.Namespace, options: Options, prompt: Any, console: Console) -> int:
    """Trains an adapter of the tone."""
    from chatflow.evaluation.tuning import bar, examples_of, parts_of, report_of, show
    from chatflow.models.gemma.tuner import Schedule, Tuner
    from chatflow.weights.adapters import local_adapter
    from chatflow.weights.presets import local_preset

    if len(parsed.labelled) > 1:
        raise UsageError("LABELLED.jsonl: LoRA is trained on one file")
    parsed.labelled, parsed.adapter_output = parsed.labelled[0], parsed.output
    spec = prompt.model
    parts = parts_of(parsed)
    # The template's constants fit the initial adapter, not the new one.
    learning = dataclasses.replace(prompt, model=dataclasses.replace(spec, adapter=""))
    training = examples_of(learning, parts.training)
    validation = examples_of(learning, parts.validation)
    console.print(
        f"{len(training)} chats to learn from, {len(validation)} to check it with; "
        f"{parts.near} left out: they share text with others",
        soft_wrap=True,
    )
    names = {field.name for field in dataclasses.fields(Schedule)}
    preset = local_preset(spec.name, console.print)
    adapter = local_adapter(spec.adapter, console.print) if spec.adapter else ""
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
                tuner.save(parsed.output)  # an interrupted run keeps the best so far
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
    tuner.save(parsed.output)
    report = report_of(parsed.output, parts, checks, before or checks[0], best)
    if options.summary == "json":
        print(json.dumps(report))
    else:
        show(report, parsed)
    return 0
