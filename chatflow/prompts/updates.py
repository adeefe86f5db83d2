"""Finds new weights and templates while a pipeline runs.

A side input says which are the newest, as in Beam's automatic model refresh
(https://beam.apache.org/documentation/ml/side-input-updates/). Beam's `WatchFilePattern` is not
used: it needs a file at the start, ignores files from before a worker started and files that
replace one of the same name, and its singleton fails on two files within a second. `RunInference`
does not swap the model either, because it keeps each old model in memory and fails each bundle when
a new one cannot be loaded; see `models.refreshing`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
from apache_beam.transforms import trigger, window
from apache_beam.transforms.periodicsequence import PeriodicImpulse
from apache_beam.utils.timestamp import Timestamp

from chatflow import metrics
from chatflow.errors import UsageError, one_line
from chatflow.models.refreshing import newest_version
from chatflow.models.requests import FIRST, Version
from chatflow.prompts.questions import AnalysisPrompt, DraftPrompt
from chatflow.prompts.routes import Route, Routed, Routes

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Updates:
    """The newest templates of all routes and weights of their models.

    `seen` is the time of the check, in seconds since 1970; `by_route` has the prompts for analyses
    and drafts, in the order of the routes.
    """

    seen: float
    routes: Routes
    by_route: tuple[tuple[AnalysisPrompt, DraftPrompt], ...]

    @functools.cached_property
    def analysis(self) -> AnalysisPrompt | Routed[AnalysisPrompt]:
        return self.routes.by_chat([analysis for analysis, _ in self.by_route])

    @functools.cached_property
    def draft(self) -> DraftPrompt | Routed[DraftPrompt]:
        return self.routes.by_chat([draft for _, draft in self.by_route])

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def newest(updates: Iterable[Updates], name: str, first: Any) -> Any:
    """Returns a field of the newest update in a side input, or `first` if it is still empty."""
    latest = max(updates, key=lambda update: update.seen, default=None)
    return first if latest is None else getattr(latest, name)


def look(routes: Routes, before: Updates | None = None, watch_prompts: bool = True) -> Updates:
    """Returns the newest templates and weights.

    If templates have a mistake or files cannot be listed, those of `before` stay; without `before`,
    it raises `UsageError`.
    """
    seen = time.time()
    prompts = []
    for number, route in enumerate(routes.routes):
        known = before.by_route[number] if before else None
        kept = known is not None and not watch_prompts
        analysis, draft = known if known and kept else _prompts(route, known)
        weights = _weights(route.spec.updates, seen, known)
        analysis = dataclasses.replace(analysis, weights=weights)
        if route.draft is None:
            draft = dataclasses.replace(draft, weights=weights)
        prompts.append((analysis, draft))
    return Updates(seen, routes, tuple(prompts))


Pair = tuple[AnalysisPrompt, DraftPrompt]


def _prompts(route: Route, known: Pair | None) -> Pair:
    try:
        return route.prompts()
    except Exception as error:  # templates may raise any error
        if known is None:
            raise
        _say_once("updates/prompts_refused", f"new templates are refused: {one_line(error)}")
        return known


def _weights(pattern: str, seen: float, known: Pair | None) -> Version:
    if not pattern:
        return FIRST
    try:
        return newest_version(pattern, seen)
    except Exception as error:  # each filesystem raises its own errors
        said = f"--model_updates={pattern}: cannot be listed: {one_line(error)}"
        if known is None:
            raise UsageError(said) from None
        _say_once("updates/looks_failed", said)
        return known[0].weights


_said: set[str] = set()


def _say_once(counter: str, text: str) -> None:
    if text not in _said:
        _said.add(text)
        metrics.count(counter)
        _log.warning("%s; the old ones stay in use", text)


@dataclasses.dataclass
class WatchUpdates(beam.PTransform):
    """Looks for updates at a fixed interval while a pipeline runs.

    Attributes:
      first: what the pipeline starts with.
      seconds: between two checks.
      watch_prompts: whether to read the templates again, too.

    Outputs:
      `Updates`, in the global window; the latest pane is the newest.
    """

    routes: Routes
    first: Updates
    seconds: float
    watch_prompts: bool

    def expand(self, begin: beam.pvalue.PBegin) -> beam.PCollection[Updates]:
        return (
            begin
            | "Ticks" >> PeriodicImpulse(Timestamp.now(), fire_interval=self.seconds)
            | "Look" >> beam.ParDo(_Look(self.routes, self.first, self.watch_prompts))
            | "Latest"
            >> beam.WindowInto(
                window.GlobalWindows(),
                trigger=trigger.Repeatedly(trigger.AfterCount(1)),
                accumulation_mode=trigger.AccumulationMode.DISCARDING,
            )
        )


class _Look(beam.DoFn):
    def __init__(self, routes: Routes, first: Updates, watch_prompts: bool):
        self.routes, self.latest, self.watch_prompts = routes, first, watch_prompts

    def process(self, tick: Any) -> Iterator[Updates]:
        self.latest = look(self.routes, self.latest, self.watch_prompts)
        yield self.latest
