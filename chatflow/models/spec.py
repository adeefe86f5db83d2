"""Chooses a Beam model handler by `--inference` and `--model`."""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import importlib
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chatflow.errors import UsageError
from chatflow.models.requests import Request
from chatflow.options import (
    NO_CLOUD,
    ONE_BUNDLE,
    ONE_COPY,
    Batching,
    Cloud,
    Options,
    RemoteSettings,
    WorkerSettings,
)
from chatflow.weights import embedded
from chatflow.weights.adapters import check_adapter
from chatflow.weights.heads import check_heads
from chatflow.weights.presets import is_instruct

KINDS = {
    "scripted:": "chatflow.models.scripted.Scripted",
    "torch:": "chatflow.models.pytorch.handler.Torch",
    "vllm:": "chatflow.models.vllm.handler.Vllm",
    "openai:": "chatflow.models.remote.openai.OpenAI",
    "anthropic:": "chatflow.models.remote.anthropic.Anthropic",
    "remote": "chatflow.models.remote.google.Google",
    "on_worker": "chatflow.models.gemma.handler.Gemma",
}
"""The class of each kind of model, by how its names begin, or else by `--inference`."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to ask. Stages that are given the same `Model` share one copy of it.

    Attributes:
      handler: from `Request` to Beam's `PredictionResult` of an `Answer` or a `Failure`.
      hints: Beam's resource hints for the steps that ask the model.
      identifier: names a worker's copy; unique to a run, because Beam keeps the copy machine-wide.
    """

    handler: Any
    hints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    identifier: str = dataclasses.field(default_factory=lambda: f"chatflow-{uuid.uuid4().hex}")

    def forget(self) -> None:
        """Closes this process's copy and removes the files that lead Beam to it on this machine."""
        from apache_beam.utils import multi_process_shared

        held = multi_process_shared._process_level_singleton_manager.entries
        for tag, entry in held.items():
            close = getattr(getattr(entry, "obj", None), "close", None)
            if tag.startswith(self.identifier) and close is not None:
                close()
        for path in Path(tempfile.gettempdir()).glob(f"{self.identifier}*"):
            path.unlink(missing_ok=True)


Say = Callable[[str], None]
"""Prints a line for the person who starts a run."""


class Kind(abc.ABC):
    """A kind of model: what differs between kinds before one is loaded.

    Attributes:
      update_files: endings of the files whose weights a running model can load.
      has_budget: is set up for prompts of at most `max_prompt_tokens`.
      asked_by_json: has no scores, and so writes its answer as JSON.
      needs_accelerator: runs only on GPUs.
    """

    update_files: tuple[str, ...] = ()
    takes_state_dict = has_budget = asked_by_json = needs_accelerator = False

    @abc.abstractmethod
    def check(self, spec: ModelSpec) -> None:
        """Raises `UsageError` for a missing model or settings that do not fit; loads nothing."""

    @abc.abstractmethod
    def handler(self, spec: ModelSpec, expected: tuple[Request, ...]) -> Any:
        """Returns a Beam model handler; nothing is loaded yet."""

    def adaptable(self, spec: ModelSpec) -> bool:
        """Returns whether adapters and heads can be fitted to the model."""
        return False

    def instruct(self, spec: ModelSpec) -> bool:
        """Returns whether the model follows instructions, if `--model_kind` does not say so."""
        return is_instruct(spec.name)

    def writes_json(self, spec: ModelSpec) -> bool:
        """Returns whether the model writes the JSON answer itself."""
        return self.asked_by_json

    def heads(self, spec: ModelSpec) -> str:
        """Returns the heads that choose from the model's states, or an empty text."""
        return ""

    def base_name(self, spec: ModelSpec) -> str:
        """Returns the model's name in results, whatever its weights."""
        return spec.name

    def tier(self, spec: ModelSpec) -> str:
        """Returns the tier of service at which the model is asked; see `--service_tier`."""
        return "standard"

    def prepare(self, spec: ModelSpec, say: Say) -> None:  # noqa: B027 (most need nothing)
        """Prepares on this machine what the model needs; raises `UsageError` if that fails."""

    def check_service(self, spec: ModelSpec, local: bool, say: Say) -> None:  # noqa: B027
        """Raises `UsageError` if the service behind the model, if any, lacks it or denies access.

        `local` means that the pipeline runs on this machine.
        """


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Which model to ask, and how. Making one loads nothing.

    Raises `UsageError` if there is no such model or it cannot be kept as the settings say.

    Attributes:
      name: `gemma3-270m` (embedded), a keras_hub preset, a folder, `hf://…`, `kaggle://…`, `gs://…`
        or `scripted:FILE`; `torch:NAME` for a Hugging Face text model on PyTorch; `vllm:NAME` for
        one that vLLM serves on the worker (a name of the hub, a folder, `gs://…`); remotely,
        `gemini-…`, `projects/P/locations/L/endpoints/E`, `openai:NAME` of a server that speaks
        OpenAI's protocol, or `anthropic:NAME`.
      inference: `on_worker` or `remote`.
      model_kind: `base` continues text, `instruct` follows instructions, `auto` is by name.
      worker: how the weights are kept; unused remotely.
      remote: the service and how it is called; on the worker, only for vLLM.
      state_dict_path: weights of a `torch:` model, instead of its folder's own.
      adapter: a file of LoRA for a Gemma 1 to 3 on the worker; see `weights.adapters`.
      heads: for a Gemma 1 to 3 on the worker: `auto`, `none` or a file; see `choices.heads`.
      updates: see `handlers.LanguageModelHandler`.
    """

    name: str = embedded.NAME
    inference: str = "on_worker"
    model_kind: str = "auto"
    batching: Batching = ONE_BUNDLE
    worker: WorkerSettings = ONE_COPY
    remote: RemoteSettings = dataclasses.field(default_factory=RemoteSettings)
    state_dict_path: str = ""
    adapter: str = ""
    heads: str = "auto"
    updates: str = ""

    @classmethod
    def of(cls, options: Options, cloud: Cloud = NO_CLOUD, streaming: bool = False) -> ModelSpec:
        """Returns the model that flags name.

        Args:
          cloud: project and location of a remote model whose name does not say them.
          streaming: requests come in small bundles, and may wait for others.
        """
        batching, worker = options.take(Batching), options.take(WorkerSettings)
        if not kind_of(options.model, options.inference).has_budget:
            # Ignore an unused budget, so that several can share the model.
            worker = dataclasses.replace(worker, max_prompt_tokens=ONE_COPY.max_prompt_tokens)
        return cls(
            name=options.model,
            inference=options.inference,
            model_kind=options.model_kind,
            batching=batching if streaming else batching.within_bundles(),
            worker=worker,
            remote=dataclasses.replace(options.take(RemoteSettings), **cloud._asdict()),
            state_dict_path=options.state_dict_path,
            adapter=options.adapter,
            heads=options.heads,
            updates=options.model_updates,
        )

    def __post_init__(self) -> None:
        kind, name = self.kind, self.name
        if self.updates and not kind.update_files:
            raise UsageError(f"--model_updates: {name} has no weights here that could be updated")
        if self.updates and not self.updates.endswith(kind.update_files):
            raise UsageError(
                f"--model_updates={self.updates}: for --model={name} it must end in one of "
                f"{', '.join(kind.update_files)}"
            )
        if self.state_dict_path and not kind.takes_state_dict:
            raise UsageError(
                f"--state_dict_path: only with --model=torch:NAME, not with --model={name}"
            )
        for flag, given, check in (
            ("adapter", self.adapter, check_adapter),
            ("heads", "" if self.heads in ("auto", "none") else self.heads, check_heads),
        ):
            if given and not kind.adaptable(self):
                raise UsageError(f"--{flag}: only for Gemma 1 to 3 on the workers, not for {name}")
            if given:
                check(given)
        kind.check(self)

    @property
    def kind(self) -> Kind:
        return kind_of(self.name, self.inference)

    @property
    def result_name(self) -> str:
        """The model's name in results, with its weights."""
        own = [self.state_dict_path or self.adapter, self.own_heads]
        return "@".join([self.name, *filter(None, own)]) if any(own) else self.base_name

    @property
    def base_name(self) -> str:
        """The model's name in results, whatever its weights."""
        return self.kind.base_name(self)

    @property
    def own_heads(self) -> str:
        """The heads that choose from the model's states, or an empty text."""
        return self.kind.heads(self)

    @functools.cached_property
    def key(self) -> str:
        """Distinguishes the model from others of the same pipeline."""
        return f"{self.name}#{hashlib.sha256(repr(self).encode()).hexdigest()[:8]}"

    @property
    def writes_json(self) -> bool:
        return self.kind.writes_json(self)

    @property
    def instruct(self) -> bool:
        """Whether the model follows instructions."""
        return self.model_kind == "instruct" or (
            self.model_kind == "auto" and self.kind.instruct(self)
        )

    def handler(self, expected: Sequence[Request] = ()) -> Any:
        """Returns a Beam model handler; nothing is loaded yet. Remote models ignore `expected`."""
        return self.kind.handler(self, tuple(expected))


def kind_of(name: str, inference: str) -> Kind:
    """Returns the kind of a model by its name, or else by `--inference`."""
    prefixes = (key for key in KINDS if key.endswith(":") and name.startswith(key))
    return _kind(KINDS[next(prefixes, inference)])


def name_of(key: str) -> str:
    """Returns the name of the model with a key; see `ModelSpec.key`."""
    return key.rpartition("#")[0]


def inference_of(name: str) -> str:
    """Returns where a model runs, by its name alone.

    >>> inference_of("gemini-2.5-flash"), inference_of("gemma3-270m")
    ('remote', 'on_worker')
    """
    return "remote" if name.startswith(_REMOTE_NAMES) else "on_worker"


_REMOTE_NAMES = ("gemini-", "projects/", "openai:", "anthropic:")


@functools.cache
def _kind(path: str) -> Kind:
    module, _, name = path.rpartition(".")
    made: Kind = getattr(importlib.import_module(module), name)()
    return made
