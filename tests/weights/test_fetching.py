"""`chatflow model fetch`, from a stand-in for Hugging Face's hub and to Cloud Storage."""

import hashlib
import json
import shutil
import socket
from types import SimpleNamespace

import pytest
from conftest import mistake
from fakes.dataflow import FakeCloud
from fakes.hub import FakeHub

from chatflow.cli import main
from chatflow.weights.folders import SUMS, Folder
from chatflow.weights.hubs import needed

WEIGHTS = bytes(range(256)) * 4096  # 1 MB
MODEL = {
    "config.json": b'{"model_type": "gemma3_text"}',
    "generation_config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}",
    "tokenizer.model": b"pieces",
    "LICENSE": b"terms",
}
OTHERS = {
    "README.md": b"# A model",
    ".gitattributes": b"",
    "pytorch_model.bin": b"pickled",
    "flax_model.msgpack": b"flax",
    "tf_model.h5": b"tf",
    "onnx/model.onnx": b"onnx",
    "model-Q4_0.gguf": b"GGUF",
    "runs/config.json": b"{}",
}


@pytest.fixture(scope="module")
def the_hub():
    with FakeHub() as fake:
        yield fake


@pytest.fixture
def hub(the_hub, monkeypatch, tmp_path):
    the_hub.reset()
    the_hub.repositories["org/tiny"] = {**MODEL, **OTHERS}
    monkeypatch.setenv("HF_ENDPOINT", the_hub.address)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return the_hub


@pytest.fixture(scope="module")
def google():
    with FakeCloud("models") as fake, pytest.MonkeyPatch.context() as patch:
        for name, value in fake.environment.items():
            patch.setenv(name, value)
        yield fake


def fetch(source, destination, capsys):
    """What the command says of itself."""
    capsys.readouterr()
    assert main(["model", "fetch", source, str(destination), "--summary=json"]) == 0
    return json.loads(capsys.readouterr().out)


def held(folder):
    """Names and contents of a folder; its list of hashes is right and takes no file out."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    if SUMS in files:
        sums = json.loads(files.pop(SUMS))
        assert sums == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return files


def test_only_what_loading_needs_is_fetched(hub, tmp_path, capsys):
    said = fetch("hf://org/tiny", tmp_path / "m", capsys)
    assert held(tmp_path / "m") == MODEL
    size = sum(map(len, MODEL.values()))
    sums = hashlib.sha256((tmp_path / "m" / SUMS).read_bytes()).hexdigest()
    assert said.pop("seconds") > 0
    assert said == {
        "source": "hf://org/tiny", "destination": str(tmp_path / "m"), "files": 6,
        "bytes": size, "new_bytes": size, "sums_sha256": sums,
    }  # fmt: skip
    assert sorted(hub.fetched()) == sorted(MODEL)


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["pytorch_model.bin", "flax_model.msgpack"], ["pytorch_model.bin"]),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
             "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
             "model.safetensors.index.json"],
        ),
        (
            ["assets/tokenizer/vocabulary.spm", "config.json", "metadata.json", "model.weights.h5",
             "preprocessor.json", "task.json", "tokenizer.json", "README.md", SUMS],
            ["assets/tokenizer/vocabulary.spm", "config.json", "metadata.json", "model.weights.h5",
             "preprocessor.json", "task.json", "tokenizer.json"],
        ),
        (["spiece.model", "model.safetensors", "training_args.bin"],
         ["model.safetensors", "spiece.model"]),
    ],
)  # fmt: skip
def test_one_format_of_the_weights_is_taken(names, taken):
    assert needed(names, "x") == taken


def test_a_second_run_takes_what_is_there_with_the_right_hash(hub, tmp_path, capsys):
    first = fetch("org/tiny", tmp_path / "m", capsys)
    hub.asked.clear()
    written = (tmp_path / "m" / SUMS).stat()
    again = fetch("org/tiny", tmp_path / "m", capsys)
    kept = (tmp_path / "m" / SUMS).stat()
    assert (kept.st_ino, kept.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    assert (again["new_bytes"], again["sums_sha256"]) == (0, first["sums_sha256"])
    assert hub.asked == []
    (tmp_path / "m" / "model.safetensors").write_bytes(bytes(len(WEIGHTS)))
    (tmp_path / "m" / "config.json").write_bytes(b"x" * len(MODEL["config.json"]))
    (tmp_path / "m" / "tokenizer.model").unlink()
    fetch("org/tiny", tmp_path / "m", capsys)
    assert hub.fetched() == ["config.json", "model.safetensors", "tokenizer.model"]
    assert held(tmp_path / "m") == MODEL


def test_what_the_source_no_longer_has_goes(hub, tmp_path, capsys):
    fetch("org/tiny", tmp_path / "m", capsys)
    del hub.repositories["org/tiny"]["generation_config.json"]
    fetch("org/tiny", tmp_path / "m", capsys)
    assert held(tmp_path / "m") == {k: v for k, v in MODEL.items() if k != "generation_config.json"}


def test_a_connection_that_is_cut_is_taken_up_again(hub, tmp_path, capsys, monkeypatch):
    """From where it was; the library keeps parts of 10 MB, here of 64 kB."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)
    hub.cuts["model.safetensors"] = 300_000
    fetch("org/tiny", tmp_path / "m", capsys)
    assert held(tmp_path / "m") == MODEL
    ranges = [part for name, part in hub.asked if name == "model.safetensors"]
    assert ranges == ["", f"bytes={4 << 16}-"]


def test_what_was_whole_when_a_run_ended_is_kept(hub, tmp_path, capsys):
    """And nobody can take the folder for whole."""
    hub.refused.add("model.safetensors")
    assert main(["model", "fetch", "org/tiny", str(tmp_path / "m")]) == 2
    before = held(tmp_path / "m")
    assert before.keys() == {"LICENSE", "config.json", "generation_config.json"}
    assert not (tmp_path / "m" / SUMS).exists()
    hub.reset()
    hub.repositories["org/tiny"] = MODEL
    fetch("org/tiny", tmp_path / "m", capsys)
    assert sorted(hub.fetched()) == sorted(MODEL.keys() - before.keys())
    assert held(tmp_path / "m") == MODEL


def test_another_content_than_the_hub_says_is_refused(hub, tmp_path, capsys):
    for name, said in (
        ("tokenizer.json", ", which is not what its source says"),
        ("model.safetensors", f", not {hashlib.sha256(WEIGHTS).hexdigest()}"),
    ):
        hub.broken = {name}
        folder = tmp_path / name
        error = mistake(["model", "fetch", "org/tiny", "TO"], {"TO": str(folder)}, capsys)
        assert f"{name} came with the SHA-256 " in error
        assert said in error
        assert not {name, SUMS} & {path.name for path in folder.rglob("*")}
        hub.broken = set()
        fetch("org/tiny", folder, capsys)
        assert held(folder) == MODEL


def test_a_gated_repository_is_for_those_with_a_token(hub, tmp_path, capsys, monkeypatch):
    hub.gated.add("org/tiny")
    for token in ("", "hf_another"):
        monkeypatch.setenv("HF_TOKEN", token)
        error = mistake(["model", "fetch", "org/tiny", "TO"], {"TO": str(tmp_path / "m")}, capsys)
        assert f"org/tiny: is gated: accept its licence at {hub.address}/org/tiny" in error
        assert "set HF_TOKEN" in error
    monkeypatch.setenv("HF_TOKEN", hub.token)
    fetch("org/tiny", tmp_path / "m", capsys)
    assert held(tmp_path / "m") == MODEL


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("hf://org/none", "there is no such repository at http://127.0.0.1"),
        ("org/none", ", nor such a folder here; if it is private or gated, accept its licence"),
        ("org/tiny@v9", "there is no revision 'v9'"),
        ("hf://a/b/c", "is not a repository's name; give hf://ORG/NAME"),
        ("org/empty", "has no weights that can be loaded"),
        ("./nowhere", "there is no such folder; give gemma3-270m"),
        ("EMPTY", "there is no such folder, or it is empty"),
    ],
)
def test_a_source_that_cannot_be_fetched(hub, tmp_path, capsys, source, said):
    hub.repositories["org/empty"] = {**OTHERS, "pytorch_model.bin.index.json": b""}
    del hub.repositories["org/empty"]["pytorch_model.bin"]
    (tmp_path / "empty").mkdir()
    places = {"TO": str(tmp_path / "m"), "EMPTY": str(tmp_path / "empty")}
    assert said in mistake(["model", "fetch", source, "TO"], places, capsys)
    assert not (tmp_path / "m").exists()


def test_a_hub_that_is_not_there(hub, tmp_path, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", closed)
    error = mistake(["model", "fetch", "org/tiny", "TO"], {"TO": str(tmp_path / "m")}, capsys)
    assert f"cannot be fetched from {closed}: ConnectError" in error


def test_a_disk_without_room(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**5))
    error = mistake(["model", "fetch", "org/tiny", "TO"], {"TO": str(tmp_path / "m")}, capsys)
    assert "m: 0.001 GB are needed, 0.000 GB are free; make room" in error
    assert (hub.asked, held(tmp_path / "m")) == ([], {})


def test_a_folder_with_other_files_is_left_alone(hub, tmp_path, capsys):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.txt").write_text("years of work")
    error = mistake(["model", "fetch", "org/tiny", "TO"], {"TO": str(tmp_path / "m")}, capsys)
    assert "holds other files, such as thesis.txt" in error
    assert held(tmp_path / "m") == {"thesis.txt": b"years of work"}


def test_a_name_that_hides_what_the_model_is(hub, tmp_path, capsys):
    hub.repositories["org/tiny-it"] = MODEL
    for name, warned in (("m", True), ("m-it", False)):
        assert main(["model", "fetch", "org/tiny-it@main", str(tmp_path / name)]) == 0
        said = capsys.readouterr().err
        assert ("was tuned to follow instructions" in said) is warned
        assert f"fetched {tmp_path / name} in " in said


@pytest.mark.slow
def test_a_model_of_kaggles_by_its_librarys_cache(tmp_path, capsys, monkeypatch):
    """What was downloaded before is asked of nobody."""
    kept = tmp_path / "kaggle" / "models" / "org" / "tiny" / "keras" / "tiny_en"
    (kept / "1").mkdir(parents=True)
    (kept / "1.complete").touch()
    for name in ("config.json", "model.weights.h5", "README.md"):
        (kept / "1" / name).write_text(name)
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kaggle"))
    fetch("kaggle://org/tiny/keras/tiny_en/1", tmp_path / "m", capsys)
    assert held(tmp_path / "m").keys() == {"config.json", "model.weights.h5"}
    assert held(kept / "1").keys() == {"config.json", "model.weights.h5", "README.md"}
    error = mistake(["model", "fetch", "kaggle://tiny", "TO"], {"TO": "m"}, capsys)
    assert "kaggle://tiny: cannot be fetched: ValueError: Invalid model handle" in error


@pytest.mark.slow
def test_by_way_of_a_bucket(hub, google, tmp_path, capsys):
    said = fetch("org/tiny", "gs://models/by/tiny", capsys)
    names = {f"by/tiny/{name}" for name in (*MODEL, SUMS)}
    assert set(google.objects("models", "by/")) == names
    hub.asked.clear()
    assert fetch("org/tiny", "gs://models/by/tiny/", capsys)["new_bytes"] == 0
    assert hub.asked == []
    back = fetch("gs://models/by/tiny", tmp_path / "m", capsys)
    assert back["sums_sha256"] == said["sums_sha256"]
    assert held(tmp_path / "m") == MODEL
    assert not Folder("gs://models/by/tiny").staging.exists()

    google.put("models", "by/tiny/model.safetensors", bytes(len(WEIGHTS)))
    (tmp_path / "m" / "model.safetensors").unlink()
    arguments = ["model", "fetch", "gs://models/by/tiny", "TO"]
    error = mistake(arguments, {"TO": str(tmp_path / "m")}, capsys)
    assert "model.safetensors came with the SHA-256 " in error
    assert not (tmp_path / "m" / SUMS).exists()
