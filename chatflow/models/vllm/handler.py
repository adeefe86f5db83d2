"""Runs models on the workers in vLLM's own server, and calls it like a remote service."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
import re
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chatflow.errors import UsageError
from chatflow.models.base import LanguageModel
from chatflow.models.handlers import LanguageModelHandler
from chatflow.models.parts import Result, put_together
from chatflow.models.remote.calls import RemoteModel
from chatflow.models.requests import FIRST, Answer, Failure, Part, Request, Version
from chatflow.models.spec import Kind, ModelSpec, Say
from chatflow.models.vllm.client import VllmClient
from chatflow.options import ONE_BUNDLE, ONE_COPY, Batching, RemoteSettings, WorkerSettings
from chatflow.weights.presets import VLLM, brought, copied

if TYPE_CHECKING:
    from chatflow.models.vllm.server import VllmServer

_log = logging.getLogger(__name__)

INSTALL = "pip install 'chatflow[vllm]'"

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_ARGUMENT = re.compile(r"(?:--)?([a-z][\w.-]*)(?:=(.+))?", re.DOTALL)
_OURS = ("model", "port", "uds", "served-model-name", "root-path", "api-key", "ssl-keyfile")


def check(name: str, worker: WorkerSettings) -> None:
    """Checks `vllm:NAME` and its settings without loading; raises `UsageError`."""
    model = name.removeprefix(VLLM)
    folder = Path(model)
    if model and folder.is_dir() and not (folder / "config.json").is_file():
        raise UsageError(f"--model={name}: the folder has no config.json, so it is not a model")
    scheme, bucket, _ = model.partition("://")
    known = (
        scheme not in ("hf", "kaggle")
        if bucket
        else model and (folder.is_dir() or folder.is_absolute() or brought(model))
    )
    if not known and not _HUB_NAME.fullmatch(model):
        raise UsageError(
            f"--model={name}: give vllm:ORGANISATION/NAME of Hugging Face's, a folder on the "
            "workers, or one of Cloud Storage (gs://…)"
        )
    if not worker.large_model:
        raise UsageError(
            f"--large_model=false: not with --model={VLLM}…, whose server serves all processes "
            "of a worker"
        )
    if worker.model_copies > 1:
        raise UsageError(
            f"--model_copies={worker.model_copies}: not with --model={VLLM}…, whose server has all "
            "GPUs of a worker; give --vllm_args=data-parallel-size="
            f"{worker.model_copies} for copies, or tensor-parallel-size for parts"
        )
    if worker.quantization != "none":
        raise UsageError(
            f"--quantization={worker.quantization}: only for Keras; for vLLM give e.g. "
            "--vllm_args=quantization=fp8 (it detects quantised weights itself)"
        )
    parse_arguments(worker.vllm_args)


def parse_arguments(text: str) -> dict[str, str | None]:
    """Returns the flags of vLLM's server by name, None for one without a value.

    A comma separates flags only if a name follows it, so values may be JSON.

    >>> parse_arguments('tensor-parallel-size=2,enforce_eager,limit-mm-per-prompt={"a":0,"b":0}')
    {'tensor-parallel-size': '2', 'enforce-eager': None, 'limit-mm-per-prompt': '{"a":0,"b":0}'}

    Raises `UsageError` for other texts, repeated flags, and flags that chatflow sets.
    """
    arguments: dict[str, str | None] = {}
    for item in re.split(r",(?=[a-z-])", text) if text else ():
        found = _ARGUMENT.fullmatch(item)
        if not found:
            raise UsageError(
                f"--vllm_args: {item!r} is not a flag of vLLM; give e.g. "
                "tensor-parallel-size=2,gpu-memory-utilization=0.9,enforce-eager"
            )
        name = found[1].replace("_", "-")
        if name in _OURS:
            raise UsageError(f"--vllm_args: {name} is set by chatflow; --model names the model")
        if name in arguments:
            raise UsageError(f"--vllm_args: {name} is given twice")
        arguments[name] = found[2]
    return arguments


def check_installed(name: str) -> None:
    """Checks that this machine has vLLM, openai and the model's folder; raises `UsageError`."""
    for package in ("vllm", "openai"):
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:  # a folder of that name is not a package
            raise UsageError(f"--model={name}: {package} is not installed here; {INSTALL}")
    if (model := Path(name.removeprefix(VLLM))).is_absolute() and not model.is_dir():
        raise UsageError(f"--model={name}: there is no such folder here")


def server_arguments(name: str, worker: WorkerSettings, most: int) -> dict[str, str | None]:
    """Returns a server's flags except the model and the port, for `most` requests at once."""
    # Only local, because the server asks for no key. Prompts have estimated lengths, and when asked
    # again also contain the first answer. Without max-model-len, vLLM does not start if the model's
    # longest context does not fit into memory.
    arguments: dict[str, str | None] = {
        "host": "127.0.0.1",
        "served-model-name": name.removeprefix(VLLM),
        "max-model-len": str(2 * worker.max_prompt_tokens + 1024),
        "max-num-seqs": str(most),
        "disable-uvicorn-access-log": None,
    }
    if worker.dtype != "auto":
        arguments["dtype"] = worker.dtype
    return arguments | parse_arguments(worker.vllm_args)


class VllmModel(LanguageModel):
    """A server, which loads `path`, and its client. Each part of a request is a separate call."""

    def __init__(
        self,
        name: str,
        path: str,
        arguments: Mapping[str, str | None],
        instruct: bool,
        settings: RemoteSettings,
    ):
        from chatflow.models.vllm.server import VllmServer

        started = time.monotonic()
        server = VllmServer(path, arguments, instruct)
        _log.info("loaded %s in %.1f s", path, time.monotonic() - started)
        client = VllmClient(str(arguments["served-model-name"]), server, settings, instruct)
        self._calls = RemoteModel(name, client, settings)
        self._release = weakref.finalize(self, _release, self._calls, server)

    def answer(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        calls = [dataclasses.replace(r, parts=(part,)) for r in requests for part in r.parts]
        answers = iter(self._calls.answer(calls))
        return [_together(r.parts, [next(answers) for _ in r.parts]) for r in requests]

    def counts(self) -> dict[str, int]:
        return self._calls.counts()

    def close(self) -> None:
        """Ends the server; also runs at garbage collection and when the process ends."""
        self._release()


def _release(calls: RemoteModel, server: VllmServer) -> None:
    calls.close()
    server.stop()


def _together(parts: Sequence[Part], found: Sequence[Answer | Failure]) -> Answer | Failure:
    """Returns one answer from the parts' answers, or the first failure, with all tokens used."""
    read = sum(each.prompt_tokens for each in found)
    written = sum(each.answer_tokens for each in found)
    answers: list[Answer] = []
    for each in found:
        if isinstance(each, Failure):
            return dataclasses.replace(each, prompt_tokens=read, answer_tokens=written)
        answers.append(each)
    results = [(part, _result(part, each)) for part, each in zip(parts, answers, strict=True)]
    made = put_together(results, answers[0].model, max(each.seconds for each in answers))
    if isinstance(made, Answer):
        repairs = tuple(repair for each in answers for repair in each.repairs)
        made = dataclasses.replace(made, repairs=repairs)
    return dataclasses.replace(made, prompt_tokens=read, answer_tokens=written)


def _result(part: Part, answer: Answer) -> Result:
    if not part.choices:
        cut = answer.finish_reason == "length"
        return Result(answer.prompt_tokens, text=answer.text, cut=cut)
    scores = tuple(json.loads(answer.text))  # see `VllmClient`
    biased = [score - bias for score, bias in zip(scores, part.bias, strict=True)]
    return Result(answer.prompt_tokens, scores, biased.index(max(biased)))


class VllmModelHandler(LanguageModelHandler[VllmModel]):
    """A model in vLLM on the worker: one server for all its processes and steps.

    In Beam's own handlers one error fails a whole batch, and there are no timeouts and no schemas.
    So they only start the server; calls are those of `RemoteLanguageModelHandler`. vLLM batches
    continuously, so `Batching.max_batch_size` is the number of calls in flight.

    Args:
      name: `vllm:` and a Hugging Face name, or a folder on the worker or in Cloud Storage.
      instruct: asks for chat completions, else for completions.
      worker: the server gets its `dtype`, `max_prompt_tokens` and `vllm_args`.
      remote: timeouts and retries.
    """

    def __init__(
        self,
        name: str,
        instruct: bool,
        worker: WorkerSettings = ONE_COPY,
        remote: RemoteSettings | None = None,
        batching: Batching = ONE_BUNDLE,
    ):
        times = 2 if batching.max_batch_duration_secs else 16  # as for remote models
        super().__init__(
            name,
            dataclasses.replace(batching, max_batch_size=times * batching.max_batch_size),
            worker,
        )
        self.instruct = instruct
        self.settings = dataclasses.replace(
            remote or RemoteSettings(), max_in_flight=batching.max_batch_size
        )
        self.arguments = server_arguments(name, worker, batching.max_batch_size)

    def load(self, version: Version = FIRST) -> VllmModel:
        model = self.name.removeprefix(VLLM)
        if folder := brought(model):
            model = os.fspath(folder)
        elif "://" in model:
            model = os.fspath(copied(model, _log.info))
        return VllmModel(self.name, model, self.arguments, self.instruct, self.settings)


class Vllm(Kind):
    """`vllm:NAME`: models that vLLM serves on the worker's GPU."""

    has_budget = needs_accelerator = True

    def check(self, spec: ModelSpec) -> None:
        if spec.inference == "remote":
            raise UsageError(
                f"--model={spec.name}: runs on the workers; with --inference=remote give gemini-… "
                "or projects/P/locations/L/endpoints/E"
            )
        check(spec.name, spec.worker)

    def writes_json(self, spec: ModelSpec) -> bool:
        return spec.instruct

    def prepare(self, spec: ModelSpec, say: Say) -> None:
        check_installed(spec.name)
        say(f"{spec.name}: the first chats wait for vLLM's server; --debug shows its log")

    def handler(self, spec: ModelSpec, expected: tuple[Request, ...]) -> VllmModelHandler:
        return VllmModelHandler(
            spec.name,
            instruct=spec.instruct,
            worker=spec.worker,
            remote=spec.remote,
            batching=spec.batching,
        )
