"""Writes a model's `state_dict` as one file of a chosen precision, tensor by tensor.

Neither the model nor the file is ever in memory as a whole: the file is laid out first, then each
tensor is read, converted and written to its place.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from chatflow.errors import UsageError, one_line
from chatflow.weights.checkpoints import Find, Stored, contents, needs_torch, shards, tensors

DTYPES = ("float16", "bfloat16", "float32")

SUFFIXES = (".pt", ".pth", ".safetensors")

CHUNK = 4_000_000
"""Numbers of a tensor that are converted at once."""

_SAFETENSORS_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


class Plan(NamedTuple):
    """What is written.

    Attributes:
      sources: the checkpoint's tensor for each key of the state dict; tied keys share one.
      stored: those tensors by name.
      dtypes: their types in the file, by name; only floating-point numbers are converted.
    """

    sources: Mapping[str, str]
    stored: Mapping[str, Stored]
    dtypes: Mapping[str, Any]

    @property
    def parameters(self) -> int:
        return sum(entry.numbers for entry in self.stored.values())

    @property
    def bytes(self) -> int:
        """Returns the file's approximate size; safetensors repeats tied weights for each key."""
        return sum(map(self.bytes_of, self.stored))

    def bytes_of(self, name: str) -> int:
        return self.stored[name].numbers * int(self.dtypes[name].itemsize)


def plan(find: Find, name: str, dtype: str) -> Plan:
    """Returns what to write, after comparing a checkpoint with its configuration's model.

    `name` is for messages; `dtype` is float16, bfloat16 or float32. Raises `UsageError` if there is
    no such model, or its weights are not those of its class.
    """
    try:
        import torch
    except ImportError:
        raise needs_torch("chatflow model save-state-dict") from None

    model = blank_model(find, name)
    paths = shards(find, name)
    stored = contents(paths)
    sources = _sources(model, stored, name)
    taken = {source: stored[source] for source in stored if source in set(sources.values())}
    wanted = getattr(torch, dtype)
    dtypes = {n: wanted if e.dtype.is_floating_point else e.dtype for n, e in taken.items()}
    return Plan(sources, taken, dtypes)


def blank_model(find: Find, name: str) -> Any:
    """Returns the model of a checkpoint's `config.json`, without weights.

    Raises `UsageError` if there is none, or transformers knows no such language model.
    """
    try:
        from transformers import AutoConfig
        from transformers.utils import logging

        from chatflow.weights.torch_loading import without_weights
    except ImportError:
        raise needs_torch(name) from None

    file = find("config.json")
    if file is None:
        raise UsageError(f"{name}: there is no config.json, so it is not a Hugging Face model")
    quiet: Any = logging
    quiet.set_verbosity_error()
    try:
        return without_weights(AutoConfig.from_pretrained(file.parent))
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise UsageError(f"{name}: its config.json cannot be used: {one_line(error)}") from None


def _sources(model: Any, stored: Mapping[str, Stored], name: str) -> dict[str, str]:
    """Returns the checkpoint's tensor name for each key of the state dict."""
    keys = model.state_dict(keep_vars=True)
    # Left over from older versions of the class.
    extras = {*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"}
    known, strange = {}, []
    for own in stored:
        # A checkpoint without the head lacks this prefix.
        key = own if own in keys else f"{model.base_model_prefix}.{own}"
        if key in keys:
            known[key] = own
        elif not any(re.search(pattern, own) for pattern in extras):
            strange.append(own)
    tied: dict[int, list[str]] = {}
    for key, tensor in keys.items():
        tied.setdefault(id(tensor), []).append(key)
    sources, missing = {}, []
    for key, tensor in keys.items():
        # Prefer the checkpoint to the class: transformers 5 ties the output of all T5s to the
        # input, but newer T5s are not tied.
        found = [known[each] for each in (key, *tied[id(tensor)]) if each in known]
        if not found:
            missing.append(key)
            continue
        sources[key] = stored[found[0]].same_as
        shape = stored[found[0]].shape
        if shape != tuple(tensor.shape):
            raise UsageError(
                f"{name}: {found[0]} has the shape {shape}; by its config.json it is "
                f"{tuple(tensor.shape)}"
            )
    for what, names in (("lacks", missing), ("holds, beside its model's,", strange)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UsageError(
                f"{name}: the checkpoint {what} {', '.join(names[:3])}{more}, so it is not of "
                f"the class {type(model).__name__}"
            )
    return sources


def write(planned: Plan, path: Path, progress: Callable[[int, int], None]) -> None:
    """Writes the file; `path` ends in one of `SUFFIXES`, optionally followed by `.part`.

    `progress` gets the tensors and bytes written since the last call. Raises `UsageError` if a
    weight is too large for float16, or a shard is broken.
    """
    torch_form = path.name.removesuffix(".part").endswith((".pt", ".pth"))
    places = (_lay_out_torch if torch_form else _lay_out_safetensors)(planned, path)
    sums: dict[int, int] = {}
    with path.open("r+b") as file:
        for name, tensor in tensors(planned.stored):
            check = _put(
                file, places[name], _converted(tensor, planned.dtypes[name], name), progress
            )
            sums |= dict.fromkeys(places[name], check)
            progress(1, 0)
            del tensor  # frees the shard before the next one is opened
    if torch_form:
        _put_sums(path, sums)


def _put(
    file: IO[bytes],
    places: Iterable[int],
    parts: Iterable[memoryview],
    progress: Callable[[int, int], None],
) -> int:
    """Writes a tensor to its places and returns its checksum."""
    done = check = 0
    for data in parts:
        for place in places:
            file.seek(place + done)
            file.write(data)
        check = zlib.crc32(data, check)
        done += len(data)
        progress(0, len(data))
    return check


def _converted(tensor: Any, dtype: Any, name: str) -> Iterator[memoryview]:
    """Yields a tensor's numbers in another precision, part by part."""
    import torch

    for part in tensor.reshape(-1).split(CHUNK):
        made = part.to(dtype)
        if dtype == torch.float16 and _overflows(part, made):
            raise UsageError(
                f"{name} holds {part[part.isfinite()].abs().max().item():.4g}, but float16 ends "
                "at 65504: use --dtype=bfloat16, which has float32's range"
            )
        yield memoryview(made.view(torch.uint8).numpy())


def _overflows(part: Any, made: Any) -> bool:
    if not part.numel():
        return False
    least, most = (extreme.item() for extreme in part.aminmax())
    if least >= -65504 and most <= 65504:  # both false if there is a NaN
        return False
    return bool((made.isinf() & part.isfinite()).any())


def _lay_out_torch(planned: Plan, path: Path) -> dict[str, list[int]]:
    """Writes all but the numbers, as torch.save does; returns where each tensor's numbers go."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        blank = {
            name: torch.empty(entry.shape, dtype=planned.dtypes[name])
            for name, entry in planned.stored.items()
        }
        state = {key: blank[source] for key, source in planned.sources.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(state, path)
    with FakeTensorMode():
        laid_out = torch.load(path, weights_only=True)
    return {
        source: [laid_out[key].untyped_storage()._checkpoint_offset]
        for key, source in planned.sources.items()
    }


def _put_sums(path: Path, sums: Mapping[int, int]) -> None:
    """Adds the checksums to the zip file's list: PyTorch needs none, but a valid zip file does."""
    with zipfile.ZipFile(path, "a") as archive:
        # Only a name and padding are between a header and its data.
        at = sorted(sums)
        for info in archive.infolist():
            if "/data/" in info.filename and info.file_size:
                place = next(place for place in at if place > info.header_offset)
                info.CRC = sums[place]
        archive.comment = b""  # makes zipfile rewrite the list


def _lay_out_safetensors(planned: Plan, path: Path) -> dict[str, list[int]]:
    """Writes the header and makes room; returns where each tensor's numbers go.

    The format is the header's length in 8 bytes, the header as JSON, and the numbers. Tensors share
    nothing in it, so tied weights are repeated for each key.
    https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, list[int]] = {}
    end = 0
    # Wide types first, so that each tensor starts at a multiple of its type's size.
    for key, source in sorted(
        planned.sources.items(), key=lambda pair: -planned.dtypes[pair[1]].itemsize
    ):
        kind = str(planned.dtypes[source]).removeprefix("torch.")
        if kind not in _SAFETENSORS_NAMES:
            raise UsageError(f"{source} is of the type {kind}; write a .pt file")
        start, end = end, end + planned.bytes_of(source)
        header[key] = {
            "dtype": _SAFETENSORS_NAMES[kind],
            "shape": planned.stored[source].shape,
            "data_offsets": [start, end],
        }
        starts.setdefault(source, []).append(start)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return {source: [8 + len(text) + start for start in at] for source, at in starts.items()}
