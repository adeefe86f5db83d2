"""`chatflow tune`, and adapters in the pipeline: on tiny Gemmas with random weights."""

import collections
import contextlib
import io
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import FEW_SHOT, ROOT, chat, read
from tiny import tiny_gemma

from chatflow.cli import main
from chatflow.errors import UsageError
from chatflow.evaluation.labels import Label, near_copies, read_labels
from chatflow.evaluation.tuning import divided
from chatflow.models.spec import ModelSpec
from chatflow.options import Options
from chatflow.running.launch import execute

TINY = ("--batch=20", "--dtype=float32", "--max_prompt_tokens=400")
GEMMA = {"dtype": "float32", "max_prompt_tokens": 400}
WORDS = {-1: "late", 0: "parcel", 1: "sorry"}


def chat_of(text, number):
    return json.loads(chat(text, chat_id=str(number)).to_json())


def labelled(count, first=0):
    """Chats whose tone one word says, each with different text, up to 84 of them."""
    rng = random.Random(first)
    others = "the is and it said agent customer".split()
    pairs = list(itertools.combinations_with_replacement(others, 2))
    random.Random(0).shuffle(pairs)
    made = []
    for number in range(first, first + count):
        tone = number % 3 - 1
        words = [WORDS[tone], *pairs[number // 3]]
        rng.shuffle(words)
        made.append({**chat_of(" ".join(words), number), "sentiment": tone})
    return made


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    return tiny_gemma(tmp_path_factory.mktemp("gemma") / "tiny")


def run_tune(*flags):
    """What `chatflow tune` says, as JSON."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["tune", *flags, *TINY, "--summary=json"]) == 0
    return json.loads(said.getvalue())


@pytest.fixture(scope="module")
def tuned(preset, tmp_path_factory):
    """An adapter, what `chatflow tune` said of it, the chats that it learned from, and others."""
    folder = tmp_path_factory.mktemp("tuned")
    for name, chats in (("train", labelled(60)), ("check", labelled(21, 60))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats))
    train, check = f"{folder}/train.jsonl", f"{folder}/check.jsonl"
    adapter = str(folder / "made" / "tone.lora.h5")
    report = run_tune(
        train, f"--model={preset}", f"--validation={check}", f"--output={adapter}",
        "--epochs=14", "--patience=50", "--learning_rate=0.05",
    )  # fmt: skip
    return adapter, report, train, check


def analysed(path, output, model, **options):
    """Analyses by chat, of a run that loses nothing."""
    done = execute(Options(input=path, output=str(output), model=model, **GEMMA, **options), [])
    assert done.lost == 0
    return {found["chat_id"]: found for found in read(output, "analyses")}


@pytest.mark.slow
def test_it_learns_what_one_word_says(tuned):
    _, report, _, _ = tuned
    assert report["after"]["accuracy"]["value"] > report["before"]["accuracy"]["value"] + 0.3
    assert report["difference"]["better"] > report["difference"]["worse"]
    lowest = min(report["checks"], key=lambda check: check["loss"])
    assert report["best_step"] == lowest["step"] > 0
    assert report["checks"][0]["step"] == 0
    assert (report["training"], report["validation"], report["left_out"]) == (60, 21, 0)


@pytest.mark.slow
def test_the_pipeline_answers_as_the_tuner_did_and_writes_as_before(tuned, preset, tmp_path):
    adapter, report, _, path = tuned
    plain = analysed(path, tmp_path / "plain", preset)
    adapted = analysed(path, tmp_path / "adapted", preset, adapter=adapter)
    labels = {label.chat.chat_id: label.sentiment for label in read_labels(path).values()}
    right = sum(found["sentiment"] == labels[key] for key, found in adapted.items())
    assert right / len(labels) == pytest.approx(report["after"]["accuracy"]["value"], abs=1e-3)
    for key, found in adapted.items():
        assert found["tone_scores"] != plain[key]["tone_scores"]
        assert found["analysis_id"] != plain[key]["analysis_id"]
        assert found["summary"] == plain[key]["summary"]
        assert found["model"] == f"{preset}@{adapter}"
        assert plain[key]["model"] == preset


@pytest.mark.slow
def test_an_adapter_of_the_tone_that_comes_as_an_update_changes_the_scoring_alone(
    tuned, preset, tmp_path
):
    adapter, _, _, path = tuned
    given = analysed(path, tmp_path / "given", preset, adapter=adapter)
    pattern = f"{Path(adapter).parent}/*.lora.h5"
    found = analysed(path, tmp_path / "found", preset, model_updates=pattern)
    assert {k: v["tone_scores"] for k, v in found.items()} == {
        k: v["tone_scores"] for k, v in given.items()
    }


@pytest.mark.usefixtures("settled")
@pytest.mark.slow
def test_an_adapter_works_on_weights_of_8_bits(tuned, preset):
    from chatflow.models.gemma.engine import Row, load_engine
    from chatflow.models.gemma.grammar import Text

    row = Row("", "the parcel is late", choices=(" angry", "said"))
    text = Row("", "the parcel is late", text=Text(("\n",)), max_tokens=4)
    plain, adapted = (
        load_engine(preset, "float32", quantization="int8", adapter=adapter).run([row, text])
        for adapter in ("", tuned[0])
    )
    assert plain[0].scores != adapted[0].scores
    assert plain[1].text == adapted[1].text


def test_one_epoch_measures_before_and_after_and_leaves_an_adapter(preset, lines, tmp_path):
    adapter = tmp_path / "short.lora.h5"
    learn, check = lines(*labelled(12)), lines(*labelled(6, 12), name="check.jsonl")
    report = run_tune(
        learn, f"--model={preset}", f"--validation={check}", f"--output={adapter}",
        "--epochs=1",
    )  # fmt: skip
    assert {*report} >= {"before", "after"}
    assert matrices(str(adapter), "lora_kernel_a").size


@pytest.mark.slow
def test_keras_reads_the_adapter(tuned, preset):
    from chatflow.weights.presets import use_jax

    use_jax()
    import keras_hub

    adapter, report, _, _ = tuned
    backbone = keras_hub.models.Backbone.from_preset(preset, dtype="float32")
    backbone.load_lora_weights(adapter)
    assert any(abs(v.numpy()).max() > 0 for v in backbone.weights if "lora_kernel_b" in v.path)
    assert os.path.getsize(adapter) == report["bytes"] < 2_000_000


def matrices(adapter, name):
    """The sizes of an adapter's matrices of that name."""
    found = []
    with h5py.File(adapter) as file:
        file.visititems(
            lambda at, value: found.append(abs(value[()]).sum()) if at.endswith(name) else None
        )
    return np.array(found)


@pytest.mark.slow
def test_tuning_goes_on_from_an_adapter_of_the_same_rank_and_keeps_half_of_it(
    tuned, preset, tmp_path, capsys
):
    adapter, first, train, check = tuned
    flags = [
        train, f"--model={preset}", f"--validation={check}", f"--adapter={adapter}",
        f"--output={tmp_path}/more.lora.h5", "--epochs=1", "--learning_rate=0.00001",
        "--strength=0.5",
    ]  # fmt: skip
    report = run_tune(*flags)
    assert report["before"] == first["after"]
    for name, share in (("lora_kernel_a", 1), ("lora_kernel_b", 0.5)):
        was, left = matrices(adapter, name), matrices(f"{tmp_path}/more.lora.h5", name)
        assert left == pytest.approx(was * share, rel=0.02)
    assert main(["tune", *flags, *TINY, "--rank=8"]) == 2
    assert f"--adapter={adapter}" in capsys.readouterr().err


HEADS = ("--output=x.heads.npz", "--heads=none")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--output=x.h5"], "--output=x.h5: must end in .heads.npz or .lora.h5"),
        (["--output=gs://b/x.lora.h5"], "must be on this machine"),
        (["--strength=2"], "--strength: must be a number, above 0, at most 1; found '2'"),
        (["--epochs=0"], "--epochs: must be a whole number, above 0; found '0'"),
        (["--model=torch:google/t5-small"], "cannot be tuned here"),
        (["--input=x"], "unknown flag --input"),
        (["--apart_from=/none.jsonl"], "cannot be read"),
        (["--adapter=/none.lora.h5"], "--adapter=/none.lora.h5: there is no such file"),
        (["--adapter=x.pt"], "--adapter=x.pt: must be a file whose name ends in .lora.h5"),
        ([*HEADS, "--output=gs://b/x.heads.npz"], "must be on this machine"),
        ([*HEADS, "--choices=topic,mood"], "--choices: 'mood' is not one of tone, toward, "),
        ([*HEADS, "--layers=9,last"], "--layers=9,last: must be numbers"),
        ([*HEADS, f"--prompts={FEW_SHOT}"], "analysis.jinja: has no block reading"),
        ([*HEADS, "--heads=/none.heads.npz"], "--heads=/none.heads.npz: there is no such file"),
    ],
)
def test_a_mistake_is_one_clear_line(flags, said, lines, capsys):
    path = lines(*labelled(6))
    assert main(["tune", path, "--output=x.lora.h5", *flags]) == 2
    assert said in capsys.readouterr().err


def test_an_adapter_is_trained_on_one_file(lines, capsys):
    path = lines(*labelled(6))
    assert main(["tune", path, path, "--output=x.lora.h5"]) == 2
    assert "LABELLED.jsonl: LoRA is trained on one file" in capsys.readouterr().err


def test_chats_that_share_text_with_others_are_not_learned_from(lines, capsys):
    text = "nobody at all has called me back about the leaking washing machine"
    path = lines(*({**chat_of(text, i), "sentiment": i % 3 - 1} for i in range(12)))
    assert main(["tune", path, "--model=gemma3-270m", "--output=x.lora.h5"]) == 2
    assert "0 chats to learn from, and none that is angry or neutral or happy" in (
        capsys.readouterr().err
    )


def test_adapters_are_for_gemma_alone():
    with pytest.raises(UsageError, match="only for Gemma"):
        ModelSpec("gemini-2.5-flash", "remote", adapter="x.lora.h5")
    assert ModelSpec("gemma3-270m", heads="none").result_name == "gemma3-270m"
    assert ModelSpec("gemma3-270m").result_name == "gemma3-270m@support-2"
    assert ModelSpec("gemma3-270m", model_kind="instruct").result_name == "gemma3-270m"


def test_an_adapter_is_in_the_name_of_a_result(preset, tmp_path):
    adapter = str(tmp_path / "x.lora.h5")
    Path(adapter).write_bytes(b"\x89HDF\r\n\x1a\n")
    assert ModelSpec(preset, adapter=adapter).result_name == f"{preset}@{adapter}"
    assert ModelSpec(adapter=adapter).result_name == f"gemma3-270m@{adapter}@support-2"


def test_both_parts_have_each_sentiment():
    labels = [
        Label(tone, "", chat(f"{tone} {number}", chat_id=f"{tone}{number}"))
        for tone, count in zip((-1, 0, 1), (40, 20, 2), strict=True)
        for number in range(count)
    ]
    first, second = divided(labels, 0.1, seed=1)
    assert collections.Counter(label.sentiment for label in second) == {-1: 4, 0: 2, 1: 1}
    assert {id(x) for x in (*first, *second)} == {id(x) for x in labels}
    assert len(first) + len(second) == len(labels)


def made(tmp_path, *flags):
    path = tmp_path / "made.jsonl"
    command = [sys.executable, "tuning/generate.py", "--output", str(path), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.slow
def test_the_written_chats_are_many_and_varied_and_apart_from_those_that_judge(tmp_path):
    training = made(tmp_path, "--variants=1")
    labels = list(read_labels(str(training)).values())
    assert len(labels) >= 3000
    tones = collections.Counter(label.sentiment for label in labels)
    assert max(tones.values()) - min(tones.values()) < 100
    assert len({label.own_text for label in labels}) == len(labels)
    judging = [label.chat for label in read_labels("tuning/eval.jsonl").values()]
    everything = read_labels(str(made(tmp_path, "--variants=1", "--all"))).values()
    assert near_copies(judging, [label.chat for label in everything]) == []
    again = made(tmp_path, "--part=eval").read_text()
    assert again == (ROOT / "tuning" / "eval.jsonl").read_text()
