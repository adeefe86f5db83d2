"""The whole graph. A chat passes through it from top to bottom."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import apache_beam as beam

from chatflow.errors import UsageError
from chatflow.models.keyed import PerKeyModelHandler
from chatflow.models.prices import Price, price_of
from chatflow.models.settings import Batching, RemoteSettings, WorkerSettings
from chatflow.models.spec import Model, ModelSpec
from chatflow.options import NO_CLOUD, Cloud, Options
from chatflow.prompts.routes import Routes, routes_of
from chatflow.prompts.updates import Updates, WatchUpdates, look
from chatflow.records import KINDS, AnalysedChat, Analysis
from chatflow.sinks.sink import SinkSettings
from chatflow.sinks.write import WriteRecords, sink_of, split_destinations
from chatflow.sources.parse import ParseArrivals
from chatflow.sources.read import ReadArrivals, is_stream, split_inputs
from chatflow.stages.analyse import AnalyseChats
from chatflow.stages.assemble import AssembleChats
from chatflow.stages.draft import DraftApologies, to_be_written
from chatflow.stages.replay import OpenDeadLetters
from chatflow.stages.revisions import Rules
from chatflow.weights.presets import VLLM


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a pipeline is built from; all of it checked before anything runs.

    Attributes:
      routes: models and prompts.
      first: prompts and weights to begin with.
      rules: when a chat that comes as messages is analysed.
      destinations: by kind of record, the URIs that it is written to.
      streaming: the input never ends.
      replay: the input holds dead letters, which are tried again.
      drafts: apologies are drafted; without, analyses alone are made.
      price: what the model costs, where that is known.
    """

    options: Options
    routes: Routes
    model: Model
    first: Updates
    rules: Rules
    destinations: Mapping[str, tuple[str, ...]]
    streaming: bool = False
    replay: bool = False
    drafts: bool = True
    price: Price | None = None

    @property
    def watches(self) -> bool:
        """New weights or templates are taken up while the pipeline runs."""
        updates = any(spec.updates for spec in self.routes.specs)
        return self.streaming and (updates or self.options.prompt_updates == "true")

    def write(self, kind: str) -> WriteRecords:
        """What writes a kind of record."""
        return self.write_to(self.destinations[kind])

    def write_to(self, destinations: Sequence[str]) -> WriteRecords:
        return WriteRecords(destinations, self.sink_settings)

    @property
    def sink_settings(self) -> SinkSettings:
        return SinkSettings(
            streaming=self.streaming,
            webhook_secret=self.options.webhook_secret,
            database_password=self.options.database_password,
        )


def plan(
    options: Options,
    cloud: Cloud = NO_CLOUD,
    replay: bool = False,
    drafts: bool = True,
) -> Plan:
    """Reads and checks sources, destinations, model and prompts.

    Args:
      cloud: project and location of a remote model whose name does not say them; carried to
        the workers.

    Raises:
      UsageError: an unknown model, source or destination, or a prompt folder or a table of
        prices with a mistake.
    """
    streaming = is_stream(options.input)
    if options.database:
        from chatflow.database.connections import parse_uri

        try:
            parse_uri(options.database)
        except UsageError as error:
            raise UsageError(f"--database: {error}") from None
    rules = Rules(
        timedelta(seconds=options.quiet_seconds),
        options.every_messages,
        options.max_messages,
        timedelta(hours=options.retention_hours),
    )
    routes = routes_of(options, functools.partial(spec_of, cloud=cloud, streaming=streaming))
    first = look(routes)
    return Plan(
        options,
        routes,
        model_of(routes, first, streaming, options.resource_hints),
        first,
        rules,
        {
            kind: split_destinations(kind, getattr(options, kind), options.output, options.database)
            for kind in KINDS
        },
        streaming,
        replay,
        drafts,
        price_of(routes.specs[0].name, options.prices) if len(routes.specs) == 1 else None,
    )


def spec_of(options: Options, cloud: Cloud, streaming: bool) -> ModelSpec:
    """The model that the flags name."""
    is_vllm = options.model.startswith(VLLM)
    return ModelSpec(
        name=options.model,
        inference=options.inference,
        kind=options.model_kind,
        worker=WorkerSettings(
            options.dtype,
            options.quantization,
            options.large_model == "true",
            options.model_copies,
            # Only vLLM's server needs it: other models are the same whatever the budget.
            **({"max_prompt_tokens": options.max_prompt_tokens} if is_vllm else {}),
            vllm_args=options.vllm_args,
        ),
        batching=Batching(
            options.max_batch_size,
            (options.max_batch_duration_secs or None) if streaming else None,
            options.bucket_boundaries if streaming else (),
        ),
        remote=RemoteSettings(
            cloud.project,
            cloud.location,
            options.api_endpoint,
            options.endpoint_override,
            options.request_timeout,
            options.max_in_flight,
            options.max_requests_per_second,
            options.rate_limit_service,
            options.retry_seconds,
            options.request_format,
            options.response_format,
            options.thinking,
        ),
        state_dict_path=options.state_dict_path,
        adapter=options.adapter,
        updates=options.model_updates,
    )


def model_of(routes: Routes, first: Updates, streaming: bool, hints: Mapping[str, str]) -> Model:
    """One model, or one by key, for both inference steps."""
    handlers: dict[str, Any] = {}
    for route, (analysis, draft) in zip(routes.routes, first.by_route, strict=True):
        probes = (analysis.probe, draft.probe)
        # In a stream somebody waits for the first answers, so the model is readied as it loads.
        expected = probes if streaming or route.spec.updates else ()
        if route.spec.key not in handlers:
            handlers[route.spec.key] = route.spec.handler(expected)
    if not routes.attribute:
        return Model(next(iter(handlers.values())), hints)
    return Model(PerKeyModelHandler(handlers, routes.max_models), hints, several=True)


def build(pipeline: beam.Pipeline, plan: Plan) -> None:
    """Chats and messages in; analyses, apology drafts and dead letters out."""
    options, model, rules = plan.options, plan.model, plan.rules

    inputs = split_inputs(options.input)
    arrivals = pipeline | "ReadArrivals" >> ReadArrivals(inputs, options.id_label)
    if plan.replay:
        opened = arrivals | "OpenDeadLetters" >> OpenDeadLetters()
        arrivals = opened.arrivals

    read = arrivals | "ParseArrivals" >> ParseArrivals(options.max_line_bytes, rules.retention)
    assembled = read.events | "AssembleChats" >> AssembleChats(rules)
    chats = (read.chats, assembled.ok) | "AllChats" >> beam.Flatten()
    refused = []
    if options.database:  # people see what they decide on
        refused.append(chats | "WriteChats" >> plan.write_to([options.database]))
    updates = None
    if plan.watches:
        watch = WatchUpdates(
            plan.routes, plan.first, options.update_seconds, options.prompt_updates == "true"
        )
        updates = beam.pvalue.AsIter(pipeline | "WatchUpdates" >> watch)
    analysed = chats | "AnalyseChats" >> AnalyseChats(model, plan.first.analysis, updates)
    dead_letters = [read.dead_letters, assembled.dead_letters, analysed.dead_letters]

    analyses = analysed.analysed | "TakeAnalysis" >> beam.Map(take_analysis)
    if plan.replay:
        analyses = (analyses, opened.analyses) | "WithReplayedAnalyses" >> beam.Flatten()
        dead_letters.append(opened.dead_letters)
    refused.append(analyses | "WriteAnalyses" >> plan.write("analyses"))

    if plan.drafts:
        to_draft = analysed.analysed
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
            failed | "WriteFailed" >> plan.write_to(reviewed)  # refused or not: it has its letter

    dead_letters += filter(None, refused)
    all_dead_letters = dead_letters | "AllDeadLetters" >> beam.Flatten()
    all_dead_letters | "WriteDeadLetters" >> plan.write("dead_letters")


def take_analysis(analysed: AnalysedChat) -> Analysis:
    return analysed.analysis
