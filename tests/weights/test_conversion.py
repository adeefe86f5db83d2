"""`chatflow model convert` of tiny models, against what transformers computes."""

import json

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from conftest import mistake
from fakes.dataflow import FakeCloud
from fakes.hub import FakeHub
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, get_tensor_name_map, quantize
from gguf.constants import MODEL_ARCH, RopeScalingType
from safetensors.numpy import load_file, save_file
from tiny import tiny_gemma

from chatflow.cli import main
from chatflow.models.gemma.grammar import Text
from chatflow.weights.folders import SUMS
from chatflow.weights.presets import use_jax

# chatflow.models.engine is imported when keras has its backend.
use_jax()
from chatflow.models.gemma.engine import Row, load_engine  # noqa: E402

LAYERS = {"gemma": 2, "gemma2": 2, "gemma3": 6}  # the last is the first that sees all tokens
IDS = [2, *range(20, 40), 7, 300]  # more than the sliding window

PRESET = {
    SUMS, "assets/tokenizer/vocabulary.spm", "config.json", "metadata.json", "model.weights.h5",
    "tokenizer.json",
}  # fmt: skip


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
        "num_hidden_layers": LAYERS[generation], "num_attention_heads": 2, "num_key_value_heads": 1,
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


def as_gguf(model, path, pieces, architecture, kind=GGMLQuantizationType.F32, name="tiny"):
    """As llama.cpp's convert_hf_to_gguf.py writes it; names of tensors are from its own table.

    The model's weights become what a quantised file still holds of them.
    """
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_name(name)
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
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
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
    names = get_tensor_name_map(MODEL_ARCH[architecture.upper()], LAYERS[architecture])
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


def logits(preset):
    """What the engine's model says after each of the tokens."""
    engine = load_engine(str(preset), "float32")
    ids = np.array([IDS], np.int32)
    return np.asarray(engine.forward.model({"token_ids": ids, "padding_mask": np.ones_like(ids)}))[
        0
    ]


def theirs(model):
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


def held(folder):
    """Names of all files in a folder, also hidden ones."""
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]


def convert(capsys, *arguments):
    capsys.readouterr()
    assert main(["model", "convert", *map(str, arguments), "--summary=json"]) == 0
    said = capsys.readouterr()
    return json.loads(said.out), said.err


@pytest.mark.slow
def test_weights_of_hugging_face_become_a_preset(pieces, tmp_path, capsys):
    model = made("gemma2")
    source = saved(model, tmp_path / "source", pieces)
    said, _ = convert(capsys, source, tmp_path / "preset", "--dtype=float32")
    assert said["files"] == 5
    assert (said["checked"], said["logits_off"], said["same_tokens"]) == (True, 0, 1)
    assert set(held(tmp_path / "preset")) == PRESET
    np.testing.assert_allclose(logits(tmp_path / "preset"), theirs(model), atol=2e-4)


@pytest.mark.parametrize(
    ("generation", "kind", "scaling"),
    [
        ("gemma", "F32", None),
        ("gemma2", "F32", None),
        ("gemma3", "Q8_0", {"rope_type": "linear", "factor": 8.0}),
    ],
)
@pytest.mark.slow
def test_a_gguf_file_becomes_a_preset(generation, kind, scaling, pieces, tmp_path, capsys):
    model = made(generation, scaling)
    kind = GGMLQuantizationType[kind]
    source = as_gguf(model, tmp_path / "tiny.gguf", pieces, generation, kind)
    convert(capsys, source, tmp_path / "preset", "--dtype=float32", "--check=false")
    np.testing.assert_allclose(logits(tmp_path / "preset"), theirs(model), atol=2e-4)
    kept = (tmp_path / "preset" / "assets" / "tokenizer" / "vocabulary.spm").read_bytes()
    text = "the parcel is late\nsörry"
    assert encoded(kept, text) == encoded(pieces, text)


def encoded(proto, text):
    return sentencepiece.SentencePieceProcessor(model_proto=proto).encode(text)


@pytest.mark.slow
def test_from_the_hub_to_a_bucket_and_the_engine_answers_the_same(
    pieces, tmp_path, capsys, monkeypatch
):
    model = made("gemma2")
    source = saved(model, tmp_path / "source", pieces)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with FakeHub() as hub, FakeCloud("models") as google:
        for name, value in {**google.environment, "HF_ENDPOINT": hub.address}.items():
            monkeypatch.setenv(name, value)
        files = (tmp_path / "source").iterdir()
        hub.repositories["org/tiny-it"] = {path.name: path.read_bytes() for path in files}
        said, warned = convert(
            capsys, "org/tiny-it", "gs://models/tiny-it", "--dtype=float32", "--check=false"
        )
        assert warned.count("warning") == 0
        assert set(google.objects("models")) == {f"tiny-it/{name}" for name in PRESET}
        assert main(["model", "fetch", "gs://models/tiny-it", str(tmp_path / "preset-it")]) == 0
        as_gguf(model, tmp_path / "tiny.gguf", pieces, "gemma2", name="Tiny It")
        google.put("models", "tiny.gguf", (tmp_path / "tiny.gguf").read_bytes())
        said, warned = convert(capsys, "gs://models/tiny.gguf", tmp_path / "g", "--check=false")
        assert "put -it or instruct into the name" in warned
        assert said["dtype"] == "bfloat16"
    rows = [Row("", text, text=Text(), max_tokens=8) for text in ("the parcel is", "sorry")]
    engine, other = (load_engine(str(f), "float32") for f in (tmp_path / "preset-it", source))
    ours = engine.run(rows)
    engine.forward.weights = other.forward.weights  # compiled once
    assert [row.tokens for row in ours] == [row.tokens for row in engine.run(rows)]
    assert min(len(row.tokens) for row in ours) > 1
    assert np.std(logits(tmp_path / "g") - theirs(model)) < 0.05 * np.std(theirs(model))


@pytest.mark.slow
def test_of_a_model_that_sees_the_text_is_taken(pieces, tmp_path, capsys):
    model = made("gemma3")
    text = tmp_path / "text"
    saved(model, text, pieces)
    folder = tmp_path / "source"
    folder.mkdir()
    tensors = {f"language_model.{k}": v for k, v in load_file(text / "model.safetensors").items()}
    tensors["vision_tower.vision_model.post_layernorm.weight"] = np.ones(4, np.float32)
    save_file(tensors, folder / "model.safetensors")
    (folder / "tokenizer.model").write_bytes(pieces)
    own = json.loads((text / "config.json").read_text())
    del own["vocab_size"], own["model_type"]
    config = {"model_type": "gemma3", "text_config": own, "vision_config": {"hidden_size": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    convert(capsys, folder, tmp_path / "preset", "--dtype=float32", "--check=false")
    np.testing.assert_allclose(logits(tmp_path / "preset"), theirs(model), atol=2e-4)


@pytest.mark.slow
def test_what_says_something_else_is_not_kept(pieces, tmp_path, capsys):
    """A weight that float16 does not hold."""
    model = made("gemma")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 1e6
    source = saved(model, tmp_path / "source", pieces)
    arguments = ["model", "convert", source, str(tmp_path / "new" / "preset"), "--dtype=float16"]
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "as float16, logits are off by nan standard deviations, more than 0.01" in error
    assert "nothing was written; try --dtype=float32" in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"split.count": 3}, "is one part of several; merge them with llama-gguf-split --merge"),
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type 'yarn': only linear of gemma3 is known"),
        ({"rope.freq_base": 5000.0}, "rope_theta is 5000; keras_hub has only 10000 for it"),
        ({"tokenizer.ggml.model": "gpt2"}, "has a tokenizer of kind 'gpt2'; only SentencePiece"),
        ({"general.architecture": "llama"}, "holds a 'llama' model; gemma, gemma2 and gemma3"),
        ({"block_count": None}, "tiny.gguf lacks the field gemma.block_count"),
        ({"cut": 0}, "tiny.gguf is not a GGUF file"),
    ],
)
def test_gguf_files_that_cannot_be_converted(fields, said, pieces, tmp_path, capsys):
    path = tmp_path / "tiny.gguf"
    writer = GGUFWriter(path, fields.pop("general.architecture", "gemma"))
    known = {"embedding_length": 32, "feed_forward_length": 64, "context_length": 512,
             "attention.head_count": 2, "attention.key_length": 16, "block_count": 1,
             "attention.layer_norm_rms_epsilon": 1e-6}  # fmt: skip
    known = {f"gemma.{key}": value for key, value in known.items()}
    known["tokenizer.ggml.model"] = "llama"
    cut = fields.pop("cut", None)
    for key, value in fields.items():
        known[key if key.startswith(("split", "tokenizer")) else f"gemma.{key}"] = value
    for key, value in known.items():
        if value is not None:
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](key, value)
    for key in ("tokens", "scores", "token_type"):
        writer.add_array(f"tokenizer.ggml.{key}", ["a"] if key == "tokens" else [1])
    writer.add_tensor("token_embd.weight", np.zeros((1, 32), np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file,
                  writer.write_tensors_to_file, writer.close):  # fmt: skip
        write()
    if cut is not None:
        path.write_bytes(b"GGUF"[cut + 1 :] * 100)
    arguments = ["model", "convert", "FROM", "TO"]
    places = {"FROM": str(path), "TO": str(tmp_path / "preset")}
    assert said in mistake(arguments, places, capsys)
    assert not (tmp_path / "preset").exists()


def test_sources_and_destinations_that_cannot_be_used(pieces, tmp_path, capsys):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text('{"model_type": "gemma2"}')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    for source, destination, said in [
        ("none.gguf", "new", "none.gguf: there is no such file"),
        ("llama", "new", "holds a 'llama' model; Gemma 1, 2 and 3 can be converted"),
        ("pickled", "new", "has no model.safetensors, which keras_hub reads"),
        ("full", "new", "config.json cannot be read"),
        ("llama", "full", "holds other files, such as thesis.txt; name an empty folder"),
    ]:
        places = {"FROM": str(tmp_path / source), "TO": str(tmp_path / destination)}
        assert said in mistake(["model", "convert", "FROM", "TO"], places, capsys)
    error = mistake(["model", "fetch", "no_such_preset", "TO"], places, capsys)
    assert "or the name of a keras_hub preset" in error
    assert not (tmp_path / "new").exists()
    assert held(tmp_path / "full") == ["thesis.txt"]
