"""Converts Gemma's weights to a Keras preset, and checks that both predict the same."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chatflow.errors import UsageError, one_line
from chatflow.weights import embedded
from chatflow.weights.embedded import slug
from chatflow.weights.fetching import Fetched, Progressing, fetch
from chatflow.weights.folders import SUMS, Folder
from chatflow.weights.hubs import FolderSource, open_source
from chatflow.weights.presets import is_instruct, names_instruct, use_jax

TEXT = "My parcel is three weeks late, and nobody answers. In short, the customer is"

ALLOWED = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}
"""Largest difference of logits by the type of the weights, in standard deviations of the logits.
Gemma 3 270M, whose source is float16, differs by 0, 0 and 0.0047."""

GEMMAS = {"gemma", "gemma2", "gemma3", "gemma3_text"}
BASES = {"gemma": 1e4, "gemma2": 1e4, "gemma3_text": 1e6}
"""Bases of the rotary embedding in keras_hub."""

_MADE = re.compile(
    r"(config|metadata|tokenizer)\.json|model(_\d+)?\.weights\.(h5|json)|assets/tokenizer/.*"
)
"""Files that keras_hub writes; an interrupted conversion may have left some."""


@dataclasses.dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    Attributes:
      instruct: the source says that it is tuned to follow instructions.
      off: RMS difference of the logits, in their standard deviations; None: not checked.
      same_tokens: fraction of places in the text where both predict the same next token.
    """

    fetched: Fetched
    dtype: str
    instruct: bool
    off: float | None = None
    same_tokens: float = 0.0

    def __str__(self) -> str:
        near = "not checked"
        if self.off is not None:
            near = (
                f"logits are off by {self.off:.2g} standard deviations, "
                f"{self.same_tokens:.0%} of next tokens are the same"
            )
        return f"{self.fetched}; {self.dtype}; {near}"

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.fetched.to_dict(),
            "dtype": self.dtype,
            "checked": self.off is not None,
            "logits_off": self.off,
            "same_tokens": self.same_tokens,
        }


class Saying(NamedTuple):
    """A model's output for `TEXT`: token ids, and logits [tokens, vocabulary] as float32."""

    tokens: list[int]
    logits: np.ndarray[Any, Any]


def convert(
    source: str,
    folder: Folder,
    dtype: str = "bfloat16",
    check: bool = True,
    progress: Progressing | None = None,
) -> Converted:
    """Makes a Keras preset in a folder.

    Args:
      source: a GGUF file, or what `open_source` knows, in Hugging Face's or Keras's format.
      dtype: of the weights in the file.
      check: compares preset and source; the weights of each are in memory as float32, in turn.

    Raises:
      UsageError: the source is not a convertible Gemma, or the preset differs; nothing is left.
    """
    try:
        use_jax()
        import gguf  # noqa: F401
        import keras_hub  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"model convert needs {error.name}: pip install 'chatflow[gemma]'"
        ) from None

    progress = progress or Progressing()
    there = folder.sizes()
    ours = folder.sums() if SUMS in there else {}
    for name in there.keys() - ours.keys() - {SUMS}:
        if not _MADE.fullmatch(name):  # otherwise `fetch` fails after an hour of work
            raise UsageError(
                f"{folder.url}: holds other files, such as {name}; name an empty folder"
            )
    with _scratch(folder) as scratch:
        weights, instruct = _loadable(source, scratch, progress)
        reference, off, same = None, None, 0.0
        if check:
            progress.step("reading the source, to compare with it later")
            reference = _says(source, weights)
        progress.step(f"making the preset as {dtype}")
        made = scratch / "preset"
        _save(source, weights, dtype, made)
        if reference is not None:
            progress.step("reading the preset, to compare")
            off, same = compare(reference, _says(source, made))
            if not off <= ALLOWED[dtype]:  # also if NaN
                raise UsageError(
                    f"{source}: as {dtype}, logits are off by {off:.2g} standard deviations, more "
                    f"than {ALLOWED[dtype]}; nothing was written; try --dtype=float32"
                )
        fetched = fetch(FolderSource(Folder(str(made)), source, moved=True), folder, progress)
    return Converted(fetched, dtype, instruct, off, round(same, 4))


@contextlib.contextmanager
def _scratch(folder: Folder) -> Iterator[Path]:
    """Yields a temporary folder beside the folder's files; removes it and its new empty parents."""
    path = folder.staging.with_name(folder.staging.name + "-convert")
    new = [p for p in (path, *path.parents) if not p.exists()]
    try:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"{folder.url}: cannot be written: {one_line(error)}") from None
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        for parent in new[1:]:
            with contextlib.suppress(OSError):  # not empty
                parent.rmdir()


def _loadable(source: str, scratch: Path, progress: Progressing) -> tuple[Path, bool]:
    """Returns a text model's folder for keras_hub, and whether the model follows instructions."""
    if source.endswith(".gguf"):
        return _of_gguf(source, scratch, progress)
    found = open_source(source)
    here = found.folder.path if isinstance(found, FolderSource) else None
    if here is None:
        # In the cache, so that another conversion need not fetch it.
        here = embedded.cache_root() / "sources" / slug(source)
        fetch(found, Folder(str(here)), progress)
    instruct = names_instruct(source) or _has_chat_template(here)
    return _text_only(source, here, scratch), instruct


def _has_chat_template(folder: Path) -> bool:
    """Returns whether there is a chat template, Hugging Face's sign of an instruct model."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        config = {}
    return "chat_template" in config or any(folder.glob("chat_template*"))


def _of_gguf(source: str, scratch: Path, progress: Progressing) -> tuple[Path, bool]:
    path = Path(source).expanduser()
    if "://" in source:
        base, _, name = source.rpartition("/")
        path = scratch / "model.gguf"
        progress.step("copying the GGUF file")
        Folder(base).copy(name, path)
    if not path.is_file():
        raise UsageError(f"{source}: there is no such file")
    from safetensors import SafetensorError

    weights = scratch / "weights"
    try:
        header = embedded.convert(path, weights, progress.step, "float32")
    except embedded.EmbeddedModelError as error:
        raise UsageError(str(error).replace(str(path), source)) from None
    except (OSError, SafetensorError) as error:  # e.g. the disk is full
        raise UsageError(f"{weights} cannot be written: {one_line(error)}") from None
    _check_config(source, json.loads((weights / "config.json").read_text()))
    own = (str(header.get(f"general.{key}", "")) for key in ("name", "finetune"))
    return weights, names_instruct(source) or any(is_instruct(n.replace(" ", "-")) for n in own)


def _text_only(source: str, folder: Path, scratch: Path) -> Path:
    """Returns the folder; if its model also sees images, a folder of links as a text model."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{source}: config.json cannot be read: {one_line(error)}") from None
    if not isinstance(config, dict):
        raise UsageError(f"{source}: config.json is not a JSON object")
    if "registered_name" in config:  # Keras's own
        return folder
    kind = config.get("model_type")
    if kind not in GEMMAS:
        raise UsageError(f"{source}: holds a {kind!r} model; Gemma 1, 2 and 3 can be converted")
    if not list(folder.glob("*.safetensors")):
        raise UsageError(f"{source}: has no model.safetensors, which keras_hub reads")
    if kind != "gemma3":
        _check_config(source, config)
        return folder
    config = {**config["text_config"], "model_type": "gemma3_text"}
    config.setdefault("vocab_size", _rows(folder))
    _check_config(source, config)
    linked = scratch / "text"
    linked.mkdir()
    for path in folder.iterdir():
        if path.is_file() and path.name != "config.json":
            (linked / path.name).symlink_to(path.resolve())
    (linked / "config.json").write_text(json.dumps(config))
    return linked


def _rows(folder: Path) -> int:
    """Returns the vocabulary size, read from the embedding."""
    from safetensors import safe_open

    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="np") as file:
            for key in file.keys():  # noqa: SIM118 - it is not a dictionary
                if key.endswith("embed_tokens.weight"):
                    return int(file.get_slice(key).get_shape()[0])
    raise UsageError(f"{folder}: has no embed_tokens.weight")


def _check_config(source: str, config: dict[str, Any]) -> None:
    """Raises `UsageError` if keras_hub would use another rope_theta than the configuration."""
    base = BASES[config["model_type"]]
    rope = config.get("rope_parameters") or {}  # in transformers 5
    theta = config.get("rope_theta") or rope.get("full_attention", rope).get("rope_theta") or base
    if theta != base:
        raise UsageError(f"{source}: rope_theta is {theta:g}; keras_hub has only {base:g} for it")


def _read(source: str, folder: Path, dtype: str) -> tuple[Any, Any]:
    """Returns the backbone and the tokenizer."""
    import keras_hub

    from chatflow.weights.keras_loading import without_initial_values

    try:
        with without_initial_values():
            backbone = keras_hub.models.Backbone.from_preset(str(folder), dtype=dtype)
        tokenizer = keras_hub.tokenizers.Tokenizer.from_preset(str(folder))
    except Exception as error:  # keras_hub and safetensors raise many kinds
        raise UsageError(
            f"{source}: keras_hub cannot read it: {type(error).__name__}: {one_line(error)}"
        ) from error
    if not isinstance(backbone, (keras_hub.models.GemmaBackbone, keras_hub.models.Gemma3Backbone)):
        raise UsageError(
            f"{source}: holds a {type(backbone).__name__}; Gemma 1, 2 and 3 can be converted"
        )
    if getattr(backbone, "vision_encoder", None) is not None:
        raise UsageError(
            f"{source}: also sees images; to convert its text model, give Hugging Face's format"
        )
    return backbone, tokenizer


def _save(source: str, weights: Path, dtype: str, made: Path) -> None:
    backbone, tokenizer = _read(source, weights, dtype)
    try:
        backbone.save_to_preset(str(made))
        tokenizer.save_to_preset(str(made))
    except OSError as error:
        raise UsageError(f"{source}: cannot be written: {one_line(error)}") from error
    del backbone
    gc.collect()


def _says(source: str, folder: Path) -> Saying:
    backbone, tokenizer = _read(source, folder, "float32")
    tokens = [tokenizer.start_token_id, *map(int, tokenizer(TEXT))]
    ids = np.array([tokens], np.int32)
    hidden = backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    logits = np.asarray(backbone.token_embedding(hidden, reverse=True), np.float32)[0]
    del backbone, hidden
    gc.collect()  # before the next model is read
    return Saying(tokens, logits)


def compare(source: Saying, made: Saying) -> tuple[float, float]:
    """Returns `Converted.off` and `same_tokens`; raises `UsageError` if the tokenizers differ."""
    if source.tokens != made.tokens:
        raise UsageError(
            f"the tokenizer was not kept: {source.tokens[:8]}… has become {made.tokens[:8]}…"
        )
    off = np.sqrt(np.mean((source.logits - made.logits) ** 2)) / np.std(source.logits)
    same = np.mean(source.logits.argmax(-1) == made.logits.argmax(-1))
    return float(off), float(same)
