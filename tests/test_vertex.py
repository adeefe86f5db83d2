"""Remote models: the real clients of Gemini and Vertex AI against a server that misbehaves."""

import json
from pathlib import Path

import pytest
from conftest import chat
from fakes.vertex import ENDPOINT, FakeVertex

from chatflow.answers import ANALYSIS_SCHEMA
from chatflow.cli import main
from chatflow.errors import UsageError
from chatflow.models import ModelSpec, vertex
from chatflow.models.requests import Answer, Failure, Part, RemoteSettings, Request
from chatflow.models.vertex import VertexModelHandler, classify

MODELS = ["gemini-2.5-flash", ENDPOINT]
ANGRY = '{"sentiment": -1, "summary": "The parcel is late."}'


def say(prompt):
    return "We are sorry that your parcel is late." if "Write an apology" in prompt else ANGRY


@pytest.fixture(scope="module")
def server():
    with FakeVertex(say) as fake:
        yield fake


@pytest.fixture
def fake(server, monkeypatch):
    server.reset()
    monkeypatch.setattr(vertex, "FIRST_PAUSE", 0.01)
    return server


def request(prompt="hello", task="analysis"):
    schema = ANALYSIS_SCHEMA if task == "analysis" else None
    part = Part(field=None, prompt=prompt, max_tokens=9, schema=schema)
    return Request("id", task, "7", "c", (part,))


def ask(fake, model, *requests, **settings):
    defaults = {"project": "p", "location": "us-central1", "api_endpoint": fake.address}
    handler = VertexModelHandler(model, RemoteSettings(**{**defaults, **settings}))
    loaded = handler.load_model()
    return [result.inference for result in handler.run_inference(requests, loaded)]


@pytest.mark.parametrize("model", MODELS)
def test_each_prompt_is_a_call_of_its_own_and_gets_its_own_answer(fake, model):
    fake.answer, prompts = (lambda prompt: prompt.upper()), [f"prompt {i}" for i in range(40)]
    try:
        found = ask(fake, model, *(request(prompt) for prompt in prompts), max_in_flight=8)
    finally:
        fake.answer = say
    assert [answer.text for answer in found] == [prompt.upper() for prompt in prompts]
    assert sorted(call.prompt for call in fake.calls) == sorted(prompts)
    assert (found[0].prompt_tokens, found[0].answer_tokens, found[0].model) == (11, 7, model)


@pytest.mark.parametrize("model", MODELS)
def test_many_calls_are_in_flight_but_never_more_than_are_allowed(fake, model):
    fake.latency = 0.05
    ask(fake, model, *(request(str(i)) for i in range(24)), max_in_flight=6)
    assert 2 <= fake.peak <= 6


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("fault", ["429", "500", "503", "408", "reset", "html"])
def test_a_passing_fault_is_tried_again(fake, model, fault):
    fake.faults = [fault, fault]
    found = ask(fake, model, request())
    assert [type(answer) for answer in found] == [Answer]
    assert len(fake.calls) == 3


@pytest.mark.parametrize("model", MODELS)
def test_a_call_has_a_time_out(fake, model):
    fake.faults = ["hang"]
    (found,) = ask(fake, model, request(), timeout=0.5)
    assert isinstance(found, Answer)
    assert len(fake.calls) == 2
    fake.released.set()


@pytest.mark.parametrize("model", MODELS)
def test_no_call_comes_before_retry_after(fake, model):
    fake.faults, fake.retry_after = ["429"], 1
    ask(fake, model, request())
    first, second = fake.calls
    assert second.at - first.at >= 1


@pytest.mark.parametrize("model", MODELS)
def test_what_fails_for_good_fails_alone_and_is_counted_by_its_status(fake, model):
    fake.poison = "poison"
    good, bad, fine = ask(fake, model, request("a"), request("poison"), request("b"))
    assert (good.text, fine.text) == (ANGRY, ANGRY)
    assert isinstance(bad, Failure)
    assert bad.reason == "http_400"
    assert len(fake.calls) == 3


@pytest.mark.parametrize("model", MODELS)
def test_a_fault_for_ever_ends_after_five_calls(fake, model):
    fake.faults = ["503"] * 99
    (found,) = ask(fake, model, request())
    assert found.reason == "http_503"
    assert "after 5 calls" in found.error
    assert len(fake.calls) == 5


@pytest.mark.parametrize(
    ("model", "fault", "reason", "says"),
    [
        (MODELS[0], "blocked", "no_answer", "SAFETY"),
        (MODELS[0], "empty", "no_answer", "MAX_TOKENS"),
        (MODELS[1], "empty", "bad_response", "no chat completion"),
        (MODELS[1], "malformed", "bad_response", "no chat completion"),
    ],
)
def test_a_reply_without_an_answer_is_a_failure_that_says_why(fake, model, fault, reason, says):
    fake.faults = [fault]
    (found,) = ask(fake, model, request())
    assert found.reason == reason
    assert says in found.error
    assert len(fake.calls) == 1


def test_gemini_is_given_the_schema_for_analyses_alone(fake):
    ask(fake, MODELS[0], request(), request(task="apology"), max_in_flight=1)
    configs = [call.body["generationConfig"] for call in fake.calls]
    assert configs[0]["responseJsonSchema"]["required"] == ["sentiment", "summary"]
    assert configs[0]["temperature"] == 0
    assert "responseJsonSchema" not in configs[1]
    assert {config["maxOutputTokens"] for config in configs} == {9}


def test_a_time_out_and_a_status_in_a_text_are_understood():
    assert classify(TimeoutError()).again
    assert classify(ConnectionResetError()).reason == "connection"
    assert classify(ValueError("Status code:503, response: x")) == ("http_503", True, 0)
    assert not classify(KeyError("x")).again


@pytest.mark.parametrize("model", MODELS)
def test_the_whole_pipeline_runs_on_a_remote_model(fake, model, tmp_path, lines, capsys):
    fake.faults = ["429", "ok", "reset"]
    flags = [
        "--input", lines(*(chat("late!", chat_id=str(i)) for i in range(5))),
        "--output", f"{tmp_path}/out", "--inference=remote", "--model", model,
        "--api_endpoint", fake.address, "--project=p", "--region=us-central1", "--summary=json",
    ]  # fmt: skip
    assert main(["run", *flags]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["analysed"], counts["drafted"], counts["lost"]) == (5, 5, 0)
    assert counts["prompt_tokens"] == 110
    (path,) = counts["files"]["analyses"]
    assert {json.loads(x)["model"] for x in Path(path).read_text().splitlines()} == {model}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gemma3-270m", "give gemini-… or projects/P/locations/L/endpoints/E"),
        ("gemini-2.5-flash", "give --project and --region"),
    ],
)
def test_a_remote_model_is_checked_by_its_name_and_nothing_is_called(name, says):
    with pytest.raises(UsageError) as caught:
        ModelSpec(name, inference="remote")
    assert says in str(caught.value)
    assert ModelSpec(ENDPOINT, inference="remote").model().handler.name == ENDPOINT
