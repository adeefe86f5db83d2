"""Names of Gemma models, and the folders that keras_hub loads them from."""

from __future__ import annotations

import difflib
import os
import re
import shutil
from pathlib import Path
from typing import Any

from chatflow.errors import UsageError
from chatflow.models import embedded

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
    words = r"(^|[-_/])(it|instruct|flan)([-_/]|$)|[-_]chat([-_][^/]*)?$"
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


def brought(preset: str) -> Path | None:
    """The folder of a preset that an image has brought along."""
    root = os.environ.get(PRESETS_VARIABLE)
    folder = Path(root, preset) if root and "://" not in preset else None
    return folder if folder is not None and (folder / "config.json").is_file() else None


def copied(url: str, progress: embedded.Progress) -> Path:
    """A folder of any filesystem that Beam knows, in the local cache."""
    base = url.rstrip("/") + "/"
    return _copied(base + "**", base, progress)


def local_file(path: str, progress: embedded.Progress) -> str:
    """A local path of a file of any filesystem that Beam knows; copied to the cache if need be."""
    if "://" not in path:
        return path
    folder, name = path.rsplit("/", 1)
    return os.fspath(_copied(path, folder + "/", progress) / name)


def _copied(pattern: str, base: str, progress: embedded.Progress) -> Path:
    """The files of a pattern, in a folder of the cache for what is under `base`.

    A file is copied under another name first, so that a broken copy is never used.
    """
    import fasteners
    from apache_beam.io.filesystems import FileSystems

    folder = embedded.cache_root() / "presets" / re.sub(r"[^\w.-]+", "_", base.rstrip("/"))
    folder.mkdir(parents=True, exist_ok=True)
    with fasteners.InterProcessLock(f"{folder}.lock"):
        files = FileSystems.match([pattern])[0].metadata_list
        if not files:
            raise UsageError(f"--model: no files in {pattern.removesuffix('/**')!r}")
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
