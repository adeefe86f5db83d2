"""Finds the heads of a model: chatflow's own by name, others by file."""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path

from chatflow.choices.heads import ENDS
from chatflow.errors import UsageError
from chatflow.weights import embedded
from chatflow.weights.presets import local_file

OWN = {embedded.NAME: "support-2"}
"""chatflow's own heads for each model; made in `tuning/`."""


def chosen_heads(heads: str, model: str, instruct: bool) -> str:
    """Returns the heads that `--heads` selects: some of chatflow's own, a file, or "" for none.

    >>> chosen_heads("auto", "gemma3-270m", False), chosen_heads("auto", "gemma3_1b", False)
    ('support-2', '')
    """
    if heads == "auto":
        return "" if instruct else OWN.get(model, "")
    return "" if heads == "none" else heads


def check_heads(heads: str) -> None:
    """Checks the name of heads; raises `UsageError`."""
    if heads in ("auto", "none", *OWN.values()):
        return
    if not heads.endswith(ENDS):
        raise UsageError(
            f"--heads={heads}: must be auto, none, or a file whose name ends in {ENDS}"
        )
    if "://" not in heads and not os.path.isfile(heads):
        raise UsageError(f"--heads={heads}: there is no such file")


def local_heads(heads: str, progress: embedded.Progress = lambda _: None) -> str:
    """Returns the path of heads on this machine; copies a remote file first."""
    return os.fspath(own_file(heads)) if heads in OWN.values() else local_file(heads, progress)


def own_file(name: str) -> Path:
    return Path(str(importlib.resources.files("chatflow.weights") / f"{name}{ENDS}"))
