"""Writes the manifest of a finished run: its inputs, its results, and how they were made."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems

from chatflow import __version__
from chatflow.options import Options
from chatflow.records import now
from chatflow.sinks.files import is_local
from chatflow.sinks.staging import digest
from chatflow.sinks.write import shown

if TYPE_CHECKING:
    from chatflow.pipeline import Plan


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The part that the manifests in all folders of a run share.

    Attributes:
      models: the models that were asked, with the versions of their prompts if known.
      flags: those that differ from their defaults, without secrets.
    """

    started: datetime
    inputs: Sequence[str]
    models: Sequence[Mapping[str, str]] = ()
    flags: Sequence[str] = ()

    def content(self, counts: Mapping[str, Any]) -> dict[str, Any]:
        """Returns everything but a folder's `results`; reads the inputs again for their hashes."""
        return {
            "started": _utc(self.started),
            "finished": _utc(now()),
            "versions": {"chatflow": __version__, "apache_beam": beam.__version__},
            "models": list(self.models),
            "flags": list(self.flags),
            "inputs": [{"path": path, **_described(path)} for path in self.inputs],
            "counts": dict(counts),
        }


def models_of(planned: Plan) -> list[dict[str, str]]:
    """Returns the model and the versions of the prompts of each route, each pair once."""
    found = [
        {"model": route.spec.name, "analysis_prompt": a.version, "apology_prompt": draft.version}
        for route, (a, draft) in zip(planned.routes.routes, planned.first.by_route, strict=True)
    ]
    return [each for number, each in enumerate(found) if each not in found[:number]]


def shown_flags(options: Options) -> list[str]:
    """Returns the flags that differ from their defaults, without secrets."""
    hidden = {field.name for field in dataclasses.fields(options) if not field.repr}
    names = [flag.removeprefix("--").split("=")[0] for flag in options.flags()]
    return [
        f"--{name}=***" if name in hidden else shown(flag)
        for name, flag in zip(names, options.flags(), strict=True)
    ]


def _described(path: str) -> dict[str, Any]:
    """Returns bytes and sha256 of an input; less if it is a pipe or on another machine."""
    try:
        if is_local(path) and os.path.isfile(path):
            found = digest(path)
            return {"bytes": found["bytes"], "sha256": found["sha256"]}
        return {"bytes": FileSystems.match([path])[0].metadata_list[0].size_in_bytes}
    except Exception:  # the file is gone, but the run has read it
        return {}


def _utc(moment: datetime) -> str:
    return f"{moment:%FT%T.%f}"[:-3] + "Z"
