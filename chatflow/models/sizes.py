"""How large a Gemma is, by its name or its configuration; nothing is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from apache_beam.io.filesystems import FileSystems

from chatflow.errors import UsageError, one_line
from chatflow.models.presets import brought


class Architecture(NamedTuple):
    """What decides a Gemma's size. Embeddings are tied: they are input and output.

    From the models' technical reports and their published configurations.

    Attributes:
      norms: scales of a layer, in multiples of `hidden`.
      head_norms: whether queries and keys have a norm of their own (Gemma 3).
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    norms: int = 4
    head_norms: bool = True

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        attention = self.hidden * self.head * (2 * self.heads + 2 * self.kv_heads)
        norms = self.norms * self.hidden + 2 * self.head * self.head_norms
        layer = attention + 3 * self.hidden * self.ffn + norms
        return self.embedding + self.layers * layer + self.hidden

    def kv_bytes(self, tokens: int, width: int) -> int:
        """A row's cache: keys and values of all layers for so many tokens."""
        return 2 * self.layers * self.kv_heads * self.head * width * tokens


GEMMAS: Mapping[str, Architecture] = {
    "gemma_2b": Architecture(18, 2048, 16384, 8, 1, 256, 256_000, 2, False),
    "gemma_7b": Architecture(28, 3072, 24576, 16, 16, 256, 256_000, 2, False),
    "gemma2_2b": Architecture(26, 2304, 9216, 8, 4, 256, 256_000, 4, False),
    "gemma2_9b": Architecture(42, 3584, 14336, 16, 8, 256, 256_000, 4, False),
    "gemma2_27b": Architecture(46, 4608, 36864, 32, 16, 128, 256_000, 4, False),
    "gemma3_270m": Architecture(18, 640, 2048, 4, 1, 256, 262_144),
    "gemma3_1b": Architecture(26, 1152, 6912, 4, 1, 256, 262_144),
    "gemma3_4b": Architecture(34, 2560, 10240, 8, 4, 256, 262_144),
    "gemma3_12b": Architecture(48, 3840, 15360, 16, 8, 256, 262_144),
    "gemma3_27b": Architecture(62, 5376, 21504, 32, 16, 128, 262_144),
}


_NAME = re.compile(
    r"(?<![a-z])gemma[-_]?(?P<family>[23]?)(?:[-_](?:text|instruct|it|1\.1))*[-_](?P<size>\d+[bm])"
)


def architecture_of(model: str) -> Architecture:
    """From the `config.json` of a folder, or by the name of a preset.

    A folder of Cloud Storage is only read where its name does not tell.

    Raises:
      UsageError: neither tells.
    """
    folder = brought(model) or Path(model)
    if (folder / "config.json").is_file():
        return _read(str(folder))
    if found := _NAME.search(model.lower().rsplit("/", 1)[-1]):
        key = f"gemma{found['family']}_{found['size']}"
        if key in GEMMAS:
            return GEMMAS[key]
    if "://" in model and not model.startswith(("hf:", "kaggle:")):
        return _read(model)
    raise UsageError(
        f"--model={model}: its size is not known; give a folder with a Gemma's config.json, "
        f"or a name with one of {', '.join(GEMMAS)} in it"
    )


def _read(folder: str) -> Architecture:
    try:
        with FileSystems.open(FileSystems.join(folder, "config.json")) as file:
            return _from_config(json.loads(file.read()))
    except Exception as error:  # each filesystem has its own
        raise UsageError(
            f"--model={folder}: no Gemma's config.json can be read there: {one_line(error)}"
        ) from None


def _from_config(config: Mapping[str, Any]) -> Architecture:
    """A configuration of Hugging Face's, or of Keras's."""
    if "config" in config:
        third = "Gemma3" in config["registered_name"]
        own = config["config"]
        norms = 2 + bool(own.get("use_post_attention_norm")) + bool(own.get("use_post_ffw_norm"))
        # Keras counts both halves of the gated layer, but for Gemma 3.
        ffn = own["intermediate_dim"] // (1 if third else 2)
        names = "num_layers hidden_dim num_query_heads num_key_value_heads head_dim vocabulary_size"
    else:
        third = "gemma3" in config["model_type"]
        norms = 2 if config["model_type"] == "gemma" else 4
        own = config.get("text_config", config)
        ffn = own["intermediate_size"]
        names = (
            "num_hidden_layers hidden_size num_attention_heads num_key_value_heads head_dim "
            "vocab_size"
        )
    layers, hidden, heads, kv_heads, head, vocabulary = (int(own[name]) for name in names.split())
    return Architecture(
        layers, hidden, ffn, heads, kv_heads, head, vocabulary, norms, head_norms=third
    )
