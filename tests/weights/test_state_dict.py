"""`chatflow model save-state-dict`: what is in the file, what it took, and what is not left behind.

Models are real ones with random weights, written by transformers; Cloud Storage, the hub and
Vertex AI are stand-ins on loopback.
"""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import mistake
from state_dicts import mistake_of, read, save
from tiny import tiny_t5

from chatflow.cli import main
from chatflow.commands.model import save_state_dict as weights_save

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A T5 as transformers 5 makes it: its output is its input's embedding."""
    return tiny_t5(tmp_path_factory.mktemp("t5") / "t5", tied=True)


@pytest.fixture(scope="module")
def flan(t5, tmp_path_factory):
    """The same as Google's Flan-T5 are on the hub: with a separate output."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("flan") / "flan"
    shutil.copytree(t5, folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(8)
    weights["lm_head.weight"] = torch.randn_like(weights["shared.weight"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["scale_decoder_outputs"]
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return str(folder)


def loaded(folder):
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = json.loads((Path(folder) / "config.json").read_text())
    kind = AutoModelForSeq2SeqLM if config["model_type"] == "t5" else AutoModelForCausalLM
    return kind.from_pretrained(folder).eval()


def edited(folder, to, change):
    """A copy of a model whose weights were changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    change(weights)
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("t5.pt", "float16"), ("t5.pth", "float32"), ("t5.safetensors", "bfloat16")],
)
@pytest.mark.parametrize("kind", ["t5", "flan"])
def test_the_file_is_the_models_state_dict(request, kind, name, dtype, tmp_path, capsys):
    folder = request.getfixturevalue(kind)
    summary = save(folder, tmp_path / "made" / name, f"--dtype={dtype}", capsys=capsys)
    found, model = read(tmp_path / "made" / name), loaded(folder)
    wanted = {key: value.to(getattr(torch, dtype)) for key, value in model.state_dict().items()}
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert summary["bytes"] == (tmp_path / "made" / name).stat().st_size
    assert sorted(os.listdir(tmp_path / "made")) == [name, f"{name}.sha256"]


def test_tied_weights_are_in_the_file_once(t5, flan, tmp_path):
    tied = {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    for folder, same in ((t5, {*tied, "lm_head.weight"}), (flan, tied)):
        save(folder, tmp_path / "tied.pt", "--overwrite")
        found = read(tmp_path / "tied.pt")
        at = found["shared.weight"].data_ptr()
        assert {key for key, value in found.items() if value.data_ptr() == at} == same


def test_the_file_is_a_whole_zip_file_and_its_sum_is_beside_it(t5, tmp_path, capsys):
    summary = save(t5, tmp_path / "t5.pt", capsys=capsys)
    with zipfile.ZipFile(tmp_path / "t5.pt") as archive:
        assert archive.testzip() is None
    sha256 = hashlib.sha256((tmp_path / "t5.pt").read_bytes()).hexdigest()
    assert summary["sha256"] == sha256
    assert (tmp_path / "t5.pt.sha256").read_text() == f"{sha256}  t5.pt\n"


def test_float16_answers_as_float32_does(t5, tmp_path):
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    save(t5, tmp_path / "t5.pt", "--dtype=float16")
    reference = loaded(t5)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(t5)).eval()
    model.load_state_dict(read(tmp_path / "t5.pt"))
    tokens = torch.arange(3, 23).reshape(2, 10)
    with torch.no_grad():
        logits = [m(input_ids=tokens, decoder_input_ids=tokens).logits for m in (reference, model)]
        answers = [m.generate(tokens, do_sample=False, max_length=20) for m in (reference, model)]
    torch.testing.assert_close(*logits, atol=0.05, rtol=0.02)
    assert torch.equal(*answers)


def test_beams_handler_loads_it(t5, tmp_path):
    from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerTensor
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    save(t5, tmp_path / "t5.pt", "--dtype=bfloat16")
    handler = PytorchModelHandlerTensor(
        state_dict_path=str(tmp_path / "t5.pt"),
        model_class=AutoModelForSeq2SeqLM.from_config,
        model_params={"config": AutoConfig.from_pretrained(t5)},
    )
    model = handler.load_model()
    assert torch.equal(model.shared.weight, loaded(t5).shared.weight.bfloat16().float())


@pytest.mark.parametrize("form", ["safetensors", "bin", "one bin", "old bin"])
def test_all_forms_of_checkpoints_give_the_same_file(form, flan, tmp_path):
    """Torch's hold tied weights under each of their names."""
    model = loaded(flan)
    (folder := tmp_path / "model").mkdir()
    shutil.copy(Path(flan) / "config.json", folder)
    if form == "safetensors":
        model.save_pretrained(folder, max_shard_size="20KB")
        shutil.copy(Path(flan) / "config.json", folder)
        assert len(list(folder.glob("*.safetensors"))) > 3
    else:
        state = model.state_dict()
        keys = sorted(state, key=lambda key: "embed_tokens" not in key and "shared" not in key)
        halves = [keys] if form != "bin" else [keys[:20], keys[20:]]
        names = [f"pytorch_model-{i}-of-{len(halves)}.bin" for i in range(len(halves))]
        if len(names) == 1:
            names = ["pytorch_model.bin"]
        for name, half in zip(names, halves, strict=True):
            part = {key: state[key] for key in half}
            torch.save(part, folder / name, _use_new_zipfile_serialization=form != "old bin")
        if len(names) > 1:
            where = {key: name for name, half in zip(names, halves, strict=True) for key in half}
            index = json.dumps({"metadata": {}, "weight_map": where})
            (folder / "pytorch_model.bin.index.json").write_text(index)
    save(folder, tmp_path / "found.pt")
    found, wanted = read(tmp_path / "found.pt"), model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value.half()) for key, value in wanted.items())
    assert found["shared.weight"].data_ptr() == found["decoder.embed_tokens.weight"].data_ptr()


def test_a_decoder_alone_and_integers(tmp_path):
    """A GPT-2 as its checkpoints are: without the head's prefix, and with leftovers."""
    from safetensors.torch import save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_ctx=8))
    model.save_pretrained(tmp_path / "gpt")
    body = {k.removeprefix("transformer."): v for k, v in model.state_dict().items()}
    del body["lm_head.weight"]
    body["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    save_file(body, tmp_path / "gpt" / "model.safetensors")
    save(tmp_path / "gpt", tmp_path / "gpt.pt")
    found = read(tmp_path / "gpt.pt")
    assert found.keys() == model.state_dict().keys()
    assert torch.equal(found["lm_head.weight"], model.transformer.wte.weight.half())


@pytest.mark.slow
@pytest.mark.gemma
def test_the_embedded_gemma(tmp_path, capsys):
    summary = save("gemma3-270m", tmp_path / "gemma.pt", capsys=capsys)
    assert (summary["parameters"], summary["tensors"]) == (268_098_176, 236)
    found = read(tmp_path / "gemma.pt")
    assert found["lm_head.weight"].data_ptr() == found["model.embed_tokens.weight"].data_ptr()


def test_integers_keep_their_type(t5, tmp_path):
    from chatflow.weights.checkpoints import finder
    from chatflow.weights.state_dict import plan

    name = "encoder.final_layer_norm.weight"
    whole = edited(t5, tmp_path / "t5", lambda w: w.update({name: w[name].to(torch.int32)}))
    for path in ("whole.pt", "whole.safetensors"):
        save(whole, tmp_path / path)
        assert read(tmp_path / path)[name].dtype == torch.int32
    assert plan(finder(str(whole)), "t5", "float16").dtypes[name] == torch.int32


def memory(name):
    """Of this process, in bytes; VmHWM is the peak of VmRSS."""
    return 1024 * int(re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])


def converting(folder, path, results):
    """Writes a model as float16; returns by how much the process's memory grew meanwhile."""
    torch.set_num_threads(1)  # the others' threads are not there after a fork
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory("VmRSS")
    assert main(["model", "save-state-dict", folder, path]) == 0
    results.put(memory("VmHWM") - before)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux says it here")
def test_a_large_model_is_never_in_memory(t5, tmp_path):
    """A model of Flan-T5-small's size, 308 MB as float32."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_layers=10, num_heads=8,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100MB")
    (tmp_path / "bin").mkdir()
    shutil.copy(tmp_path / "shards" / "config.json", tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    size = sum(p.numel() for p in model.parameters()) * 4
    assert size > 290e6
    del model
    save(t5, tmp_path / "small.pt")  # all that is imported is there now

    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    for form in ("shards", "bin"):
        path = tmp_path / f"{form}.pt"
        child = fork.Process(target=converting, args=(str(tmp_path / form), str(path), results))
        child.start()
        growth = results.get(timeout=120)
        child.join()
        # The largest tensor is 66 MB of it. Measured: 106 MB of 318.
        assert growth < size / 2.5
        assert path.stat().st_size == pytest.approx(size / 2, rel=0.02)


def large_wo(weights):
    weights["encoder.block.1.layer.1.DenseReluDense.wo.weight"][3, 5] = -70_000.0


def test_a_value_beyond_float16_is_said(t5, tmp_path, capsys):
    large = edited(t5, tmp_path / "t5", large_wo)
    out = tmp_path / "out"
    said = mistake_of(large, out / "t5.pt", capsys)
    assert "encoder.block.1.layer.1.DenseReluDense.wo.weight holds 7e+04" in said
    assert "use --dtype=bfloat16" in said
    assert os.listdir(out) == []
    save(large, out / "t5.pt", "--dtype=bfloat16")
    assert sorted(os.listdir(out)) == ["t5.pt", "t5.pt.sha256"]


def test_what_is_there_is_only_replaced_when_told_to(t5, tmp_path, capsys):
    path = tmp_path / "t5.pt"
    path.write_text("of another")
    assert f"PATH={path} exists already; --overwrite" in mistake_of(t5, path, capsys)
    assert path.read_text() == "of another"
    save(t5, path, "--overwrite")
    assert len(read(path)) == 54
    first = (tmp_path / "t5.pt.sha256").read_text()
    save(t5, path, "--overwrite", "--dtype=float32")
    assert (tmp_path / "t5.pt.sha256").read_text() != first


def cut(weights):
    del weights["encoder.block.0.layer.0.SelfAttention.q.weight"]


def grown(weights):
    weights["encoder.block.9.layer.0.SelfAttention.q.weight"] = torch.zeros(2)


def reshaped(weights):
    weights["encoder.block.0.layer.0.SelfAttention.q.weight"] = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (cut, "the checkpoint lacks encoder.block.0.layer.0.SelfAttention.q.weight, so it is not"),
        (grown, "holds, beside its model's, encoder.block.9.layer.0.SelfAttention.q.weight"),
        (reshaped, "q.weight has the shape (2, 3); by its config.json it is (32, 32)"),
    ],
)
def test_weights_of_another_class_are_said(t5, tmp_path, capsys, change, said):
    other = edited(t5, tmp_path / "t5", change)
    assert said in mistake_of(other, tmp_path / "t5.pt", capsys)
    assert not (tmp_path / "t5.pt").exists()


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"\x08" + b"\0" * 20), "is broken"),
        (lambda f: os.truncate(f / "model.safetensors", 10_000), "model.safetensors is broken"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights there; looked for"),
        (lambda f: (f / "config.json").unlink(), "there is no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "its config.json cannot be used"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model-1.safetensors"}}'
            ),
            "model-1.safetensors is missing, which model.safetensors.index.json names",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text("[]"),
            "model.safetensors.index.json is broken",
        ),
        (
            lambda f: (
                (f / "model.safetensors").unlink(),
                (f / "pytorch_model.bin").write_bytes(b"PK nothing"),
            ),
            "pytorch_model.bin is broken",
        ),
    ],
)
def test_a_broken_checkpoint_is_said(t5, tmp_path, capsys, break_it, said):
    shutil.copytree(t5, tmp_path / "t5")
    break_it(tmp_path / "t5")
    assert said in mistake_of(tmp_path / "t5", tmp_path / "t5.pt", capsys)
    assert not (tmp_path / "t5.pt").exists()


def test_what_is_to_be_installed_is_said(t5, tmp_path, capsys, monkeypatch):
    (path := tmp_path / "t5.pt").touch()
    monkeypatch.setitem(sys.modules, "torch", None)
    said = "needs PyTorch and transformers: pip install 'chatflow[torch]'"
    assert said in mistake_of(t5, tmp_path / "new.pt", capsys)
    assert said in mistake(["model", "info", str(path)], {}, capsys)
    assert main(["model", "info", "google/flan-t5-xl"]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x", "out.bin"], "PATH=out.bin: must end in .pt, .pth, .safetensors"),
        (["./nowhere", "out.pt"], "there is no folder ./nowhere"),
        (["x", "out.pt", "--region=r"], "--region: only with --on=vertex"),
        (["x", "out.pt", "--dtype=int8"], "--dtype"),
        (["x", "s3x://b/out.pt"], "PATH=s3x://b/out.pt cannot be written"),
        (["x", "out.pt", "--nonsense"], "unknown flag --nonsense; see chatflow model save-"),
    ],
)
def test_what_is_wrong_is_said(capsys, arguments, said):
    assert said in mistake(["model", "save-state-dict", *arguments], {}, capsys)


def test_nothing_is_found_under_the_name_until_the_file_is_whole(t5, tmp_path, monkeypatch):
    """Ctrl-C after the first tensor; until then, another name is written to."""
    path, seen, write = tmp_path / "out" / "t5.pt", [], weights_save.write

    def interrupted(planned, part, progress):
        def counted(tensors, size):
            progress(tensors, size)
            if tensors:
                seen.append((part.stat().st_size, path.exists()))
                os.kill(os.getpid(), signal.SIGINT)

        write(planned, part, counted)

    monkeypatch.setattr(weights_save, "write", interrupted)
    assert main(["model", "save-state-dict", t5, str(path)]) == 130
    ((size, found),) = seen
    assert size > 100_000
    assert not found
    assert os.listdir(tmp_path / "out") == []
