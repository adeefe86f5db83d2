"""Who answers: the switch from `--inference` and `--model` to a Beam model handler."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatflow.errors import UsageError
from chatflow.models.requests import Request
from chatflow.models.settings import ONE_BUNDLE, ONE_COPY, Batching, RemoteSettings, WorkerSettings
from chatflow.weights import adapters, embedded
from chatflow.weights.adapters import check_adapter, chosen
from chatflow.weights.presets import MARKERS, SCRIPTED, TORCH, VLLM

ENDS = {
    "script": (".jsonl",),
    "torch": (*MARKERS, ".pt", ".pth", ".bin", ".safetensors"),
    "gemma": (*MARKERS, adapters.ENDS),
}
"""How the patterns end by which the weights of a kind of model may be replaced."""


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

        held = multi_process_shared._process_level_singleton_manager.entries
        for tag, entry in held.items():
            close = getattr(getattr(entry, "obj", None), "close", None)
            if tag.startswith(self.identifier) and close is not None:
                close()
        for path in Path(tempfile.gettempdir()).glob(f"{self.identifier}*"):
            path.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Which model, and how it is asked. Checked when made; loads nothing.

    Attributes:
      name: `gemma3-270m` (embedded), a preset of keras_hub's, a folder, `hf://…`,
        `kaggle://…`, `gs://…`, `scripted:FILE`; `torch:NAME` for a text model of Hugging
        Face's on PyTorch, `vllm:NAME` for one that vLLM serves on the worker (a name of the hub,
        a folder, `gs://…`); or, remotely, `gemini-…` or
        `projects/P/locations/L/endpoints/E`.
      inference: `on_worker` or `remote`.
      kind: `base` continues text, `instruct` follows instructions, `auto` is by name.
      batching: how requests are put together for one call.
      worker: how the weights are kept; unused remotely.
      remote: where the service is, and how it is called; on the worker, only vLLM's is.
      state_dict_path: weights of a `torch:` model, instead of its folder's own.
      adapter: LoRA weights of a Gemma on the worker: `auto`, `none` or a file; see
        `chatflow.models.adapters`.
      updates: the files among which the newest has the weights; empty: they stay as they are.

    Raises:
      UsageError: no such model, or one that cannot be kept so.
    """

    name: str = embedded.NAME
    inference: str = "on_worker"
    kind: str = "auto"
    batching: Batching = ONE_BUNDLE
    worker: WorkerSettings = ONE_COPY
    remote: RemoteSettings = dataclasses.field(default_factory=RemoteSettings)
    state_dict_path: str = ""
    adapter: str = "auto"
    updates: str = ""

    def __post_init__(self) -> None:
        if self.updates:
            check_pattern(self)
        if self.state_dict_path and not self.is_torch:
            raise UsageError(
                f"--state_dict_path: only with --model=torch:NAME, not with --model={self.name}"
            )
        if self.adapter not in ("auto", "none"):
            if self.is_scripted or self.is_torch or self.is_vllm or self.is_remote:
                raise UsageError(f"--adapter: only for Gemma on the workers, not for {self.name}")
            check_adapter(self.adapter)
        if self.is_scripted:
            return
        if self.is_torch:
            if self.inference == "remote":
                raise UsageError(f"--model={self.name}: runs on the workers, not remotely")
            from chatflow.models.pytorch.handler import check_torch

            check_torch(self.name.removeprefix(TORCH), self.state_dict_path, self.worker)
            return
        if self.is_remote:
            from chatflow.models.remote.handler import check_name

            check_name(self.name, self.remote)
            return
        if self.is_vllm:
            from chatflow.models.vllm.handler import check

            check(self.name, self.worker)
            return
        if self.worker.dtype == "float16":
            raise UsageError(
                f"--dtype=float16: only for torch: and vllm: models; --model={self.name} runs in "
                "float32 or bfloat16, for Gemma's activations are too large for float16"
            )
        from chatflow.weights.presets import check_preset

        check_preset(self.name)

    @property
    def is_scripted(self) -> bool:
        return self.name.startswith(SCRIPTED)

    @property
    def is_torch(self) -> bool:
        return self.name.startswith(TORCH)

    @property
    def result_name(self) -> str:
        """What results say made them. A script is known by its kind, not by its path."""
        own = self.state_dict_path or self.own_adapter
        return f"{self.name}@{own}" if own else self.base_name

    @property
    def base_name(self) -> str:
        """The same, whatever the weights."""
        return "scripted" if self.is_scripted else self.name

    @property
    def own_adapter(self) -> str:
        """The adapter with which the model begins, or empty."""
        if self.is_scripted or self.is_torch or self.is_vllm or self.is_remote:
            return ""
        return chosen(self.adapter, self.name, self.instruct)

    @functools.cached_property
    def key(self) -> str:
        """Tells it apart from other models of the same pipeline."""
        return f"{self.name}#{hashlib.sha256(repr(self).encode()).hexdigest()[:8]}"

    @property
    def is_embedded(self) -> bool:
        return self.inference == "on_worker" and self.name == embedded.NAME

    @property
    def is_remote(self) -> bool:
        return self.inference == "remote" and not self.is_scripted and not self.is_torch

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
        from chatflow.weights.presets import is_instruct

        return self.is_scripted or self.is_remote or is_instruct(self.name)

    def handler(self, expected: Sequence[Request] = ()) -> Any:
        """A Beam model handler; nothing is loaded yet.

        Args:
          expected: see `handlers.LanguageModelHandler`; unused by remote models.
        """
        expected = tuple(expected)
        if self.is_scripted:
            from chatflow.models.scripted import ScriptedModelHandler, load_script

            script = load_script(self.name.removeprefix(SCRIPTED))
            return ScriptedModelHandler(script, batching=self.batching, updates=self.updates)
        if self.is_remote:
            from chatflow.models.remote.handler import RemoteLanguageModelHandler

            return RemoteLanguageModelHandler(self.name, self.remote, self.batching)
        if self.is_torch:
            from chatflow.models.pytorch.handler import TorchModelHandler

            return TorchModelHandler(
                self.name.removeprefix(TORCH),
                self.instruct,
                self.state_dict_path,
                self.worker,
                self.batching,
                expected,
                self.updates,
            )
        if self.is_vllm:
            from chatflow.models.vllm.handler import VllmModelHandler

            return VllmModelHandler(
                self.name, self.instruct, self.worker, self.remote, self.batching
            )
        from chatflow.models.gemma.handler import GemmaModelHandler

        return GemmaModelHandler(
            self.name,
            self.instruct,
            self.worker,
            self.batching,
            expected,
            self.updates,
            self.own_adapter,
            self.result_name,
        )


def check_pattern(spec: ModelSpec) -> None:
    """Makes sure that a model can take up what a pattern of `--model_updates` names.

    Raises:
      UsageError: it has no weights here, or not of this kind.
    """
    if spec.is_remote or spec.is_vllm:
        raise UsageError(f"--model_updates: {spec.name} has no weights here to be updated")
    kind = "script" if spec.is_scripted else "torch" if spec.is_torch else "gemma"
    if not spec.updates.endswith(ENDS[kind]):
        raise UsageError(
            f"--model_updates={spec.updates}: for --model={spec.name} it must end in one of "
            f"{', '.join(ENDS[kind])}"
        )
