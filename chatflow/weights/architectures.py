"""Computes the sizes of Gemma and T5 models from names or configurations; loads no model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from chatflow.errors import UsageError, one_line
from chatflow.weights.presets import TORCH, brought

ATTENTION_BYTES = 1 << 30
"""Limit for the attention scores of one PyTorch call, as float32."""


def rows_at_once(batch: int, heads: int, tokens: int) -> int:
    """Returns how many prompts one PyTorch call takes; at least 1, whatever their length."""
    return max(1, min(batch, ATTENTION_BYTES // (4 * heads * tokens**2)))


class Architecture(NamedTuple):
    """A Gemma's dimensions, from technical reports and published configurations.

    Input and output embeddings are tied.

    Attributes:
      norms: norm scales per layer, in multiples of `hidden`.
      head_norms: whether queries and keys have their own norms (Gemma 3).
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

    @property
    def wide(self) -> int:
        """Returns the parameters that stay float32 in a float16 model; see `EncoderDecoder`."""
        return 0

    def kv_bytes(self, tokens: int, width: int) -> int:
        """Returns the bytes of a row's cache: keys and values of all layers for `tokens` tokens."""
        return 2 * self.layers * self.kv_heads * self.head * width * tokens

    def rows(self, batch: int, tokens: int) -> int:
        """Returns how many prompts of a batch run at once: all."""
        return batch

    def score_bytes(self, tokens: int, width: int) -> int:
        """Returns 0: prompts are read in pieces, so attention scores are small beside the cache."""
        return 0

    def operations(self, read: int, written: int) -> float:
        """Returns the FLOPs: all tokens pass through the layers, written ones also the output."""
        layers = self.parameters - self.embedding
        return 2.0 * ((read + written) * layers + written * self.embedding)


class EncoderDecoder(NamedTuple):
    """A T5's dimensions: https://arxiv.org/abs/1910.10683, and published configurations.

    Attributes:
      layers, decoder_layers: of the encoder and of the decoder.
      newer: T5 1.1, Flan-T5 and UL2: gated feed-forward layers and an untied output.
      buckets: of distances between tokens; each half has a bias per bucket and head.
    """

    layers: int
    decoder_layers: int
    hidden: int
    ffn: int
    heads: int
    head: int
    newer: bool = True
    vocabulary: int = 32_128
    buckets: int = 32

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def attention(self) -> int:
        return 4 * self.hidden * self.head * self.heads

    def half(self, layers: int, attentions: int) -> int:
        ffn = (3 if self.newer else 2) * self.hidden * self.ffn
        layer = attentions * (self.attention + self.hidden) + ffn + self.hidden
        return layers * layer + self.hidden + self.buckets * self.heads

    @property
    def parameters(self) -> int:
        halves = self.half(self.layers, 1) + self.half(self.decoder_layers, 2)
        return halves + (2 if self.newer else 1) * self.embedding

    @property
    def wide(self) -> int:
        """Returns the parameters that transformers keeps in float32 in a float16 model."""
        return (self.layers + self.decoder_layers) * self.ffn * self.hidden

    def kv_bytes(self, tokens: int, width: int) -> int:
        """Returns the bytes of a row's cache for `tokens` tokens, read and written together."""
        return 2 * self.decoder_layers * self.heads * self.head * width * tokens

    def rows(self, batch: int, tokens: int) -> int:
        """Returns how many prompts of a batch run at once, limited by their attention's memory."""
        return rows_at_once(batch, self.heads, tokens)

    def score_bytes(self, tokens: int, width: int) -> int:
        """Returns the bytes of one row's attention while an encoder layer runs, each token to each.

        Measured on transformers 5.23: 2.2 to 2.4 times the scores as float32, 2.0 to 2.5 times as
        bfloat16, because distances and the mask are added to them.
        """
        return 5 * width * self.heads * tokens**2 // 2

    def operations(self, read: int, written: int) -> float:
        """Returns the FLOPs: text read passes the encoder and becomes decoder keys and values."""
        seen = self.decoder_layers * self.attention // 2
        decoder = self.half(self.decoder_layers, 2) - seen + self.embedding
        return 2.0 * (read * (self.half(self.layers, 1) + seen) + written * decoder)


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

T5S: Mapping[str, EncoderDecoder] = {
    "t5-small": EncoderDecoder(6, 6, 512, 2048, 8, 64, False),
    "t5-base": EncoderDecoder(12, 12, 768, 3072, 12, 64, False),
    "t5-large": EncoderDecoder(24, 24, 1024, 4096, 16, 64, False),
    "t5-3b": EncoderDecoder(24, 24, 1024, 16384, 32, 128, False),
    "t5-11b": EncoderDecoder(24, 24, 1024, 65536, 128, 128, False),
    "flan-t5-small": EncoderDecoder(8, 8, 512, 1024, 6, 64),
    "flan-t5-base": EncoderDecoder(12, 12, 768, 2048, 12, 64),
    "flan-t5-large": EncoderDecoder(24, 24, 1024, 2816, 16, 64),
    "flan-t5-xl": EncoderDecoder(24, 24, 2048, 5120, 32, 64),
    "flan-t5-xxl": EncoderDecoder(24, 24, 4096, 10240, 64, 64),
    "flan-ul2": EncoderDecoder(32, 32, 4096, 16384, 16, 256),
}
"""T5 1.1 is as large as Flan-T5, and UL2 as large as Flan-UL2."""

_NAME = re.compile(
    r"(?<![a-z])gemma[-_]?(?P<family>[23]?)(?:[-_](?:text|instruct|it|1\.1))*[-_](?P<size>\d+[bm])"
)

_T5_NAME = re.compile(
    r"(?<![a-z])(?:(?P<newer>flan[-_])?t5(?P<v11>[-_]v1_1)?[-_]"
    r"(?P<size>small|base|large|xl|xxl|3b|11b)|(?P<ul2>ul2))(?![a-z\d])(?P<adapted>-lm-adapt)?"
)


def architecture_of(model: str) -> Architecture | EncoderDecoder:
    """Returns a model's dimensions, from the `config.json` of a local folder or from its name.

    If the name does not tell, reads a folder in Cloud Storage, or asks Hugging Face's hub (for
    `torch:NAME`). Raises `UsageError` if neither tells.
    """
    name = model.removeprefix(TORCH)
    folder = brought(name) or Path(name)
    if (folder / "config.json").is_file():
        return _read(str(folder))
    last = name.lower().rsplit("/", 1)[-1]
    if found := _NAME.search(last):
        key = f"gemma{found['family']}_{found['size']}"
        if key in GEMMAS:
            return GEMMAS[key]
    if found := _T5_NAME.search(last):
        newer = found["newer"] or found["v11"] or found["adapted"] or "xl" in str(found["size"])
        key = "flan-ul2" if found["ul2"] else f"{'flan-' if newer else ''}t5-{found['size']}"
        if key in T5S:
            return T5S[key]
    if "://" in name and not name.startswith(("hf:", "kaggle:")):
        return _read(name)
    if model.startswith(TORCH) and name.removeprefix("hf://").count("/") == 1:
        from chatflow.weights.checkpoints import finder

        if config := finder(name)("config.json"):
            return _read(str(config.parent))
    raise UsageError(
        f"--model={model}: its size is not known; give a folder with a Gemma's or a T5's "
        f"config.json, or a name with one of {', '.join([*GEMMAS, *T5S])} in it"
    )


def _read(folder: str) -> Architecture | EncoderDecoder:
    from apache_beam.io.filesystems import FileSystems

    try:
        with FileSystems.open(FileSystems.join(folder, "config.json")) as file:
            return _from_config(json.loads(file.read()))
    except Exception as error:  # each filesystem raises its own
        raise UsageError(
            f"--model={folder}: no Gemma's or T5's config.json can be read there: {one_line(error)}"
        ) from None


def _from_config(config: Mapping[str, Any]) -> Architecture | EncoderDecoder:
    """Reads a configuration of Hugging Face or Keras."""
    if config.get("model_type") in ("t5", "mt5"):
        return _from_t5(config)
    if "config" in config:
        third = "Gemma3" in config["registered_name"]
        own = config["config"]
        norms = 2 + bool(own.get("use_post_attention_norm")) + bool(own.get("use_post_ffw_norm"))
        # Keras counts both halves of the gated layer, except in Gemma 3.
        ffn = own["intermediate_dim"] // (1 if third else 2)
        names = "num_layers hidden_dim num_query_heads num_key_value_heads head_dim vocabulary_size"
    else:
        if not config["model_type"].startswith("gemma"):
            raise ValueError(f"it is of the kind {config['model_type']}")
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


def _from_t5(config: Mapping[str, Any]) -> EncoderDecoder:
    names = "num_layers d_model d_ff num_heads d_kv vocab_size"
    layers, hidden, ffn, heads, head, vocabulary = (int(config[name]) for name in names.split())
    # transformers 5 writes that every T5's embeddings are tied; the other field has the truth.
    ties = ("tie_word_embeddings", "scale_decoder_outputs")
    return EncoderDecoder(
        layers, int(config.get("num_decoder_layers") or layers), hidden, ffn, heads, head,
        str(config.get("feed_forward_proj")).startswith("gated")
        or any(config.get(name) is False for name in ties),
        vocabulary, int(config.get("relative_attention_num_buckets", 32)),
    )  # fmt: skip
