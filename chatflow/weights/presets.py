"""Checks names of keras_hub's models, and returns the folders that it loads them from."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chatflow.errors import UsageError, one_line
from chatflow.imports import UNUSED_BY_KERAS, without
from chatflow.weights import embedded
from chatflow.weights.families import FAMILIES, family_named

MARKERS = ("SHA256SUMS.json", "config.json")
"""Files that mark their folder as a model."""

SCRIPTED, TORCH, VLLM = "scripted:", "torch:", "vllm:"

PRESETS_VARIABLE = "CHATFLOW_PRESETS"

_NOT_DECODERS = r"embedding|_assistant$"
"""Presets that keras_hub lists among the decoders, but that do not write text."""


def is_instruct(preset: str) -> bool:
    """Returns whether a preset's name says that it is tuned to follow instructions.

    >>> is_instruct("gemma3_instruct_1b"), is_instruct("hf://google/gemma-3-1b-it")
    (True, True)
    >>> is_instruct("google/flan-t5-small"), is_instruct("Llama-2-7b-chat-hf")
    (True, True)
    >>> is_instruct("gemma3-270m"), is_instruct("google/t5-v1_1-small")
    (False, False)
    """
    words = r"(^|[-_/:])(it|instruct|flan)([-_/]|$)|[-_]chat([-_][^/]*)?$"
    return re.search(words, preset.lower()) is not None


def is_tuned(preset: str) -> bool:
    """Returns `is_instruct` for a model in chatflow's engine; Qwen 3 and SmolLM 3 are by default.

    >>> is_tuned("hf://Qwen/Qwen3-4B"), is_tuned("Qwen/Qwen3-4B-Base"), is_tuned("llama3.2_1b")
    (True, False, False)
    """
    family = family_named(preset)
    of_family = family is not None and family.tuned
    last = preset.lower().rstrip("/").rsplit("/", 1)[-1]
    says_base = re.search(r"[-_]base([-_]|$)", last) is not None
    return is_instruct(preset) or (of_family and not says_base)


def check_preset(preset: str) -> None:
    """Raises `UsageError` if a preset is not a known name, folder or handle; loads nothing."""
    if preset == embedded.NAME or "://" in preset or brought(preset):
        return
    folder = Path(preset)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(
                f"--model: the folder {preset!r} has no config.json, so it is not a preset"
            )
        try:
            family_named(preset)
        except ValueError as error:
            raise UsageError(
                f"--model={preset}: {one_line(error)}; for others give torch:{preset}, or a "
                "server (vllm:, openai:)"
            ) from None
        return
    known = _keras_presets()
    if preset not in known:
        near = difflib.get_close_matches(preset, sorted(known), n=5, cutoff=0.3)
        raise UsageError(
            f"--model: unknown model {preset!r}; give {embedded.NAME} (embedded), a folder, "
            "hf://…, kaggle://…, gs://…, scripted:FILE, or one of keras_hub's presets, e.g. "
            + ", ".join(near or ["gemma3_instruct_1b", "gemma2_instruct_2b_en"])
        )


def _keras_presets() -> set[str]:
    use_jax()
    from keras_hub import models

    presets = (getattr(models, f"{name}Backbone").presets for name in FAMILIES)
    return {name for some in presets for name in some if not re.search(_NOT_DECODERS, name)}


def use_jax(alone: bool = True) -> None:
    """Selects JAX for Keras and caches compiled code on disk; call it before importing keras.

    If `alone`, JAX may reserve a GPU's memory on first use, as by default; else it takes what it
    needs and leaves room for other processes. `XLA_PYTHON_CLIENT_PREALLOCATE` overrides both.
    Compiled code is not kept where the cache cannot be written. Raises `UsageError` if keras is
    already loaded with another backend, or cannot read its own settings.
    """
    os.environ["KERAS_BACKEND"] = "jax"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", str(alone).lower())
    import jax

    try:
        with without(*UNUSED_BY_KERAS):
            import keras
            import keras_hub  # noqa: F401 (here, so that it does without these, too)
    except (OSError, ValueError) as error:  # e.g. a keras.json of somebody else's in /tmp
        raise UsageError(
            f"keras cannot read its settings: {one_line(error)}; fix that file, or set KERAS_HOME "
            "to a folder that can be written"
        ) from None
    config: Any = jax.config
    if not config.jax_compilation_cache_dir:
        with contextlib.suppress(embedded.EmbeddedModelError):
            embedded.check_cache()
            config.update("jax_compilation_cache_dir", os.fspath(embedded.cache_root() / "xla"))
    config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

    if keras.config.backend() != "jax":
        raise UsageError(f"keras runs on {keras.config.backend()}; set KERAS_BACKEND=jax")


def local_preset(preset: str, progress: embedded.Progress = lambda _: None) -> str:
    """Returns a name that keras_hub can load; makes the embedded model, and copies `gs://` folders.

    A preset that the image contains, in `$CHATFLOW_PRESETS`, is used as it is. Raises `UsageError`
    if the model cannot be made or copied, e.g. where the cache cannot be written.
    """
    if folder := brought(preset):
        return os.fspath(folder)
    if preset == embedded.NAME:
        with usable_cache(preset):
            return os.fspath(embedded.ensure(progress))
    if preset.startswith(("kaggle://", "hf://")) or "://" not in preset:
        return preset
    return os.fspath(copied(preset, progress))


def local_file(path: str, progress: embedded.Progress = lambda _: None) -> str:
    """Returns a local path of a file; copies it from any filesystem that Beam knows."""
    if "://" not in path:
        return path
    folder, _, name = path.rpartition("/")
    return os.fspath(copied(folder, progress, name) / name)


@contextlib.contextmanager
def usable_cache(what: str) -> Iterator[None]:
    """Turns errors of the cache and of the embedded model into a `UsageError` naming `what`."""
    try:
        with embedded.cache_errors():
            yield
    except embedded.EmbeddedModelError as error:
        raise UsageError(f"{what}: {error}") from None


def brought(preset: str) -> Path | None:
    """Returns the folder of a preset that the image contains, if any."""
    root = os.environ.get(PRESETS_VARIABLE)
    folder = Path(root, preset) if root and "://" not in preset else None
    return folder if folder is not None and (folder / "config.json").is_file() else None


def copied(url: str, progress: embedded.Progress, names: str = "**") -> Path:
    """Returns the cached copy of a folder on any filesystem that Beam knows.

    Copies the files that match `names` if they are new or rewritten; never uses a partial copy.
    """
    import fasteners
    from apache_beam.io.filesystems import FileSystems

    from chatflow.weights.folders import Folder

    folder = _copy_of(url)
    with usable_cache(url):
        embedded.check_cache()
        folder.mkdir(parents=True, exist_ok=True)
    with fasteners.InterProcessLock(f"{folder}.lock"):
        base = url.rstrip("/") + "/"
        files = FileSystems.match([base + names])[0].metadata_list
        if not files:
            raise UsageError(f"--model: no files in {url!r}")
        for file in files:
            name = file.path[len(base) :]
            target = folder / name
            written = file.last_updated_in_seconds
            if target.is_file():
                there = target.stat()
                if (there.st_size, round(there.st_mtime)) == (file.size_in_bytes, round(written)):
                    continue
            progress(f"copying {file.path} ({file.size_in_bytes / 1e6:,.0f} MB)")
            Folder(url).copy(name, target)
            os.utime(target, (written, written))
    return folder


def forget(url: str) -> None:
    """Removes the local copy that `copied` made of a folder or file; local paths have none.

    A process that has mapped a file keeps it. A file that cannot be removed stays.
    """
    import fasteners

    if "://" not in url:
        return
    folder, (parent, _, name) = _copy_of(url), url.rstrip("/").rpartition("/")
    file = _copy_of(parent) / name
    with contextlib.suppress(OSError):
        if folder.is_dir():
            with fasteners.InterProcessLock(f"{folder}.lock"):
                shutil.rmtree(folder, ignore_errors=True)
        elif file.is_file():
            with fasteners.InterProcessLock(f"{file.parent}.lock"):
                file.unlink(missing_ok=True)


def _copy_of(url: str) -> Path:
    return embedded.cache_root() / "presets" / embedded.slug(url)


def names_instruct(source: str) -> bool:
    """Returns `is_instruct` for a source's name without its revision or `.gguf`.

    >>> names_instruct("google/gemma-3-1b-it@main"), names_instruct("gemma-3-1b-it.gguf")
    (True, True)
    """
    return is_instruct(re.sub(r"(@.*|\.gguf)$", "", source))
