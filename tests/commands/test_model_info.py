"""How large T5s are, and what it takes to write, load and run models; Google's sample says more."""

import json

import pytest
from conftest import mistake
from generate import models_tables
from tiny import tiny_t5

from chatflow.cli import main
from chatflow.commands.model.info import MODELS, needs_of
from chatflow.commands.size import read_machines, size_of
from chatflow.weights.architectures import DECODERS, T5S, EncoderDecoder, architecture_of

# Google's sample: https://github.com/GoogleCloudPlatform/python-docs-samples/tree/main/dataflow/
# run-inference. In GB: memory to load, its machine, its disk; memory to run, its machine.
SAMPLE = {
    "google/flan-t5-small": (0.48, 8, 100, 0.32, 8),
    "google/flan-t5-base": (1.5, 8, 100, 1, 8),
    "google/flan-t5-large": (4.8, 8, 100, 3.2, 8),
    "google/flan-t5-xl": (18, 32, 100, 12, 16),
    "google/flan-t5-xxl": (66, 128, 100, 44, 64),
    "google/flan-ul2": (120, 128, 150, 80, 128),
}
TABLE = read_machines()
GB = {row["name"]: row["memory_gb"] for row in TABLE["machine"] + TABLE["save_machine"]}


@pytest.mark.parametrize("name", ["t5-small", "t5-11b", "flan-t5-small", "flan-ul2"])
def test_parameters_are_those_of_transformers(name):
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    shape = T5S[name]
    with torch.device("meta"):
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=shape.vocabulary, d_model=shape.hidden, d_kv=shape.head,
                d_ff=shape.ffn, num_layers=shape.layers, num_heads=shape.heads,
                feed_forward_proj="gated-gelu" if shape.newer else "relu",
            )
        )  # fmt: skip
    # transformers 5 ties the output of each T5 when it makes it, also where a checkpoint has one.
    own = shape.embedding if shape.newer else 0
    assert shape.parameters == sum(p.numel() for p in model.parameters()) + own


def test_parameters_are_those_that_are_published():
    published = {
        "t5-small": 60_506_624, "flan-t5-small": 76_961_152, "flan-t5-base": 247_577_856,
        "flan-t5-large": 783_150_080, "flan-t5-xl": 2_849_757_184, "flan-t5-xxl": 11_135_332_352,
    }  # fmt: skip
    assert {name: T5S[name].parameters for name in published} == published


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("torch:google/flan-t5-xl", "flan-t5-xl"),
        ("torch:google-t5/t5-3b", "t5-3b"),
        ("torch:google/t5-v1_1-small", "flan-t5-small"),
        ("torch:google/t5-base-lm-adapt", "flan-t5-base"),
        ("torch:hf://google/ul2", "flan-ul2"),
        ("gs://bucket/flan-t5-large-of-ours", "flan-t5-large"),
        ("torch:google/gemma-3-1b-it", "gemma3_1b"),
    ],
)
def test_a_models_name_tells_its_size(name, known):
    assert architecture_of(name) == {**T5S, **DECODERS}[known]


def test_a_folders_configuration_tells_its_size(tmp_path):
    config = {
        "model_type": "mt5", "num_layers": 8, "num_decoder_layers": 6, "d_model": 512,
        "d_ff": 1024, "num_heads": 6, "d_kv": 64, "vocab_size": 250112,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert architecture_of(f"torch:{tmp_path}") == EncoderDecoder(
        8, 6, 512, 1024, 6, 64, True, 250112
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_chatflow_size_knows_t5(dtype):
    size = size_of("torch:google/flan-t5-xl", TABLE, dtype=dtype, batch=1, prompt_tokens=808)
    width = 4 if dtype == "float32" else 2
    kept = 2 * 48 * 5120 * 2048 / 1e9 if dtype == "float16" else 0  # as float32 by transformers
    assert size.weights_gb == pytest.approx(2.849757184 * width + kept)
    # Keys and values of 24 layers, 32 heads of 64, 1,000 tokens.
    assert size.kv_mb == pytest.approx(2 * 24 * 32 * 64 * width * 1000 / 1e6)
    scores = 2.5 * width * 32 * 808**2 / 1e9
    memory = size.weights_gb + 1.5 * size.kv_mb / 1e3 + scores + 1.2
    assert size.memory_gb == pytest.approx(memory)


def test_chatflow_size_takes_float16(capsys):
    arguments = ["size", "--model=torch:google/flan-t5-large", "--dtype=float16", "--summary=json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weights_gb"] == pytest.approx(0.78315008 * 2 + 2 * 48 * 2816 * 1024 / 1e9)
    assert found["chats_per_second"] > 0


def test_a_t5_reads_with_one_half_and_writes_with_the_other():
    shape = T5S["flan-t5-base"]
    read, written = shape.operations(1, 0), shape.operations(0, 1)
    assert read + written == 2 * (shape.parameters - shape.embedding)
    assert read < written  # the output's embedding, and attention to both texts


@pytest.mark.parametrize("name", SAMPLE)
def test_no_model_needs_more_than_googles_sample_says(name):
    needs = needs_of(name)
    memory, machine, disk, weights, worker = SAMPLE[name]
    # Its memory to load is both precisions; here it is one tensor and the libraries, so that only
    # models of less than a GB need as much.
    assert needs.save_gb < max(1.5, memory / 4)
    assert GB[needs.save_machine] <= machine
    assert needs.save_disk_gb <= disk
    # Its memory to run is the weights as float32; with float16 they are half of that.
    assert needs.file_gb <= weights * 0.51
    assert GB[needs.run_machine] <= worker
    assert max(needs.load_gb, needs.run_gb) <= GB[needs.run_machine] * 0.9


def test_the_tables_have_all_models(capsys):
    assert main(["model", "info", "--summary=json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["model"] for row in rows] == list(MODELS)
    assert {*SAMPLE, *(n for n, d in DECODERS.items() if not d.total)} == set(MODELS)
    assert main(["model", "info"]) == 0
    said = capsys.readouterr().out
    markdown = models_tables()
    for name in MODELS:
        assert said.count(f"│ {name} ") == 2
        assert markdown.count(f"| `{name}` |") == 2


def test_one_model_of_a_folder_and_its_state_dict(tmp_path, capsys):
    folder = tiny_t5(tmp_path / "t5", tied=True)
    path = str(tmp_path / "tiny.pt")
    assert main(["model", "save-state-dict", folder, path, "--dtype=float32"]) == 0
    capsys.readouterr()
    found = []
    for name in (folder, path):
        assert main(["model", "info", name, "--dtype=float32", "--summary=json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    of_folder, of_file = found
    # By its configuration, the output may be its own; in the file it is the input's.
    embedding = of_folder["parameters"] - of_file["parameters"]
    assert embedding == architecture_of(folder).embedding
    assert of_file["file_gb"] == pytest.approx((tmp_path / "tiny.pt").stat().st_size / 1e9, rel=0.2)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llama", "NAME=llama: its size is not known; give a folder"),
        ("file:///nowhere", "NAME=file:///nowhere: no config.json of a known model"),
        ("nowhere.pt", "NAME=nowhere.pt: there is no such file"),
    ],
)
def test_what_is_wrong_is_said(capsys, name, said):
    assert said in mistake(["model", "info", name], {}, capsys)


def test_another_kind_of_model_is_said(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    said = mistake(["model", "info", str(tmp_path)], {}, capsys)
    assert "the model is a mistral" in said
