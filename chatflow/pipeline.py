"""Builds the whole pipeline graph; a chat passes through it from top to bottom."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import apache_beam as beam

from chatflow.choices.heads import CHAT
from chatflow.errors import UsageError
from chatflow.models.kept import KeptSettings
from chatflow.models.prices import Price, price_of
from chatflow.models.requests import Request
from chatflow.models.several import SeveralModelsHandler
from chatflow.models.spec import Model, ModelSpec, inference_of
from chatflow.options import NO_CLOUD, Cloud, Options, RedactionSettings, Rules, SinkSettings
from chatflow.prompts.questions import AnalysisPrompt
from chatflow.prompts.routes import Routes, routes_of
from chatflow.prompts.updates import Updates, WatchUpdates, look
from chatflow.records import KINDS, AnalysedChat, Analysis, DeadLetter
from chatflow.sinks.database import Database
from chatflow.sinks.files import Files
from chatflow.sinks.write import WriteRecords, sink_of, split_destinations
from chatflow.sources.chats import USUAL, Customs, customs_by
from chatflow.sources.parse import ParseArrivals
from chatflow.sources.read import ReadArrivals, is_stream, split_inputs
from chatflow.sources.results import ReadResults
from chatflow.stages.analyse import AnalyseChats
from chatflow.stages.assemble import AssembleChats
from chatflow.stages.draft import DraftApologies, to_be_written
from chatflow.stages.identity import TellApart
from chatflow.stages.redact import RedactChats, RedactLogs
from chatflow.stages.replay import OpenDeadLetters
from chatflow.stages.skip import SkipDone

if TYPE_CHECKING:
    from chatflow.redaction import Redactor


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a pipeline is built from, checked before anything runs.

    Attributes:
      first: the prompts and weights at the start.
      destinations: the URIs to write to, by kind of record.
      streaming: whether the input never ends.
      replay: whether the input holds dead letters to try again.
      drafts: whether to make apology drafts in addition to analyses.
      prices: what each model costs, by its name, if known.
      redactor: replaces personal data, if the options ask for it.
    """

    options: Options
    routes: Routes
    model: Model
    first: Updates
    rules: Rules
    customs: Customs
    destinations: Mapping[str, tuple[str, ...]]
    streaming: bool = False
    replay: bool = False
    drafts: bool = True
    prices: Mapping[str, Price | None] = dataclasses.field(default_factory=dict)
    redactor: Redactor | None = None

    @property
    def watches(self) -> bool:
        """Returns whether to look for new weights and templates while the pipeline runs."""
        updates = any(spec.updates for spec in self.routes.specs)
        return self.streaming and (updates or self.options.prompt_updates)

    def write(self, kind: str) -> WriteRecords:
        """Returns the transform that writes a kind of record."""
        return self.write_to(self.destinations[kind])

    def write_to(self, destinations: Sequence[str]) -> WriteRecords:
        return WriteRecords(destinations, self.sink_settings)

    @property
    def sink_settings(self) -> SinkSettings:
        settings = self.options.take(SinkSettings)
        return dataclasses.replace(settings, streaming=self.streaming, fields=self.fields)

    @property
    def fields(self) -> tuple[str, ...]:
        """Returns the names of an analysis's fields, as the prompts at the start declare them."""
        asked = (prompt for pair in self.first.by_route for prompt in pair[0].every)
        choices = (c for one in asked if isinstance(one, AnalysisPrompt) for c in one.choices)
        names = (c.name for c in choices if c.over == CHAT and c.name != "tone")
        return tuple(dict.fromkeys(names))


def plan(
    options: Options,
    cloud: Cloud = NO_CLOUD,
    replay: bool = False,
    drafts: bool = True,
) -> Plan:
    """Checks sources, destinations, model and prompts, and returns the plan.

    `cloud` is the project and location for remote models whose names do not contain them; it is
    sent to the workers.

    Raises:
      UsageError: an unknown model, source or destination; a mistake in the prompts or the prices.
    """
    streaming = is_stream(options.input)
    if options.skip_done and streaming:
        raise UsageError("--skip_done: only with files; in a stream, use --answers")
    for flag in ("database", "answers"):
        if uri := getattr(options, flag):
            from chatflow.database.connections import parse_uri

            try:
                parse_uri(uri)
            except UsageError as error:
                raise UsageError(f"--{flag}: {error}") from None
    if options.keep_raw:
        check_raw(options.keep_raw)
    routes = routes_of(options, functools.partial(ModelSpec.of, cloud=cloud, streaming=streaming))
    first = look(routes)
    return Plan(
        options,
        routes,
        model_of(routes, first, streaming, options),
        first,
        options.take(Rules),
        customs_by(options),
        {
            kind: split_destinations(kind, getattr(options, kind), options.output, options.database)
            for kind in KINDS
        },
        streaming,
        replay,
        drafts,
        prices_of(routes, options),
        redactor_of(options, cloud),
    )


def redactor_of(options: Options, cloud: Cloud) -> Redactor | None:
    """Returns what replaces personal data, if the options ask for it; raises `UsageError`."""
    settings = options.take(RedactionSettings)
    if settings == RedactionSettings():  # its import takes a tenth of a second
        return None
    from chatflow.redaction import Redactor

    return Redactor.of(settings, cloud.project)


def check_raw(uri: str) -> None:
    """Raises `UsageError` if `--keep_raw` is not a place that can hold raw chats."""
    try:
        sink = sink_of(uri)
        if not isinstance(sink, (Files, Database)):
            raise UsageError(f"{uri!r} must be a file prefix or a database")
        sink.check_uri(uri)
    except UsageError as error:
        raise UsageError(f"--keep_raw: {error}") from None


def model_of(routes: Routes, first: Updates, streaming: bool, options: Options) -> Model:
    """Returns the model for both inference steps: a single one, or several by key."""
    expected: dict[str, list[Request]] = {spec.key: [] for spec in routes.specs}
    for prompt in itertools.chain.from_iterable(p.every for pair in first.by_route for p in pair):
        # In a stream, the first answers are wanted soon, so warm up the model while it loads. Of
        # files, the first batch is known if texts are only read.
        if streaming or prompt.model.updates or prompt.model.own_heads:
            expected[prompt.model.key].append(prompt.probe)
    handlers = {spec.key: spec.handler(expected[spec.key]) for spec in routes.specs}
    kept = kept_of(routes, options)
    if len(handlers) == 1 and not routes.attribute and kept is None:
        return Model(next(iter(handlers.values())), options.resource_hints)
    several = SeveralModelsHandler(handlers, routes.max_models, kept)
    return Model(several, options.resource_hints)


def prices_of(routes: Routes, options: Options) -> dict[str, Price | None]:
    """Returns what each model costs, by name; None if that is not known."""
    return {
        spec.name: price_of(spec.name, options.prices, spec.kind.tier(spec))
        for spec in routes.specs
    }


def kept_of(routes: Routes, options: Options) -> KeptSettings | None:
    """Returns where answers are kept; raises `UsageError` if the flags do not go together."""
    most = options.max_cost_usd
    if not options.answers:
        if most:
            raise UsageError(
                "--max_cost_usd: also give --answers=DATABASE, where workers record what they spend"
            )
        return None
    prices = prices_of(routes, options)
    for name, price in prices.items():
        if price is None and inference_of(name) == "on_worker":
            prices[name] = Price()  # its tokens cost nothing
        elif most and (price is None or price.hour):
            raise UsageError(
                f"--max_cost_usd: no price by tokens is known of {name}; add one in --prices"
            )
    known = {name: price for name, price in prices.items() if price is not None}
    run = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%S} {uuid.uuid4().hex[:8]}"
    return KeptSettings(options.answers, options.database_password, run, most, known)


def build(pipeline: beam.Pipeline, plan: Plan) -> None:
    """Adds all steps to a pipeline, from chats to analyses, apology drafts and dead letters."""
    options, model, rules = plan.options, plan.model, plan.rules

    inputs = split_inputs(options.input)
    arrivals = pipeline | "ReadArrivals" >> ReadArrivals(
        inputs,
        options.id_label,
        options.max_line_bytes,
        USUAL if plan.replay else plan.customs,  # dead letters are always chatflow's own JSON
    )
    if redactor := plan.redactor:
        arrivals = hushed(arrivals, "RedactLogsOfArrivals", redactor)
    if plan.replay:
        opened = arrivals | "OpenDeadLetters" >> OpenDeadLetters(
            options.max_line_bytes, plan.customs, redactor
        )
        arrivals = opened.arrivals

    read = arrivals | "ParseArrivals" >> ParseArrivals(
        options.max_line_bytes, rules.retention, plan.customs
    )
    assembled = read.events | "AssembleChats" >> AssembleChats(rules)
    chats = (read.chats, assembled.ok) | "AllChats" >> beam.Flatten()
    if redactor:
        chats = hushed(chats, "RedactLogsOfChats", redactor)
    dead_letters = [read.dead_letters, assembled.dead_letters]
    if not plan.streaming:
        chats, shared = chats | "TellApart" >> TellApart()
        dead_letters.append(shared)
    refused = []
    if redactor:
        chats, raw = chats | "RedactChats" >> RedactChats(redactor)
        if options.keep_raw:
            raw = hushed(raw, "RedactLogsOfRaw", redactor)
            refused.append(raw | "KeepRaw" >> plan.write_to([options.keep_raw]))
    if options.database:  # the console shows the chats to reviewers
        refused.append(chats | "WriteChats" >> plan.write_to([options.database]))
    updates = None
    if plan.watches:
        watch = WatchUpdates(
            plan.routes, plan.first, options.update_seconds, options.prompt_updates
        )
        updates = beam.pvalue.AsIter(pipeline | "WatchUpdates" >> watch)
    skip = None
    if options.skip_done:
        earlier = pipeline | "ReadEarlier" >> ReadResults(
            options.skip_done, options.database_password
        )
        skip = SkipDone(earlier, plan.first.analysis, plan.first.draft)
    analysed = chats | "AnalyseChats" >> AnalyseChats(
        model, plan.first.analysis, updates, plan.routes.escalates, skip
    )
    dead_letters.append(analysed.dead_letters)

    taken = beam.Map(take_analysis).with_output_types(Analysis)
    analyses = analysed.analysed | "TakeAnalysis" >> taken
    if plan.replay:
        analyses = (analyses, opened.analyses) | "WithReplayedAnalyses" >> beam.Flatten()
        dead_letters.append(opened.dead_letters)
    refused.append(analyses | "WriteAnalyses" >> plan.write("analyses"))

    if plan.drafts:
        to_draft = analysed.analysed
        if analysed.undrafted is not None:
            to_draft = (to_draft, analysed.undrafted) | "WithUndrafted" >> beam.Flatten()
        if plan.replay:
            to_draft = (to_draft, opened.analysed) | "WithReplayed" >> beam.Flatten()
        drafted = to_draft | "DraftApologies" >> DraftApologies(model, plan.first.draft, updates)
        dead_letters.append(drafted.dead_letters)
        drafts = drafted.drafts
        if plan.replay:
            drafts = (drafts, opened.drafts) | "WithReplayedDrafts" >> beam.Flatten()
        refused.append(drafts | "WriteDrafts" >> plan.write("drafts"))
        if reviewed := [uri for uri in plan.destinations["drafts"] if sink_of(uri).reviewed]:
            failed = drafted.dead_letters | "ToBeWritten" >> beam.FlatMap(to_be_written)
            failed | "WriteFailed" >> plan.write_to(reviewed)  # each already has its dead letter

    dead_letters += filter(None, refused)
    all_dead_letters = dead_letters | "AllDeadLetters" >> beam.Flatten()
    if redactor:
        all_dead_letters = all_dead_letters | "RedactLetters" >> beam.Map(redactor.letter)
        all_dead_letters.element_type = DeadLetter
    all_dead_letters | "WriteDeadLetters" >> plan.write("dead_letters")


def hushed(elements: beam.PCollection, label: str, redactor: Redactor) -> beam.PCollection:
    """Returns the same elements, of a step that keeps personal data out of logs."""
    same = elements | label >> beam.ParDo(RedactLogs(redactor))
    same.element_type = elements.element_type
    return same


def take_analysis(analysed: AnalysedChat) -> Analysis:
    return analysed.analysis
