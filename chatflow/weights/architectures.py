"""Computes the sizes of decoders and T5 models from names or configurations; loads no model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from chatflow.errors import UsageError, one_line
from chatflow.weights.families import FAMILIES, family_in
from chatflow.weights.presets import TORCH, brought

ATTENTION_BYTES = 1 << 30
"""Limit for the attention scores of one PyTorch call, as float32."""


def rows_at_once(batch: int, heads: int, tokens: int) -> int:
    """Returns how many prompts one PyTorch call takes; at least 1, whatever their length."""
    return max(1, min(batch, ATTENTION_BYTES // (4 * heads * tokens**2)))


class Architecture(NamedTuple):
    """A decoder's dimensions, from technical reports and published configurations.

    Attributes:
      kv_heads, head: of the cache, in its layers with the most and the largest heads.
      norms: norm scales per layer, in multiples of `hidden`.
      head_norms: whether queries and keys have their own norms (Gemma 3, Qwen 3).
      tied: the output has the weights of the embedding.
      total: all parameters, where the dimensions do not tell (Gemma 3n and 4, which also see and
        hear); 0: they do.
      active: parameters that a token passes through, if not all but the embedding: without each
        layer's own embeddings; 0: all. keras_hub computes every expert.
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
    tied: bool = True
    total: int = 0
    active: int = 0

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        attention = self.hidden * self.head * (2 * self.heads + 2 * self.kv_heads)
        norms = self.norms * self.hidden + 2 * self.head * self.head_norms
        layer = attention + 3 * self.hidden * self.ffn + norms
        embeddings = self.embedding * (1 if self.tied else 2)
        return self.total or embeddings + self.layers * layer + self.hidden

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
        layers = self.active or self.parameters - self.embedding * (1 if self.tied else 2)
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


def _llama(
    layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, head: int, tied: bool = False
) -> Architecture:
    """Returns the dimensions of a Llama 3, or of what is built like one."""
    return Architecture(layers, hidden, ffn, heads, kv_heads, head, 128_256, 2, False, tied)


def _qwen(
    layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, head: int, tied: bool = False
) -> Architecture:
    return Architecture(layers, hidden, ffn, heads, kv_heads, head, 151_936, 2, True, tied)


DECODERS: Mapping[str, Architecture] = {
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
    "gemma3n_e2b": Architecture(
        30, 2048, 8192, 8, 2, 256, 262_400, total=5_439_595_456, active=1_910_000_000
    ),
    "gemma3n_e4b": Architecture(
        35, 2048, 16384, 8, 2, 256, 262_400, total=7_850_135_376, active=3_980_000_000
    ),
    "gemma4_2b": Architecture(
        35, 1536, 6144, 8, 1, 512, 262_144, total=5_100_000_000, active=1_900_000_000
    ),
    "gemma4_4b": Architecture(
        42, 2560, 10240, 8, 2, 512, 262_144, total=7_900_000_000, active=3_800_000_000
    ),
    "gemma4_26b": Architecture(30, 2816, 2112, 16, 8, 512, 262_144, total=26_000_000_000),
    "gemma4_31b": Architecture(60, 5376, 21504, 32, 16, 512, 262_144, total=31_000_000_000),
    "llama3_8b": _llama(32, 4096, 14336, 32, 8, 128),
    "llama3_70b": _llama(80, 8192, 28672, 64, 8, 128),
    "llama3.2_1b": _llama(16, 2048, 8192, 32, 8, 64),
    "llama3.2_3b": _llama(28, 3072, 8192, 24, 8, 128),
    "qwen3_0.6b": _qwen(28, 1024, 3072, 16, 8, 128, tied=True),
    "qwen3_1.7b": _qwen(28, 2048, 6144, 16, 8, 128, tied=True),
    "qwen3_4b": _qwen(36, 2560, 9728, 32, 8, 128, tied=True),
    "qwen3_8b": _qwen(36, 4096, 12288, 32, 8, 128),
    "qwen3_14b": _qwen(40, 5120, 17408, 40, 8, 128),
    "qwen3_32b": _qwen(64, 5120, 25600, 64, 8, 128),
    "smollm3_3b": _llama(36, 2048, 11008, 16, 4, 128, tied=True),
}
"""The `total` of Gemma 4 is rounded, as in keras_hub. There, Llama 3.2 has a separate output; on
Hugging Face it is tied to the embedding."""

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

_OTHER_NAME = re.compile(
    r"(?<![a-z])(?P<family>gemma[-_]?3n|gemma[-_]?4|llama[-_]?3(?P<minor>\.\d)?|qwen[-_]?3|smollm[-_]?3)"
    r"(?:[-_](?:text|instruct|it|guard))*[-_](?P<size>e?\d+(?:\.\d+)?b)(?![a-z\d])"
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
    if (folder / "config.json").is_file() and (found_there := _read(str(folder))):
        return found_there
    last = name.lower().rsplit("/", 1)[-1]
    if found := _NAME.search(last):
        key = f"gemma{found['family']}_{found['size']}"
        if key in DECODERS:
            return DECODERS[key]
    if found := _OTHER_NAME.search(last):
        family = re.sub("[-_]", "", found["family"])
        for start in (family, family.removesuffix(found["minor"] or "")):
            for size in (found["size"], found["size"].removeprefix("e")):
                if f"{start}_{size}" in DECODERS:
                    return DECODERS[f"{start}_{size}"]
    if found := _T5_NAME.search(last):
        newer = found["newer"] or found["v11"] or found["adapted"] or "xl" in str(found["size"])
        key = "flan-ul2" if found["ul2"] else f"{'flan-' if newer else ''}t5-{found['size']}"
        if key in T5S:
            return T5S[key]
    if "://" in name and not name.startswith(("hf:", "kaggle:")) and (there := _read(name)):
        return there
    if model.startswith(TORCH) and name.removeprefix("hf://").count("/") == 1:
        from chatflow.weights.checkpoints import finder

        if (config := finder(name)("config.json")) and (there := _read(str(config.parent))):
            return there
    raise UsageError(
        f"--model={model}: its size is not known; give a folder with the config.json of a "
        "decoder that runs here or of a T5, or a name with one of "
        f"{', '.join([*DECODERS, *T5S])} in it"
    )


def _read(folder: str) -> Architecture | EncoderDecoder | None:
    from apache_beam.io.filesystems import FileSystems

    try:
        with FileSystems.open(FileSystems.join(folder, "config.json")) as file:
            return _from_config(json.loads(file.read()))
    except Exception as error:  # each filesystem raises its own
        raise UsageError(
            f"--model={folder}: no config.json of a known model can be read there: "
            f"{one_line(error)}"
        ) from None


def _from_config(config: Mapping[str, Any]) -> Architecture | EncoderDecoder | None:
    """Reads a configuration of Hugging Face or Keras; None if the name tells more."""
    if config.get("model_type") in ("t5", "mt5"):
        return _from_t5(config)
    family = family_in(config).name
    keras = "config" in config
    if keras and family in ("Gemma3n", "Gemma4"):
        return _counted(config, family)
    if family in ("Gemma3n", "Gemma4"):
        return None  # its name tells
    own = config["config"] if keras else config.get("text_config", config)
    names = _KERAS_NAMES if keras else _NAMES
    if keras and family == "SmolLM3":
        names = names.replace("num_query_heads", "num_attention_heads")
    layers, hidden, ffn, heads, kv_heads, vocabulary = (int(own[name]) for name in names.split())
    head = int(own.get("head_dim") or hidden // heads)
    norms, tied = 2, True
    if family in ("Gemma", "Gemma3") and keras:
        ffn //= 2 if family == "Gemma" else 1  # where Keras counts both halves of the gated layer
        norms += bool(own.get("use_post_attention_norm")) + bool(own.get("use_post_ffw_norm"))
    elif family == "Gemma3" or config.get("model_type") == "gemma2":
        norms = 4
    elif family in ("Llama3", "Qwen3"):
        tied = bool(own.get("tie_word_embeddings", family == "Qwen3" and keras))
    head_norms = family in ("Gemma3", "Qwen3")
    return Architecture(
        layers, hidden, ffn, heads, kv_heads, head, vocabulary, norms, head_norms, tied
    )


_KERAS_NAMES = (
    "num_layers hidden_dim intermediate_dim num_query_heads num_key_value_heads vocabulary_size"
)
_NAMES = (
    "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads "
    "vocab_size"
)


def _counted(config: Mapping[str, Any], family: str) -> Architecture:
    """Returns the dimensions of a Keras preset by building its model, without values."""
    import math

    from chatflow.weights.presets import use_jax

    use_jax()
    import keras
    import keras_hub  # noqa: F401 (its classes are in the configuration)

    with keras.StatelessScope():  # variables have shapes, and no values yet
        backbone = keras.saving.deserialize_keras_object(config)
        sizes = {id(v): (v.path, math.prod(v.shape)) for v in backbone.variables}
    size = FAMILIES[family].sizes(backbone)
    idle = ("per_layer_token_embedding", "embed_tokens_per_layer", "vision", "audio")
    passed = sum(n for path, n in sizes.values() if not any(word in path for word in idle))
    return Architecture(
        size.layers, size.hidden, 0, 0, size.kv_heads, size.head, size.vocabulary,
        total=sum(n for _, n in sizes.values()), active=passed - size.vocabulary * size.hidden,
    )  # fmt: skip


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
