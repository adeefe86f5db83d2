"""`chatflow model convert`: tiny models of transformers' own, against what transformers computes."""

import json

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, get_tensor_name_map, quantize
from gguf.constants import MODEL_ARCH
from tiny import tiny_gemma

from chatflow.cli import main
from chatflow.models.presets import use_jax
from chatflow.weights.folders import SUMS

transformers = pytest.importorskip("transformers")
use_jax()
from chatflow.models.loading import load_engine  # noqa: E402

GENERATIONS = ["gemma", "gemma2", "gemma3"]
LAYERS = 6  # the last is Gemma 3's first that sees all tokens
IDS = [2, *range(20, 40), 7, 300]  # more than the sliding window


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A SentencePiece model."""
    folder = tmp_path_factory.mktemp("pieces")
    tiny_gemma(folder)
    return (folder / "assets" / "tokenizer" / "vocabulary.spm").read_bytes()


def made(generation, scaling=None):
    """A model with random weights, of float32."""
    sizes = {
        "vocab_size": 316, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16,
        "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1,
        "attn_implementation": "eager", "max_position_embeddings": 512,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    }  # fmt: skip
    window = {"sliding_window": 8, "query_pre_attn_scalar": 16}
    if generation == "gemma3":
        rope = {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6, **(scaling or {})},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
        config = transformers.Gemma3TextConfig(**sizes, **window, rope_parameters=rope)
        model = transformers.Gemma3ForCausalLM(config)
    elif generation == "gemma2":
        model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, **window))
    else:
        model = transformers.GemmaForCausalLM(transformers.GemmaConfig(**sizes))
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


def saved(model, folder, pieces):
    """As a repository of the hub has it."""
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(pieces)
    return str(folder)


def as_gguf(model, path, pieces, architecture, kind=GGMLQuantizationType.F32, **fields):
    """As llama.cpp's convert_hf_to_gguf.py writes it; names of tensors are from its own table.

    The model's weights become what a quantised file still holds of them.
    """
    import sentencepiece

    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_name(fields.pop("name", "tiny"))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if architecture != "gemma":
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture == "gemma3":
        rope = config.rope_parameters["full_attention"]
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(writer_scaling())
            writer.add_rope_scaling_factor(rope["factor"])
    for key, value in fields.items():
        writer.add_uint32(f"{architecture}.{key}" if "." not in key else key, value)
    trained = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    ids = range(len(trained))
    types = [
        6 if trained.is_byte(i) else 2 if trained.is_unknown(i) else 3 if trained.is_control(i)
        else 4 if trained.id_to_piece(i) == "\n" else 1
        for i in ids
    ]  # fmt: skip
    writer.add_tokenizer_model("llama")
    writer.add_token_list([trained.id_to_piece(i) for i in ids])
    writer.add_token_scores([trained.get_score(i) for i in ids])
    writer.add_token_types(types)
    names = get_tensor_name_map(MODEL_ARCH[architecture.upper()], LAYERS)
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        own = names.get_name(name, try_suffixes=(".weight",))
        if name.endswith("norm.weight"):
            writer.add_tensor(own, values + 1)
            continue
        held = quantize(values, kind)
        writer.add_tensor(own, held, raw_dtype=kind)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(dequantize(held, kind).reshape(values.shape)))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file,
                  writer.write_tensors_to_file, writer.close):  # fmt: skip
        write()
    return str(path)


def writer_scaling():
    from gguf.constants import RopeScalingType

    return RopeScalingType.LINEAR


def logits(preset):
    """What the engine's model says after each of the tokens."""
    model = load_engine(preset, "float32").forward.model
    ids = np.array([IDS], np.int32)
    return np.asarray(model({"token_ids": ids, "padding_mask": np.ones_like(ids)}))[0]


def theirs(model):
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


def convert(capsys, *arguments):
    capsys.readouterr()
    assert main(["model", "convert", *map(str, arguments), "--summary=json"]) == 0
    said = capsys.readouterr()
    return json.loads(said.out), said.err


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_repository_of_the_hub_becomes_a_preset(generation, pieces, tmp_path, capsys):
    model = made(generation)
    source = saved(model, tmp_path / "source", pieces)
    said, _ = convert(capsys, source, tmp_path / "preset", "--dtype=float32")
    assert said["files"] == 5
    assert (said["checked"], said["same_tokens"]) == (True, 1)
    assert said["logits_off"] < 1e-6
    names = {p.relative_to(tmp_path / "preset").as_posix() for p in tmp_path.glob("preset/**/*.*")}
    assert names == {
        SUMS, "assets/tokenizer/vocabulary.spm", "config.json", "metadata.json",
        "model.weights.h5", "tokenizer.json",
    }  # fmt: skip
    np.testing.assert_allclose(logits(str(tmp_path / "preset")), theirs(model), atol=2e-4)


@pytest.mark.parametrize(
    ("generation", "kind", "scaling"),
    [
        ("gemma", "F32", None),
        ("gemma2", "F32", None),
        ("gemma3", "Q8_0", {"rope_type": "linear", "factor": 8.0}),
    ],
)
def test_a_gguf_file_becomes_a_preset(generation, kind, scaling, pieces, tmp_path, capsys):
    model = made(generation, scaling)
    kind = GGMLQuantizationType[kind]
    source = as_gguf(model, tmp_path / "tiny.gguf", pieces, generation, kind)
    convert(capsys, source, tmp_path / "preset", "--dtype=float32", "--check=false")
    np.testing.assert_allclose(logits(str(tmp_path / "preset")), theirs(model), atol=2e-4)
    kept = (tmp_path / "preset" / "assets" / "tokenizer" / "vocabulary.spm").read_bytes()
    text = "the parcel is late\nsörry"
    assert encoded(kept, text) == encoded(pieces, text)


def encoded(proto, text):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=proto).encode(text)
