"""How large models are, and which machines hold them; keras_hub states the same sizes."""

import importlib.util
import json

import pytest
from conftest import GEMMA3_1B, mistake, required

from chatflow.cli import main
from chatflow.commands.size import read_machines, size_of
from chatflow.weights.architectures import DECODERS, architecture_of

TABLE = read_machines()


def test_parameters_are_those_that_keras_hub_states():
    if not importlib.util.find_spec("keras_hub"):
        required("keras_hub", "pip install 'chatflow[gemma]'")
    from chatflow.weights.presets import use_jax

    use_jax()
    from keras_hub.models import Gemma3Backbone, GemmaBackbone

    stated = {
        name: preset["metadata"]["params"]
        for kind in (GemmaBackbone, Gemma3Backbone)
        for name, preset in kind.presets.items()
        # Those of four billion and more have eyes, too, unless their name says "text".
        if name.startswith("gemma") and not ("gemma3" in name and name.endswith("b"))
    }
    assert len(stated) > 15
    assert {name: architecture_of(name).parameters for name in stated} == stated


@pytest.mark.parametrize(
    ("name", "gemma"),
    [
        ("gemma3-270m", "gemma3_270m"),
        ("hf://google/gemma-3-1b-it", "gemma3_1b"),
        ("kaggle://keras/gemma2/keras/gemma2_instruct_9b_en", "gemma2_9b"),
        ("gs://bucket/models/gemma-2-27b-it", "gemma2_27b"),
        ("gemma_1.1_instruct_7b_en", "gemma_7b"),
        ("gemma3_instruct_12b_text", "gemma3_12b"),
    ],
)
def test_a_models_name_tells_its_size(name, gemma):
    assert architecture_of(name) == DECODERS[gemma]


def test_a_folders_configuration_tells_its_size(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GEMMA3_1B))
    assert architecture_of(str(tmp_path)) == DECODERS["gemma3_1b"]
    named = tmp_path.rename(tmp_path.with_name("my-gemma-2b-from-a-1b"))
    assert architecture_of(str(named)) == DECODERS["gemma3_1b"]


def test_weights_and_caches_are_counted():
    size = size_of("gemma3_1b", TABLE, dtype="bfloat16", batch=16, prompt_tokens=808)
    assert size.weights_gb == pytest.approx(0.999885952 * 2)
    # Keys and values of 26 layers, one head of 256, two bytes each, 1,000 tokens.
    assert size.kv_mb == pytest.approx(2 * 26 * 256 * 2 * 1000 / 1e6)
    assert size.memory_gb == pytest.approx(1.9998 + 1.5 * 16 * 0.026624 + 1.2, abs=0.001)


@pytest.mark.parametrize(
    ("model", "accelerator", "machine"),
    [
        ("gemma3-270m", "", "n2-standard-2"),
        ("gemma3_1b", "", "n2-standard-4"),
        ("gemma3_4b", "any", "g2-standard-4"),
        ("gemma3_12b", "any", "a2-ultragpu-1g"),
        ("gemma3_4b", "nvidia-a100-80gb", "a2-ultragpu-1g"),
    ],
)
def test_the_smallest_machine_that_fits_is_taken(model, accelerator, machine):
    assert size_of(model, TABLE, accelerator).machine_type == machine


def test_what_was_measured_goes_before_estimates_and_what_is_given_before_both():
    assert size_of("gemma3-270m", TABLE).measured == "measured"
    larger = size_of("gemma3-270m", TABLE, machine_type="n2-standard-4")
    other = size_of("gemma3-270m", TABLE, dtype="bfloat16")
    assert other.measured == "estimated"
    assert (larger.measured, larger.chats_per_second) == ("estimated", pytest.approx(2 * 0.5))
    given = size_of("gemma3_4b", TABLE, "nvidia-l4", chats_per_second=12)
    assert (given.measured, given.chats_per_second) == ("given", 12)


def test_a_fleet_is_as_large_as_it_must_be_and_has_its_price(tmp_path, capsys):
    prices = tmp_path / "prices.toml"
    prices.write_text("""
        dataflow = {vcpu_hour = 0.10, gb_hour = 0.01}
        machine = [{name = "mine", vcpus = 4, memory_gb = 20}]
        accelerator = []
        measured = [{model = "gemma3-270m", vcpus = 4, chats_per_second = 2}]
    """)
    arguments = ["size", "--model", "gemma3-270m", "--prices", str(prices), "--summary", "json"]
    assert main([*arguments, "--chats_per_hour", "10000", "--utilisation", "0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine_type"] == "mine"
    assert found["workers"] == 3  # one handles 2 × 3,600 × 0.5 chats an hour
    assert found["dollars_per_hour"] == 1.8  # 3 × (4 × 0.10 + 20 × 0.01)
    assert found["dollars_per_1000_chats"] == 0.18


def test_the_table_has_all_gemmas_and_says_what_does_not_fit(capsys):
    assert main(["size", "--accelerator", "any"]) == 0
    said = capsys.readouterr().out
    assert all(f"│ {name} " in said or f"--model={name}:" in said for name in DECODERS)
    assert "--model=gemma3_27b: needs" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "gemma3-270m"], "--machine_type=n2-standard-2 --min_ram=6GB"),
        (
            ["--model", "gemma3_4b", "--accelerator", "nvidia-l4"],
            "--accelerator=type:nvidia-l4;count:1;machine_type:g2-standard-4;install-nvidia-driver "
            "--machine_type=n2-standard-2",
        ),
        (["--model", "gemini-2.5-flash", "--inference", "remote"], "--machine_type=n2-standard-2"),
    ],
)
def test_it_prints_the_flags_of_a_run(capsys, arguments, said):
    assert main(["size", *arguments, "--summary", "flags"]) == 0
    assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "llama"], "--model=llama: its size is not known"),
        (
            ["--model", "file:///nowhere"],
            "--model=file:///nowhere: no config.json of a known model",
        ),
        (["--accelerator", "tpu", "--model", "gemma3_1b"], "--accelerator=tpu: not in the table"),
        (["--machine_type", "e2-micro", "--model", "gemma3_1b"], "--machine_type=e2-micro: not in"),
        (["--model", "gemma3_27b", "--accelerator", "any"], "72 GB can be used"),
        (["--chats_per_hour", "0"], "--chats_per_hour"),
        (["--prices", "/nowhere"], "--prices=/nowhere"),
        (["--inference", "remote"], "needs no memory on the workers"),
        (["--nonsense"], "unknown flag --nonsense"),
    ],
)
def test_what_is_wrong_is_said(capsys, arguments, said):
    assert said in mistake(["size", *arguments], {}, capsys)
