"""`chatflow model save-state-dict` from and to Cloud Storage, from the hub, and on Vertex AI.

All three are stand-ins on loopback.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fakes import environment
from fakes.dataflow import FakeCloud
from fakes.jobs import FakeJobs
from state_dicts import mistake_of, read, save
from tiny import tiny_t5

from chatflow.cli import _parser, main

BUCKET = "gs://proj-1-chatflow"


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return tiny_t5(tmp_path_factory.mktemp("t5") / "t5", tied=True)


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    names = {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
    with FakeCloud("proj-1-chatflow") as fake, environment({**fake.environment, **names}):
        yield fake


def test_from_and_to_cloud_storage(cloud, t5, tmp_path, capsys):
    for file in ("config.json", "model.safetensors"):
        cloud.put("proj-1-chatflow", f"models/t5/{file}", (Path(t5) / file).read_bytes())
    target = f"{BUCKET}/dicts/t5.pt"
    summary = save(f"{BUCKET}/models/t5", target, capsys=capsys)
    assert cloud.objects("proj-1-chatflow", "dicts/") == ["dicts/t5.pt", "dicts/t5.pt.sha256"]
    content = cloud.staged(target)
    assert hashlib.sha256(content).hexdigest() == summary["sha256"]
    assert cloud.staged(f"{target}.sha256").decode() == f"{summary['sha256']}  t5.pt\n"
    (tmp_path / "t5.pt").write_bytes(content)
    assert len(read(tmp_path / "t5.pt")) == 54
    assert "exists already" in mistake_of(t5, target, capsys)
    save(t5, target, "--overwrite", "--dtype=float32")
    assert len(cloud.staged(target)) > len(content) * 1.8


def test_places_of_cloud_storage_that_are_not_there_are_said(cloud, t5, capsys):
    said = mistake_of(t5, "gs://no-such-bucket/t5.pt", capsys)
    assert "PATH=gs://no-such-bucket/t5.pt cannot be written" in said
    assert "no files in" in mistake_of(f"{BUCKET}/nothing", f"{BUCKET}/n.pt", capsys)
    said = mistake_of("gs://no-such-bucket/t5", f"{BUCKET}/n.pt", capsys)
    assert "gs://no-such-bucket/t5" in said


class Hub:
    """A stand-in for the hub: one model, for who has the token."""

    def __init__(self, folder, token):
        files = Path(folder)
        self.asked = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                self.answer(False)

            def do_GET(self):
                self.answer(True)

            def answer(self, whole):
                hub.asked.append(self.path)
                name = self.path.removeprefix("/acme/tiny-t5/resolve/main/")
                headers, data, status = {}, b"", 200
                if name == self.path:
                    status, headers = 404, {"X-Error-Code": "RepoNotFound"}
                elif self.headers.get("Authorization") != f"Bearer {token}":
                    status, headers = 403, {"X-Error-Code": "GatedRepo"}
                elif not (files / name).is_file():
                    status, headers = 404, {"X-Error-Code": "EntryNotFound"}
                else:
                    data = (files / name).read_bytes()
                    tag = hashlib.sha256(data).hexdigest()
                    headers = {"ETag": f'"{tag}"', "X-Repo-Commit": "1" * 40}
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if whole:
                    self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


def test_from_the_hub(t5, tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    hub = Hub(t5, "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    # As HF_HOME does, which is read when the library is imported.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    said = mistake_of("acme/tiny-t5", tmp_path / "x.pt", capsys)
    assert f"acme/tiny-t5: is gated: accept its licence at {hub.address}/acme/tiny-t5" in said
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    save("acme/tiny-t5", tmp_path / "t5.pt")
    assert len(read(tmp_path / "t5.pt")) == 54
    said = mistake_of("acme/nothing", tmp_path / "x.pt", capsys)
    nowhere = f"acme/nothing: there is no such repository at {hub.address}, nor such a folder here"
    assert nowhere in said
    hub.stop()


@pytest.fixture
def jobs(monkeypatch):
    for name in ("HF_ENDPOINT", "GOOGLE_CLOUD_PROJECT", "GOOGLE_CLOUD_LOCATION"):
        monkeypatch.delenv(name, raising=False)
    with FakeJobs() as fake:
        yield fake


@pytest.fixture
def on_vertex(jobs, cloud):
    place = ["--on=vertex", "--project=p", "--region=us-central1", "--image=docker/chatflow:v1-cpu"]
    return [*place, f"--api_endpoint={jobs.address}"]


def submit(name, path, *flags):
    return main(["model", "save-state-dict", name, path, *flags])


@pytest.mark.slow
def test_the_job_is_the_same_command(jobs, on_vertex, capsys):
    path = f"{BUCKET}/flan-t5-xxl.pt"
    more = ["--service_account=a@p.iam.gserviceaccount.com", f"--staging_bucket={BUCKET}/staging"]
    arguments = [*on_vertex, *more, "--dtype=bfloat16", "--summary=json"]
    jobs.busy = 1
    assert submit("google/flan-t5-xxl", path, *arguments) == 0
    out, shown = capsys.readouterr()
    ((name, job),) = jobs.jobs.items()
    assert name == "projects/p/locations/us-central1/customJobs/1"
    assert json.loads(out) == {"job": name, "state": "JOB_STATE_SUCCEEDED", "path": path}
    for state in ("PENDING", "RUNNING", "SUCCEEDED"):
        assert f"{name}: JOB_STATE_{state}" in shown
    assert job["displayName"] == "save-state-dict google/flan-t5-xxl"
    spec = job["jobSpec"]
    assert spec["serviceAccount"] == "a@p.iam.gserviceaccount.com"
    assert spec["baseOutputDirectory"] == {"outputUriPrefix": f"{BUCKET}/staging"}
    (pool,) = spec["workerPoolSpecs"]
    assert pool["machineSpec"]["machineType"] == "e2-standard-2"
    assert pool["diskSpec"]["bootDiskSizeGb"] == 100
    container = pool["containerSpec"]
    assert (container["imageUri"], container["command"]) == ("docker/chatflow:v1-cpu", ["chatflow"])
    said, rest = _parser().parse_known_args(container["args"])
    assert (said.name, said.path, said.dtype, said.on) == (
        "google/flan-t5-xxl", path, "bfloat16", "here",
    )  # fmt: skip
    assert not rest


def test_machine_and_disk_are_those_that_are_given_or_fit(jobs, on_vertex):
    assert submit("google/flan-ul2", f"{BUCKET}/u.pt", *on_vertex) == 0
    own = ["--machine_type=e2-highmem-4", "--disk_size_gb=300"]
    assert submit("acme/anything", f"{BUCKET}/a.pt", *on_vertex, *own) == 0
    pools = [job["jobSpec"]["workerPoolSpecs"][0] for job in jobs.jobs.values()]
    found = [(p["machineSpec"]["machineType"], p["diskSpec"]["bootDiskSizeGb"]) for p in pools]
    assert found == [("e2-standard-2", 140), ("e2-highmem-4", 300)]


def test_a_job_that_is_not_waited_for(jobs, on_vertex, capsys):
    flags = [*on_vertex, "--no_wait_until_finish"]
    assert submit("google/flan-t5-xl", f"{BUCKET}/xl.pt", *flags) == 0
    ((name, job),) = jobs.jobs.items()
    assert job["state"] == "JOB_STATE_PENDING"
    assert name in capsys.readouterr().out


def test_a_job_that_fails_ends_with_its_error(jobs, on_vertex, capsys):
    jobs.error = "the replica workerpool0-0 exited with a non-zero status of 2"
    assert submit("google/flan-t5-xl", f"{BUCKET}/xl.pt", *on_vertex) == 1
    assert "JOB_STATE_FAILED: the replica workerpool0-0 exited" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "path", "flags", "said"),
    [
        ("google/flan-t5-xl", "here.pt", [], "with --on=vertex, it must be gs://"),
        ("google/flan-t5-xl", "", ["--image="], "--image is missing: chatflow's container image"),
        ("google/flan-t5-xl", "", ["--project="], "--project is missing"),
        ("google/flan-t5-xl", "", ["--region="], "--region is missing"),
        ("google/flan-t5-xl", "", ["--disk_size_gb=50"], "--disk_size_gb=50: must be a number, at"),
        ("google/flan-t5-xl", "", ["--disk_size_gb=big"], "--disk_size_gb=big: must be a number"),
        ("google/flan-t5-xl", "", ["--staging_bucket=b"], "--staging_bucket=b: must be gs://"),
        ("FOLDER", "", [], "is a folder of this machine: copy it to gs://"),
        ("llama", "", [], "or give --machine_type and --disk_size_gb"),
    ],
)
def test_what_is_wrong_with_a_job_is_said(on_vertex, tmp_path, capsys, name, path, flags, said):
    name = str(tmp_path) if name == "FOLDER" else name
    path = path or f"{BUCKET}/xl.pt"
    assert said in mistake_of(name, path, capsys, *on_vertex, *flags)


def test_what_vertex_refuses_is_said(jobs, on_vertex, capsys):
    jobs.refusal = (403, "the caller does not have permission")
    said = mistake_of("google/flan-t5-xl", f"{BUCKET}/xl.pt", capsys, *on_vertex)
    assert "--on=vertex: 403" in said
    assert "the caller does not have permission" in said
