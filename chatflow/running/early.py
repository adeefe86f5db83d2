"""Lets the results of files come while the model still answers, on this machine."""

from __future__ import annotations

from typing import Any

import apache_beam as beam
from apache_beam.pipeline import PTransformOverride

from chatflow.stages.ask import AFTER_MODEL


def let_results_pass(pipeline: beam.Pipeline) -> None:
    """Removes the Reshuffles after models from a pipeline.

    They keep runners that retry a sink from asking the model again. The local runner for files
    retries nothing, and holds everything behind a Reshuffle back until all is answered.
    """
    pipeline.replace_all([_Passing()])


class _Passing(PTransformOverride):
    def matches(self, applied: Any) -> bool:
        is_reshuffle = isinstance(applied.transform, beam.Reshuffle)
        return is_reshuffle and applied.full_label.endswith(f"/{AFTER_MODEL}")

    def get_replacement_transform_for_applied_ptransform(self, applied: Any) -> beam.PTransform:
        return _Pass()


class _Pass(beam.PTransform):
    """Hands elements on as they come."""

    def expand(self, elements: beam.PCollection) -> beam.PCollection:
        return elements | beam.Map(_same)


def _same(element: Any) -> Any:
    return element
