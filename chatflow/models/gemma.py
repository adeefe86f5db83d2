"""Gemma on the workers: keras_hub on the JAX backend, behind a Beam model handler."""

from __future__ import annotations

import collections
import difflib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatflow.errors import UsageError
from chatflow.models import embedded
from chatflow.models.handlers import LanguageModelHandler
from chatflow.models.requests import ONE_BUNDLE, Answer, Batching, Failure, Part, Request

if TYPE_CHECKING:
    from chatflow.models.engine import Continuation, Score

_log = logging.getLogger(__name__)


def is_instruct(preset: str) -> bool:
    """Whether a preset's name says that it was tuned to follow instructions.

    >>> is_instruct("gemma3_instruct_1b"), is_instruct("hf://google/gemma-3-1b-it")
    (True, True)
    >>> is_instruct("gemma3-270m")
    False
    """
    return re.search(r"(^|[-_/])(it|instruct)([-_/]|$)", preset.lower()) is not None


def check_preset(preset: str) -> None:
    """Checks what can be checked of a preset's name without loading it.

    Raises:
      UsageError: it is no name, folder or handle that can be loaded.
    """
    if preset == embedded.NAME or "://" in preset:
        return
    folder = Path(preset)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(
                f"--model: the folder {preset!r} has no config.json, so it is no preset"
            )
        return
    known = _keras_presets()
    if preset not in known:
        near = difflib.get_close_matches(preset, sorted(known), n=5, cutoff=0.3)
        raise UsageError(
            f"--model: unknown model {preset!r}; give {embedded.NAME} (embedded), a folder, "
            "hf://…, kaggle://…, gs://…, scripted:FILE, or one of keras_hub's Gemma presets, e.g. "
            + ", ".join(near or ["gemma3_instruct_1b", "gemma2_instruct_2b_en"])
        )


def _keras_presets() -> set[str]:
    use_jax()
    from keras_hub.models import Gemma3Backbone, GemmaBackbone

    return {*GemmaBackbone.presets, *Gemma3Backbone.presets}


def use_jax() -> None:
    """Chooses Keras's backend; must run before keras is first imported.

    Raises:
      UsageError: keras is loaded already, with another backend.
    """
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    if keras.config.backend() != "jax":
        raise UsageError(f"keras runs on {keras.config.backend()}; set KERAS_BACKEND=jax")


def local_preset(preset: str, progress: embedded.Progress = lambda _: None) -> str:
    """A name that keras_hub can load: the embedded model made, `gs://` copied to the cache."""
    if preset == embedded.NAME:
        return os.fspath(embedded.ensure(progress))
    if preset.startswith(("kaggle://", "hf://")) or "://" not in preset:
        return preset
    return os.fspath(copied(preset, progress))


def copied(url: str, progress: embedded.Progress) -> Path:
    """A folder of any filesystem that Beam knows, in the local cache.

    A file is copied under another name first, so that a broken copy is never used.
    """
    import fasteners
    from apache_beam.io.filesystems import FileSystems

    folder = embedded.cache_root() / "presets" / re.sub(r"[^\w.-]+", "_", url)
    folder.mkdir(parents=True, exist_ok=True)
    with fasteners.InterProcessLock(f"{folder}.lock"):
        base = url.rstrip("/") + "/"
        files = FileSystems.match([base + "**"])[0].metadata_list
        if not files:
            raise UsageError(f"--model: no files in {url!r}")
        for file in files:
            target = folder / file.path[len(base) :]
            if target.is_file() and target.stat().st_size == file.size_in_bytes:
                continue
            progress(f"copying {file.path} ({file.size_in_bytes / 1e6:,.0f} MB)")
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(target.name + ".part")
            source = FileSystems.open(file.path, compression_type="uncompressed")
            with source, part.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 22)
            part.replace(target)
    return folder


class GemmaModel:
    """A loaded Gemma that answers requests, part by part.

    Args:
      name: what answers say made them.
      preset: see `GemmaModelHandler`.
      dtype: `float32`, `bfloat16`, or `auto`: bfloat16 on an accelerator.
      instruct: prompts are wrapped as a user's turn.
    """

    def __init__(self, name: str, preset: str, dtype: str, instruct: bool):
        started = time.monotonic()
        use_jax()
        import jax

        config: Any = jax.config
        config.update("jax_compilation_cache_dir", os.fspath(embedded.cache_root() / "xla"))
        config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        from chatflow.models.engine import Engine

        if dtype == "auto":
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        self.name = name
        self.engine = Engine(local_preset(preset, _log.info), dtype, instruct)
        self._lock = threading.Lock()
        _log.info(
            "loaded %s (%s, %s) in %.1f s",
            preset, dtype, jax.default_backend(), time.monotonic() - started,
        )  # fmt: skip

    def answer(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        """Answers in the order of the requests.

        A part that fills a field of the answer is put into its JSON here: the model
        writes no JSON that code can write.

        Raises:
          PromptTooLongError: a prompt is longer than the engine takes.
        """
        started = time.monotonic()
        with self._lock:  # one batch at a time uses all cores, or the whole device
            results = self._run(requests)
        seconds = time.monotonic() - started
        return [self._put_together(result, seconds) for result in results]

    def _run(self, requests: Sequence[Request]) -> list[list[tuple[Part, Any]]]:
        groups: dict[Any, list[tuple[int, Part]]] = collections.defaultdict(list)
        for row, request in enumerate(requests):
            for part in request.parts:
                shared = part.shared if part.shared < len(part.prompt) else 0
                key = (part.prompt[:shared], part.max_tokens, part.stop, part.choices)
                groups[key].append((row, part))
        results: list[list[tuple[Part, Any]]] = [[] for _ in requests]
        for (prefix, max_tokens, stop, choices), members in groups.items():
            suffixes = [part.prompt[len(prefix) :] for _, part in members]
            answers: Sequence[Score | Continuation]
            if choices:
                answers = self.engine.score(prefix, suffixes, choices)
            else:
                answers = self.engine.generate(prefix, suffixes, max_tokens, stop)
            for (row, part), answer in zip(members, answers, strict=True):
                results[row].append((part, answer))
        return results

    def _put_together(self, result: list[tuple[Part, Any]], seconds: float) -> Answer:
        fields: dict[str, Any] = {}
        text, finish_reason, scores = "", "stop", {}
        for part, answer in result:
            if part.choices:
                best = max(range(len(part.choices)), key=lambda i: answer.scores[i] - part.bias[i])
                value: Any = part.values[best]
                for choice, score in zip(part.choices, answer.scores, strict=True):
                    scores[choice.strip()] = round(float(score), 4)
            else:
                value = (part.lead + answer.text).strip()
                if answer.cut:
                    finish_reason = "length"
                    value += "…"
                if part.tail:
                    value = value.rstrip(" ,.!?…") + part.tail
            if part.field:
                fields[part.field] = value
            else:
                text = value
        return Answer(
            json.dumps(fields, ensure_ascii=False) if fields else text,
            self.name,
            prompt_tokens=sum(answer.prompt_tokens for _, answer in result),
            answer_tokens=sum(answer.answer_tokens for _, answer in result),
            seconds=seconds,
            finish_reason=finish_reason,
            tone_scores=tuple(scores.items()),
        )


class GemmaModelHandler(LanguageModelHandler[GemmaModel]):
    """Gemma 1, 2 or 3 on the worker: one copy of the weights for all its processes and steps.

    Args:
      preset: `gemma3-270m` (embedded), a name of keras_hub's, a local folder, or a
        handle: `hf://`, `kaggle://`, `gs://`.
      dtype: `float32`, `bfloat16` or `auto`.
      instruct: whether prompts are wrapped in the turns of Gemma's chat template;
        None: as the preset's name says.
    """

    def __init__(
        self,
        preset: str = embedded.NAME,
        dtype: str = "auto",
        instruct: bool | None = None,
        batching: Batching = ONE_BUNDLE,
    ):
        super().__init__(preset, batching, large_model=True)
        self.preset = preset
        self.dtype = dtype
        self.instruct = is_instruct(preset) if instruct is None else instruct

    def load_model(self) -> GemmaModel:
        return GemmaModel(self.name, self.preset, self.dtype, self.instruct)
