"""Who answers: the switch from `--inference` and `--model` to a Beam model handler."""

from __future__ import annotations

import dataclasses
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatflow.models import embedded
from chatflow.models.requests import (
    ONE_BUNDLE,
    ONE_COPY,
    Batching,
    RemoteSettings,
    Request,
    WorkerSettings,
)

SCRIPTED = "scripted:"
VLLM = "vllm:"


@dataclasses.dataclass(frozen=True)
class Model:
    """Who answers. Stages that are given the same `Model` share one copy of it.

    Attributes:
      handler: a Beam `ModelHandler` from `Request` to `PredictionResult`, whose
        inference is an `Answer` or a `Failure`.
      hints: Beam's resource hints for the steps that ask it.
      identifier: what a worker's copy is known by; Beam keeps it machine-wide, so it is
        unique to a run.
    """

    handler: Any
    hints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    identifier: str = dataclasses.field(default_factory=lambda: f"chatflow-{uuid.uuid4().hex}")

    def forget(self) -> None:
        """Closes the copy that this process holds, and removes the small files by which Beam
        finds one on this machine."""
        from apache_beam.utils import multi_process_shared

        from chatflow.models.handlers import LanguageModel

        held = multi_process_shared._process_level_singleton_manager.entries
        for tag, entry in held.items():
            model = getattr(entry, "obj", None)
            if tag.startswith(self.identifier) and isinstance(model, LanguageModel):
                model.close()
        for path in Path(tempfile.gettempdir()).glob(f"{self.identifier}*"):
            path.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Which model, and how it is asked. Checked when made; loads nothing.

    Attributes:
      name: `gemma3-270m` (embedded), a preset of keras_hub's, a folder, `hf://…`,
        `kaggle://…`, `gs://…`, `vllm:NAME`, `scripted:FILE`; or, remotely, `gemini-…` or
        `projects/P/locations/L/endpoints/E`.
      inference: `on_worker` or `remote`.
      kind: `base` continues text, `instruct` follows instructions, `auto` is by name.
      batching: how requests are put together for one call.
      worker: how the weights are kept; unused remotely.
      remote: where the service is, and how it is called; on the worker, only vLLM's is.

    Raises:
      UsageError: no such model.
    """

    name: str = embedded.NAME
    inference: str = "on_worker"
    kind: str = "auto"
    batching: Batching = ONE_BUNDLE
    worker: WorkerSettings = ONE_COPY
    remote: RemoteSettings = dataclasses.field(default_factory=RemoteSettings)

    def __post_init__(self) -> None:
        if self.is_scripted:
            return
        if self.is_remote:
            from chatflow.models.remote import check_name

            check_name(self.name, self.remote)
            return
        if self.is_vllm:
            from chatflow.models.vllm import check

            check(self.name, self.worker)
            return
        from chatflow.models.presets import check_preset

        check_preset(self.name)

    @property
    def is_scripted(self) -> bool:
        return self.name.startswith(SCRIPTED)

    @property
    def result_name(self) -> str:
        """What results say made them. A script is known by its kind, not by its path."""
        return "scripted" if self.is_scripted else self.name

    @property
    def is_embedded(self) -> bool:
        return self.inference == "on_worker" and self.name == embedded.NAME

    @property
    def is_remote(self) -> bool:
        return self.inference == "remote" and not self.is_scripted

    @property
    def is_vllm(self) -> bool:
        return self.inference == "on_worker" and self.name.startswith(VLLM)

    @property
    def writes_json(self) -> bool:
        """The model writes the JSON answer itself."""
        return self.is_scripted or self.is_remote or (self.is_vllm and self.instruct)

    @property
    def instruct(self) -> bool:
        if self.kind != "auto":
            return self.kind == "instruct"
        from chatflow.models.presets import is_instruct

        return self.is_scripted or self.is_remote or is_instruct(self.name)

    def model(
        self, expected: Sequence[Request] = (), hints: Mapping[str, str] | None = None
    ) -> Model:
        """The model as the stages take it; nothing is loaded yet.

        Args:
          expected: requests of the kinds that will come; a model on the worker is made
            ready for them when it is loaded.
          hints: see `Model`.
        """
        return Model(self._handler(tuple(expected)), dict(hints or {}))

    def _handler(self, expected: tuple[Request, ...]) -> Any:
        if self.is_scripted:
            from chatflow.models.scripted import ScriptedModelHandler, load_script

            script = load_script(self.name.removeprefix(SCRIPTED))
            return ScriptedModelHandler(script, batching=self.batching)
        if self.is_remote:
            from chatflow.models.remote import RemoteLanguageModelHandler

            return RemoteLanguageModelHandler(self.name, self.remote, self.batching)
        if self.is_vllm:
            from chatflow.models.vllm import VllmModelHandler

            return VllmModelHandler(
                self.name, self.instruct, self.worker, self.remote, self.batching
            )
        from chatflow.models.gemma import GemmaModelHandler

        return GemmaModelHandler(self.name, self.instruct, self.worker, self.batching, expected)
