"""New weights and new templates, taken up while a pipeline runs.

A side input says what the newest are, as in Beam's automatic model refresh
(https://beam.apache.org/documentation/ml/side-input-updates/). Beam's own `WatchFilePattern` is
not used: it needs a file to begin with, passes over those that were there before a worker
began and those that replace one of the same name, and two within a second make its singleton
fail. Nor is the model swapped by `RunInference`, which keeps each old model in memory and fails
each bundle when a new one cannot be loaded; see `models.refreshing`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.transforms import trigger, window
from apache_beam.transforms.periodicsequence import PeriodicImpulse
from apache_beam.utils.timestamp import Timestamp

from chatflow import metrics
from chatflow.errors import UsageError, one_line
from chatflow.models.requests import FIRST, Version
from chatflow.prompts import AnalysisPrompt, DraftPrompt
from chatflow.routes import Route, Routed, Routes

MARKERS = ("SHA256SUMS.json", "config.json")
"""Files that stand for the folder that they are in, which holds a model."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Updates:
    """The newest templates of all routes, and the newest weights of the models that they ask.

    Attributes:
      seen: when they were looked for, in seconds since 1970.
      by_route: the prompts for analyses and drafts, in the order of the routes.
    """

    seen: float
    routes: Routes
    by_route: tuple[tuple[AnalysisPrompt, DraftPrompt], ...]

    @functools.cached_property
    def analysis(self) -> AnalysisPrompt | Routed[AnalysisPrompt]:
        return self.routes.put_together([analysis for analysis, _ in self.by_route])

    @functools.cached_property
    def draft(self) -> DraftPrompt | Routed[DraftPrompt]:
        return self.routes.put_together([draft for _, draft in self.by_route])

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def newest(updates: Iterable[Updates], name: str, first: Any) -> Any:
    """The newest of a side input, by field; the first one where it holds nothing yet."""
    latest = max(updates, key=lambda update: update.seen, default=None)
    return first if latest is None else getattr(latest, name)


def look(routes: Routes, before: Updates | None = None, watch_prompts: bool = True) -> Updates:
    """What is the newest now.

    Args:
      before: whose prompts stay where templates have a mistake, or are not watched.

    Raises:
      UsageError: a template has a mistake, and there are none before.
    """
    seen = time.time()
    prompts = []
    for number, route in enumerate(routes.routes):
        analysis, draft = _prompts(
            route, before.by_route[number] if before else None, watch_prompts
        )
        weights = newest_version(route.updates, seen) if route.updates else FIRST
        put = functools.partial(dataclasses.replace, weights=weights)
        prompts.append((put(analysis), put(draft)))
    return Updates(seen, routes, tuple(prompts))


_refused: set[str] = set()


def _prompts(
    route: Route, before: tuple[AnalysisPrompt, DraftPrompt] | None, watched: bool
) -> tuple[AnalysisPrompt, DraftPrompt]:
    if before and not watched:
        return before
    try:
        return route.prompts()
    except UsageError as error:
        if before is None:
            raise
        if str(error) not in _refused:  # said once, not at each look
            _refused.add(str(error))
            metrics.count("updates/prompts_refused")
            _log.warning("new templates are refused, the old go on: %s", one_line(error))
        return before


def newest_version(pattern: str, seen: float) -> Version:
    """The file of a pattern that was written last, as weights; `FIRST` where there is none."""
    files = FileSystems.match([pattern])[0].metadata_list
    if not files:
        return FIRST._replace(seen=seen)
    latest = max(files, key=lambda file: (file.last_updated_in_seconds, file.path))
    folder, name = FileSystems.split(latest.path)
    path = folder if name in MARKERS else latest.path
    return Version(seen, path, latest.last_updated_in_seconds)


@dataclasses.dataclass
class WatchUpdates(beam.PTransform):
    """Looks for updates at each interval, from the beginning of a pipeline to its end.

    Attributes:
      routes: whose templates and weights are watched.
      first: what the pipeline begins with.
      seconds: between two looks.
      watch_prompts: whether templates are read again, too.

    Outputs:
      `Updates`, in the global window; the latest pane is what is newest.
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
        try:
            self.latest = look(self.routes, self.latest, self.watch_prompts)
        except Exception as error:  # a file system that is away for a while
            metrics.count("updates/looks_failed")
            _log.warning("looking for updates failed, the old go on: %s", one_line(error))
            return
        yield self.latest
