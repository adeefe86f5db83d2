"""Finds and checks LoRA adapters: chatflow's own by name, others by file."""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path

from chatflow.errors import UsageError
from chatflow.weights import embedded
from chatflow.weights.presets import local_file

ENDS = ".lora.h5"
"""Suffix of adapter files, which Keras's `save_lora_weights` writes."""

OWN = {embedded.NAME: "tone-1"}
"""chatflow's own adapter for each model, by its name in results; made in `tuning/`."""


def chosen(adapter: str, model: str, instruct: bool) -> str:
    """Returns the adapter that `--adapter` selects: one of chatflow's own, a file, or "" for none.

    `auto` selects chatflow's own adapter for the model. It is not made for chat turns (`instruct`).

    >>> chosen("auto", "gemma3-270m", False), chosen("auto", "gemma3_1b", False)
    ('tone-1', '')
    """
    if adapter == "auto":
        return "" if instruct else OWN.get(model, "")
    return "" if adapter == "none" else adapter


def check_adapter(adapter: str) -> None:
    """Checks an adapter's name and, if it is a local file, its signature; raises `UsageError`."""
    if adapter in OWN.values():
        return
    if not adapter.endswith(ENDS):
        raise UsageError(
            f"--adapter={adapter}: must be auto, none, or a file whose name ends in {ENDS}"
        )
    if "://" in adapter:
        return
    if not os.path.isfile(adapter):
        raise UsageError(f"--adapter={adapter}: there is no such file")
    with open(adapter, "rb") as file:
        if file.read(8) != b"\x89HDF\r\n\x1a\n":  # signature of HDF5
            raise UsageError(f"--adapter={adapter}: is no file of Keras's save_lora_weights")


def local_adapter(adapter: str, progress: embedded.Progress = lambda _: None) -> str:
    """Returns an adapter's path on this machine; copies a remote file first."""
    if adapter in OWN.values():
        return os.fspath(own_file(adapter))
    return local_file(adapter, progress)


def own_file(name: str) -> Path:
    return Path(str(importlib.resources.files("chatflow.weights") / f"{name}{ENDS}"))
