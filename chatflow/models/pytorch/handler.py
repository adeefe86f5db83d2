"""T5, Flan-T5 and other Hugging Face text models on PyTorch, behind a Beam model handler."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import time
from pathlib import Path

from chatflow.errors import UsageError, one_line
from chatflow.models.handlers import LanguageModelHandler
from chatflow.models.parts import EngineModel
from chatflow.models.requests import FIRST, Request, Version
from chatflow.models.spec import Kind, ModelSpec
from chatflow.options import ONE_BUNDLE, ONE_COPY, Batching, WorkerSettings
from chatflow.weights.presets import MARKERS, TORCH, brought, is_instruct, local_preset

_log = logging.getLogger(__name__)

STATE_DICT = r"\.(pt|pth|bin|safetensors)$"
"""Suffixes of state dicts."""


def check_torch(name: str, state_dict_path: str, settings: WorkerSettings) -> None:
    """Checks a model without loading it; `name` is what follows `torch:`.

    Raises `UsageError` if PyTorch is not installed, or the model or its state dict does not exist.
    """
    flag = f"--model={TORCH}{name}"
    missing = [lib for lib in ("torch", "transformers") if importlib.util.find_spec(lib) is None]
    if missing:
        raise UsageError(f"{flag}: {missing[0]} is not installed: pip install 'chatflow[torch]'")
    if settings.quantization != "none":
        raise UsageError(f"--quantization={settings.quantization}: only for Gemma, not with {flag}")
    folder = brought(name) or Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(f"{flag}: the folder has no config.json, so it is not a model")
    elif not _LOADABLE.fullmatch(name):
        raise UsageError(
            f"{flag}: no such folder, and not a name on the Hugging Face hub; give a folder, "
            "gs://…, or a name like google/flan-t5-small"
        )
    if state_dict_path:
        check_state_dict(state_dict_path)


_LOADABLE = re.compile(r"(hf://)?[\w-][\w.-]*(/[\w-][\w.-]*)?|(?!kaggle:|hf:)\w+://.+")
"""A name on the hub, or a folder's URL."""


def check_state_dict(path: str) -> None:
    """Raises `UsageError` if the file does not exist, or its filesystem does not answer."""
    from apache_beam.io.filesystems import FileSystems

    try:
        found = FileSystems.exists(path)
    except Exception as error:  # each filesystem raises its own
        said = f"--state_dict_path={path}: cannot be looked up: {one_line(error)}"
        raise UsageError(said) from None
    if not found or os.path.isdir(path):
        raise UsageError(f"--state_dict_path={path}: no such file")


def local_model(name: str) -> str:
    """Returns what transformers can load: a folder or a name on the hub; copies `gs://` first."""
    if name.startswith("hf://"):
        return name.removeprefix("hf://")
    return local_preset(name, _log.info)


class TorchModel(EngineModel):
    """A loaded model that answers requests, part by part.

    Its weights are freed with the last reference to it. `path` is a local folder or a name on the
    hub; `instruct` is as in `Engine`, `state_dict_path` and `settings` as in `TorchModelHandler`.
    """

    def __init__(
        self,
        name: str,
        path: str,
        state_dict_path: str,
        settings: WorkerSettings,
        instruct: bool,
        most: int,
    ):
        started = time.monotonic()
        from chatflow.models.pytorch.engine import Engine
        from chatflow.weights.torch_loading import load

        loaded = load(path, state_dict_path, settings.dtype, name)
        super().__init__(name, Engine(*loaded, instruct, most), most, settings.merge_seconds)
        _log.info("loaded %s in %.1f s", name, time.monotonic() - started)


def _name(model: str, weights: str) -> str:
    """Returns the model's name in answers."""
    return f"{TORCH}{model}@{weights}" if weights else f"{TORCH}{model}"


class TorchModelHandler(LanguageModelHandler[TorchModel]):
    """A Hugging Face text model on the worker: one copy for all its processes and steps.

    Takes encoder-decoders (T5, Flan-T5, BART …) and decoder-only models (Llama, Qwen …).

    Args:
      model: a name on the hub (`google/flan-t5-small`), a local folder, or `gs://…`.
      instruct: whether prompts are instructions; None: as the model's name says.
      state_dict_path: weights to use instead: a `state_dict()` by `torch.save`, or safetensors, on
        any filesystem that Beam knows; the folder then supplies only configuration and tokenizer.
      expected, updates: see `LanguageModelHandler`.
    """

    def __init__(
        self,
        model: str,
        instruct: bool | None = None,
        state_dict_path: str = "",
        settings: WorkerSettings = ONE_COPY,
        batching: Batching = ONE_BUNDLE,
        expected: tuple[Request, ...] = (),
        updates: str = "",
    ):
        super().__init__(_name(model, state_dict_path), batching, settings, expected, updates)
        self.model = model
        self.state_dict_path = state_dict_path
        self.settings = settings
        self.most = batching.max_batch_size
        self.instruct = is_instruct(model) if instruct is None else instruct

    def load(self, version: Version = FIRST) -> TorchModel:
        """Returns the model; a version replaces its state dict or, if a folder, all of it."""
        model, state_dict_path = self.model, self.state_dict_path
        if re.search(STATE_DICT, version.path):
            state_dict_path = version.path
        elif version.path:
            model, state_dict_path = version.path, ""
        return TorchModel(
            _name(self.model, version.path) if version.path else self.name,
            local_model(model),
            state_dict_path,
            self.settings,
            self.instruct,
            self.most,
        )


class Torch(Kind):
    """`torch:NAME`: Hugging Face text models on PyTorch."""

    update_files = (*MARKERS, ".pt", ".pth", ".bin", ".safetensors")
    takes_state_dict = True

    def check(self, spec: ModelSpec) -> None:
        if spec.inference == "remote":
            raise UsageError(f"--model={spec.name}: runs on the workers, not remotely")
        check_torch(spec.name.removeprefix(TORCH), spec.state_dict_path, spec.worker)

    def handler(self, spec: ModelSpec, expected: tuple[Request, ...]) -> TorchModelHandler:
        return TorchModelHandler(
            spec.name.removeprefix(TORCH),
            instruct=spec.instruct,
            state_dict_path=spec.state_dict_path,
            settings=spec.worker,
            batching=spec.batching,
            expected=expected,
            updates=spec.updates,
        )
