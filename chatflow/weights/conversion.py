"""Gemma's weights, from other formats to a preset of Keras's, and whether they are the same."""

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
"""How far logits may be off, in multiples of their standard deviation, by the type of the weights.
Gemma 3 270M, whose source is float16, is off by 0, 0 and 0.0047."""

GEMMAS = {"gemma", "gemma2", "gemma3", "gemma3_text"}
BASES = {"gemma": 1e4, "gemma2": 1e4, "gemma3_text": 1e6}
"""Of the rotary embedding, as keras_hub has them."""

_MADE = re.compile(
    r"(config|metadata|tokenizer)\.json|model(_\d+)?\.weights\.(h5|json)|assets/tokenizer/.*"
)
"""What keras_hub writes, which a conversion that was ended may have left."""


@dataclasses.dataclass(frozen=True)
class Converted:
    """What was made.

    Attributes:
      instruct: the source says of itself that it was tuned to follow instructions.
      off: root mean square of the differences of the logits, in multiples of their standard
        deviation; None: not checked.
      same_tokens: part of the places in the text after which both say the same next token.
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
    """What a model says of `TEXT`.

    Attributes:
      tokens: their ids.
      logits: [tokens, vocabulary], float32.
    """

    tokens: list[int]
    logits: np.ndarray[Any, Any]


def convert(
    source: str,
    folder: Folder,
    dtype: str = "bfloat16",
    check: bool = True,
    progress: Progressing | None = None,
) -> Converted:
    """Makes a preset of Keras's in a folder.

    Args:
      source: a GGUF file, or what `open_source` knows, in Hugging Face's or Keras's format.
      dtype: of the weights in the file.
      check: load it and compare; the weights are in memory as float32 then, once at a time.

    Raises:
      UsageError: the source is no Gemma that can be converted, or what was made says
        something else; then nothing of it is left.
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
        if not _MADE.fullmatch(name):  # else after an hour of work
            raise UsageError(
                f"{folder.url}: holds other files, such as {name}; name a folder of its own"
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
            if not off <= ALLOWED[dtype]:  # nor where it is no number
                raise UsageError(
                    f"{source}: as {dtype}, logits are off by {off:.2g} standard deviations, more "
                    f"than {ALLOWED[dtype]}; nothing was written; try --dtype=float32"
                )
        fetched = fetch(FolderSource(Folder(str(made)), source, moved=True), folder, progress)
    return Converted(fetched, dtype, instruct, off, round(same, 4))


@contextlib.contextmanager
def _scratch(folder: Folder) -> Iterator[Path]:
    """A place beside the folder's files; what was not there before is gone where this fails."""
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
    """A folder that keras_hub can read, of a text model; and whether it follows instructions."""
    if source.endswith(".gguf"):
        return _of_gguf(source, scratch, progress)
    found = open_source(source)
    here = found.folder.path if isinstance(found, FolderSource) else None
    if here is None:
        # In the cache, so that another conversion does not fetch it again.
        here = embedded.cache_root() / "sources" / slug(source)
        fetch(found, Folder(str(here)), progress)
    instruct = names_instruct(source) or _has_chat_template(here)
    return _text_only(source, here, scratch), instruct


def _has_chat_template(folder: Path) -> bool:
    """Hugging Face's sign of a model that follows instructions."""
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
    except (OSError, SafetensorError) as error:  # the disk is full, say
        raise UsageError(f"{weights} cannot be written: {one_line(error)}") from None
    _check_config(source, json.loads((weights / "config.json").read_text()))
    own = (str(header.get(f"general.{key}", "")) for key in ("name", "finetune"))
    return weights, names_instruct(source) or any(is_instruct(n.replace(" ", "-")) for n in own)


def _text_only(source: str, folder: Path, scratch: Path) -> Path:
    """The folder, or one of links to its files as a text model where it can see, too."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{source}: config.json cannot be read: {one_line(error)}") from None
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
    """Tokens that the embedding has."""
    from safetensors import safe_open

    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="np") as file:
            for key in file.keys():  # noqa: SIM118 - it is no dictionary
                if key.endswith("embed_tokens.weight"):
                    return int(file.get_slice(key).get_shape()[0])
    raise UsageError(f"{folder}: has no embed_tokens.weight")


def _check_config(source: str, config: dict[str, Any]) -> None:
    """Raises a `UsageError` for what keras_hub would read as something else."""
    base = BASES[config["model_type"]]
    rope = config.get("rope_parameters") or {}  # where transformers 5 has it
    theta = config.get("rope_theta") or rope.get("full_attention", rope).get("rope_theta") or base
    if theta != base:
        raise UsageError(f"{source}: rope_theta is {theta:g}; keras_hub has only {base:g} for it")


def _read(source: str, folder: Path, dtype: str) -> tuple[Any, Any]:
    """Backbone and tokenizer."""
    import keras_hub

    from chatflow.weights.keras_loading import without_initial_values

    try:
        with without_initial_values():
            backbone = keras_hub.models.Backbone.from_preset(str(folder), dtype=dtype)
        tokenizer = keras_hub.tokenizers.Tokenizer.from_preset(str(folder))
    except Exception as error:  # keras_hub and safetensors have many
        raise UsageError(
            f"{source}: keras_hub cannot read it: {type(error).__name__}: {one_line(error)}"
        ) from error
    if not isinstance(backbone, (keras_hub.models.GemmaBackbone, keras_hub.models.Gemma3Backbone)):
        raise UsageError(
            f"{source}: holds a {type(backbone).__name__}; Gemma 1, 2 and 3 can be converted"
        )
    if getattr(backbone, "vision_encoder", None) is not None:
        raise UsageError(
            f"{source}: sees pictures, too; its text model is taken from Hugging Face's format only"
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
    gc.collect()  # before the next is read
    return Saying(tokens, logits)


def compare(source: Saying, made: Saying) -> tuple[float, float]:
    """How far what was made is off, and which part of next tokens is the same; see `Converted`.

    Raises:
      UsageError: the tokenizers differ.
    """
    if source.tokens != made.tokens:
        raise UsageError(
            f"the tokenizer was not kept: {source.tokens[:8]}… has become {made.tokens[:8]}…"
        )
    off = np.sqrt(np.mean((source.logits - made.logits) ** 2)) / np.std(source.logits)
    same = np.mean(source.logits.argmax(-1) == made.logits.argmax(-1))
    return float(off), float(same)
