"""Sign-in by OpenID Connect, with a real provider on loopback."""

import contextlib
import dataclasses
import html
import importlib.util
import re
import socket
import subprocess
import sys
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx
import pytest
import sqlalchemy as sa
from conftest import ROOT, mistake, required
from consoles import Visitor, angry_chat, running, write
from fakes.openid import CLIENT, PASSWORD, SECRET

from chatflow.commands.console import listen
from chatflow.console.people import People
from chatflow.console.site import Console
from chatflow.database import tables

USERS = {"ada@example.com": {"role": "lead"}}


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def place():
    """The socket of the console, and the provider that knows the console's address."""
    for name in ("canaille", "authlib"):
        if importlib.util.find_spec(name) is None:
            required(name, "make setup-dev")
    with contextlib.closing(listen("127.0.0.1", 0)) as listener:
        back = f"http://127.0.0.1:{listener.getsockname()[1]}/sign-in/openid/back"
        command = [sys.executable, str(ROOT / "tests" / "fakes" / "openid.py"), str(free_port())]
        with subprocess.Popen([*command, back], stdout=subprocess.PIPE, text=True) as process:
            try:
                yield listener, process.stdout.readline().strip()
            finally:
                process.kill()


@contextlib.contextmanager
def served(database, place, people=None, **client):
    from chatflow.console.openid import Provider

    listener, issuer = place
    provider = Provider(issuer, CLIENT, SECRET, **client)
    known = people or People("", USERS, openid=True)
    # A copy, because a server closes its socket.
    with running(Console(database, known, openid=provider), listener.dup()) as address:
        yield address


def sign_in_there(address, name):
    """Signs in at the provider, as a person does; returns where it sends the browser back."""
    with httpx.Client(follow_redirects=False) as browser:
        answer = browser.get(address)
        for _ in range(20):
            while answer.is_redirect:
                found = str(answer.url.join(answer.headers["location"]))
                if urlsplit(found).path == "/sign-in/openid/back":
                    return found
                answer = browser.get(found)
            fields = dict(re.findall(r'name="(\w+)"[^>]*value="([^"]*)"', answer.text))
            fields = {key: html.unescape(value) for key, value in fields.items()}
            typed = {"login": name, "password": PASSWORD, "answer": "accept"}
            form = {"csrf_token": fields.get("csrf_token", "")}
            form |= {key: typed[key] for key in typed if f'name="{key}"' in answer.text}
            answer = browser.post(answer.url, data=form)
    raise AssertionError(answer.text)


def begun(visitor, to="/"):
    """Begins to sign in; returns the provider's address."""
    answer = visitor.get(f"/sign-in/openid?{urlencode({'to': to})}")
    assert answer.status_code == 303
    return answer.headers["location"]


def path_of(address):
    found = urlsplit(address)
    return f"{found.path}?{found.query}"


def test_a_person_signs_in_by_a_real_provider(sqlite, place):
    write(sqlite, *angry_chat(1))
    with served(sqlite, place) as address:
        visitor = Visitor(address)
        page = visitor.get("/drafts/d1r0?q=x")
        sign_in = visitor.get(page.headers["location"]).text
        assert "Sign in with your organisation" in sign_in
        assert 'name="token"' not in sign_in  # nobody has one
        there = begun(visitor, "/drafts/d1r0?q=x")
        asked = parse_qs(urlsplit(there).query)
        assert (asked["code_challenge_method"], asked["scope"]) == (
            ["S256"],
            ["openid email profile"],
        )
        assert SECRET not in there
        answer = visitor.get(path_of(sign_in_there(there, "ada")))
        assert (answer.status_code, answer.headers["location"]) == (303, "/drafts/d1r0?q=x")
        assert "ada@example.com</a> <small>lead" in visitor.get("/").text
        assert "OpenID" in visitor.get("/sessions").text
        assert visitor.decide("d1r0", "dismiss", reason="other").status_code == 303
        entries = visitor.get("/audit").text
        assert "ada@example.com" in entries
        visitor.post("/sign-out", visitor.form("/"))
        assert visitor.get("/").status_code == 303
    with sqlite.read() as connection:
        assert connection.execute(sa.select(tables.history.c.who)).scalars().all() == [
            "ada@example.com"
        ]


def test_whom_nobody_knows_here_has_no_access(sqlite, place):
    with served(sqlite, place) as address:
        visitor = Visitor(address)
        answer = visitor.get(path_of(sign_in_there(begun(visitor), "mallory")))
        assert (answer.status_code, "You were not signed in" in answer.text) == (403, True)
        assert visitor.get("/").status_code == 303
    with served(sqlite, place, People("", openid=True, default_role="observer")) as address:
        visitor = Visitor(address)
        visitor.get(path_of(sign_in_there(begun(visitor), "mallory")))
        assert "mallory@example.com</a> <small>observer" in visitor.get("/").text
    with sqlite.read() as connection:
        query = sa.select(tables.audit.c.who, tables.audit.c.what)
        found = connection.execute(query.where(tables.audit.c.action == "sign_in_failed")).all()
    assert found == [("mallory@example.com", "OpenID: has no access")]


def test_an_answer_is_for_the_browser_that_asked(sqlite, place):
    with served(sqlite, place) as address:
        mallory, ada = Visitor(address), Visitor(address)
        begun(ada)
        back = path_of(sign_in_there(begun(mallory), "ada"))
        assert ada.get(back).status_code == 403  # another state
        assert Visitor(address).get(back).status_code == 403  # no state
        forged = dict(mallory.client.cookies)
        forged["chatflow_openid"] = forged["chatflow_openid"][:-1] + "x"
        assert httpx.get(f"{address}{back}", cookies=forged).status_code == 403
        assert ada.get("/").status_code == 303


@pytest.mark.parametrize(
    "change",
    [
        {"iss": "https://other.example"},
        {"iss": None},
        {"state": "other"},
        {"code": "other"},
        {"code": None, "error": "access_denied"},
    ],
    ids=str,
)
def test_what_the_provider_did_not_say_is_refused(sqlite, place, change):
    with served(sqlite, place) as address:
        visitor = Visitor(address)
        back = urlsplit(sign_in_there(begun(visitor), "ada"))
        said = {name: values[0] for name, values in parse_qs(back.query).items()} | change
        query = urlencode({name: value for name, value in said.items() if value is not None})
        assert visitor.get(f"{back.path}?{query}").status_code == 403
        assert visitor.get("/").status_code == 303


def test_a_code_is_good_once(sqlite, place):
    with served(sqlite, place) as address:
        visitor = Visitor(address)
        there = begun(visitor)
        attempt = dict(visitor.client.cookies)
        back = path_of(sign_in_there(there, "ada"))
        assert visitor.get(back).status_code == 303
        assert httpx.get(f"{address}{back}", cookies=attempt).status_code == 403


def test_a_token_for_another_client_or_attempt_is_refused(sqlite, place):
    """Tokens of the real provider, held against what is expected."""
    from chatflow.console.openid import Provider, SignInError

    listener, issuer = place
    back = f"http://127.0.0.1:{listener.getsockname()[1]}/sign-in/openid/back"
    provider = Provider(issuer, CLIENT, SECRET)

    def said():
        address, attempt = provider.begin(back, "/")
        query = parse_qs(urlsplit(sign_in_there(address, "ada")).query)
        return attempt, {name: values[0] for name, values in query.items()}

    attempt, answer = said()
    with pytest.raises(SignInError, match="nonce"):
        provider.end(back, dataclasses.replace(attempt, nonce="other"), answer)
    attempt, answer = said()
    with pytest.raises(SignInError, match="invalid_grant"):
        provider.end(back, dataclasses.replace(attempt, verifier="x" * 43), answer)
    attempt, answer = said()
    with pytest.raises(SignInError, match="took too long"):
        provider.end(back, dataclasses.replace(attempt, until=0), answer)
    attempt, answer = said()
    with pytest.raises(SignInError, match="invalid_client"):
        Provider(issuer, CLIENT, "guess").end(back, attempt, answer)
    attempt, answer = said()
    with pytest.raises(SignInError, match="does not say the groups"):
        Provider(issuer, CLIENT, SECRET, "groups").end(back, attempt, answer)
    attempt, answer = said()
    with pytest.raises(SignInError, match="does not say that it was by mfa"):
        Provider(issuer, CLIENT, SECRET, method="mfa").end(back, attempt, answer)
    attempt, answer = said()
    assert Provider(issuer, CLIENT, SECRET, method="pwd").end(back, attempt, answer)
    attempt, answer = said()
    assert provider.end(back, attempt, answer) == "ada@example.com"
    attempt, answer = said()
    assert Provider(issuer, CLIENT, SECRET, "sub").end(back, attempt, answer) == "ada"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--openid ISSUER", "--openid=http://localhost:1: nobody has a role"),
        ("--openid ISSUER --default_role agent", "--openid: needs --openid_client and"),
        ("--openid http://sso.example.com --default_role agent CLIENT", "must begin with https://"),
        ("--openid ISSUER --default_role agent CLIENT", "--openid=http://localhost:1: http://"),
        ("--openid REAL/ --default_role agent CLIENT", "the provider calls itself http://"),
        ("--openid ISSUER --identity_header X --default_role agent", "only one of them"),
    ],
)
def test_wrong_flags_are_said(arguments, said, place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENID_SECRET", SECRET)
    client = f"--openid_client={CLIENT} --openid_secret=env:OPENID_SECRET"
    words = {"ISSUER": "http://localhost:1", "REAL/": f"{place[1]}/", "CLIENT": client}
    for word, stands_for in words.items():
        arguments = arguments.replace(word, stands_for)
    given = ["console", "--port=0", f"--database=sqlite:///{tmp_path}/console.db"]
    assert said in mistake([*given, *arguments.split()], {}, capsys)
