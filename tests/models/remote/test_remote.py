"""Remote models: the real clients of Gemini and Vertex AI against a server that misbehaves."""

import collections
import json
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, chat
from fakes.brain import FAULTS
from fakes.vertex import ENDPOINTS
from remotes import ANGRY, CLAUDE, GEMINI, MODELS, OPENAI, is_json, request, settings_of

from chatflow import network
from chatflow.cli import main
from chatflow.errors import UsageError
from chatflow.models.prices import Price
from chatflow.models.remote import calls
from chatflow.models.remote import handler as remote
from chatflow.models.remote.calls import RemoteModel
from chatflow.models.remote.gemini import thinking_of
from chatflow.models.remote.handler import RemoteLanguageModelHandler, client_of
from chatflow.models.requests import Answer, Failure
from chatflow.models.spec import ModelSpec
from chatflow.options import RemoteSettings
from chatflow.prompts.answers import ANALYSIS_SCHEMA

MANY, MOST = 600, 2_000


def say(prompt):
    return "We are sorry that your parcel is late." if "Write an apology" in prompt else ANGRY


@pytest.fixture
def fake(vertex, monkeypatch):
    vertex.brain.answer = say
    monkeypatch.setattr(network, "FIRST_PAUSE", 0.02)
    return vertex


def misbehave(fake, **behaviour):
    answer = fake.brain.answer
    fake.reset(**behaviour)
    fake.brain.answer = answer
    return fake.brain


def ask(fake, model, *requests, **settings):
    handler = RemoteLanguageModelHandler(model, settings_of(fake, model, **settings))
    loaded = handler.load_model()
    return [result.inference for result in handler.run_inference(requests, loaded)]


@pytest.mark.parametrize("model", MODELS)
def test_each_prompt_is_a_call_of_its_own_and_gets_its_own_answer(fake, model):
    prompts = [f"prompt {i}" for i in range(40)]
    fake.brain.answer = str.upper
    found = ask(fake, model, *(request(prompt) for prompt in prompts), max_in_flight=8)
    assert [answer.text for answer in found] == [prompt.upper() for prompt in prompts]
    assert sorted(call.prompts for call in fake.brain.calls) == sorted([p] for p in prompts)
    assert (found[0].prompt_tokens, found[0].answer_tokens, found[0].model) == (2, 2, model)
    assert found[0].cached_tokens == 1


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("fault", ["429", "500", "503", "504", "408", "reset", "html"])
def test_a_passing_fault_is_tried_again(fake, model, fault):
    brain = misbehave(fake, script=[fault, fault])
    found = ask(fake, model, request())
    assert [type(answer) for answer in found] == [Answer]
    assert len(brain.calls) == 3


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("fault", ["hang", "slow_body"])
def test_a_call_has_a_time_out_to_the_last_byte_of_its_answer(fake, model, fault):
    brain = misbehave(fake, script=[fault])
    started = time.monotonic()
    (found,) = ask(fake, model, request(), request_timeout=0.5)
    assert isinstance(found, Answer)
    assert time.monotonic() - started < 5
    assert len(brain.calls) == 2


@pytest.mark.parametrize("model", MODELS)
def test_what_fails_for_good_fails_alone_and_is_counted_by_its_status(fake, model):
    brain = misbehave(fake, match={"poison": "400"})
    good, bad, fine = ask(fake, model, request("a"), request("poison"), request("b"))
    assert (good.text, fine.text) == (ANGRY, ANGRY)
    assert isinstance(bad, Failure)
    assert bad.reason == "http_400"
    assert "called once" in bad.error
    assert len(brain.calls) == 3


@pytest.mark.parametrize("model", MODELS[:2])
def test_a_fault_for_ever_ends_when_its_time_is_used_up(fake, model):
    brain = misbehave(fake, match={"poison": "503"})
    bad, good = ask(fake, model, request("poison"), request("b"), retry_seconds=0.5)
    assert isinstance(good, Answer)
    assert bad.reason == "http_503"
    assert f"called {len(brain.calls) - 1} times" in bad.error
    assert 3 <= len(brain.calls) <= 60


@pytest.mark.parametrize("model", MODELS[:2])
def test_a_wait_beyond_the_budget_is_not_begun(fake, model):
    brain = misbehave(fake, match={"poison": "429"}, retry_after=3600)
    started = time.monotonic()
    (bad,) = ask(fake, model, request("poison"))
    assert (bad.reason, len(brain.calls)) == ("http_429", 1)
    assert "must wait 3600 s" in bad.error
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("fault", ["malformed", "empty", "cut_body"])
def test_a_reply_that_cannot_be_read_is_asked_for_twice_more_at_most(fake, model, fault):
    brain = misbehave(fake, script=[fault, fault])
    (found,) = ask(fake, model, request())
    assert isinstance(found, Answer)
    brain = misbehave(fake, script=[fault] * 9)
    (found,) = ask(fake, model, request())
    assert isinstance(found, Failure)
    assert len(brain.calls) == 3


# The behaviour of the service; and how many requests fail, by reason.
EVERY_FAULT = {
    "429": ({"rates": {"429": 0.1}, "retry_after": 0.2}, {}),
    "429 in bursts": ({"bursts": (0.5, 0.1), "retry_after": 0.1}, {}),
    "a quota": ({"quota": 600, "retry_after": 0.2}, {}),
    "a capacity": ({"capacity": 20, "latency": 0.02}, {}),
    "500, 502, 504": ({"rates": {"500": 0.04, "502": 0.04, "504": 0.04}}, {}),
    "503": ({"rates": {"503": 0.1}, "retry_after": 0.1}, {}),
    "reset": ({"rates": {"reset": 0.1}}, {}),
    "hang": ({"rates": {"hang": 0.01}}, {}),
    "slow_body": ({"rates": {"slow_body": 0.01}}, {}),
    "cut_body": ({"rates": {"cut_body": 0.02}}, {}),
    "html": ({"rates": {"html": 0.1}}, {}),
    "malformed": ({"rates": {"malformed": 0.02}}, {}),
    "empty": ({"rates": {"empty": 0.02}}, {}),
    "fewer": ({"rates": {"fewer": 0.02}}, {}),
    "truncated": ({"rates": {"truncated": 0.1}}, {}),
    "nonsense": ({"rates": {"nonsense": 0.1}}, {}),
    "safety": ({"match": {"prompt 77 ": "safety"}}, {"blocked": 1}),
    "poison": ({"match": {"prompt 77 ": "400", "prompt 567 ": "403"}},
               {"http_400": 1, "http_403": 1}),
    "latencies": ({"latency": "lognormal:0.02,0.8"}, {}),
    "everything": (
        {
            "rates": {"429": 0.05, "hang": 0.005, **dict.fromkeys(("503", "reset", "html"), 0.02),
                   **dict.fromkeys(("malformed", "truncated", "cut_body"), 0.01)},
            "match": {"prompt 77 ": "400"}, "retry_after": 0.2, "latency": "bimodal:0.005,0.1,0.05",
        },
        {"http_400": 1},
    ),
}  # fmt: skip


def conserve(fake, model, fault, monkeypatch):
    """64 in flight: what came back, by id, and what the service saw."""
    asked = MOST if fault == "everything" else MANY
    monkeypatch.setattr(calls, "MALFORMED_RETRIES", 9)  # so that none fails by chance
    behaviour, expected = EVERY_FAULT[fault]
    brain = misbehave(fake, **behaviour)
    brain.answer = lambda prompt: json.dumps({"sentiment": 0, "summary": prompt})
    requests = [request(f"prompt {i} ", name=str(i), check=is_json) for i in range(asked)]
    handler = RemoteLanguageModelHandler(
        model, settings_of(fake, model, max_in_flight=64, request_timeout=5.0)
    )
    loaded = handler.load_model()
    results = handler.run_inference(requests, loaded)

    assert [result.example.id for result in results] == [str(i) for i in range(asked)]
    failures: dict[str, int] = {}
    useless = collections.Counter()
    for i, result in enumerate(results):
        if isinstance(result.inference, Failure):
            reason = result.inference.reason
            failures[reason] = failures.get(reason, 0) + 1
        elif f"prompt {i} " not in result.inference.text:
            useless[result.inference.text.startswith("{")] += 1
    assert failures == expected
    # What the service cut, or said nonsense to twice, is for the parser to judge.
    said = collections.Counter(call.fault for call in brain.calls)
    assert useless[True] == said["truncated"]
    assert 2 * useless[False] <= said["nonsense"]
    assert not any(call.early for call in brain.calls)
    assert brain.peak <= 64
    assert brain.in_flight == 0
    # Nothing was answered twice.
    assert max(brain.answered.values()) == 1
    answered = asked - sum(expected.values()) - useless.total()
    assert sum(brain.answered.values()) == answered
    poisoned = [call for call in brain.calls if call.fault in ("400", "403", "safety")]
    assert len(poisoned) == sum(expected.values())


@pytest.mark.slow
@pytest.mark.parametrize("fault", EVERY_FAULT)
def test_under_every_fault_each_request_has_one_result(fake, fault, monkeypatch):
    conserve(fake, ENDPOINTS["public"], fault, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("model", [GEMINI, CLAUDE])
def test_so_it_is_with_gemini_and_claude(fake, model, monkeypatch):
    conserve(fake, model, "everything", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("fault", EVERY_FAULT)
def test_so_it_is_with_a_server_of_openais_protocol(fake, fault, monkeypatch):
    conserve(fake, OPENAI, fault, monkeypatch)


def test_every_fault_of_the_stand_in_is_in_that_test():
    tried = {name for behaviour, _ in EVERY_FAULT.values() for name in behaviour.get("rates", {})}
    tried |= {name for behaviour, _ in EVERY_FAULT.values()
              for name in behaviour.get("match", {}).values()}  # fmt: skip
    assert tried >= set(FAULTS)


def test_what_failed_calls_cost_is_counted_too(fake):
    def speechless(prompt):
        fake.brain.answer = say
        return ""

    fake.brain.answer = speechless
    (found,) = ask(fake, GEMINI, request("three short words"))
    assert found.text == ANGRY
    assert found.prompt_tokens == 6


def test_a_bug_in_one_answer_takes_no_other_with_it(fake):
    def bug(text):
        raise KeyError("a bug")

    found = ask(fake, GEMINI, request("a"), request("b", check=bug), request("c"))
    assert [type(each) for each in found] == [Answer, Failure, Answer]
    assert found[1].reason == "client_KeyError"
    assert len(fake.brain.calls) == 3


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS[:2])
def test_where_all_is_refused_for_too_long_all_that_wait_are_turned_away(fake, model):
    brain = misbehave(fake, rates={"429": 1.0})
    requests = [request(str(i), name=str(i)) for i in range(500)]
    started = time.monotonic()
    found = ask(fake, model, *requests, max_in_flight=4, retry_seconds=2.0)
    assert {failure.reason for failure in found} == {"http_429"}
    assert "refused every call" in "".join(failure.error for failure in found)
    assert time.monotonic() - started < 20
    assert len(brain.calls) < 300


def test_a_closed_client_is_not_given_out_again_and_does_not_hang(fake):
    settings = settings_of(fake, GEMINI)
    model = remote.shared_model(GEMINI, settings)
    model.close()
    with pytest.raises(RuntimeError, match="is closed"):
        model.answer([request()])
    assert isinstance(remote.shared_model(GEMINI, settings).answer([request()])[0], Answer)


@pytest.mark.parametrize("request_format", ["chat_completions", "raw_predict"])
def test_a_reply_that_cannot_be_read_is_in_the_failure_as_it_came(fake, request_format):
    misbehave(fake, script=["malformed"] * 9)
    (found,) = ask(fake, ENDPOINTS["public"], request(), request_format=request_format)
    assert found.reason == "malformed"
    assert "choices" in found.answer


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS[:2])
def test_two_steps_and_many_threads_share_one_client_and_its_limit(fake, model):
    brain = misbehave(fake, latency=0.02)
    settings = settings_of(fake, model, max_in_flight=6)
    models = [RemoteLanguageModelHandler(model, settings).load_model() for _ in range(4)]
    assert len(set(map(id, models))) == 1

    def many(loaded):
        assert len(loaded.answer([request(f"{i}") for i in range(30)])) == 30

    threads = [threading.Thread(target=many, args=(loaded,)) for loaded in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(brain.calls), brain.peak) == (120, 6)


@pytest.mark.parametrize("model", MODELS)
def test_an_answer_that_is_not_what_was_asked_for_is_sent_back_once_with_the_error(fake, model):
    brain = misbehave(fake, script=["nonsense"])
    (found,) = ask(fake, model, request(check=is_json))
    assert (found.text, found.repairs) == (ANGRY, ("asked_again",))
    assert found.prompt_tokens == 2  # of both calls
    turns = brain.calls[1].body
    turns = turns.get("contents") or turns.get("instances", [turns])[0]["messages"]
    roles, texts = zip(*((turn["role"], json.dumps(turn)) for turn in turns), strict=True)
    assert roles in (("user", "model", "user"), ("user", "assistant", "user"))
    assert "I would rather not" in texts[1]
    assert "that is no JSON; finish reason stop" in texts[2]

    brain = misbehave(fake, script=["nonsense"] * 9)
    (found,) = ask(fake, model, request(check=is_json))
    assert "I would rather not" in found.text
    assert len(brain.calls) == 2


@pytest.mark.parametrize("model", MODELS[:2])
def test_where_the_second_call_fails_the_first_answer_is_in_the_failure(fake, model):
    misbehave(fake, script=["nonsense", "400"])
    (found,) = ask(fake, model, request(check=is_json))
    assert found.reason == "http_400"
    assert "I would rather not" in found.answer
    assert found.answer_tokens > 0


@pytest.mark.parametrize("model", MODELS)
def test_a_block_is_a_failure_that_says_why(fake, model):
    brain = misbehave(fake, script=["safety"])
    (found,) = ask(fake, model, request())
    assert found.reason == "blocked"
    said = {GEMINI: "SAFETY (HARM_CATEGORY_HARASSMENT HIGH)", CLAUDE: "refusal"}
    assert said.get(model, "content_filter") in found.error
    assert len(brain.calls) == 1


def test_gemini_is_given_the_schema_for_analyses_alone_and_thinks_no_more_than_it_must(fake):
    ask(fake, GEMINI, request(), request(task="apology"), max_in_flight=1)
    ask(fake, "gemini-3-pro-preview", request(task="apology"))
    configs = [call.body["generationConfig"] for call in fake.brain.calls]
    assert configs[0]["responseJsonSchema"]["required"] == ["sentiment", "summary"]
    assert configs[0]["temperature"] == 0
    assert list(configs[0]["thinkingConfig"].values()) == [0]
    assert "responseJsonSchema" not in configs[1]
    assert [config["maxOutputTokens"] for config in configs] == [9, 9, 9 + 1024]
    assert list(configs[2]["thinkingConfig"].values()) == ["LOW"]


@pytest.mark.parametrize(
    ("model", "setting", "found"),
    [
        ("gemini-2.0-flash", "auto", (None, 0)),
        ("gemini-2.5-pro", "auto", ({"thinking_budget": 128}, 128)),
        ("gemini-3-flash-preview", "minimal", ({"thinking_level": "minimal"}, 512)),
        ("gemini-2.5-flash", "none", (None, 0)),
        ("gemini-2.5-flash", "500", ({"thinking_budget": 500}, 500)),
    ],
)
def test_thinking_is_a_level_or_a_budget_by_the_model(model, setting, found):
    assert thinking_of(model, setting) == found


SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "answer", "schema": ANALYSIS_SCHEMA, "strict": True},
}


@pytest.mark.parametrize(
    ("spelling", "fields"),
    [
        ("response_format", {"response_format": SCHEMA}),
        ("structured_outputs", {"structured_outputs": {"json": ANALYSIS_SCHEMA}}),
        ("guided_json", {"guided_json": ANALYSIS_SCHEMA}),
        ("none", {}),
    ],
)
def test_an_endpoint_is_told_the_schema_as_it_knows_it(fake, spelling, fields):
    ask(fake, ENDPOINTS["public"], request(), response_format=spelling)
    (call,) = fake.brain.calls
    asked = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 9, "temperature": 0}
    (instance,) = call.body["instances"]
    assert instance == {"@requestFormat": "chatCompletions", **asked, **fields}


@pytest.mark.parametrize("model", MODELS[1:-2])
def test_a_raw_prediction_and_a_prompt_are_spoken_too(fake, model):
    (raw,) = ask(fake, model, request(), request_format="raw_predict")
    (prompt,) = ask(fake, model, request(), request_format="prompt")
    misbehave(fake, listed=False)
    (unlisted,) = ask(fake, model, request())
    assert {raw.text, prompt.text, unlisted.text} == {ANGRY}


def test_the_path_of_a_call_is_that_of_its_kind_of_endpoint(fake):
    for model in MODELS[1:-2]:
        ask(fake, model, request())
    psa = "/v1/models/7:predict"
    paths = [call.path for call in fake.brain.calls]
    assert paths == [psa if "1003" in model else f"/v1/{model}:predict" for model in MODELS[1:-2]]


def test_a_call_over_tls_has_the_token_of_the_machines_credentials(fake, tmp_path, monkeypatch):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    account = {
        "type": "service_account", "private_key": key.decode(), "project_id": "p",
        "client_email": "worker@p.iam.gserviceaccount.com", "token_uri": f"{fake.address}/token",
    }  # fmt: skip
    (tmp_path / "key.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    override = f"https://localhost:{fake.secure.rpartition(':')[2]}"
    settings = {"api_endpoint": "", "endpoint_override": override}
    (answer,) = ask(fake, ENDPOINTS["private service connect"], request(), **settings)
    # An address without scheme: its certificate is not checked, as aiplatform does it.
    settings["endpoint_override"] = fake.secure
    (unchecked,) = ask(fake, ENDPOINTS["private service connect"], request(), **settings)
    (gemini,) = ask(fake, GEMINI, request(), api_endpoint=override, endpoint_override="")
    assert {answer.text, unchecked.text, gemini.text} == {ANGRY}
    assert {call.authorization for call in fake.brain.calls} == {"Bearer a-token"}


def test_without_credentials_each_request_fails_and_says_so(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    settings = {"api_endpoint": "", "endpoint_override": f"https://{fake.secure}"}
    found = ask(fake, ENDPOINTS["public"], request(), request(), **settings)
    assert [failure.reason for failure in found] == ["credentials"] * 2
    assert "none.json" in found[0].error


class Limiter:
    """Beam's interface, as far as it is used."""

    def __init__(self, *allowed):
        self.allowed, self.asked = list(allowed), 0

    def allow(self, hits_added=1):
        self.asked += hits_added
        return self.allowed.pop(0) if self.allowed else True


def test_a_rate_limiter_is_asked_before_each_call(fake):
    settings = settings_of(fake, GEMINI)
    limiter = Limiter(True, False, False)
    model = RemoteModel(GEMINI, client_of(GEMINI, settings), settings, limiter)
    found = model.answer([request(str(i)) for i in range(4)])
    model.close()
    assert all(isinstance(answer, Answer) for answer in found)
    assert (limiter.asked, len(fake.brain.calls)) == (6, 4)
    assert model.counts()["faults/rate_limited"] == 2


class SlowLedger:
    """Notes one answer at a time, as a database on a slow disk does."""

    def __init__(self, brain):
        self.brain, self.noted, self.most_unnoted = brain, 0, 0
        self.lock = threading.Lock()

    def refusal(self):
        return None

    def note(self, request, answer):
        with self.lock:
            time.sleep(0.01)
            self.most_unnoted = max(self.most_unnoted, len(self.brain.calls) - self.noted)
            self.noted += 1


def test_what_is_not_noted_yet_is_in_flight(fake):
    settings = settings_of(fake, GEMINI, max_in_flight=4)
    model = RemoteModel(GEMINI, client_of(GEMINI, settings), settings)
    ledger = SlowLedger(fake.brain)
    found = model.answer_each([request(str(i)) for i in range(40)], ledger)
    model.close()
    assert len(found) == ledger.noted == 40
    assert ledger.most_unnoted <= 4


def test_answers_that_are_asked_again_do_not_wait_for_each_other(fake):
    """Each of them waits for a place behind requests that wait for the ledger."""
    said = collections.Counter()

    def answer(prompt):
        said[prompt] += 1
        return "no json" if said.total() % 3 == 1 else ANGRY

    fake.brain.answer = answer
    for places, requests in ((1, 4), (4, 64)):
        settings = settings_of(fake, GEMINI, max_in_flight=places)
        model = RemoteModel(GEMINI, client_of(GEMINI, settings), settings)
        ledger = SlowLedger(fake.brain)
        asked = [request(f"{places} {i}", check=is_json) for i in range(requests)]
        found = model.answer_each(asked, ledger)
        model.close()
        assert len(found) == ledger.noted == requests
        assert model.counts()["asked_again"] > 0


def test_a_fleet_shares_a_limit_through_an_envoy_rate_limit_service(fake):
    from concurrent.futures import ThreadPoolExecutor

    import grpc
    from apache_beam.io.components import rate_limit_pb2 as rls

    seen = []

    def should_rate_limit(asked, _):
        seen.append(asked)
        code = rls.RateLimitResponse.OVER_LIMIT if len(seen) == 1 else rls.RateLimitResponse.OK
        return rls.RateLimitResponse(overall_code=code)

    server = grpc.server(ThreadPoolExecutor(2))
    handler = grpc.unary_unary_rpc_method_handler(
        should_rate_limit,
        request_deserializer=rls.RateLimitRequest.FromString,
        response_serializer=rls.RateLimitResponse.SerializeToString,
    )
    service = "envoy.service.ratelimit.v3.RateLimitService"
    methods = {"ShouldRateLimit": handler}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        address = f"127.0.0.1:{port}"
        found = ask(fake, GEMINI, request("a"), request("b"), rate_limit_service=address)
    finally:
        server.stop(None)
    assert all(isinstance(answer, Answer) for answer in found)
    assert len(seen) == 3
    (descriptor,) = seen[0].descriptors
    assert seen[0].domain == "chatflow"
    assert [(entry.key, entry.value) for entry in descriptor.entries] == [("model", GEMINI)]


def test_waiting_for_a_refusing_service_is_told_to_the_runner(fake):
    misbehave(fake, script=["429"], retry_after=0.3)
    settings = settings_of(fake, GEMINI, retry_seconds=60.0)
    loaded = RemoteLanguageModelHandler(GEMINI, settings).load_model()
    loaded.answer([request()])
    assert 0.3 <= loaded.throttled() < 5
    assert loaded.throttled() == 0


def flags(fake, path, tmp_path, *more, model=GEMINI):
    return [
        "run", "--input", path, "--output", f"{tmp_path}/out", "--inference=remote", "--model",
        model, "--api_endpoint", fake.address, "--project=p", "--region=us-central1",
        "--summary=json", *more,
    ]  # fmt: skip


def letters_of(counts):
    (path,) = counts["files"]["dead_letters"]
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS[:3])
def test_the_whole_pipeline_runs_on_a_remote_model(fake, model, tmp_path, lines, capsys):
    misbehave(fake, script=["429", "ok", "reset"])
    path = lines(*(chat("late!", chat_id=str(i)) for i in range(5)))
    assert main(flags(fake, path, tmp_path, model=model)) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["analysed"], counts["drafted"], counts["lost"]) == (5, 5, 0)
    assert (counts["requests"], counts["retries"]) == (12, 2)
    assert counts["faults"] == {"http_429": 1, "connection": 1}
    cached = counts["cached_tokens"]
    new = counts["prompt_tokens"] - cached
    paid = (new * 0.30 + cached * 0.03 + counts["answer_tokens"] * 2.50) / 1e6
    assert counts["cost_usd"] == (round(paid, 6) if model == GEMINI else None)
    (written,) = counts["files"]["analyses"]
    assert {json.loads(x)["model"] for x in Path(written).read_text().splitlines()} == {model}


@pytest.mark.slow
def test_what_cannot_be_repaired_is_a_dead_letter_with_all_that_is_known(
    fake, tmp_path, lines, capsys
):
    misbehave(fake, match={"gibberish": "nonsense", "forbidden": "safety"})
    chats = (chat(text, chat_id=str(i)) for i, text in enumerate(("gibberish", "forbidden", "ok")))
    assert main(flags(fake, lines(*chats), tmp_path)) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["asked_again"], counts["analysed"], counts["lost"]) == (1, 1, 0)
    assert counts["dead_letters_by_reason"] == {"answer/not_json": 1, "model/blocked": 1}
    by_chat = {letter["chat_id"]: letter for letter in letters_of(counts)}
    assert "asked twice, finish reason stop" in by_chat["0"]["error"]
    assert by_chat["0"]["answer"] == "As a language model, I would rather not."
    assert "SAFETY (HARM_CATEGORY_HARASSMENT HIGH)" in by_chat["1"]["error"]


@pytest.mark.slow
def test_a_repaired_answer_says_so_in_its_record(fake, tmp_path, lines, capsys):
    misbehave(fake, script=["nonsense"])
    assert main(flags(fake, lines(chat("late")), tmp_path)) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["repaired"] == {"asked_again": 1}


@pytest.mark.slow
def test_the_cost_is_by_the_users_own_table(fake, tmp_path, lines, capsys):
    prices = tmp_path / "prices.toml"
    prices.write_text('["gemini-*"]\ninput = 1e6\n["gemini-1*"]\ninput = 5\n')
    path = lines(chat("late"))
    assert main(flags(fake, path, tmp_path, "--prices", str(prices))) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["cost_usd"] == counts["prompt_tokens"] > 0
    arguments = [flag for flag in flags(fake, path, tmp_path) if flag != "--summary=json"]
    assert main([*arguments, "--prices", str(prices)]) == 0
    said = capsys.readouterr().out
    assert "US dollars" in said
    assert "2, of these made again 0" in said


def test_an_endpoint_costs_by_the_hour():
    assert Price(hour=2.0).of(1_000_000, 1_000_000, seconds=1800) == 1.0


def test_what_came_from_a_cache_costs_less():
    assert Price(input=2.0, output=1.0, cached=0.5).of(3_000_000, 1_000_000, 2_000_000) == 4.0
    assert Price(input=2.0).of(3_000_000, 0, 2_000_000) == 6.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("not TOML", "--prices="),
        ('[gemini]\ninput = "much"', "input is 'much'"),
        ("[gemini]\nminute = 1", "unknown fields ['minute']"),
        ("gemini = 3", "not a table of input, output, cached and hour"),
    ],
)
def test_a_mistake_in_the_table_of_prices_is_told(fake, tmp_path, lines, capsys, text, says):
    prices = tmp_path / "prices.toml"
    prices.write_text(text)
    assert main(flags(fake, lines(chat("late")), tmp_path, "--prices", str(prices))) == 2
    assert says in capsys.readouterr().err
    assert main(flags(fake, lines(chat("late")), tmp_path, "--prices=none.toml")) == 2


@pytest.mark.slow
def test_the_model_is_looked_for_at_launch_and_nothing_is_paid(fake, tmp_path, lines, capsys):
    path = lines(chat("late"))
    empty = ENDPOINTS["empty"]
    assert main(flags(fake, path, tmp_path, model=empty)) == 2
    assert "no model is deployed" in capsys.readouterr().err
    unknown = empty.replace("1005", "9")
    assert main(flags(fake, path, tmp_path, model=unknown)) == 2
    assert "http_404" in capsys.readouterr().err
    psc = ENDPOINTS["private service connect"]
    assert main(flags(fake, path, tmp_path, model=psc)) == 2
    assert "--endpoint_override" in capsys.readouterr().err
    assert fake.brain.calls == []
    assert main(flags(fake, path, tmp_path, "--check_endpoint=false", model=unknown)) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["dead_letters_by_reason"] == {"model/http_404": 1}


@pytest.mark.slow
def test_where_the_service_cannot_be_reached_the_job_is_started_all_the_same(
    fake, tmp_path, lines, capsys
):
    arguments = flags(fake, lines(chat("late")), tmp_path, "--retry_seconds=0")
    arguments[arguments.index(fake.address)] = "http://127.0.0.1:9"
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "warning: not checked" in printed.err
    assert json.loads(printed.out)["dead_letters_by_reason"] == {"model/connection": 1}


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("gemma3-270m", {}, "give gemini-…, openai:NAME, anthropic:NAME or projects/P/"),
        ("openai:", {}, "give the model's name on the server"),
        ("openai:small", {}, "give --api_key=env:OPENAI_API_KEY for OpenAI, or --api_endpoint"),
        ("openai:small", {"api_key": "sk-secret"}, "--api_key: must be env:NAME"),
        ("openai:small", {"api_endpoint": "http://x", "thinking": "hard"}, "--thinking=hard"),
        ("anthropic:", {}, "give the model's name"),
        ("anthropic:small", {"project": "p"}, "--project and --location for Vertex AI"),
        (GEMINI, {}, "give --project"),
        (GEMINI, {"project": "p"}, "give --location"),
        (GEMINI, {"endpoint_override": "10.0.0.1"}, "--endpoint_override: only with an endpoint"),
        (GEMINI, {"project": "p", "location": "l", "thinking": "hard"}, "--thinking=hard"),
    ],
)
def test_a_remote_model_is_checked_by_its_name_and_nothing_is_called(name, settings, says):
    with pytest.raises(UsageError) as caught:
        ModelSpec(name, inference="remote", remote=RemoteSettings(**settings))
    assert says in str(caught.value)


def test_the_graph_is_built_without_the_service():
    name = ENDPOINTS["public"]
    assert ModelSpec(name, inference="remote").handler().name == name


def test_prompts_for_a_remote_model_need_a_block_json(fake, tmp_path, lines, capsys):
    base = ROOT / "prompts" / "base"
    arguments = flags(fake, lines(chat("late")), tmp_path, "--prompts", str(base))
    assert main(arguments) == 2
    assert "json, which remote models need" in capsys.readouterr().err


def test_the_location_and_the_project_are_those_of_the_flags_else_the_environments(monkeypatch):
    from chatflow.options import Options
    from chatflow.running.runner import beam_options, cloud_of

    remote_model = {"inference": "remote", "model": GEMINI}
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "of-environment")
    monkeypatch.setenv("GOOGLE_CLOUD_LOCATION", "of-environment")
    found = cloud_of(beam_options([]), Options(**remote_model))
    assert found == ("of-environment", "of-environment")
    beam = beam_options(["--project=p", "--region=r"])
    assert cloud_of(beam, Options(**remote_model)) == ("p", "r")
    assert cloud_of(beam, Options(**remote_model, location="global")) == ("p", "global")
