"""LoRA adapters: chatflow's own, and those of others, by name or file."""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path

from chatflow.errors import UsageError
from chatflow.weights import embedded
from chatflow.weights.presets import local_file

ENDS = ".lora.h5"
"""How the names of adapters end: files that Keras's `save_lora_weights` writes."""

OWN = {embedded.NAME: "tone-1"}
"""chatflow's own adapter for a model, as results have its name; made in `tuning/`."""


def chosen(adapter: str, model: str, instruct: bool) -> str:
    """The adapter that `--adapter` names: one of chatflow's own, a file, or empty for none.

    Args:
      adapter: `auto`, for chatflow's own where the model has one; `none`; or a file's name.
      instruct: the model is asked in the turns of a chat, for which chatflow's own is not.

    >>> chosen("auto", "gemma3-270m", False), chosen("auto", "gemma3_1b", False)
    ('tone-1', '')
    """
    if adapter == "auto":
        return "" if instruct else OWN.get(model, "")
    return "" if adapter == "none" else adapter


def check_adapter(adapter: str) -> None:
    """Checks what can be checked of an adapter without a model.

    Raises:
      UsageError: it is none of chatflow's own and no file of that kind.
    """
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
        if file.read(8) != b"\x89HDF\r\n\x1a\n":  # HDF5's signature
            raise UsageError(f"--adapter={adapter}: is no file of Keras's save_lora_weights")


def local_adapter(adapter: str, progress: embedded.Progress = lambda _: None) -> str:
    """The file of an adapter on this machine."""
    if adapter in OWN.values():
        return os.fspath(own_file(adapter))
    return local_file(adapter, progress)


def own_file(name: str) -> Path:
    return Path(str(importlib.resources.files("chatflow.weights") / f"{name}{ENDS}"))
