"""The whole graph. A chat passes through it from top to bottom."""

from __future__ import annotations

import dataclasses

import apache_beam as beam

from chatflow.analysis import AnalyseChats
from chatflow.dead_letters import OpenDeadLetters
from chatflow.drafts import DraftApologies
from chatflow.models import Model, ModelSpec
from chatflow.models.requests import RemoteSettings
from chatflow.options import NO_CLOUD, Cloud, Options
from chatflow.prompts import AnalysisPrompt, DraftPrompt
from chatflow.records import AnalysedChat, Analysis
from chatflow.sinks import WriteRecords
from chatflow.sources import ParseChats, ReadLines
from chatflow.templates import load_folder


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a pipeline is built from; all of it checked before anything runs.

    Attributes:
      replay: the input holds dead letters, which are tried again.
      drafts: apologies are drafted; without, analyses alone are made.
    """

    options: Options
    spec: ModelSpec
    model: Model
    analysis_prompt: AnalysisPrompt
    draft_prompt: DraftPrompt
    replay: bool = False
    drafts: bool = True


def plan(
    options: Options,
    cloud: Cloud = NO_CLOUD,
    replay: bool = False,
    drafts: bool = True,
) -> Plan:
    """Reads and checks model and prompts.

    Args:
      cloud: project and location of a remote model whose name does not say them.

    Raises:
      UsageError: an unknown model, or a prompt folder with a mistake.
    """
    spec = ModelSpec(
        name=options.model,
        inference=options.inference,
        kind=options.model_kind,
        dtype=options.dtype,
        max_batch_size=options.max_batch_size,
        remote=RemoteSettings(
            cloud.project,
            cloud.location,
            options.api_endpoint,
            options.request_timeout,
            options.max_in_flight,
        ),
    )
    templates = load_folder(options.prompts or ("instruct" if spec.instruct else "base"))
    return Plan(
        options,
        spec,
        spec.model(),
        AnalysisPrompt(templates["analysis"], spec, options.max_prompt_tokens),
        DraftPrompt(templates["apology"], spec, options.max_prompt_tokens),
        replay,
        drafts,
    )


def build(pipeline: beam.Pipeline, plan: Plan) -> None:
    """Chats in; analyses, apology drafts and dead letters out."""
    options, model = plan.options, plan.model

    lines = pipeline | "ReadLines" >> ReadLines(options.input)
    if plan.replay:
        opened = lines | "OpenDeadLetters" >> OpenDeadLetters()
        lines = opened.lines

    read = lines | "ParseChats" >> ParseChats(options.max_line_bytes)
    analysed = read.chats | "AnalyseChats" >> AnalyseChats(model, plan.analysis_prompt)
    dead_letters = [read.dead_letters, analysed.dead_letters]

    analyses = analysed.analysed | "TakeAnalysis" >> beam.Map(take_analysis)
    analyses | "WriteAnalyses" >> WriteRecords(options.output, "analyses")

    if plan.drafts:
        to_draft = analysed.analysed
        if plan.replay:
            to_draft = (to_draft, opened.analysed) | "WithReplayed" >> beam.Flatten()
            dead_letters.append(opened.dead_letters)
        drafted = to_draft | "DraftApologies" >> DraftApologies(model, plan.draft_prompt)
        dead_letters.append(drafted.dead_letters)
        drafted.drafts | "WriteDrafts" >> WriteRecords(options.output, "drafts")

    all_dead_letters = dead_letters | "AllDeadLetters" >> beam.Flatten()
    all_dead_letters | "WriteDeadLetters" >> WriteRecords(options.output, "dead_letters")


def take_analysis(analysed: AnalysedChat) -> Analysis:
    return analysed.analysis
