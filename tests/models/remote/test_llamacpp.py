"""The real server of llama.cpp, with a real model, behind OpenAI's protocol."""

import json

import pytest
from conftest import chat

from chatflow.cli import main
from chatflow.models.remote.handler import RemoteLanguageModelHandler
from chatflow.models.requests import Part, Request
from chatflow.options import RemoteSettings

pytestmark = pytest.mark.slow

SCHEMA = {
    "type": "object",
    "properties": {"sentiment": {"type": "integer", "enum": [-1, 0, 1]}},
    "required": ["sentiment"],
    "additionalProperties": False,
}


def test_its_answers_have_the_form_of_the_schema_and_their_tokens_are_counted(llama_cpp):
    settings = RemoteSettings(api_endpoint=llama_cpp, max_in_flight=2)
    handler = RemoteLanguageModelHandler("openai:gemma3-270m", settings)
    words = ("My parcel is lost!", "How lovely, thank you!", "When do you open?")
    parts = (
        Part(
            field=None,
            prompt=f"The customer wrote: {text} Answer with JSON: sentiment (-1, 0, 1).",
            max_tokens=32,
            schema=SCHEMA,
        )
        for text in words
    )
    requests = [Request(str(at), "analysis", "7", "c", (part,)) for at, part in enumerate(parts)]
    found = [result.inference for result in handler.run_inference(requests, handler.load_model())]
    assert all(json.loads(answer.text)["sentiment"] in (-1, 0, 1) for answer in found)
    assert all(answer.prompt_tokens > answer.answer_tokens > 0 for answer in found)


def test_a_chat_leaves_as_an_analysis_or_as_a_dead_letter(llama_cpp, lines, tmp_path, capsys):
    main([
        "run", "--input", lines(chat("Late!")), "--output", f"{tmp_path}/out", "--summary=json",
        "--inference=remote", "--model=openai:gemma9", "--api_endpoint", llama_cpp,
    ])  # fmt: skip
    said = capsys.readouterr()
    counts = json.loads(said.out)
    assert counts["analysed"] + counts["dead_letters"] == 1
    assert (counts["lost"], counts["faults"]) == (0, {})
    assert counts["prompt_tokens"] > 0
    assert "gemma9 is not among the models that" in said.err
