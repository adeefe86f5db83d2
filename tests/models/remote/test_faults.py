"""What clients raise under faults, and what the one table makes of it, for each kind of service."""

import asyncio
import datetime
import email.utils

import aiohttp
import google.auth.exceptions
import pytest
from fakes.vertex import ENDPOINTS
from google.api_core import exceptions as api_core
from remotes import GEMINI, MODELS, request, settings_of

from chatflow.errors import ModelError, UsageError
from chatflow.models.remote.clients import Reply, Turn
from chatflow.models.remote.faults import HttpError, Kind, MalformedReplyError, classify
from chatflow.models.remote.handler import client_of
from chatflow.models.remote.vertex import look_up

BUSY, PASSING, MALFORMED, FATAL = Kind.BUSY, Kind.PASSING, Kind.MALFORMED, Kind.FATAL

TABLE = {
    "400": (FATAL, "http_400"),
    "401": (FATAL, "http_401"),
    "403": (FATAL, "http_403"),
    "404": (FATAL, "http_404"),
    "408": (PASSING, "http_408"),
    "429": (BUSY, "http_429"),
    "500": (PASSING, "http_500"),
    "502": (PASSING, "http_502"),
    "503": (BUSY, "http_503"),
    "504": (PASSING, "http_504"),
    "html": (PASSING, "http_502"),
    "reset": (PASSING, "connection"),
    "hang": (PASSING, "timeout"),
    "slow_body": (PASSING, "timeout"),
    "cut_body": (MALFORMED, "cut_body"),
    "malformed": (MALFORMED, "malformed"),
    "safety": (FATAL, "blocked"),
}


def fault_of(fake, model, **settings):
    """What one call ends with, as the remote model sees it."""

    async def call():
        client = client_of(model, settings_of(fake, model, **settings))
        try:
            async with asyncio.timeout(settings.get("timeout", 20)):
                (part,) = request().parts
                return await client.ask([Turn("user", "hello")], part)
        except Exception as error:
            return classify(error)
        finally:
            await client.close()

    return asyncio.run(call())


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("fault", TABLE)
def test_a_fault_means_the_same_whichever_the_service(vertex, model, fault):
    vertex.reset(script=[fault], retry_after=7)
    found = fault_of(vertex, model, request_timeout=0.5 if fault in ("hang", "slow_body") else 20)
    assert (found.kind, found.reason) == TABLE[fault]
    assert found.wait == (7 if fault in ("429", "503") else 0)
    assert found.error


@pytest.mark.parametrize("model", MODELS)
def test_a_reply_with_no_answer_in_it_is_malformed(vertex, model):
    for fault in ("empty", "fewer"):
        vertex.reset(script=[fault])
        assert fault_of(vertex, model).kind is MALFORMED


@pytest.mark.parametrize("model", MODELS)
def test_an_answer_without_text_is_worth_another_call_unless_the_limit_ended_it(vertex, model):
    vertex.brain.answer = lambda prompt: ""
    found = fault_of(vertex, model)
    assert (found.kind, found.reason) == (MALFORMED, "no_answer")
    vertex.reset(script=["truncated"])
    vertex.brain.answer = lambda prompt: ""
    found = fault_of(vertex, model)
    assert (found.kind, found.reason) == (FATAL, "no_answer")
    assert "finish reason length" in found.error
    assert found.prompt_tokens == 1


@pytest.mark.parametrize("model", MODELS)
def test_nobody_there_is_a_passing_fault(vertex, model):
    nowhere = {"api_endpoint": "http://127.0.0.1:9", "endpoint_override": ""}
    if model == ENDPOINTS["private service connect"]:
        nowhere["endpoint_override"] = "http://127.0.0.1:9"
    assert fault_of(vertex, model, **nowhere)[:2] == (PASSING, "connection")


def test_a_certificate_that_is_not_trusted_is_for_good(vertex, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    found = fault_of(vertex, ENDPOINTS["dedicated"])
    assert found[:2] == (FATAL, "certificate")


def test_all_is_well_otherwise(vertex):
    vertex.brain.answer = str.upper
    assert [fault_of(vertex, model).text for model in MODELS] == ["HELLO"] * len(MODELS)
    assert isinstance(fault_of(vertex, GEMINI), Reply)


def test_the_details_of_grpc_are_understood_too(vertex, monkeypatch):
    """aiplatform speaks gRPC by default; endpoints are looked up by it."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.aiplatform_v1 import PredictionServiceClient

    options = {"api_endpoint": vertex.grpc}
    client = PredictionServiceClient(credentials=AnonymousCredentials(), client_options=options)
    instances = [{"prompt": "hello"}]
    for fault, wait in (("429", 1.5), ("503", 1.5), ("400", 0.0), ("500", 0.0)):
        vertex.reset(script=[fault], retry_after=1.5)
        with pytest.raises(api_core.GoogleAPICallError) as caught:
            client.predict(endpoint=ENDPOINTS["public"], instances=instances, retry=None)
        found = classify(caught.value)
        assert (found.kind, found.reason, found.wait) == (*TABLE[fault], wait)
    vertex.reset(script=["hang"])
    with pytest.raises(api_core.DeadlineExceeded) as caught:
        client.predict(endpoint=ENDPOINTS["public"], instances=instances, retry=None, timeout=0.3)
    assert classify(caught.value).kind is PASSING


def test_an_endpoint_is_looked_up_over_grpc(vertex, monkeypatch):
    from google.auth.credentials import AnonymousCredentials

    monkeypatch.setattr("google.auth.default", lambda *_, **__: (AnonymousCredentials(), "p"))
    settings = settings_of(vertex, "", api_endpoint=vertex.grpc)
    found = look_up(ENDPOINTS["dedicated"], settings)
    assert (found.kind, found.models) == ("dedicated", 1)
    assert found.predict == f"https://{vertex.secure}/v1/{ENDPOINTS['dedicated']}:predict"
    with pytest.raises(api_core.NotFound) as caught:
        look_up(ENDPOINTS["public"].replace("1001", "9"), settings)
    assert classify(caught.value)[:2] == (FATAL, "http_404")


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (TimeoutError(), PASSING, "timeout"),
        (aiohttp.ServerTimeoutError(), PASSING, "timeout"),
        (ConnectionResetError(), PASSING, "connection"),
        (aiohttp.ServerDisconnectedError(), PASSING, "connection"),
        (aiohttp.ClientPayloadError(), MALFORMED, "cut_body"),
        (aiohttp.InvalidURL("x y"), FATAL, "bad_address"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"), MALFORMED, "malformed"),
        (google.auth.exceptions.TransportError(), PASSING, "credentials"),
        (google.auth.exceptions.RefreshError("no", retryable=True), PASSING, "credentials"),
        (google.auth.exceptions.RefreshError("no"), FATAL, "credentials"),
        (google.auth.exceptions.DefaultCredentialsError("none"), FATAL, "credentials"),
        (api_core.Aborted("again"), PASSING, "http_409"),
        (UsageError("no such flag"), FATAL, "usage"),
        (HttpError(529, "", {}), BUSY, "http_529"),
        (HttpError(501, "", {}), FATAL, "http_501"),
        (HttpError(599, "", {}), PASSING, "http_599"),
        (MalformedReplyError("no_predictions", "none"), MALFORMED, "no_predictions"),
        (ModelError("blocked", "no"), FATAL, "blocked"),
        (KeyError("a bug"), FATAL, "client_KeyError"),
    ],
)
def test_each_line_of_the_table(error, kind, reason):
    assert classify(error)[:2] == (kind, reason)


def _http_date(seconds):
    return email.utils.format_datetime(
        datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds), usegmt=True
    )


@pytest.mark.parametrize(
    ("headers", "body", "wait"),
    [
        ({"Retry-After": "2.5"}, "", 2.5),
        ({"Retry-After": "soon"}, "", 0.0),
        ({"Retry-After": "-3"}, "", 0.0),
        ({"Retry-After": _http_date(-60)}, "", 0.0),
        ({}, '{"error": {"details": [{"retryDelay": "37s"}]}}', 37.0),
        ({"Retry-After": "9"}, '{"error": {"details": [{"retryDelay": "3.5s"}]}}', 9.0),
        ({}, '{"error": {"details": ["no", {"other": 1}, {"retryDelay": "x"}]}}', 0.0),
        ({}, '{"error": "text"}', 0.0),
        ({}, "[1, 2]", 0.0),
        ({}, "<html>", 0.0),
    ],
)
def test_the_wait_that_a_service_asks_for(headers, body, wait):
    assert classify(HttpError(429, body, headers)).wait == wait


def test_a_wait_until_a_date():
    assert classify(HttpError(429, "", {"Retry-After": _http_date(60)})).wait == pytest.approx(
        60, abs=5
    )
