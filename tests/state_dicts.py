"""What the tests of state dicts share."""

from __future__ import annotations

import json

from chatflow.cli import main


def save(folder, path, *flags, capsys=None):
    """Runs the command; returns its summary."""
    if capsys is not None:
        capsys.readouterr()
    assert main(["model", "save-state-dict", str(folder), str(path), "--summary=json", *flags]) == 0
    return json.loads(capsys.readouterr().out) if capsys is not None else None


def read(path):
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    import torch

    return torch.load(path, weights_only=True)


def mistake_of(folder, path, capsys, *flags):
    """What the command says in its last line; exit code 2."""
    capsys.readouterr()
    assert main(["model", "save-state-dict", str(folder), str(path), *flags]) == 2
    return capsys.readouterr().err.splitlines()[-1]
