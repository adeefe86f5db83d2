"""Checks files of LoRA adapters, and brings them to this machine."""

from __future__ import annotations

import os

from chatflow.errors import UsageError
from chatflow.weights import embedded
from chatflow.weights.presets import local_file

ENDS = ".lora.h5"
"""Suffix of adapter files, which Keras's `save_lora_weights` writes."""


def check_adapter(adapter: str) -> None:
    """Checks an adapter's name and, if it is a local file, its signature; raises `UsageError`."""
    if not adapter.endswith(ENDS):
        raise UsageError(f"--adapter={adapter}: must be a file whose name ends in {ENDS}")
    if "://" in adapter:
        return
    if not os.path.isfile(adapter):
        raise UsageError(f"--adapter={adapter}: there is no such file")
    with open(adapter, "rb") as file:
        if file.read(8) != b"\x89HDF\r\n\x1a\n":  # signature of HDF5
            raise UsageError(f"--adapter={adapter}: is not a file of Keras's save_lora_weights")


def local_adapter(adapter: str, progress: embedded.Progress = lambda _: None) -> str:
    """Returns an adapter's path on this machine; copies a remote file first."""
    return local_file(adapter, progress)
