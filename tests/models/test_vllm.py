"""vLLM on the workers: Beam's handler starts and watches a stand-in for its server."""

import collections
import dataclasses
import functools
import io
import json
import pickle
import signal
import subprocess
import sys
import threading
import time
import types

import apache_beam as beam
import pytest
from apache_beam.ml.inference import vllm_inference
from apache_beam.utils.multi_process_shared import MultiProcessShared
from conftest import FEW_SHOT, SAMPLES, chat, mistake, read
from fakes import environment
from fakes.vllm import Place
from rich.console import Console

from chatflow import network
from chatflow.cli import main
from chatflow.commands.stream import Run
from chatflow.errors import BadAnswerError, ModelError, UsageError
from chatflow.models.remote.calls import RemoteModel
from chatflow.models.requests import Answer, Failure, Part, Request
from chatflow.models.spec import ModelSpec
from chatflow.models.vllm.client import VllmClient, _scores_of
from chatflow.models.vllm.handler import VllmModelHandler, check, server_arguments
from chatflow.models.vllm.server import GUARD, VllmServer
from chatflow.options import Options, RemoteSettings, WorkerSettings
from chatflow.pipeline import build, plan
from chatflow.prompts.answers import ANALYSIS_SCHEMA
from chatflow.running.launch import check_accelerator, execute, prepare
from chatflow.running.runner import beam_options

NAME = "vllm:google/gemma-3-1b-it"
BASE = "vllm:google/gemma-3-1b-pt"
DATAFLOW = [
    "--runner=DataflowRunner", "--project=p", "--region=us-central1", "--temp_location=gs://b/t",
]  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where the stand-in is installed, and seen; nothing of it is left behind."""
    place = Place(tmp_path)
    for name, value in place.install().items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(tmp_path))
    hurry(monkeypatch)
    yield place
    assert place.all_gone(), "a server is left"


def hurry(monkeypatch):
    """Beam looks every five seconds whether a server is there, with a client that waits, too."""
    often = types.SimpleNamespace(time=time.time, sleep=lambda _: time.sleep(0.1))
    monkeypatch.setattr(vllm_inference, "time", often)
    once = functools.partial(vllm_inference.OpenAI, max_retries=0)
    monkeypatch.setattr(vllm_inference, "OpenAI", once)
    monkeypatch.setattr(network, "FIRST_PAUSE", 0.05)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One server for the tests that only ask it."""
    place = Place(tmp_path_factory.mktemp("vllm"))
    arguments = server_arguments(NAME, WorkerSettings(), 32)
    with environment(place.install()), pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        server = VllmServer("google/gemma-3-1b-it", arguments, instruct=True)
    yield place, server
    server.stop()
    assert place.all_gone()


def request(prompt="hello", **part):
    return Request("id", "analysis", "7", "c", (Part(None, prompt, **{"max_tokens": 9, **part}),))


def ask(server, *requests, instruct=True, **settings):
    settings = RemoteSettings(**settings)
    client = VllmClient("google/gemma-3-1b-it", server, settings, instruct)
    model = RemoteModel(NAME, client, settings)
    found = model.answer(requests)
    model.close()
    return found


def last_body(place):
    return place.calls[-1]["body"]


@pytest.mark.parametrize("instruct", [True, False])
@pytest.mark.parametrize(
    ("spelling", "sent"),
    [
        ("response_format", {
            "response_format": {
                "type": "json_schema", "json_schema": {
                    "name": "answer", "schema": ANALYSIS_SCHEMA, "strict": True,
                },
            }
        }),
        ("structured_outputs", {"structured_outputs": {"json": ANALYSIS_SCHEMA}}),
        ("none", {}),
    ],
)  # fmt: skip
def test_the_schema_is_on_the_wire(shared, instruct, spelling, sent):
    place, server = shared
    asked = request("hello", schema=ANALYSIS_SCHEMA)
    (found,) = ask(server, asked, instruct=instruct, response_format=spelling)
    assert isinstance(found, Answer)
    limits = {"model": "google/gemma-3-1b-it", "max_tokens": 9, "temperature": 0}
    prompt = (
        {"messages": [{"role": "user", "content": "hello"}]} if instruct else {"prompt": "hello"}
    )
    assert last_body(place) == {**limits, **prompt, **sent}
    assert place.calls[-1]["path"] == f"/v1/{'chat/' if instruct else ''}completions"


def test_an_answer_of_no_use_is_asked_for_once_more(shared):
    place, server = shared

    def refuse(text):
        raise BadAnswerError("not_json", "that is no JSON", text)

    (found,) = ask(server, request("hello", check=refuse))
    assert found.repairs == ("asked_again",)
    said = [turn["role"] for turn in last_body(place)["messages"]]
    assert said == ["user", "assistant", "user"]


def test_the_tone_of_a_base_model_is_a_scored_choice(shared):
    place, server = shared
    tones = {"choices": (" angry", " neutral", " happy"), "bias": (0.0, 0.0, 0.0)}
    tones |= {"values": (-1, 0, 1), "field": "sentiment"}
    prompt = "u: my parcel is broken\nTone of u:"
    asked = dataclasses.replace(request(prompt).parts[0], **tones)
    (found,) = ask(server, Request("id", "analysis", "7", "u", (asked,)), instruct=False)
    assert json.loads(found.text) == [-0.1, -5.0, -5.0]
    assert (last_body(place)["max_tokens"], last_body(place)["logprobs"]) == (1, 20)
    (found,) = ask(server, Request("id", "analysis", "7", "u", (asked,)))
    assert json.loads(found.text) == [-0.1, -5.0, -5.0]
    assert last_body(place)["top_logprobs"] == 20
    words = dataclasses.replace(asked, choices=("red", "green"))
    (found,) = ask(server, Request("id", "analysis", "7", "u", (words,)), instruct=False)
    assert found.reason == "no_choice"


def test_a_token_that_begins_several_choices_scores_none_of_them():
    def scored(tops):
        part = Part("sentiment", "Tone:", choices=(" angry", " negative", " neutral"))
        return _scores_of({"choices": [{"logprobs": {"top_logprobs": [tops]}}]}, part)

    tops = {" ne": -0.1, " negative": -3.0, " an": -4.0, " the": -5.0}
    assert json.loads(scored(tops).text) == [-4.0, -3.0, -5.0]
    fault = scored({" ne": -0.1, " the": -5.0})
    assert fault.reason == "no_choice"


def loaded(name=NAME, **remote):
    spec = ModelSpec(name, remote=RemoteSettings(**remote))
    return spec.handler().load_model()


def test_a_base_models_answer_is_put_together_by_code(place):
    spec = ModelSpec(BASE)
    assert (spec.instruct, spec.writes_json) == (False, False)
    options = Options(
        input=str(SAMPLES), output=str(place.folder / "out"), model=BASE, prompts=str(FEW_SHOT)
    )
    planned = plan(options)
    model = planned.routes.specs[0].handler().load_model()
    late = chat("My parcel is broken and nobody answers", chat_id="1")
    question = planned.first.analysis.question(late, "c")
    tone, summary = question.request.parts
    (found,) = model.answer([question.request])
    fields = json.loads(found.text)
    assert fields["sentiment"] == -1
    assert fields["summary"] == "c says that My parcel is broken and nobody answers"
    assert dict(found.tone_scores) == {"angry": -0.1, "neutral": -5.0, "happy": -5.0}
    assert found.prompt_tokens == sum(len(part.prompt.split()) for part in (tone, summary))
    assert [call["path"] for call in place.calls] == ["/v1/completions"] * 2
    assert {tuple(call["body"].get("stop", ())) for call in place.calls} == {(), summary.stop}
    # A constant that is taken off a word counts.
    against = dataclasses.replace(tone, bias=(9.0, 0.0, 0.0))
    biased = dataclasses.replace(question.request, parts=(against, summary))
    (found,) = model.answer([biased])
    assert json.loads(found.text)["sentiment"] == 0
    model.close()


def test_beams_handler_starts_one_server_with_the_flags_of_a_run(place, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):  # which knows nothing of this machine
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "metadata.google.internal")
    worker = WorkerSettings(
        dtype="bfloat16", max_prompt_tokens=500, vllm_args="max-num-seqs=4,enforce_eager"
    )
    model = ModelSpec(NAME, worker=worker).handler().load_model()
    (start,) = place.started
    port = start["argv"][3]
    assert start["argv"] == [
        "--model", "google/gemma-3-1b-it", "--port", port, "--host", "127.0.0.1",
        "--served-model-name", "google/gemma-3-1b-it", "--max-model-len", "2024",
        "--max-num-seqs", "4", "--disable-uvicorn-access-log", "--dtype", "bfloat16",
        "--enforce-eager",
    ]  # fmt: skip
    assert model.answer([request()])[0].model == NAME
    assert model.counts() == {"requests": 1}
    del model  # nobody holds it: its server ends
    assert place.all_gone()


@pytest.mark.slow
def test_a_server_that_crashes_comes_back_and_nothing_is_lost_or_doubled(place):
    place.behave(latency=0.05)
    place.crash("number 33.")
    model = loaded()
    requests = [request(f"number {i}.") for i in range(100)]
    found = model.answer(requests)
    assert [type(each) for each in found] == [Answer] * 100
    counts = model.counts()
    assert counts["faults/connection"] == counts["retries"] > 0
    assert len(place.started) == 2
    (old, _) = ({call["pid"] for call in place.calls} & {s["pid"]} for s in place.started)
    assert old, "the first server had answered some"
    prompts = collections.Counter(c["body"]["messages"][0]["content"] for c in place.calls)
    assert set(prompts) == {f"number {i}." for i in range(100)}
    assert max(prompts.values()) == 1
    model.close()


def test_a_call_that_comes_while_the_server_is_started_again_is_made_again(shared, monkeypatch):
    """It had seen the server, and then had waited for its turn."""
    monkeypatch.setattr(network, "FIRST_PAUSE", 0.05)
    _, server = shared
    port, server._server._server_port = server._server._server_port, -1
    threading.Timer(0.2, setattr, (server._server, "_server_port", port)).start()
    assert isinstance(ask(server, request())[0], Answer)


@pytest.mark.slow
def test_a_server_that_does_not_come_back_fails_what_waits_and_is_tried_again(place):
    model = loaded()
    place.crash("bad")
    place.broken("ValueError: No available memory for the cache blocks.")
    found = model.answer([request("bad"), request("good")])
    assert [each.reason for each in found if isinstance(each, Failure)] == ["no_server"] * 2
    assert "exit code: 1. It last said: ValueError: No available memory" in found[0].error
    assert len(place.started) == 1 + 3  # Beam tries it three times, for both
    place.broken("")
    (found,) = model.answer([request("good")])
    assert isinstance(found, Answer)
    model.close()
    started = len(place.started)
    with pytest.raises(RuntimeError, match="is closed"):
        model.answer([request("good")])
    assert len(place.started) == started


@pytest.mark.slow
def test_a_server_that_never_comes_up_ends_the_run_with_its_last_words(place, lines, capsys):
    place.broken("RuntimeError: No CUDA GPUs are available")
    out = str(place.folder / "out")
    arguments = ["run", f"--input={lines(chat('late!'))}", f"--output={out}", f"--model={NAME}"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert "google/gemma-3-1b-it: Failed to start vLLM server" in said
    assert "exit code: 1. It last said: RuntimeError: No CUDA GPUs are available" in said


def test_without_vllm_in_its_image_a_worker_says_so(place):
    (place.folder / "vllm" / "entrypoints" / "openai" / "api_server.py").unlink()
    with pytest.raises(ModelError, match=r"No module named vllm.entrypoints.openai.api_server"):
        loaded()


@pytest.mark.parametrize("name", [NAME, BASE])
@pytest.mark.slow
def test_chats_in_files_become_analyses_and_drafts(place, name):
    options = Options(input=str(SAMPLES), output=str(place.folder / "out"), model=name)
    flags = ["--direct_num_workers=3", "--direct_running_mode=multi_threading"]
    counts = execute(options, flags).to_dict()
    assert (counts["lost"], counts["dead_letters"]) == (0, 0)
    assert counts["analysed"] == counts["asked"] > 50
    # For a base model drafts are composed, and some chats have nothing to quote.
    flagged = sum(counts["drafts_flagged"].values())
    assert counts["sentiment"]["angry"] == counts["drafted"] + flagged > 5
    assert counts["drafted"] > 0
    assert not flagged or name == BASE
    assert {record["model"] for record in read(options.output, "analyses")} == {name}
    assert len(place.started) == 1  # for both steps and all threads
    assert place.all_gone(), "the run is over"


OWNER = """
import signal, sys, time, types
from apache_beam.ml.inference import vllm_inference
from apache_beam.utils.multi_process_shared import MultiProcessShared
from chatflow.models import ModelSpec

name, tag, folder = sys.argv[1:]
vllm_inference.time = types.SimpleNamespace(time=time.time, sleep=lambda _: time.sleep(0.1))
load = ModelSpec(name).handler().load_model
held = MultiProcessShared(load, tag=tag, path=folder, always_proxy=True).acquire()
print("loaded", flush=True)
signal.pause()
"""


@pytest.mark.slow
def test_processes_of_a_worker_share_a_server_which_ends_with_its_owner(place):
    """As RunInference does it: the first that comes loads, and the others ask that one."""
    where = ("shared", str(place.folder))
    command = [sys.executable, "-c", OWNER, NAME, *where]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "loaded\n"
        tag, folder = where
        model = MultiProcessShared(pytest.fail, tag=tag, path=folder, always_proxy=True).acquire()
        found = model.answer([request(f"number {i}") for i in range(3)])
        assert [type(each) for each in found] == [Answer] * 3
        owner.kill()
    assert len(place.started) == 1
    assert place.all_gone()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children")
def test_a_server_whose_guard_is_killed_ends_and_is_started_again(place):
    arguments = server_arguments(NAME, WorkerSettings(), 32)
    server = VllmServer("google/gemma-3-1b-it", arguments, instruct=True)
    server._server._server_process.kill()
    assert place.all_gone(), "server and engine"
    assert isinstance(ask(server, request())[0], Answer)
    assert len(place.started) == 2
    server.stop()


TOLD_AT_ONCE = """
import os, runpy, signal, subprocess, sys

class Popen(subprocess.Popen):
    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        os.kill(os.getpid(), signal.SIGTERM)

subprocess.Popen = Popen
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_guard_that_is_told_to_end_while_the_command_starts_ends_it():
    command = [sys.executable, "-c", TOLD_AT_ONCE, str(GUARD), "sleep", "60"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as guard:
        assert guard.wait(20) == 128 + signal.SIGTERM  # as the command ended


@pytest.mark.slow
def test_a_stream_survives_a_crash(place, pubsub):
    place.crash("late 3")
    options = pubsub.options(model=NAME, quiet_seconds=0.2)
    with prepare(options, [], Console(file=io.StringIO())) as (planned, pipeline, *_):
        run = Run(pipeline.run())
        with pubsub.inbox() as inbox:
            for i in range(6):
                pubsub.send(chat(f"My parcel is late {i}", chat_id=str(i)))
            inbox.wait(lambda got: len(got.analyses) == 6)
            run.result.drain()
            assert run.ended.wait(60)
    planned.model.forget()
    assert run.error is None
    assert inbox.dead_letters == []
    assert len(inbox.messages) == 6 + len(inbox.drafts)  # none came twice
    assert len(place.started) == 2


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model=vllm:"], "give vllm:ORGANISATION/NAME"),
        (["--model=vllm:gemma"], "give vllm:ORGANISATION/NAME"),
        (["--model=vllm:hf://google/gemma-3-1b-it"], "give vllm:ORGANISATION/NAME"),
        (["--model=vllm:HERE"], "has no config.json"),
        (["--model=vllm:/nowhere/gemma-it"], "there is no such folder here"),
        ([f"--model={NAME}", "--large_model=false"], "--large_model=false: not with"),
        ([f"--model={NAME}", "--model_copies=2"], "--vllm_args=data-parallel-size=2"),
        ([f"--model={NAME}", "--quantization=int8"], "--vllm_args=quantization=fp8"),
        ([f"--model={NAME}", "--vllm_args=2"], "'2' is not a flag of vLLM"),
        ([f"--model={NAME}", "--vllm_args=port=1"], "port is set by chatflow"),
        ([f"--model={NAME}", "--vllm_args=seed=1,seed=2"], "seed is given twice"),
        (["--vllm_args=seed=1"], "--vllm_args: only with --model=vllm:"),
        ([f"--model={NAME}", "--inference=remote"], "with --inference=remote give gemini-"),
        ([f"--model={NAME}", *DATAFLOW], "give e.g. --accelerator=type:nvidia-l4"),
    ],
)  # fmt: skip
def test_mistakes_are_found_at_launch(flags, says, place, lines, capsys):
    places = {"HERE": str(place.folder)}
    output = f"--output={place.folder / 'out'}"
    assert says in mistake(["run", f"--input={lines()}", output, *flags], places, capsys)
    assert place.started == []


@pytest.mark.parametrize(
    ("flags", "accelerator"),
    [
        ([], "type:nvidia-l4;count:1"),
        (["--dataflow_service_options=worker_accelerator=type:nvidia-l4;count:1"], ""),
        (["--experiments=worker_accelerator=type:nvidia-l4;count:1"], ""),
    ],
)
def test_a_gpu_on_dataflow_can_be_asked_for_in_beams_ways_too(flags, accelerator, lines):
    options = Options(input=lines(), output="out", model=NAME, accelerator=accelerator)
    planned = plan(options)
    assert planned.model.hints == ({"accelerator": accelerator} if accelerator else {})
    check_accelerator(planned, beam_options([*DATAFLOW, *flags]))
    without = dataclasses.replace(planned, options=Options(input="x", model=NAME))
    check_accelerator(without, beam_options([]))
    with pytest.raises(UsageError, match="vLLM needs a GPU"):
        check_accelerator(without, beam_options(DATAFLOW))


@pytest.mark.slow
def test_where_it_is_not_installed_the_extra_is_named(lines, tmp_path, capsys):
    flags = [f"--input={lines()}", f"--output={tmp_path / 'out'}", f"--model={NAME}"]
    said = mistake(["run", *flags], {}, capsys)
    assert "vllm is not installed here; pip install 'chatflow[vllm]'" in said


def test_a_job_elsewhere_needs_none_of_it_here(monkeypatch):
    for name in ("openai", "vllm", "apache_beam.ml.inference.vllm_inference"):
        monkeypatch.setitem(sys.modules, name, None)
    handler = pickle.loads(pickle.dumps(ModelSpec(NAME).handler()))
    assert handler.name == NAME
    assert handler.share_model_across_processes()
    assert handler.batch_elements_kwargs()["max_batch_size"] == 256


@pytest.mark.parametrize(
    "name", ["vllm:gs://bucket/gemma-it", "vllm:/models/gemma", "vllm:Qwen/Qwen2.5-7B-Instruct"]
)
def test_names_that_workers_can_load(name):
    check(name, WorkerSettings())
    assert VllmModelHandler(name, True).arguments["served-model-name"] == name[5:]
    with pytest.raises(UsageError):
        check(name.replace("vllm:", "vllm:kaggle://"), WorkerSettings())


def test_the_graph_is_the_same_as_of_other_models(lines, tmp_path):
    options = Options(input=lines(), output=str(tmp_path / "out"), model=NAME)
    pipeline = beam.Pipeline()
    build(pipeline, plan(options))
