"""Servers that speak OpenAI's protocol, and Anthropic's; their faults are in test_remote.py."""

import asyncio
import json

import pytest
from remotes import ANGRY, CLAUDE, GEMINI, OPENAI, is_json, request, settings_of

from chatflow import network
from chatflow.errors import UsageError
from chatflow.models.prices import price_of
from chatflow.models.remote.handler import RemoteLanguageModelHandler, client_of
from chatflow.models.remote.keyed import joined
from chatflow.models.remote.openai import reply_of, thinking_of
from chatflow.models.requests import Answer, Failure
from chatflow.models.spec import ModelSpec
from chatflow.options import RemoteSettings
from chatflow.prompts.answers import ANALYSIS_SCHEMA


@pytest.fixture
def fake(vertex, monkeypatch):
    vertex.brain.answer = lambda prompt: ANGRY
    monkeypatch.setattr(network, "FIRST_PAUSE", 0.02)
    return vertex


def ask(fake, model, *requests, **settings):
    handler = RemoteLanguageModelHandler(model, settings_of(fake, model, **settings))
    return [result.inference for result in handler.run_inference(requests, handler.load_model())]


def checked(fake, model, **settings):
    said = []
    spec = ModelSpec(model, inference="remote", remote=settings_of(fake, model, **settings))
    spec.kind.check_service(spec, local=True, say=said.append)
    return said


def test_a_chat_completion_has_the_schema_and_no_more_than_servers_take(fake):
    ask(fake, OPENAI, request())
    (call,) = fake.brain.calls
    assert (call.path, call.authorization, call.key) == ("/v1/chat/completions", "", "")
    form = {"name": "answer", "schema": ANALYSIS_SCHEMA, "strict": True}
    assert call.body == {
        "model": "small", "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 9, "temperature": 0,
        "response_format": {"type": "json_schema", "json_schema": form},
    }  # fmt: skip


@pytest.mark.parametrize("model", [OPENAI, CLAUDE])
def test_the_key_is_read_where_the_flag_says(fake, model, monkeypatch, tmp_path):
    address = f"{fake.address}/v1"
    monkeypatch.setenv("THE_KEY", "from-the-environment")
    (tmp_path / "key").write_text("from-a-file\n")
    for place in ("env:THE_KEY", f"file:{tmp_path}/key"):
        ask(fake, model, request(), api_key=place, api_endpoint=address)
    keys = [call.key or call.authorization.removeprefix("Bearer ") for call in fake.brain.calls]
    assert keys == ["from-the-environment", "from-a-file"]
    (failed,) = ask(fake, model, request(), api_key="env:NO_SUCH_KEY", api_endpoint=address)
    assert (failed.reason, len(fake.brain.calls)) == ("usage", 2)
    assert "--api_key=env:NO_SUCH_KEY: there is no such variable" in failed.error


def test_a_key_that_was_replaced_is_read_again(fake, tmp_path):
    key = tmp_path / "key"
    key.write_text("old")
    fake.reset(script=["401"])
    settings = settings_of(fake, OPENAI, api_key=f"file:{key}")
    model = RemoteLanguageModelHandler(OPENAI, settings).load_model()
    assert model.answer([request()])[0].reason == "http_401"
    key.write_text("new")
    assert isinstance(model.answer([request()])[0], Answer)
    assert [call.authorization for call in fake.brain.calls] == ["Bearer old", "Bearer new"]


@pytest.mark.parametrize("refused", [["max_tokens"], ["temperature", "response_format"]])
def test_what_a_server_does_not_take_is_left_out_from_then_on(fake, refused):
    fake.reset(refused=refused)
    fake.brain.answer = lambda prompt: ANGRY
    found = ask(fake, OPENAI, *(request(str(i)) for i in range(20)), max_in_flight=8)
    assert [answer.text for answer in found] == [ANGRY] * 20
    assert len(fake.brain.calls) == 20  # refused ones are not among them
    for call in fake.brain.calls:
        assert not set(refused) & set(call.body)
        assert call.body.get("max_completion_tokens" if "max_tokens" in refused else "max_tokens")


def test_a_refusal_that_names_no_field_is_a_failure(fake):
    fake.reset(match={"poison": "400"})
    (found,) = ask(fake, OPENAI, request("poison"))
    assert isinstance(found, Failure)
    assert len(fake.brain.calls) == 1


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("<think>\nIs it -1?\n</think>\n\n-1", "-1"),
        ("Is it -1?</think>-1", "-1"),
        ("[THINK]hm[/THINK]fine", "fine"),
        ("I think </b> so", "I think </b> so"),
    ],
)
def test_thoughts_are_no_part_of_an_answer(said, left):
    content = {"choices": [{"message": {"content": said}, "finish_reason": "stop"}]}
    assert reply_of(content).text == left


def test_thoughts_without_an_answer_are_a_failure_at_the_limit():
    message = {"role": "assistant", "content": "<think>hm, hm"}
    fault = reply_of({"choices": [{"message": message, "finish_reason": "length"}]})
    assert (fault.reason, fault.kind.name) == ("no_answer", "FATAL")


@pytest.mark.parametrize(
    ("model", "setting", "found"),
    [
        ("gpt-4.1-mini", "auto", ({}, 0)),
        ("gpt-5-mini", "auto", ({"reasoning_effort": "low"}, 1024)),
        ("gpt-5-chat-latest", "auto", ({}, 0)),
        ("o4-mini", "none", ({}, 0)),
        ("qwen3:4b", "2000", ({}, 2000)),
        ("openai/gpt-oss-20b", "medium", ({"reasoning_effort": "medium"}, 4096)),
    ],
)
def test_how_much_an_openai_model_thinks(model, setting, found):
    assert thinking_of(model, setting) == found


def test_the_room_for_thoughts_is_beside_that_for_the_answer(fake):
    ask(fake, OPENAI, request(), thinking="2000")
    assert fake.brain.calls[0].body["max_tokens"] == 2009


def test_an_address_keeps_its_path_and_its_query():
    azure = "https://r.openai.azure.com/openai/deployments/d?api-version=2024-10-21"
    assert joined(azure, "chat/completions") == (
        "https://r.openai.azure.com/openai/deployments/d/chat/completions?api-version=2024-10-21"
    )
    assert joined("http://localhost:11434/v1/", "models") == "http://localhost:11434/v1/models"


@pytest.mark.parametrize(
    ("address", "header"),
    [
        ("https://r.openai.azure.com/openai/v1", {"api-key": "k"}),
        ("https://api.example/v1", {"Authorization": "Bearer k"}),
    ],
)
def test_azure_has_a_header_of_its_own(address, header, monkeypatch):
    monkeypatch.setenv("THE_KEY", "k")
    client = client_of(OPENAI, RemoteSettings(api_key="env:THE_KEY", api_endpoint=address))
    assert asyncio.run(client.headers(client.address("models"))) == header


def test_googles_own_route_gets_googles_token(monkeypatch):
    address = (
        "https://europe-west4-aiplatform.googleapis.com/v1/projects/p/locations/l/endpoints/openapi"
    )
    client = client_of("openai:google/gemini-2.5-flash", RemoteSettings(api_endpoint=address))

    class Credentials:
        valid = True

        def apply(self, headers):
            headers["authorization"] = "Bearer a-token"

    client._token._credentials = Credentials()
    assert asyncio.run(client.headers(client.address("models"))) == {
        "authorization": "Bearer a-token"
    }
    elsewhere = "https://evil-aiplatform.googleapis.com.example/v1"
    assert asyncio.run(client.headers(elsewhere)) == {}


def test_claude_at_anthropic_is_asked_for_the_input_of_a_tool(fake, monkeypatch):
    monkeypatch.setenv("THE_KEY", "k")
    settings = {"api_key": "env:THE_KEY", "api_endpoint": f"{fake.address}/v1"}
    (found,) = ask(fake, CLAUDE, request(check=is_json), **settings)
    assert json.loads(found.text) == json.loads(ANGRY)
    (call,) = fake.brain.calls
    assert (call.path, call.key, call.body["model"]) == ("/v1/messages", "k", "small")
    assert call.body["tools"][0]["input_schema"] == ANALYSIS_SCHEMA
    assert call.body["tool_choice"] == {"type": "tool", "name": call.body["tools"][0]["name"]}


def test_claude_on_vertex_ai_is_named_by_the_address(fake):
    ask(fake, CLAUDE, request(task="apology"))
    (call,) = fake.brain.calls
    where = "/v1/projects/p/locations/us-central1/publishers/anthropic/models/small:rawPredict"
    assert call.path == where
    assert call.body["anthropic_version"].startswith("vertex-")
    assert not {"model", "tools"} & set(call.body)


def test_at_launch_a_server_is_asked_what_it_has(fake, monkeypatch):
    monkeypatch.setenv("THE_KEY", "k")
    assert checked(fake, OPENAI) == ["small exists"]
    assert checked(fake, CLAUDE) == ["small exists"]
    own = {"api_key": "env:THE_KEY", "api_endpoint": f"{fake.address}/v1"}
    assert checked(fake, CLAUDE, **own) == ["small exists"]
    (said,) = checked(fake, "openai:tiny", api_endpoint=f"{fake.address}/v1")
    assert said.startswith("warning: tiny is not among the models that http://127.0.0.1")
    assert said.endswith("lists: small, large")
    with pytest.raises(UsageError, match="--api_key=env:NO_SUCH_KEY"):
        checked(fake, OPENAI, api_key="env:NO_SUCH_KEY")


def test_a_flexible_tier_is_asked_for_and_costs_half(fake):
    ask(fake, OPENAI, request(), service_tier="flex")
    assert fake.brain.calls[0].body["service_tier"] == "flex"
    usual, flex = (price_of("openai:gpt-5-mini", tier=tier) for tier in ("standard", "flex"))
    assert flex.of(1_000_000, 1_000_000, 500_000) == usual.of(1_000_000, 1_000_000, 500_000) / 2
    headers = client_of(GEMINI, settings_of(fake, GEMINI, service_tier="flex"))
    options = headers._client._api_client._http_options
    assert options.headers["X-Vertex-AI-LLM-Shared-Request-Type"] == "flex"
