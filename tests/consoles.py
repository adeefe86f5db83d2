"""A console for tests: served on a free port of this process, with drafts to review."""

import contextlib
import html
import re
import socket
import threading
import urllib.parse
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx

from chatflow.commands.console import listen
from chatflow.console.app import Server
from chatflow.console.people import People
from chatflow.console.site import Console
from chatflow.database.connections import Database
from chatflow.database.upserts import upsert
from chatflow.records import Analysis, Chat, Draft, Message

LOCAL = People("ada")


@contextlib.contextmanager
def served(database: Database, people: People = LOCAL, **fields) -> Iterator[str]:
    """A console on a database; yields its address."""
    listener = listen("127.0.0.1", 0)
    with contextlib.closing(listener), running(Console(database, people, **fields), listener) as at:
        yield at


@contextlib.contextmanager
def running(console: Console, listener: socket.socket) -> Iterator[str]:
    """A console behind a socket; yields its address."""
    server = Server(console, listener)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def write(database: Database, *records) -> None:
    with database.write() as connection:
        upsert(connection, records)


def angry_chat(
    number: int = 0,
    text: str = "My food is late!",
    revision: int = 0,
    confidence: float = 0.9,
    **of_draft,
) -> tuple[Chat, Analysis, Draft]:
    """A chat with its analysis and draft; the higher the number, the later."""
    moment = datetime.now(UTC) - timedelta(minutes=50) + timedelta(seconds=number / 10)
    key = {"chat_id": f"chat-{number}", "user_id": f"customer-{number}", "revision": revision}
    messages = [
        Message(user_id=key["user_id"], role="customer", text=text, sent_at=moment),
        Message(user_id="kim", role="agent", text="I will have a look.", sent_at=moment),
    ] + [Message(user_id=key["user_id"], role="customer", text="Hello?")] * revision
    made = {"model": "gemma", "prompt_version": "p1"}
    chat = Chat(
        chat_id=key["chat_id"], messages=messages, revision=revision,
        attributes={"tenant": ("acme", "bolt")[number % 2]},
    )  # fmt: skip
    analysis = Analysis(
        analysis_id=f"a{number}r{revision}", sentiment=-1, summary=f"Summary {number}.",
        confidence=confidence, analysed_at=moment + timedelta(seconds=2), **key, **made,
    )  # fmt: skip
    text_or_flag = of_draft or {"text": f"We are sorry, customer-{number}."}
    draft = Draft(
        draft_id=f"d{number}r{revision}", analysis_id=analysis.analysis_id,
        drafted_at=moment + timedelta(seconds=4), **key, **made, **text_or_flag,
    )  # fmt: skip
    return chat, analysis, draft


class Visitor:
    """Somebody with an HTTP client and a cookie, who sends the forms of the pages."""

    def __init__(self, address: str, **headers: str):
        """Signs in if the address has a code, as the one that the command prints."""
        self.address, sign_in, code = address.partition("/sign-in?")
        headers = {"Accept": "text/html", **headers}
        self.client = httpx.Client(base_url=self.address, headers=headers)
        if code:
            assert self.get(sign_in + code).status_code == 303

    def get(self, path: str) -> httpx.Response:
        return self.client.get(path)

    def form(self, path: str) -> dict[str, str]:
        """The hidden fields of a page's first form that has a version."""
        page = self.get(path).text
        fields = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', page))
        return {name: value for name, value in fields.items() if name in FIELDS}

    def post(self, path: str, fields: dict[str, str], **headers: str) -> httpx.Response:
        return self.client.post(path, data=fields, headers=headers)

    def decide(self, draft_id: str, action: str, **fields: str) -> httpx.Response:
        """Opens a draft, and sends its form."""
        return self.post(f"/drafts/{draft_id}/{action}", self.form(f"/drafts/{draft_id}") | fields)

    def approve_one(self) -> str:
        """Approves the first draft of the inbox as it is; returns its id."""
        draft_id = re.search(r'id="draft-([^"]+)"', self.get("/").text)[1]
        page = self.get(f"/drafts/{draft_id}").text
        text = html.unescape(re.search(r"<textarea[^>]*>([^<]*)<", page)[1])
        assert self.decide(draft_id, "approve", text=text).status_code == 303
        return draft_id


FIELDS = ("csrf", "version", "seen_chat")


def decided_in(answer: httpx.Response) -> str:
    """Which draft was decided, by where the browser is sent on to."""
    query = urllib.parse.urlsplit(answer.headers["location"]).query
    return urllib.parse.parse_qs(query)["decided"][0]
