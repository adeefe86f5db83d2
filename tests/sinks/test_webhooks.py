"""Records to webhooks: real runs against a service on loopback that misbehaves."""

import base64
import email.utils
import functools
import json
import logging
import os
import random
import re
import socket
import ssl
import time
from datetime import UTC, datetime, timedelta

import apache_beam as beam
import pytest
from apache_beam.testing.util import assert_that
from apache_beam.transforms.window import FixedWindows, GlobalWindows, TimestampedValue
from conftest import ANALYSIS, DRAFT, KEPT, RULES, SECRET, chat, keep, mistake, read
from fakes import Loopback, environment
from fakes.hook import Answer, Hook
from fakes.vertex import make_certificate
from standardwebhooks import Webhook, WebhookVerificationError

from chatflow import network
from chatflow.dead_letters import join
from chatflow.errors import UsageError
from chatflow.options import Options, SinkSettings
from chatflow.records import Analysis, DeadLetter, Record, Response, now
from chatflow.running.launch import execute
from chatflow.running.runner import LOCAL_RUNNER
from chatflow.secrets import HOST_VARIABLE
from chatflow.sinks import webhooks
from chatflow.sinks.webhooks import Poster, read_keys, shown
from chatflow.sinks.write import WriteRecords, split_destinations


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Pauses are short."""
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    monkeypatch.setattr(network, "FIRST_PAUSE", 0.01)


@pytest.fixture
def hook():
    with Hook() as hook:
        yield hook


@pytest.fixture
def apologise(lines, script, tmp_path):
    """Drafts to a webhook for angry chats "0", "1", …; all else to files."""

    def run(url, *flags, count=3, rules=RULES, **fields):
        source = lines(*(chat("It is late.", chat_id=f"{n}") for n in range(count)))
        given = {"input": source, "output": f"{tmp_path}/out", "model": script(*rules)}
        options = Options(**given | {"drafts": url, "webhook_secret": "env:HOOK_SECRET"} | fields)
        return execute(options, flags).to_dict()

    return run


def letters(folder):
    found = [DeadLetter(**letter) for letter in read(folder, "dead_letters")]
    return sorted(found, key=lambda letter: letter.chat_id or "")


# What is sent.


@pytest.mark.slow
def test_each_draft_is_a_signed_post(hook, apologise, tmp_path):
    counts = apologise(f"{hook.address}/in/tray?token=t0ken,{tmp_path}/out/drafts")
    assert (counts["drafted"], counts["lost"], counts["dead_letters"]) == (3, 0, 0)
    assert hook.taken() == sorted(read(tmp_path / "out", "drafts"), key=lambda d: d["chat_id"])
    for request in hook.received:
        assert request.path == "/in/tray?token=t0ken"
        assert request.headers["Content-Type"] == "application/json"
        assert request.headers["Idempotency-Key"] == request.record["draft_id"]
        assert request.headers["webhook-id"] == request.record["draft_id"]
        assert Webhook(SECRET).verify(request.body, request.headers) == request.record
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET).verify(request.body + b" ", request.headers)


def test_each_kind_may_go_to_a_webhook(hook, apologise, lines):
    to = {kind: f"{hook.address}/{kind}" for kind in ("analyses", "dead_letters")}
    counts = apologise(
        f"{hook.address}/drafts", input=lines(chat("It is late."), "no json", name="in.jsonl"), **to
    )
    assert counts["lost"] == 0
    assert counts["other_destinations"]["analyses"] == [f"{hook.address}/analyses"]
    found = {request.path: request.record for request in hook.received}
    assert found["/analyses"]["summary"] == "It is late."
    assert found["/drafts"]["analysis_id"] == found["/analyses"]["analysis_id"]
    assert found["/dead_letters"]["payload"] == "no json"


def test_the_specifications_example():
    """https://github.com/standard-webhooks/standard-webhooks/tree/main/libraries"""
    keys = webhooks.keys_of("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = webhooks.signed(
        keys, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.slow
def test_an_old_and_a_new_secret_both_sign(hook, apologise, monkeypatch):
    new = "whsec_" + base64.b64encode(os.urandom(32)).decode()
    monkeypatch.setenv("HOOK_SECRET", f"{SECRET}\n{new}\n")
    apologise(hook.address, count=1)
    for secret in (SECRET, new):
        Webhook(secret).verify(hook.received[0].body, hook.received[0].headers)


@pytest.mark.slow
def test_several_are_sent_at_once_but_not_all(hook, apologise):
    hook.behave = lambda *_: time.sleep(0.03) or Answer()
    apologise(hook.address, count=40)
    assert len(hook.received) == 40
    assert 2 <= hook.most <= webhooks.AT_ONCE


# What goes wrong, and passes.


@pytest.mark.parametrize(
    "fault",
    [*map(Answer, (408, 409, 425, 429, 500, 502, 503, 504, 599)),
     "reset", "hang", "drip", "rubbish"],
    ids=lambda fault: fault if isinstance(fault, str) else str(fault.status),
)  # fmt: skip
def test_a_fault_that_passes_costs_another_try(hook, monkeypatch, fault):
    if fault in ("hang", "drip"):
        monkeypatch.setattr(webhooks, "ANSWER_SECONDS", 0.4)
    hook.behave = lambda _, tries: fault if tries < 3 else Answer(202, "thanks")
    poster = Poster(hook.address, read_keys("env:HOOK_SECRET"))
    assert poster.post([DRAFT, ANALYSIS]) == [None, None]
    poster.close()
    ids = [request.headers["webhook-id"] for request in hook.received]
    assert sorted(ids) == ["a1"] * 3 + ["d1"] * 3
    for request in hook.received:  # each try has its own time
        Webhook(SECRET).verify(request.body, request.headers)


@pytest.mark.slow
def test_a_run_under_faults_delivers_each_draft(hook, apologise):
    faults = ["reset", Answer(503), "rubbish", Answer(429, "", {"Retry-After": "0.1"}), Answer()]
    hook.behave = lambda got, tries: faults[int(got.record["chat_id"]) % 4 :][tries - 1]
    counts = apologise(hook.address, count=8)
    assert (counts["drafted"], counts["dead_letters"], counts["lost"]) == (8, 0, 0)
    assert {draft["chat_id"] for draft in hook.taken()} == set("01234567")
    assert len(hook.received) == 2 * (5 + 4 + 3 + 2)


@pytest.mark.parametrize("as_date", [False, True], ids=["seconds", "date"])
def test_no_try_is_made_before_the_service_wants_it(hook, as_date):
    # A date has no fractions.
    at = (datetime.now(UTC) + timedelta(seconds=2)).replace(microsecond=0)
    wait = email.utils.format_datetime(at, usegmt=True) if as_date else "0.5"
    hook.behave = lambda _, tries: (
        Answer(503, "", {"Retry-After": wait}) if tries == 1 else Answer()
    )
    assert Poster(hook.address, [b"key"]).post([DRAFT]) == [None]
    first, second = hook.received
    assert second.at >= (at.timestamp() if as_date else first.at + 0.5)


# What stays wrong.


@pytest.mark.parametrize("status", [301, 307, 400, 401, 404, 410, 422])
def test_a_refusal_is_for_good(hook, status):
    with Hook() as elsewhere:
        hook.behave = lambda *_: Answer(status, "No.\n", {"Location": elsewhere.address})
        (error,) = Poster(hook.address, [b"key"]).post([DRAFT])
    assert error.reason == f"webhook_http_{status}"
    said = "redirects are not followed" if status < 400 else "No."
    assert str(error).startswith(f"{hook.address} answered {status}: {said}")
    assert len(hook.received) == 1
    assert elsewhere.received == []


def test_a_dead_letter_that_is_too_large_for_a_service_goes_in_parts(hook):
    hook.behave = lambda got, _: Answer(413 if len(got.body) > 1_000_000 else 200)
    noise = random.Random(1).randbytes(2_000_000).hex()
    whole = DeadLetter(stage="read", reason="x", error="x", payload=noise, failed_at=now())
    assert Poster(hook.address, [b"key"]).post([whole]) == [None]
    refused, *parts = hook.received
    assert DeadLetter(**refused.record) == whole
    assert join([DeadLetter(**part.record) for part in parts]) == whole
    assert len({request.headers["webhook-id"] for request in hook.received}) == len(parts) + 1


def test_a_dead_letter_whose_parts_are_too_large_is_an_error(hook):
    hook.behave = lambda *_: Answer(413)
    letter = DeadLetter(stage="read", reason="x", error="x", payload="x", failed_at=now())
    (error,) = Poster(hook.address, [b"key"]).post([letter])
    assert error.reason == "webhook_http_413"


@pytest.mark.slow
def test_a_refused_draft_is_a_dead_letter_and_replay_writes_it_again(
    hook, apologise, tmp_path, script
):
    hook.behave = lambda got, _: Answer(
        404 if got.record["chat_id"] == "1" else 200, "no such chat"
    )
    counts = apologise(hook.address)
    assert counts["dead_letters_by_reason"] == {"write/webhook_http_404": 1}
    assert (counts["analysed"], counts["drafted"], counts["lost"]) == (3, 3, 0)
    (letter,) = letters(tmp_path / "out")
    assert (letter.stage, letter.reason, letter.chat_id) == ("write", "webhook_http_404", "1")
    assert letter.error == f"{hook.address} answered 404: no such chat (tried once)"
    refused = next(request for request in hook.received if request.record["chat_id"] == "1")
    assert letter.payload.encode() == refused.body

    hook.received.clear()
    hook.behave = lambda *_: Answer()
    options = Options(
        input=f"{tmp_path}/out/dead_letters*", output=f"{tmp_path}/again", drafts=hook.address,
        webhook_secret="env:HOOK_SECRET", model=script({"crash": "it must not be asked"}),
    )  # fmt: skip
    counts = execute(options, [], replay=True).to_dict()
    assert (counts["asked"], counts["requests"], counts["dead_letters"]) == (0, 0, 0)
    assert counts["lost"] == 0
    (again,) = hook.received
    assert (again.headers["webhook-id"], again.body) == (
        refused.headers["webhook-id"],
        refused.body,
    )
    assert read(tmp_path / "again", "analyses") == []


@pytest.mark.slow
def test_refused_analyses_are_written_again_as_such(hook, apologise, tmp_path, script):
    hook.behave = lambda *_: Answer(410)
    apologise(f"{tmp_path}/out/drafts", analyses=hook.address)
    assert {letter.reason for letter in letters(tmp_path / "out")} == {"webhook_http_410"}
    options = Options(
        input=f"{tmp_path}/out/dead_letters*", output=f"{tmp_path}/again", model=script()
    )
    assert execute(options, [], replay=True).to_dict()["lost"] == 0
    ids = {analysis["analysis_id"] for analysis in read(tmp_path / "again", "analyses")}
    assert ids == {request.headers["webhook-id"] for request in hook.received}
    assert read(tmp_path / "again", "drafts") == []


@pytest.mark.parametrize("payload", ["no json", '{"draft_id": "d"}', "{}"])
@pytest.mark.slow
def test_a_letter_of_a_sink_that_holds_no_record_is_a_letter_again(
    tmp_path, lines, script, payload
):
    letter = DeadLetter(stage="write", reason="x", error="x", payload=payload, failed_at=now())
    source = lines(json.loads(letter.to_json()), name="letters.jsonl")
    options = Options(input=source, output=f"{tmp_path}/out", model=script())
    counts = execute(options, [], replay=True).to_dict()
    assert counts["dead_letters"] == 1
    (again,) = letters(tmp_path / "out")
    assert (again.stage, DeadLetter(**json.loads(again.payload)).payload) == ("replay", payload)


@pytest.mark.parametrize(
    ("how", "reason", "said"),
    [
        (Answer(503, "too busy"), "webhook_http_503", r"answered 503: too busy \(tried \d+ "),
        ("hang", "webhook_timeout", "did not finish its answer within 0.3 s "),
        ("drip", "webhook_timeout", "did not finish its answer within 0.3 s "),
        ("reset", "webhook_unreachable", "ServerDisconnectedError|ClientOSError"),
        ("rubbish", "webhook_unreachable", "Bad status line|BadStatusLine|Expected HTTP"),
        (
            Answer(429, "", {"Retry-After": "3600"}),
            "webhook_http_429",
            "once, and asked to wait 3600",
        ),
    ],
    ids=["503", "hang", "drip", "reset", "rubbish", "Retry-After"],
)  # fmt: skip
def test_a_service_that_stays_away_is_given_up(hook, monkeypatch, how, reason, said):
    monkeypatch.setattr(webhooks, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(webhooks, "WEBHOOK_SECONDS", 0.7)
    hook.behave = lambda got, _: how
    (error,) = Poster(hook.address, [b"key"]).post([DRAFT])
    assert error.reason == reason
    assert re.search(said, str(error))
    assert {request.headers["webhook-id"] for request in hook.received} == {"d1"}


@pytest.mark.slow
def test_a_port_where_nobody_listens(apologise, tmp_path, monkeypatch):
    monkeypatch.setattr(webhooks, "WEBHOOK_SECONDS", 0.2)
    with socket.socket() as taken:  # so that no other test's server gets the port meanwhile
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert apologise(address)["dead_letters_by_reason"] == {"write/webhook_unreachable": 3}
    assert "Cannot connect to host" in letters(tmp_path / "out")[0].error


def test_a_service_that_is_away_is_not_asked_about_each_record(hook, monkeypatch):
    """Else a thousand records would take a thousand times as long, eight at a time."""
    monkeypatch.setattr(webhooks, "WEBHOOK_SECONDS", 0.3)
    monkeypatch.setattr(webhooks, "AWAY_SECONDS", 0.5)
    drafts = [DRAFT.model_copy(update={"draft_id": f"d{n}"}) for n in range(50)]
    hook.behave = lambda *_: Answer(502)
    poster = Poster(hook.address, [b"key"])
    errors = poster.post(drafts)
    assert {error.reason for error in errors} == {"webhook_http_502"}
    tried = {request.headers["webhook-id"] for request in hook.received}
    assert len(tried) <= 2 * webhooks.AT_ONCE
    said = f"not tried, because others have just failed: {hook.address} answered 502"
    assert str(errors[-1]).startswith(said)
    hook.behave = lambda *_: Answer()
    time.sleep(0.5)
    assert poster.post(drafts) == [None] * 50


def test_a_record_that_breaks_the_service_fails_no_other(hook, monkeypatch):
    """Others are taken meanwhile, so the service is there."""
    monkeypatch.setattr(webhooks, "WEBHOOK_SECONDS", 0.3)
    drafts = [DRAFT.model_copy(update={"draft_id": f"d{n}"}) for n in range(200)]
    hook.behave = lambda got, _: (
        time.sleep(0.02) or Answer(500 if got.record["draft_id"] == "d0" else 200)
    )
    errors = Poster(hook.address, [b"key"]).post(drafts)
    assert [n for n, error in enumerate(errors) if error] == [0]


@pytest.mark.slow
def test_a_dead_letter_that_is_refused_fails_the_bundle(hook, apologise, lines, capsys):
    """It has no other place to go."""
    hook.behave = lambda *_: Answer(404)
    with pytest.raises(SystemExit) as ended:
        apologise("", input=lines("no json", name="in.jsonl"), dead_letters=hook.address)
    assert ended.value.code == 1
    assert "the pipeline failed" in capsys.readouterr().err


def test_letters_stay_in_the_window_of_their_record(hook):
    hook.behave = lambda *_: Answer(404)
    with beam.Pipeline(runner=LOCAL_RUNNER) as pipeline:
        refused = (
            pipeline
            | beam.Create([DRAFT, ANALYSIS])
            | "At" >> beam.Map(at_its_time).with_output_types(Record)
            | beam.WindowInto(FixedWindows(60))
            | WriteRecords([hook.address], SinkSettings(webhook_secret="env:HOOK_SECRET"))
        )
        seen = refused | beam.Map(with_window) | "All" >> beam.WindowInto(GlobalWindows())
        assert_that(seen, functools.partial(keep, "seen"))
    assert sorted(KEPT["seen"]) == [("analysis_id", 60.0), ("draft_id", 0.0)]


def at_its_time(record):
    return TimestampedValue(record, 65 if isinstance(record, Analysis) else 5)


def with_window(letter, window=beam.DoFn.WindowParam):
    return next(iter(json.loads(letter.payload))), float(window.start)


def test_responses_have_a_payload_too(hook):
    """Those of `AskTexts`, which is not part of the pipeline of chats."""
    hook.behave = lambda *_: Answer(404)
    said = Response(
        response_id="r", text="a", response="b", model="m", prompt_version="v", responded_at=now()
    )
    with beam.Pipeline(runner=LOCAL_RUNNER) as pipeline:
        write = WriteRecords([hook.address], SinkSettings(webhook_secret="env:HOOK_SECRET"))
        refused = pipeline | beam.Create([said]) | write
        assert_that(refused, functools.partial(keep, "found"))
    assert Response.model_validate_json(KEPT["found"][0].payload) == said


def test_certificates_are_checked(tmp_path):
    key = make_certificate(tmp_path / "certificate.pem")
    with Hook() as hook:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "certificate.pem", key)
        hook._server.socket = context.wrap_socket(hook._server.socket, server_side=True)
        url = f"https://localhost:{hook.port}"
        (error,) = Poster(url, [b"key"]).post([DRAFT])
        assert error.reason == "webhook_certificate"
        with environment({"SSL_CERT_FILE": str(tmp_path / "certificate.pem")}):
            assert Poster(url, [b"key"]).post([DRAFT]) == [None]
    assert len(hook.received) == 1


# Secrets.


@pytest.mark.slow
def test_no_secret_is_shown_anywhere(hook, apologise, tmp_path, caplog, capfd):
    """Neither the one that signs, nor what the address may hold."""
    caplog.set_level(logging.DEBUG)
    url = f"{hook.address}/in-t0ken-of-the-path?token=t0ken-of-the-query"

    def behave(got, tries):
        echo = f"{got.path} {json.dumps(got.headers)}"
        return (
            Answer(400, echo)
            if got.record["chat_id"] == "0"
            else Answer(503 * (tries < 2) or 200, echo)
        )

    hook.behave = behave
    counts = apologise(url)
    files = "".join(path.read_text() for path in tmp_path.rglob("*.jsonl"))
    said = files + json.dumps(counts) + caplog.text + "".join(capfd.readouterr())
    assert "webhook_http_400" in said
    assert f"{hook.address} answered 400" in said
    secrets = (SECRET, SECRET[6:], "a secret of more than", "t0ken-of-the-query")
    for secret in secrets:
        assert secret not in said
    letters_of_run = "".join(path.read_text() for path in tmp_path.rglob("dead_letters*"))
    assert f"{hook.address} answered 400" in letters_of_run
    posting = [each.getMessage() for each in caplog.records if each.name.startswith("chatflow")]
    assert "of-the-path" not in letters_of_run + "".join(posting)
    sink = webhooks.PostRecords(url, "env:HOOK_SECRET")
    assert "of-the-query" not in repr(sink) + repr(WriteRecords)
    assert shown(f"--drafts={hook.address}/in?t=x,out/x") == f"--drafts={hook.address}/in?…,out/x"


def test_passwords_of_netrc_are_not_sent(hook, tmp_path, monkeypatch):
    path = tmp_path / "netrc"
    path.write_text("machine 127.0.0.1 login ada password hunter2\n")
    path.chmod(0o600)
    monkeypatch.setenv("NETRC", str(path))
    poster = Poster(f"{hook.address}/in", [b"x" * 24])
    assert poster.post([DRAFT]) == [None]
    poster.close()
    (got,) = hook.received
    assert "Authorization" not in got.headers


class SecretManager(Loopback):
    """Has one version of one secret."""

    def answer(self, method, path, body):
        if path != "/v1/projects/p/secrets/hook/versions/latest:access":
            return 404, {"error": {"code": 404, "message": "no such secret", "status": "NOT_FOUND"}}
        return 200, {"payload": {"data": base64.b64encode(SECRET.encode()).decode()}}


def test_a_secret_is_read_from_where_it_is(tmp_path):
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    keys = (b"a secret of more than 24 bytes",)
    assert read_keys("env:HOOK_SECRET") == read_keys(f"file:{tmp_path}/secret") == keys
    with SecretManager() as manager:
        where = {HOST_VARIABLE: f"127.0.0.1:{manager.port}"}
        with environment(where):
            assert read_keys("projects/p/secrets/hook/versions/latest") == keys
            with pytest.raises(UsageError, match="cannot be read: 404"):
                read_keys("projects/p/secrets/other/versions/1")


# Flags.


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--drafts=https://example.com/in"], "--webhook_secret is missing: it signs what goes "
         "to https://example.com/in. Make a secret with `echo \"whsec_$(openssl"),
        (["--drafts=https://example.com/in", f"--webhook_secret={SECRET}"],
         "--webhook_secret: must be env:NAME, file:PATH or projects/P/secrets/S/versions/V, never"),
        (["--drafts=https://example.com/in", "--webhook_secret=env:NO_SUCH"],
         "--webhook_secret=env:NO_SUCH: there is no such variable"),
        (["--drafts=https://example.com/in", "--webhook_secret=file:/no/such"],
         "--webhook_secret=file:/no/such: cannot be read"),
        (["--drafts=https://example.com/in", "--webhook_secret=env:PLAIN"],
         "must contain whsec_… with at least 24 bytes in base64"),
        (["--drafts=https://example.com/in", "--webhook_secret=env:SHORT"],
         "must contain whsec_… with at least 24 bytes in base64"),
        (["--analyses=http://example.com/in?t=x"],
         "--analyses: http://example.com/in?…: must be https://"),
        (["--dead_letters=https://me:pass@example.com/"],
         "--dead_letters: https://example.com/: must not contain a user or password"),
        (["--drafts=https:///x"],
         "--drafts: 'https:///x' is not an address; write https://HOST/PATH"),
        (["--drafts=https://example.com:port/"], "is not an address"),
        (["--drafts=http://localhost\\@example.com/"], "a user or password"),
        (["--drafts=redis://x"], "and https://… (a webhook)"),
    ],
)  # fmt: skip
def test_a_mistake_is_said_at_launch(lines, script, tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.setenv("PLAIN", "plain-text-of-the-secret")
    monkeypatch.setenv("SHORT", "whsec_c2hvcnQ=")
    source = lines(chat("x"))
    arguments = ["run", f"--input={source}", f"--output={tmp_path}/out", "--model", script(*RULES)]
    error = mistake([*arguments, *flags], {}, capsys)
    assert said in error
    for secret in (SECRET, "plain-text", "c2hvcnQ", "pass@", "t=x"):
        assert secret not in error


@pytest.mark.parametrize(
    "uri",
    ["https://example.com", "https://hooks.example.com:8443/a/b?c=d", "http://localhost:1/x",
     "http://127.0.0.1:8080", "http://[::1]:8080/x", "HTTPS://example.com/%2C"],
)  # fmt: skip
def test_what_is_taken_for_a_webhook(uri):
    webhooks.Webhook().check_uri(uri)
    assert split_destinations("drafts", f"out/drafts, {uri}", "") == ("out/drafts", uri)
