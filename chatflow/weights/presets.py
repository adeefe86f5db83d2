"""Names of Gemma models, and the folders that keras_hub loads them from."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shutil
from pathlib import Path
from typing import Any

from chatflow.errors import UsageError
from chatflow.weights import embedded

MARKERS = ("SHA256SUMS.json", "config.json")
"""Files that stand for the folder that they are in, which holds a model."""

SCRIPTED, TORCH, VLLM = "scripted:", "torch:", "vllm:"

PRESETS_VARIABLE = "CHATFLOW_PRESETS"


def is_instruct(preset: str) -> bool:
    """Whether a preset's name says that it was tuned to follow instructions.

    >>> is_instruct("gemma3_instruct_1b"), is_instruct("hf://google/gemma-3-1b-it")
    (True, True)
    >>> is_instruct("google/flan-t5-small"), is_instruct("Llama-2-7b-chat-hf")
    (True, True)
    >>> is_instruct("gemma3-270m"), is_instruct("google/t5-v1_1-small")
    (False, False)
    """
    words = r"(^|[-_/:])(it|instruct|flan)([-_/]|$)|[-_]chat([-_][^/]*)?$"
    return re.search(words, preset.lower()) is not None


def check_preset(preset: str) -> None:
    """Checks what can be checked of a preset's name without loading it.

    Raises:
      UsageError: it is no name, folder or handle that can be loaded.
    """
    if preset == embedded.NAME or "://" in preset or brought(preset):
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


def use_jax(alone: bool = True) -> None:
    """Chooses Keras's backend; must run before keras is first imported.

    What is compiled is kept on disk.

    Args:
      alone: JAX may take a GPU's memory for itself when it is first used, as it does by
        default; else it takes what it needs, and other processes of the worker find room.
        The environment's word goes before both.

    Raises:
      UsageError: keras is loaded already, with another backend.
    """
    os.environ["KERAS_BACKEND"] = "jax"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", str(alone).lower())
    import jax
    import keras

    config: Any = jax.config
    if not config.jax_compilation_cache_dir:
        config.update("jax_compilation_cache_dir", os.fspath(embedded.cache_root() / "xla"))
    config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

    if keras.config.backend() != "jax":
        raise UsageError(f"keras runs on {keras.config.backend()}; set KERAS_BACKEND=jax")


def local_preset(preset: str, progress: embedded.Progress = lambda _: None) -> str:
    """A name that keras_hub can load: the embedded model made, `gs://` copied to the cache.

    A preset that an image has brought along, as a folder of that name in the folder
    `$CHATFLOW_PRESETS`, is taken as it is.
    """
    if folder := brought(preset):
        return os.fspath(folder)
    if preset == embedded.NAME:
        return os.fspath(embedded.ensure(progress))
    if preset.startswith(("kaggle://", "hf://")) or "://" not in preset:
        return preset
    return os.fspath(copied(preset, progress))


def local_file(path: str, progress: embedded.Progress = lambda _: None) -> str:
    """A file of any filesystem that Beam knows, as one of this machine."""
    if "://" not in path:
        return path
    folder, _, name = path.rpartition("/")
    return os.fspath(copied(folder, progress, name) / name)


def brought(preset: str) -> Path | None:
    """The folder of a preset that an image has brought along."""
    root = os.environ.get(PRESETS_VARIABLE)
    folder = Path(root, preset) if root and "://" not in preset else None
    return folder if folder is not None and (folder / "config.json").is_file() else None


def copied(url: str, progress: embedded.Progress, names: str = "**") -> Path:
    """A folder of any filesystem that Beam knows, in the local cache.

    A broken copy is never used, and a file that was written anew is copied again.

    Args:
      names: of the files that are copied.
    """
    import fasteners
    from apache_beam.io.filesystems import FileSystems

    from chatflow.weights.folders import Folder

    folder = _copy_of(url)
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
    """Removes the local copy of a folder or file that `copied` made; what is no URL has none.

    Whoever has mapped a file keeps it. One that cannot be removed stays.
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
    """Whether the name of a source says that it was tuned to follow instructions.

    >>> names_instruct("google/gemma-3-1b-it@main"), names_instruct("gemma-3-1b-it.gguf")
    (True, True)
    """
    return is_instruct(re.sub(r"(@.*|\.gguf)$", "", source))
