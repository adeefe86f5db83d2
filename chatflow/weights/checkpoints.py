"""Finds a checkpoint's files, lists their tensors, and reads them one by one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

from chatflow.errors import UsageError, one_line

Find = Callable[[str], Path | None]
"""Returns the local path of a checkpoint's file by its name, or None if there is no such file."""

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
FILES = ("model.safetensors", "pytorch_model.bin")

RUN_BYTES = 64_000_000
"""Bytes read before a shard is reopened: a mapped file's reads count as memory until it closes."""


class Stored(NamedTuple):
    """A tensor of a checkpoint; `same_as` is the first name of the same memory in its shard."""

    shard: Path
    shape: tuple[int, ...]
    dtype: Any
    same_as: str

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numbers * int(self.dtype.itemsize)


def finder(name: str) -> Find:
    """Returns a function that finds the files of a model on Hugging Face's hub or in a folder.

    The folder may be local, on `gs://`, the embedded Gemma, or a model that the image contains;
    raises `UsageError` if there is none. The hub is the one at `HF_ENDPOINT`, asked with
    `HF_TOKEN`; its files stay in the hub library's cache.
    """
    if Path(name).is_dir():
        return _in_folder(Path(name))
    from chatflow.weights.embedded import NAME
    from chatflow.weights.presets import brought, local_preset

    if name == NAME or brought(name) or ("://" in name and not name.startswith("hf://")):
        try:
            return _in_folder(Path(local_preset(name, print_step)))
        except UsageError:
            raise
        except Exception as error:  # each filesystem raises its own
            raise UsageError(f"{name} cannot be read: {one_line(error)}") from None
    if name.startswith((".", "/", "~")) or (name.count("/") > 1 and not name.startswith("hf://")):
        raise UsageError(f"there is no folder {name}")
    return _on_hub(name)


def print_step(text: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(text, highlight=False, markup=False)


def _in_folder(folder: Path) -> Find:
    def find(file: str) -> Path | None:
        return folder / file if (folder / file).is_file() else None

    return find


def _on_hub(name: str) -> Find:
    try:
        import httpx
        from huggingface_hub import constants, errors, hf_hub_download
    except ImportError:
        raise needs_torch(f"{name}: the hub's files") from None
    from chatflow.weights.hubs import hub_error

    def find(file: str) -> Path | None:
        try:
            # None: the value that the library read from the environment on import.
            endpoint = os.environ.get("HF_ENDPOINT")
            return Path(hf_hub_download(name.removeprefix("hf://"), file, endpoint=endpoint))
        except errors.RemoteEntryNotFoundError:
            return None
        except (errors.HFValidationError, httpx.HTTPError, OSError) as error:
            raise hub_error(name, error, endpoint or constants.ENDPOINT) from None

    return find


def needs_torch(what: str) -> UsageError:
    return UsageError(f"{what}: needs PyTorch and transformers: pip install 'chatflow[torch]'")


def shards(find: Find, name: str) -> list[Path]:
    """Returns the weight files, safetensors if possible; raises `UsageError` if any is missing."""
    for index, single in zip(INDEXES, FILES, strict=True):
        if listed := find(index):
            try:
                names = sorted(set(json.loads(listed.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UsageError(f"{name}: {index} is broken: {error!r}") from None
            found = {file: find(file) for file in names}
            if missing := [file for file, path in found.items() if path is None]:
                raise UsageError(f"{name}: {missing[0]} is missing, which {index} names")
            return [path for path in found.values() if path is not None]
        if path := find(single):
            return [path]
    raise UsageError(f"{name}: no weights there; looked for {', '.join(INDEXES + FILES)}")


def contents(paths: Sequence[Path]) -> dict[str, Stored]:
    """Returns the shards' tensors by name, reading no weights; raises `UsageError` if broken."""
    found: dict[str, Stored] = {}
    for path in paths:
        with _opened(path) as (names, get):
            first: dict[Any, str] = {}
            for name in names:
                tensor = get(name)
                place = (tensor.data_ptr(), tensor.shape, tensor.stride())
                same = first.setdefault(place, name) if tensor.numel() else name
                found[name] = Stored(path, tuple(tensor.shape), tensor.dtype, same)
    return found


def tensors(stored: Mapping[str, Stored]) -> Iterator[tuple[str, Any]]:
    """Yields tensors with their names, shard by shard; release each before asking for the next.

    Raises `UsageError` if a shard is broken.
    """
    for path in dict.fromkeys(entry.shard for entry in stored.values()):
        for run in _runs({n: entry for n, entry in stored.items() if entry.shard == path}):
            with _opened(path) as (_, get):
                for name in run:
                    yield name, get(name)


def _runs(stored: Mapping[str, Stored]) -> Iterator[list[str]]:
    run: list[str] = []
    size = 0
    for name, entry in stored.items():
        if run and size + entry.bytes > RUN_BYTES:
            yield run
            run, size = [], 0
        run.append(name)
        size += entry.bytes
    if run:
        yield run


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Iterable[str], Callable[[str], Any]]]:
    """Yields a shard's tensor names and a getter; tensors are mapped, and read when used."""
    try:
        import torch
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise needs_torch(str(path)) from None

    broken = (SafetensorError, RuntimeError, OSError, EOFError, AttributeError, UnpicklingError)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                yield file.keys(), file.get_tensor
        else:
            # PyTorch's format before 2020 cannot be mapped.
            mapped = zipfile.is_zipfile(path)
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            yield loaded.keys(), loaded.__getitem__
    except broken as error:
        raise UsageError(f"{path} is broken: {one_line(error)}") from None
