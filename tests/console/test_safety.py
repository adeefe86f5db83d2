"""The console against those who mean it harm, or have lost their access."""

import contextlib
import ipaddress
import json
import os
import re
import socket
import ssl
import stat
import subprocess
import threading

import httpx
import pytest
import sqlalchemy as sa
from conftest import ROOT, mistake
from consoles import LOCAL, Visitor, angry_chat, served, write

from chatflow.cli import main
from chatflow.commands.console import listen
from chatflow.console import app, changes, connections, people, sessions
from chatflow.console.app import Server
from chatflow.console.outbox import Publisher, ReplyFile
from chatflow.console.people import People, UsersFile
from chatflow.console.rates import Rate
from chatflow.console.retention import forget_chats_of
from chatflow.console.site import Console
from chatflow.database import connections as databases
from chatflow.database import tables
from chatflow.database.connections import Database, parse_uri
from chatflow.records import Chat, Message, now

HERE = ipaddress.ip_network("127.0.0.0/8")
TOKENS = {name: people.new_token(name, name) for name in people.ROLES}


@pytest.fixture
def users(tmp_path):
    path = tmp_path / "users.toml"
    path.write_text("".join(entry for _, entry in TOKENS.values()))
    return path


def by_token(users, **fields):
    return People("", UsersFile(str(users)), redacted=frozenset({"observer"}), **fields)


def signed_in(address, name, **headers):
    visitor = Visitor(address, **headers)
    form = visitor.form("/sign-in") | {"token": TOKENS[name][0]}
    assert visitor.post("/sign-in", form).status_code == 303
    return visitor


def rows(database, table, *columns):
    with database.read() as connection:
        return [tuple(row) for row in connection.execute(sa.select(*(table.c[c] for c in columns)))]


def port_of(address):
    return int(address.rpartition(":")[2])


def opened(address, data=b""):
    """A connection that has sent something."""
    client = socket.create_connection(("127.0.0.1", port_of(address)), timeout=20)
    client.sendall(data)
    return client


def answer_of(client):
    """All that the console sends until it ends the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65_536):
            found += part
    return found.decode()


FORM = (
    b"POST /sign-in HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    b"Content-Type: application/x-www-form-urlencoded\r\n"
)


# S1: bodies.


@pytest.mark.parametrize("length", [b"Content-Length: 999999999\r\n", b"Content-Length: 9000\r\n"])
def test_a_body_that_is_too_large_is_refused_before_it_comes(sqlite, users, length):
    with served(sqlite, by_token(users)) as address, opened(address, FORM + length + b"\r\n") as at:
        assert answer_of(at).startswith("HTTP/1.1 413 ")


def test_a_body_without_a_length_ends_at_the_limit(sqlite, users):
    chunk = b"1000\r\n" + b"&" * 4096 + b"\r\n"
    with served(sqlite, by_token(users)) as address:
        head = FORM + b"Transfer-Encoding: chunked\r\n\r\n"
        with opened(address, head + chunk * 3) as client:
            assert client.recv(100).startswith(b"HTTP/1.1 413 ")


def test_separators_without_fields_are_counted(sqlite, users):
    with served(sqlite, by_token(users)) as address:
        visitor = Visitor(address)
        form = {"content": "&" * 5000, "headers": {"Content-Type": FORM_TYPE}}
        assert visitor.client.post("/sign-in", **form).status_code == 400


FORM_TYPE = "application/x-www-form-urlencoded"


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "application/json", ""])
def test_other_kinds_of_forms_are_refused(sqlite, users, kind):
    with served(sqlite, by_token(users)) as address:
        headers = {"Content-Type": kind} if kind else {}
        answer = Visitor(address).client.post("/sign-in", content=b"token=x", headers=headers)
        assert answer.status_code == 415


def test_a_field_that_is_there_twice_is_refused(sqlite, users):
    with served(sqlite, by_token(users)) as address:
        headers = {"Content-Type": FORM_TYPE}
        answer = Visitor(address).client.post("/sign-in", content=b"to=/&to=/", headers=headers)
        assert answer.status_code == 400


def test_the_longest_reply_passes(sqlite):
    write(sqlite, *angry_chat(1))
    with served(sqlite) as address:
        text = "字" * 10_000
        assert Visitor(address).decide("d1r0", "approve", text=text).status_code == 303


# S2: what people may not read cannot be tried out.


def test_a_page_has_nothing_by_which_a_text_can_be_guessed(sqlite, users):
    chat, *rest = angry_chat(1, text="my PIN is 482913")
    write(sqlite, chat, *rest)
    other = Database(sqlite.uri.replace("console.db", "other.db"))
    other.upgrade()
    write(other, chat, *rest)
    marks = set()
    for database in (sqlite, other):  # the same chat has another mark where the key is another
        with served(database, by_token(users)) as address:
            page = signed_in(address, "observer").get("/drafts/d1r0").text
            assert "482913" not in page
            marks.add(re.search(r'data-chat="([^"]+)"', page)[1])
            assert (
                re.search(r'data-chat="([^"]+)"', page)[1]
                in signed_in(address, "lead").get("/drafts/d1r0").text
            )
    other.close()
    assert len(marks) == 2


# S3: what is said to be sent is sent.


def test_a_chat_that_comes_again_has_another_reply(sqlite, tmp_path):
    path = tmp_path / "replies.jsonl"
    for text in ("FIRST", "SECOND"):
        with sqlite.write() as connection:
            for table in (tables.drafts, tables.outbox):
                connection.execute(sa.delete(table))
        write(sqlite, *angry_chat(1))
        with served(sqlite, undo_seconds=0) as address:
            Visitor(address).decide("d1r0", "approve", text=text)
        assert Publisher(sqlite, ReplyFile(str(path))).publish() == 1
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [reply["text"] for reply in found] == ["FIRST", "SECOND"]
    assert {reply["draft_id"] for reply in found} == {"d1r0"}


# S4: nothing secret by plain HTTP.


def test_a_cookie_from_elsewhere_is_for_https_alone(sqlite, users):
    known = by_token(users, proxies=[HERE])
    with served(sqlite, known, hosts=["desk.example.com"]) as address:
        visitor = Visitor(address, Host="desk.example.com", **{"X-Forwarded-Proto": "https"})
        answer = visitor.get("/sign-in")
        assert answer.headers["set-cookie"].startswith("__Host-chatflow_session=")
        assert "Secure" in answer.headers["set-cookie"]
        policy = answer.headers["strict-transport-security"]
        assert policy == "max-age=31536000; includeSubDomains"


@pytest.mark.parametrize(
    ("proxies", "headers"),
    [([HERE], {}), ([HERE], {"X-Forwarded-Proto": "http"}), ([], {"X-Forwarded-Proto": "https"})],
)
def test_nobody_signs_in_by_plain_http_from_elsewhere(sqlite, users, proxies, headers):
    known = by_token(users, proxies=proxies)
    with served(sqlite, known, hosts=["desk.example.com"]) as address:
        bearer = {"Authorization": f"Bearer {TOKENS['lead'][0]}"}
        for path in ("/", "/sign-in"):
            answer = Visitor(address, Host="desk.example.com", **headers, **bearer).get(path)
            assert (answer.status_code, "Use https://" in answer.text) == (403, True)
        assert Visitor(address, Host="desk.example.com").get("/healthz").status_code == 200


@pytest.fixture
def certificate(tmp_path):
    paths = [str(tmp_path / name) for name in ("cert.pem", "key.pem")]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
         "-out", paths[0], "-keyout", paths[1]],
        check=True, capture_output=True,
    )  # fmt: skip
    return paths


def test_it_serves_https(sqlite, users, certificate):
    write(sqlite, *angry_chat(1))
    listener = listen("127.0.0.1", 0)
    server = Server(Console(sqlite, by_token(users)), listener, *certificate)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        trusted = ssl.create_default_context(cafile=certificate[0])
        address = f"https://localhost:{listener.getsockname()[1]}"
        with httpx.Client(base_url=address, verify=trusted) as client:
            answer = client.get("/sign-in")
            assert answer.headers["set-cookie"].startswith("__Host-chatflow_session=")
            old = ssl.create_default_context(cafile=certificate[0])
            old.maximum_version = ssl.TLSVersion.TLSv1_1
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{address}/sign-in", verify=old)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--host 0.0.0.0 --users USERS", "--host=0.0.0.0: others would sign in by plain HTTP"),
        ("--tls_cert x.pem", "--tls_cert and --tls_key: give both, or neither"),
        ("--tls_cert USERS --tls_key USERS", "--tls_cert="),
        ("--identity_header X-User", "--identity_header=X-User: nobody has a role"),
        ("--proxy_secret env:NOT_THERE", "--proxy_secret=env:NOT_THERE: there is no such variable"),
        ("--proxy_secret file:EMPTY", "the secret is empty"),
        ("--audit_log /nowhere/audit.jsonl", "--audit_log=/nowhere/audit.jsonl: cannot be written"),
        ("--users TWICE", "ada is there twice, in different case"),
    ],
)
def test_unsafe_flags_are_said(arguments, said, users, tmp_path, capsys):
    twice = tmp_path / "twice.toml"
    twice.write_text('[ada]\nrole = "lead"\n[Ada]\nrole = "lead"\n')
    given = ["console", "--port=0", f"--database=sqlite:///{tmp_path}/console.db"]
    empty = tmp_path / "empty"
    empty.write_text("\n")
    arguments = arguments.replace("EMPTY", str(empty))
    paths = {"USERS": str(users), "TWICE": str(twice)}
    assert said in mistake([*given, *arguments.split()], paths, capsys)


# S5: who comes in is noted, and guessing is slow.


def audited(console_address, **query):
    page = signed_in(console_address, "lead").client.get("/audit", params=query).text
    cells = re.findall(r"<td>(.*?)</td>", page.partition("</section>")[0], re.DOTALL)
    text = [re.sub(r"<[^>]+>", "", cell).strip() for cell in cells]
    return [tuple(text[at + 1 : at + 5]) for at in range(0, len(text), 5)]


def test_the_audit_log_says_who_came_in_and_what_they_took(sqlite, users, tmp_path):
    write(sqlite, *angry_chat(1))
    log = tmp_path / "audit.jsonl"
    with served(sqlite, by_token(users), audit_log=str(log)) as address:
        visitor = Visitor(address)
        visitor.post("/sign-in", visitor.form("/sign-in") | {"token": "guess"})
        lead = signed_in(address, "lead")
        lead.get("/drafts/d1r0")
        lead.client.get("/drafts/d1r0", headers={"Sec-Fetch-Dest": "empty"})  # it refreshes itself
        lead.get("/labelled.jsonl")
        agent = signed_in(address, "agent")
        assert agent.get("/labelled.jsonl").status_code == 403
        assert agent.get("/audit").status_code == 403
        agent.post("/sign-out", agent.form("/"))
        found = audited(address)
    expected = [
        ("", "failed to sign in", "127.0.0.1", "token"),
        ("", "was refused", "127.0.0.1", "403 POST /sign-in"),
        ("lead", "signed in", "127.0.0.1", "token"),
        ("lead", "read a chat", "127.0.0.1", "draft d1r0 of chat chat-1"),
        ("lead", "exported labelled chats", "127.0.0.1", "labelled.jsonl"),
        ("agent", "signed in", "127.0.0.1", "token"),
        ("agent", "was refused", "127.0.0.1", "403 GET /labelled.jsonl"),
        ("agent", "was refused", "127.0.0.1", "403 GET /audit"),
        ("agent", "signed out", "127.0.0.1", ""),
        ("lead", "signed in", "127.0.0.1", "token"),
    ]
    assert found == expected[::-1]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["who"] for line in lines] == [who for who, *_ in expected]
    assert set(lines[0]) == {"at", "who", "action", "address", "what"}
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    for secret in (*(token for token, _ in TOKENS.values()), "guess"):
        assert secret not in log.read_text()


def test_the_audit_log_can_be_narrowed_down(sqlite, users):
    with served(sqlite, by_token(users)) as address:
        signed_in(address, "agent")
        assert audited(address, who="agent") == [("agent", "signed in", "127.0.0.1", "token")]
        assert audited(address, action="exported") == []


def test_who_guesses_has_to_wait(sqlite, users):
    with served(sqlite, by_token(users)) as address:
        visitor = Visitor(address)
        form = visitor.form("/sign-in")
        found = [
            visitor.post("/sign-in", form | {"token": f"guess {number}"}).status_code
            for number in range(12)
        ]
        assert found == [403] * 10 + [429] * 2
        right = visitor.post("/sign-in", form | {"token": TOKENS["lead"][0]})
        assert (right.status_code, "Wait a minute" in right.text) == (429, True)
        bearer = {"Authorization": f"Bearer {TOKENS['lead'][0]}"}
        assert httpx.get(f"{address}/", headers=bearer).status_code == 429


def test_each_client_of_a_proxy_has_an_address(sqlite, users):
    with served(sqlite, by_token(users, proxies=[HERE])) as address:
        for client in ("203.0.113.9", "203.0.113.10"):
            forwarded = {"X-Forwarded-For": f"evil, 198.51.100.1, {client}, 127.0.0.9"}
            visitor = Visitor(address, **forwarded)
            form = visitor.form("/sign-in") | {"token": "guess"}
            found = [visitor.post("/sign-in", form).status_code for _ in range(11)]
            assert found == [403] * 10 + [429]
        addresses = {entry[2] for entry in audited(address, action="sign_in_failed")}
    assert addresses == {"203.0.113.9", "203.0.113.10"}
    with served(sqlite, by_token(users)) as address:  # nobody else may say who they are
        visitor = Visitor(address, **{"X-Forwarded-For": "203.0.113.9"})
        visitor.post("/sign-in", visitor.form("/sign-in") | {"token": "guess"})
        assert audited(address, action="sign_in_failed")[0][2] == "127.0.0.1"


def test_a_flood_of_refusals_is_not_noted_one_by_one(sqlite, users):
    with served(sqlite, by_token(users)) as address:
        client = httpx.Client(base_url=address)
        for _ in range(100):
            client.get("/", headers={"Host": "evil.example"})
        found = audited(address, action="refused")
    assert len(found) == 61
    assert found[0][3] == "more from this address is not noted for a minute"


def test_an_entry_that_a_database_refuses_stops_no_other(database, users):
    """PostgreSQL holds no NUL characters."""
    with served(database, by_token(users)) as address:
        assert httpx.get(f"{address}/%00").status_code == 400
        lead = signed_in(address, "lead")
        searched = lead.post("/search", lead.form("/") | {"q": "\0late"})
        assert lead.get(searched.headers["Location"]).status_code == 200
        found = audited(address, action="refused") + audited(address, action="signed_in")
    assert ("400 GET /\N{REPLACEMENT CHARACTER}" in {what for *_, what in found}) is True
    assert "lead" in {who for who, *_ in found}


def test_a_page_whose_session_has_ended_does_not_fill_the_log(sqlite, users):
    with served(sqlite, by_token(users)) as address:
        for _ in range(3):
            assert httpx.get(f"{address}/changes").status_code == 401
        assert audited(address, action="refused") == []


def test_another_site_cannot_make_an_office_wait(sqlite, users):
    """By pictures whose address is that of a sign-in with a wrong code."""
    with served(sqlite, by_token(users)) as address:
        for _ in range(20):
            httpx.get(f"{address}/sign-in?code=guess")
        assert signed_in(address, "agent").get("/").status_code == 200


@pytest.mark.parametrize(
    ("said", "known"),
    [("::ffff:203.0.113.9", "203.0.113.9"), ("203.0.113.9:51234", "203.0.113.9"),
     ("[2001:db8::1]:443", "2001:db8::1")],
)  # fmt: skip
def test_an_address_is_one_however_a_proxy_writes_it(sqlite, users, said, known):
    with served(sqlite, by_token(users, proxies=[HERE])) as address:
        visitor = Visitor(address, **{"X-Forwarded-For": said})
        visitor.post("/sign-in", visitor.form("/sign-in") | {"token": "guess"})
        assert audited(address, action="sign_in_failed")[0][2] == known


def test_a_name_is_not_mistaken_for_one_that_looks_alike():
    known = People("", {"mike": {"role": "lead"}}, openid=True, default_role="observer")
    assert known.person("MIKE").role == "lead"
    assert known.person("mi\N{KELVIN SIGN}e").role == "observer"
    assert known.person("o'brien@example.com").role == "observer"
    assert known.person("auth0|5f7c").role == "observer"


def test_a_network_of_ipv6_is_one_address():
    rate = Rate(1)
    assert [rate.count("2001:db8::1"), rate.count("2001:db8::2"), rate.count("2001:db9::1")] == [
        0, 1, 0,
    ]  # fmt: skip


# S6: who has no access any more is out.


def test_who_is_taken_out_of_the_users_is_out_at_once(sqlite, users, caplog):
    with served(sqlite, by_token(users)) as address:
        agent, lead = signed_in(address, "agent"), signed_in(address, "lead")
        users.write_text(TOKENS["lead"][1])
        assert agent.get("/").status_code == 303
        form = agent.form("/sign-in") | {"token": TOKENS["agent"][0]}
        assert agent.post("/sign-in", form).status_code == 403
        assert lead.get("/").status_code == 200
        users.write_text(TOKENS["lead"][1].replace('"lead"', '"observer"'))
        assert lead.get("/labelled.jsonl").status_code == 403
        users.write_text("[half a")  # somebody writes it just now
        assert lead.get("/").status_code == 200
    assert "is not TOML" in caplog.text


def test_a_token_expires(sqlite, users):
    today = now().date()
    text = users.read_text()
    assert f"expires = {today + people.TOKEN}" in text
    with served(sqlite, by_token(users)) as address:
        agent = signed_in(address, "agent")
        users.write_text(re.sub(r"expires = .*", f"expires = {today}", text))
        assert agent.get("/").status_code == 200
        users.write_text(re.sub(r"expires = .*", "expires = 2026-01-01", text))
        assert agent.get("/").status_code == 303
        assert 'name="token"' in agent.get("/sign-in").text  # also when those of all have
        form = agent.form("/sign-in") | {"token": TOKENS["agent"][0]}
        assert agent.post("/sign-in", form).status_code == 403


def test_every_answer_says_its_characters(sqlite, users):
    write(sqlite, *angry_chat(1))
    with served(sqlite, by_token(users)) as address:
        lead = signed_in(address, "lead")
        lead.decide("d1r0", "dismiss", reason="not_angry_neutral")
        paths = ("/", "/labelled.jsonl", "/healthz", "/nothing", "/static/icon.svg",
                 "/static/console.css", "/static/console.js")  # fmt: skip
        for path in paths:
            assert "charset=utf-8" in lead.get(path).headers["content-type"], path
        known = {"If-None-Match": lead.get("/static/icon.svg").headers["etag"]}
        assert lead.client.get("/static/icon.svg", headers=known).status_code == 304


def test_a_person_who_does_nothing_is_signed_out(sqlite, users):
    with served(sqlite, by_token(users)) as address:
        visitor = signed_in(address, "agent")

        def seen(minutes):
            with sqlite.write() as connection:
                moment = now() - sessions.IDLE * (minutes / 30)
                connection.execute(sa.update(tables.sessions).values(seen_at=moment))

        seen(29)
        refresh = {"Sec-Fetch-Dest": "empty"}
        assert visitor.client.get("/", headers=refresh).status_code == 200  # not a visit
        ((before,),) = rows(sqlite, tables.sessions, "seen_at")
        assert before < now() - sessions.IDLE * (28 / 30)
        assert visitor.get("/").status_code == 200
        ((after,),) = rows(sqlite, tables.sessions, "seen_at")
        assert after > before
        seen(31)
        assert visitor.get("/").status_code == 303


def test_signing_in_again_ends_the_session_before(sqlite, users):
    with served(sqlite, by_token(users)) as address:
        visitor = signed_in(address, "agent")
        before = dict(visitor.client.cookies)
        form = {"csrf": visitor.form("/")["csrf"], "token": TOKENS["lead"][0]}
        assert visitor.post("/sign-in", form).status_code == 303
        assert httpx.get(f"{address}/", cookies=before).status_code == 401
        assert rows(sqlite, tables.sessions, "who") == [("lead",)]


def test_people_see_and_end_their_sessions_and_leads_those_of_all(sqlite, users):
    with served(sqlite, by_token(users)) as address:
        first, second = signed_in(address, "agent"), signed_in(address, "agent")
        lead = signed_in(address, "lead")
        page = first.get("/sessions").text
        assert (page.count("<td>agent"), page.count("<td>lead")) == (2, 0)
        assert page.count("this one") == 1
        assert lead.get("/sessions").text.count("<td>agent") == 2
        csrf = first.form("/sessions")["csrf"]
        keys = dict(rows(sqlite, tables.sessions, "who", "session_hash"))
        first.post("/sessions", {"csrf": csrf, "key": keys["lead"]})  # not theirs
        first.post("/sessions", {"csrf": csrf, "who": "lead"})
        assert lead.get("/").status_code == 200
        with sqlite.write() as connection:
            connection.execute(sa.update(tables.sessions).values(began_at=now() - sessions.NEW))
        refused = first.post("/sessions", {"csrf": csrf, "who": "agent"})
        assert (refused.status_code, "sign out and in again" in refused.text) == (403, True)
        with sqlite.write() as connection:
            connection.execute(sa.update(tables.sessions).values(began_at=now()))
        other = people.digest_of(second.client.cookies["chatflow_session"])
        assert first.post("/sessions", {"csrf": csrf, "key": other}).status_code == 303
        assert second.get("/").status_code == 303
        assert first.get("/").status_code == 200
        lead.post("/sessions", {"csrf": lead.form("/sessions")["csrf"], "who": "agent"})
        assert first.get("/").status_code == 303


# S7: limits for time, connections and streams.


@pytest.mark.parametrize(
    "data",
    [b"", b"GET / HTTP/1.1\r\nHost: 127", FORM + b"Content-Length: 100\r\n\r\ntoken="],
    ids=["nothing", "half a head", "half a body"],
)
def test_a_request_must_be_complete_in_time(sqlite, users, data, monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.2)
    with served(sqlite, by_token(users)) as address, opened(address, data) as client:
        assert answer_of(client) == ""


def test_a_second_request_must_be_complete_too(sqlite, users, monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.5)
    data = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /hea"
    with served(sqlite, by_token(users)) as address, opened(address, data) as client:
        assert answer_of(client).count("200 OK") == 1


def test_who_waits_longest_for_a_request_makes_room(sqlite, users, monkeypatch):
    monkeypatch.setattr(connections, "CONNECTIONS", 20)
    with served(sqlite, by_token(users)) as address, contextlib.ExitStack() as stack:
        first = stack.enter_context(opened(address, b"GET"))
        for _ in range(40):
            stack.enter_context(opened(address, b"GET"))
        assert httpx.get(f"{address}/healthz").text == "ok\n"
        assert answer_of(first) == ""


def test_a_client_that_reads_nothing_is_cut_off(sqlite, monkeypatch):
    monkeypatch.setattr(connections, "STALLED_SECONDS", 0.2)
    write(sqlite, *angry_chat(1, text="x" * 4_000_000))
    with served(sqlite) as address:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port_of(address)))
        client.settimeout(20)
        with client:
            client.sendall(b"GET /drafts/d1r0 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            threading.Event().wait(1)  # it does not read meanwhile
            assert len(answer_of(client)) < 4_000_000


def test_large_heads_are_refused(sqlite, users):
    with served(sqlite, by_token(users)) as address:
        head = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 40_000
        with opened(address, head) as client:
            assert answer_of(client).startswith("HTTP/1.1 4")


def test_streams_are_counted(sqlite, users, monkeypatch):
    monkeypatch.setattr(changes, "OF_SESSION", 3)
    monkeypatch.setattr(changes, "STREAMS", 4)
    with served(sqlite, by_token(users)) as address, contextlib.ExitStack() as stack:
        agent, lead = signed_in(address, "agent"), signed_in(address, "lead")
        of_agent = [
            stack.enter_context(agent.client.stream("GET", "/changes")).status_code
            for _ in range(4)
        ]
        assert of_agent == [200, 200, 200, 503]
        of_lead = [
            stack.enter_context(lead.client.stream("GET", "/changes")).status_code for _ in range(2)
        ]
        assert of_lead == [200, 503]


@pytest.mark.parametrize("how", ["sign out", "a lead ends it", "not a user any more"])
def test_a_stream_ends_with_its_session(sqlite, users, how, monkeypatch):
    monkeypatch.setattr(changes, "CHECK_SECONDS", 0.2)
    with served(sqlite, by_token(users)) as address:
        agent, lead = signed_in(address, "agent"), signed_in(address, "lead")
        with agent.client.stream("GET", "/changes", timeout=20) as stream:
            parts = stream.iter_text()
            assert next(parts).startswith("retry")
            if how == "sign out":
                agent.post("/sign-out", agent.form("/"))
            elif how == "a lead ends it":
                lead.post("/sessions", {"csrf": lead.form("/sessions")["csrf"], "who": "agent"})
            else:
                users.write_text(TOKENS["lead"][1])
            for _ in parts:  # until it ends
                pass


# S8: a colleague's words are seen before they are overwritten.


def test_nobody_overwrites_the_words_of_a_colleague_unseen(sqlite, users):
    write(sqlite, *angry_chat(1))
    with served(sqlite, by_token(users)) as address:
        agent, lead = signed_in(address, "agent"), signed_in(address, "lead")
        form = agent.form("/drafts/d1r0") | {"text": "My words."}
        lead.decide("d1r0", "save", text="Never promise a refund!")
        answer = agent.post("/drafts/d1r0/approve", form)
        assert answer.status_code == 409
        for said in ("My words.", "Never promise a refund!", "<b>lead</b> has written meanwhile"):
            assert said in answer.text
        fields = re.search(r'<form method="post" id="reply".*?</form>', answer.text, re.DOTALL)[0]
        hidden = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', fields))
        assert "version" not in hidden
        # A second press alone is not enough.
        again = agent.post("/drafts/d1r0/approve", hidden | {"text": "My words."})
        assert again.status_code == 409
        assert "Never promise a refund!" in again.text
        chosen = re.search(r'type="checkbox" name="version" value="(\d+)" required', fields)[1]
        sent = agent.post("/drafts/d1r0/approve", hidden | {"text": "Mine.", "version": chosen})
        assert sent.status_code == 303


# S9: a machine with several users.


def test_without_users_the_printed_address_signs_in(sqlite):
    with served(sqlite, People("ada", code="the-code")) as address:
        stranger = Visitor(address)
        for path in ("/", "/labelled.jsonl"):
            assert stranger.get(path).status_code == 303
        assert stranger.get("/sign-in?code=guess").status_code == 403
        visitor = Visitor(f"{address}/sign-in?code=the-code")
        assert "ada" in visitor.get("/").text
        form = stranger.form("/sign-in") | {"token": "the-code"}
        assert stranger.post("/sign-in", form).status_code == 303
    with served(sqlite, People("ada", code="another")) as address:  # the console starts again
        cookies = dict(visitor.client.cookies)
        assert httpx.get(address, cookies=cookies).status_code == 401


@pytest.mark.parametrize("name", ["X-Forwarded-For", "X-Forwarded-Host", "Forwarded", "Via"])
def test_without_users_nothing_comes_by_a_proxy(sqlite, name):
    for known in (LOCAL, People("ada", code="the-code")):
        with served(sqlite, known) as address:
            answer = Visitor(address, **{name: "203.0.113.9"}).get("/")
            assert (answer.status_code, "A proxy has passed" in answer.text) == (403, True)


def test_files_are_for_their_owner(tmp_path):
    old = os.umask(0o022)
    try:
        database = Database(f"sqlite:///{tmp_path}/chatflow.db")
        database.upgrade()
        write(database, *angry_chat(1))
        with served(database, replies=ReplyFile(str(tmp_path / "replies.jsonl"))) as address:
            Visitor(address).decide("d1r0", "dismiss", reason="not_angry_neutral")
            export = tmp_path / "labelled.jsonl"
            assert main(["console", f"--database={database.uri}", f"--export={export}"]) == 0
            modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
        database.close()
    finally:
        os.umask(old)
    assert {"chatflow.db", "chatflow.db-wal", "replies.jsonl", "labelled.jsonl"} <= set(modes)
    modes.pop("replies.jsonl.lock")  # it is empty
    assert set(modes.values()) == {0o600}


# S10: what proxies say.


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("ada", 200),
        ("ADA", 200),
        ("ada, mallory", 403),
        ("a b", 403),
        ("a" * 300, 403),
        ("mallory", 403),
    ],
)
def test_a_proxy_says_one_name_of_a_user(sqlite, said, status):
    known = People("", {"Ada": {"role": "agent"}}, "X-User", [HERE])
    with served(sqlite, known) as address:
        answer = Visitor(address, **{"X-User": said}).get("/")
        assert answer.status_code == status
        if status == 200:
            assert "Ada <small>agent" in answer.text


def test_a_proxy_may_have_to_know_a_secret(sqlite):
    known = People("", {}, "X-User", [HERE], default_role="observer", proxy_secret="s3cret")
    with served(sqlite, known) as address:
        for secret, status in (("s3cret", 200), ("guess", 403), ("", 403)):
            headers = {"X-User": "Eve@example.com", "X-Chatflow-Proxy-Secret": secret}
            answer = Visitor(address, **headers).get("/")
            assert answer.status_code == status
        assert "eve@example.com" in Visitor(address, **headers | {
            "X-Chatflow-Proxy-Secret": "s3cret"
        }).get("/").text  # fmt: skip


def test_folded_headers_are_refused(sqlite):
    known = People("", {}, "X-User", [HERE], default_role="agent")
    head = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-User: a\r\n b\r\n\r\n"
    with served(sqlite, known) as address, opened(address, head) as client:
        assert answer_of(client).startswith("HTTP/1.1 400 ")


# S11, S12: cookies.


def test_an_empty_cookie_is_none(sqlite, users):
    with served(sqlite, by_token(users)) as address:
        visitor = Visitor(address)
        visitor.client.cookies.set("chatflow_session", "")
        assert "set-cookie" in visitor.get("/sign-in").headers
        visitor.client.cookies.clear()
        signed_in(address, "lead")


def test_who_plants_a_cookie_cannot_make_its_forms(sqlite):
    """Two people behind a proxy, and a cookie that one of them gave to the other."""
    write(sqlite, *angry_chat(1))
    known = People("", {}, "X-User", [HERE], default_role="agent")
    with served(sqlite, known) as address:
        planted = {"chatflow_session": "planted"}
        mallory, ada = (Visitor(address, **{"X-User": name}) for name in ("mallory", "ada"))
        for visitor in (mallory, ada):
            visitor.client.cookies.update(planted)
        form = mallory.form("/drafts/d1r0") | {"text": "Evil"}
        assert ada.post("/drafts/d1r0/approve", form).status_code == 403


def test_a_cookie_that_is_there_twice_is_none(sqlite, users):
    with served(sqlite, by_token(users)) as address:
        value = signed_in(address, "lead").client.cookies["chatflow_session"]
        twice = {"Cookie": f"chatflow_session=planted; chatflow_session={value}"}
        assert httpx.get(address, headers=twice).status_code == 401


# S13: whose clock.


def test_the_time_to_undo_does_not_go_by_the_browsers_clock(sqlite, tmp_path):
    write(sqlite, *angry_chat(1))
    replies = ReplyFile(str(tmp_path / "replies.jsonl"))
    with served(sqlite, undo_seconds=300, replies=replies) as address:
        visitor = Visitor(address)
        page = visitor.get(visitor.decide("d1r0", "approve", text="Sorry!").headers["location"])
        seconds = float(re.search(r'data-seconds="([\d.]+)"', page.text)[1])
        assert 200 < seconds <= 300


# S14: who waits longest.


def test_a_draft_that_is_written_anew_does_not_wait_for_less_time(database):
    chat, analysis, draft = angry_chat(1)
    write(database, chat, analysis, draft, *angry_chat(2))
    write(database, analysis, draft.model_copy(update={"text": "Anew.", "drafted_at": now()}))
    with served(database) as address:
        page = Visitor(address).get("/").text
    assert re.findall(r'id="draft-([^"]+)"', page) == ["d1r0", "d2r0"]
    since = dict(rows(database, tables.drafts, "draft_id", "waits_since"))
    assert since["d1r0"] == chat.messages[0].sent_at


# S15: noise.


def test_a_form_that_breaks_off_is_not_an_error(sqlite, users, caplog):
    with served(sqlite, by_token(users)) as address:
        opened(address, FORM + b"Content-Length: 100\r\n\r\ntoken=").close()
        assert httpx.get(f"{address}/healthz").text == "ok\n"
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


# S16: what texts look like.


def test_characters_that_nobody_sees_are_shown(sqlite):
    chat, analysis, draft = angry_chat(1)
    fake = Message(user_id="kim\u202e agent", text="refund\u200b \u202eyou")
    write(sqlite, chat.model_copy(update={"messages": (*chat.messages, fake)}), analysis,
          draft.model_copy(update={"text": "We \u2066are sorry."}))  # fmt: skip
    with served(sqlite) as address:
        page = Visitor(address).get("/drafts/d1r0").text
    assert "<bdi>kim⟨U+202E⟩ agent</bdi>" in page
    assert "refund⟨U+200B⟩ ⟨U+202E⟩you" in page
    assert '<bdi>kim</bdi> <span class="role">agent</span>' in page
    assert "characters that nobody sees: U+2066" in page
    assert "\u202e" not in page


# S19, S20: what stays behind.


def test_signing_out_clears_what_the_browser_keeps(sqlite, users):
    with served(sqlite, by_token(users)) as address:
        visitor = signed_in(address, "agent")
        answer = visitor.post("/sign-out", visitor.form("/"))
        assert answer.headers["clear-site-data"] == '"cache", "storage"'


def test_addresses_do_not_say_what_is_searched_for(sqlite, users):
    write(sqlite, *angry_chat(1, text="I am maria.lopez@example.com"), *angry_chat(2))
    with served(sqlite, by_token(users)) as address:
        visitor = signed_in(address, "agent")
        form = {"csrf": visitor.form("/")["csrf"], "q": "maria.lopez@", "attribute": "tenant=bolt"}
        place = visitor.post("/search", form | {"sort": "oldest"}).headers["location"]
        assert place.startswith("/?sort=oldest&sealed=")
        page = visitor.get(place).text
        assert re.findall(r'id="draft-([^"]+)"', page) == ["d1r0"]
        assert 'value="maria.lopez@"' in page
        for link in re.findall(r'(?:href|action)="([^"]+)"', page):
            assert "maria" not in link
            assert "bolt" not in link
        changed = place[:-5] + "AAAA="
        assert len(re.findall(r'id="draft-([^"]+)"', visitor.get(changed).text)) == 2


def test_ids_and_attributes_can_be_masked(sqlite, users):
    write(sqlite, *angry_chat(1))
    with served(sqlite, by_token(users, masks_ids=True)) as address:
        observer, agent = signed_in(address, "observer"), signed_in(address, "agent")
        agent.decide("d1r0", "save", text="Half a")
        for path in ("/", "/drafts/d1r0", "/history", "/dashboard"):
            page = observer.get(path).text
            for said in ("chat-1", "customer-1", "kim", "bolt"):
                assert said not in page, (path, said)
            if path != "/dashboard":
                assert "•" in page
        # A search does not tell, either.
        assert 'id="draft-' in observer.get("/?q=no-such-id").text
        assert "chat-1" in agent.get("/").text


# S21: databases elsewhere.


@pytest.mark.parametrize(
    ("uri", "mode"),
    [
        ("postgresql+psycopg://u@db.example.com/x", "verify-full"),
        ("postgresql+psycopg://u@db.example.com/x?sslmode=require", "require"),
        ("postgresql+psycopg://u@localhost/x", None),
        ("postgresql+psycopg://u@/x?host=/run/postgresql", None),
        ("postgresql+psycopg://u@/x?host=db.example.com", "verify-full"),
    ],
)
def test_a_database_elsewhere_is_reached_by_tls(uri, mode, monkeypatch):
    for name in ("PGSSLMODE", "PGSSLROOTCERT"):
        monkeypatch.delenv(name, raising=False)
    found = parse_uri(uri).query
    assert found.get("sslmode") == mode
    assert found.get("sslrootcert") == ("system" if mode == "verify-full" else None)


# S22: deleting.


def test_all_of_a_customer_is_deleted(database, tmp_path):
    for number in (1, 2, 3):
        write(database, *angry_chat(number))
    write(database, Chat(chat_id="other", messages=[Message(user_id="customer-1", text="Hi")]))
    path = tmp_path / "replies.jsonl"
    replies = ReplyFile(str(path))
    with served(database, undo_seconds=0) as address:
        for number in (1, 2):
            Visitor(address).decide(f"d{number}r0", "approve", text="Sorry!")
    assert Publisher(database, replies).publish() == 2
    assert forget_chats_of(database, database, "customer-1") == ["chat-1", "other"]
    assert replies.remove(["chat-1", "other"]) == 1
    assert [json.loads(line)["chat_id"] for line in path.read_text().splitlines()] == ["chat-2"]
    for table in (tables.chats, tables.drafts, tables.analyses, tables.customers, tables.outbox):
        keys = [str(row) for row in rows(database, table, *(c.name for c in table.columns))]
        assert not any("customer-1" in key for key in keys), table.name
    assert {row[0] for row in rows(database, tables.chats, "chat_id")} == {"chat-2", "chat-3"}


def test_the_command_deletes_a_customer(sqlite, capsys):
    write(sqlite, *angry_chat(1))
    arguments = [f"--database={sqlite.uri}", "--forget_customer=customer-1"]
    assert main(["console", *arguments]) == 0
    assert "1 chats deleted" in capsys.readouterr().out
    assert rows(sqlite, tables.chats, "chat_id") == []


@pytest.mark.parametrize("new_database", ["postgresql"], indirect=True)
def test_old_is_what_the_databases_clock_says(database, monkeypatch):
    monkeypatch.setattr(databases, "now", lambda: pytest.fail("the clock of this machine"))
    assert abs((app._time_of(database) - now()).total_seconds()) < 60


# S23, S24: requests that can be read in two ways.


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1/static/x?", "127.0.0.1:abc", "evil.com@127.0.0.1", "127.0.0.1:1:2", "127.0.0.1 x"],
)
def test_a_host_is_a_name_and_a_port(sqlite, host):
    with served(sqlite) as address:
        assert Visitor(address, Host=host).get("/").status_code == 400


def test_two_hosts_are_refused(sqlite):
    head = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n"
    with served(sqlite) as address, opened(address, head) as client:
        assert client.recv(100).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "data",
    [
        FORM + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /healthz HTTP/1.1\nHost: 127.0.0.1\n\n",
        b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX: a\nY: b\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX: a\rY: b\r\n\r\n",
    ],
    ids=["two lengths", "lines end with LF", "one line ends with LF", "a lone CR"],
)
def test_ambiguous_requests_end_the_connection(sqlite, users, data):
    with served(sqlite, by_token(users)) as address, opened(address, data) as client:
        assert answer_of(client).startswith("HTTP/1.1 400 ")


def test_a_head_may_come_in_pieces(sqlite):
    with served(sqlite) as address, opened(address) as client:
        for part in (b"GET /healthz HTTP/1.1\r", b"\nHost: x\r\nConnection: close\r", b"\n\r\n"):
            client.sendall(part)
            threading.Event().wait(0.05)
        assert answer_of(client).startswith("HTTP/1.1 200 ")


@pytest.mark.parametrize("method", ["TRACE", "OPTIONS", "PUT", "DELETE", "CONNECT"])
def test_other_methods_are_refused(sqlite, users, method):
    with served(sqlite, by_token(users)) as address:
        visitor = signed_in(address, "lead")
        for path in ("/", "/labelled.jsonl", "/sign-in", "/drafts/d1r0/approve"):
            assert visitor.client.request(method, path).status_code in (400, 405), path


def test_the_page_about_security_names_tests_that_there_are():
    page = (ROOT / "docs" / "reference" / "console-security.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "console").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 50
    assert named - set(re.findall(r"def (test_\w+)", tests)) == set()


# S25: links.


def test_a_link_offers_to_undo_only_what_one_did_just_now(sqlite, users):
    write(sqlite, *angry_chat(1), *angry_chat(2))
    with served(sqlite, by_token(users)) as address:
        agent, lead = signed_in(address, "agent"), signed_in(address, "lead")
        agent.decide("d1r0", "dismiss", reason="other")
        assert 'id="toast"' in agent.get("/?decided=d1r0").text
        assert 'id="toast"' not in lead.get("/?decided=d1r0").text
        with sqlite.write() as connection:
            long_ago = now() - sessions.LONGEST
            connection.execute(sa.update(tables.drafts).values(decided_at=long_ago))
        assert 'id="toast"' not in agent.get("/?decided=d1r0").text


# S26: why a reply cannot be undone.


def test_the_page_says_why_an_approval_cannot_be_undone(sqlite):
    write(sqlite, *angry_chat(1))

    class Away:
        def send(self, replies, seconds):
            raise ConnectionError("the topic is away")

    with served(sqlite, undo_seconds=0) as address:
        visitor = Visitor(address)
        visitor.decide("d1r0", "approve", text="Sorry!")
        with pytest.raises(ConnectionError):
            Publisher(sqlite, Away()).publish()
        page = visitor.get("/drafts/d1r0").text
    assert "It was tried to send this reply, so it may have arrived and cannot be undone." in page
