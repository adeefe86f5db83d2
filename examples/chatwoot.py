"""Connects Chatwoot: publishes its conversations for chatflow, writes drafts as private notes.

Chatwoot's webhooks go to /chatwoot here, which publishes messages and closings to the topic that
chatflow reads. chatflow's drafts come to / and become notes that customers do not see. Nothing is
sent to customers. It listens on this machine only: put a server with TLS in front of it.

1. Chatwoot, Profile settings, Access token (or an agent bot's): the token that writes the notes.
2. Settings, Integrations, Webhooks, Add new webhook: the address https://YOUR.HOST/chatwoot, with
   "Message created" and "Conversation status changed". Newer versions call no private addresses
   unless their settings allow it.
3. The secret that Chatwoot (4.11.2 or newer) then shows signs its webhooks. Older versions do not
   sign: make a secret (openssl rand -hex 24), and use the address …/chatwoot?secret=SECRET.
   Agent bots (Settings, Bots) send the same to their address, signed from 4.13 on. Separate
   several secrets with spaces.
4. Start both, chatflow with a subscription of the topic:

    export CHATWOOT_TOKEN=… CHATWOOT_SECRET=…
    export HOOK_SECRET="whsec_$(openssl rand -base64 32)"       # for chatflow and this program
    python examples/chatwoot.py --chatwoot https://app.chatwoot.com --account 1 \\
      --topic projects/P/topics/events &
    chatflow run --input projects/P/subscriptions/events --output results \\
      --drafts http://localhost:8090/,results/drafts --webhook_secret env:HOOK_SECRET

With PUBSUB_EMULATOR_HOST, the topic is the emulator's. Without --topic it only takes drafts, and
the `chat_id` of a chat must be the number of its conversation: 42, or chatwoot-42.

Chatwoot sends an account's webhook once, waits five seconds, and does not retry. It sends an agent
bot's up to three times, after 429 and 500 (https://github.com/chatwoot/chatwoot/issues/15920). So
each event is kept in a file (--spool) before it is answered, and published from there, in order, at
least once; chatflow leaves out repeated messages. Events that come while this program is down are
lost: run it where it is restarted at once. The ids of drafts with a note are kept, too (--noted),
so that none has two. A draft may still have two if Chatwoot's answer is lost, or if this program
is killed while it writes the note, because Chatwoot has no idempotency keys.
"""

import argparse
import contextlib
import hashlib
import hmac
import json
import os
import re
import sqlite3
import threading
import time
import urllib.parse
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import requests

from chatflow import BadInputError, Draft, UsageError, parse_record
from chatflow.records import load_object
from chatflow.running.publishing import Line, send
from chatflow.secrets import read_secret
from chatflow.sinks import read_keys, signed
from chatflow.sources.formats import as_ours
from chatflow.sources.formats.common import part

Reply = tuple[int, str, dict[str, str]]  # status, text and headers

MOST_BYTES = 4_000_000  # of a webhook; an e-mail comes with its HTML
TOLERANCE = 300  # seconds that clocks may differ, as in the specification's libraries
PAUSE = {"Retry-After": "5"}  # seconds
WHY = {
    "low_confidence": "it is not sure enough that this customer is angry",
    "ungrounded": "what it wrote was about something else",
    "refused_phrase": "it wrote what no draft may say",
    "accuses_customer": "it turned what the customer says of us against the customer",
}


DRAFTED = "Draft of an apology, for review. It was not sent:"
FLAGGED = "⚑ This customer seems angry. There is no draft"


def note_of(draft: Draft) -> dict[str, object]:
    """Returns a note for Chatwoot's API. Nothing here makes one that is not private."""
    text = f"{DRAFTED}\n\n{draft.text}"
    if draft.text is None:
        why = WHY.get(str(draft.flag), draft.flag)
        text = f"{FLAGGED}, because {why}: please write yourself."
    return {"content": text, "message_type": "outgoing", "private": True}


def is_now(seconds: str) -> bool:
    """Returns whether a time of sending, since 1970, is about now."""
    known = re.fullmatch("[0-9]{1,12}", seconds)
    return known is not None and abs(time.time() - int(seconds)) <= TOLERANCE


def is_any(given: str, wanted: list[str]) -> bool:
    """Returns whether a text is one of these, in constant time."""
    return any(hmac.compare_digest(given.encode(), one.encode()) for one in wanted)


def is_chatflows(headers: Mapping[str, str], body: bytes, keys: tuple[bytes, ...]) -> bool:
    """Returns whether chatflow sent a webhook just now; see https://www.standardwebhooks.com."""
    key, seconds = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not is_now(seconds):
        return False
    wanted = signed(keys, key, int(seconds), body)["webhook-signature"].split()
    return any(is_any(given, wanted) for given in headers.get("webhook-signature", "").split())


def is_chatwoots(headers: Mapping[str, str], query: str, body: bytes, secrets: list[str]) -> bool:
    """Returns whether Chatwoot sent it: signed just now, or unsigned with a secret in the query."""
    given = headers.get("x-chatwoot-signature")
    if given is None:
        return is_any(urllib.parse.parse_qs(query).get("secret", [""])[0], secrets)
    seconds = headers.get("x-chatwoot-timestamp", "")
    content = f"{seconds}.".encode() + body  # as in Chatwoot's lib/webhooks/trigger.rb
    made = [hmac.digest(secret.encode(), content, hashlib.sha256).hex() for secret in secrets]
    return is_now(seconds) and is_any(given.removeprefix("sha256="), made)


class Forwarder(threading.Thread):
    """Writes Chatwoot's webhooks into a file, and publishes their events from it."""

    def __init__(self, topic: str, account: int, secrets: list[str], spool: str):
        super().__init__(daemon=True)
        self.topic, self.account, self.secrets = topic, account, secrets
        self.one_by_one, self.filled = threading.Lock(), threading.Event()
        self.stopped = threading.Event()
        self.spool = sqlite3.connect(spool, check_same_thread=False)
        self.spool.execute(
            "CREATE TABLE IF NOT EXISTS spool (number INTEGER PRIMARY KEY, chat_id TEXT, line BLOB)"
        )
        self.start()

    def take(self, headers: Mapping[str, str], query: str, body: bytes) -> Reply:
        """Returns the answer to a webhook: 200 if it is kept, or is not for chatflow."""
        if not is_chatwoots(headers, query, body, self.secrets):
            return 401, "the signature or secret is wrong, or too old", {}
        try:
            value = load_object(body)
            read = as_ours(value, format="chatwoot")
        except BadInputError as error:
            return 400, f"this is not a webhook of Chatwoot: {error}", {}
        if not isinstance(value.get("event"), str):
            return 422, "this is not a webhook of Chatwoot: it has no event", {}
        account = part(value.get("account")).get("id", self.account)
        if account != self.account:
            return 422, f"this is of account {account!r}, not of --account {self.account}", {}
        events = [event for event in (read.values if read else ()) if not self.is_ours(event)]
        if not events:
            return 200, f"left out: {value['event']}", {}
        (event,) = events
        if not re.fullmatch("[1-9][0-9]*", event["chat_id"]):
            return 422, "this has no conversation number", {}
        try:
            self.keep(event["chat_id"], json.dumps(event, ensure_ascii=False).encode())
        except sqlite3.Error as error:  # 500: after others, Chatwoot does not retry an agent bot
            return 500, f"cannot be kept: {error}", PAUSE
        return 200, "kept", {}

    @staticmethod
    def is_ours(event: Mapping[str, object]) -> bool:
        """Returns whether a message is a private note; without these, no note can loop."""
        if event.get("private") or event.get("role") == "activity":
            return True
        return str(event.get("text", "")).startswith((DRAFTED, FLAGGED))

    def keep(self, chat_id: str, line: bytes) -> None:
        with self.one_by_one, self.spool:
            self.spool.execute("INSERT INTO spool (chat_id, line) VALUES (?, ?)", [chat_id, line])
        self.filled.set()

    def run(self) -> None:
        while not self.stopped.is_set():
            self.filled.clear()
            try:
                if not self.publish():
                    self.filled.wait()
            except Exception as error:  # go on after any error: only this thread publishes
                print(f"not published yet, trying again: {error}", flush=True)
                self.stopped.wait(float(PAUSE["Retry-After"]))

    def publish(self) -> bool:
        """Publishes the oldest events kept; returns whether there were any."""
        with self.one_by_one:
            oldest = "SELECT number, chat_id, line FROM spool ORDER BY number LIMIT 100"
            kept = self.spool.execute(oldest).fetchall()
        if not kept:
            return False
        send((Line(line, chat_id) for _, chat_id, line in kept), self.topic)
        with self.one_by_one, self.spool:
            self.spool.execute("DELETE FROM spool WHERE number <= ?", [kept[-1][0]])
        print(f"published {len(kept)} events", flush=True)
        return True

    def close(self) -> None:
        self.stopped.set()
        self.filled.set()
        self.join(5)  # events that are just being published stay, and are published again


class Relay(ThreadingHTTPServer):
    """Takes chatflow's webhooks, and writes notes; passes Chatwoot's to the forwarder."""

    request_queue_size = 128
    forwarder: Forwarder | None = None

    def __init__(self, port: int, account: str, token: str, keys: tuple[bytes, ...], noted: str):
        super().__init__(("127.0.0.1", port), Handler)
        self.account, self.token, self.keys = account, token, keys
        self.one_by_one, self.safe = threading.Lock(), True
        self.noted = sqlite3.connect(noted, check_same_thread=False)
        self.noted.execute("CREATE TABLE IF NOT EXISTS noted (draft_id TEXT PRIMARY KEY)")

    def take(self, headers: Mapping[str, str], body: bytes) -> Reply:
        """Returns the answer to a draft: 2xx if it has its note, 429 or 5xx to try again."""
        if not is_chatflows(headers, body, self.keys):
            return 401, "the signature is wrong, or too old", {}
        try:
            draft = parse_record(Draft, body)
        except BadInputError as error:
            return 422, f"this is not a draft: {error}", {}
        number = re.fullmatch(r"(?:chatwoot-)?([1-9]\d*)", draft.chat_id, re.ASCII)
        if number is None:
            return 422, f"chat_id {draft.chat_id!r} is not a conversation of Chatwoot", {}
        with self.one_by_one:
            known = self.noted.execute("SELECT 1 FROM noted WHERE draft_id = ?", [draft.draft_id])
            if known.fetchone():
                return 200, "noted before", {}
            return self.write(number[1], draft)

    def write(self, conversation: str, draft: Draft) -> Reply:
        if not self.safe:
            return 503, "stopped, because Chatwoot did not keep a note private", PAUSE
        try:
            answer = requests.post(
                f"{self.account}/conversations/{conversation}/messages",
                json=note_of(draft),
                headers={"api_access_token": self.token},
                timeout=(5, 15),
                allow_redirects=False,
            )
        except requests.RequestException as error:
            return 502, f"Chatwoot cannot be reached: {type(error).__name__}", PAUSE
        said = f"Chatwoot answered {answer.status_code}: {answer.text[:300]}"
        if answer.status_code == 429 or answer.status_code >= 500:
            wait = answer.headers.get("Retry-After", PAUSE["Retry-After"])
            return (429 if answer.status_code == 429 else 503), said, {"Retry-After": wait}
        if answer.status_code >= 300:
            return (answer.status_code if answer.status_code >= 400 else 502), said, {}
        with self.noted:
            self.noted.execute("INSERT INTO noted VALUES (?)", [draft.draft_id])
        self.safe = False
        with contextlib.suppress(ValueError, KeyError, TypeError):
            self.safe = answer.json()["private"] is True
        print(f"noted {draft.draft_id} in conversation {conversation}", flush=True)
        return 200, "noted", {}

    def server_close(self) -> None:
        super().server_close()
        if self.forwarder:
            self.forwarder.close()


class Handler(BaseHTTPRequestHandler):
    server: Relay
    timeout = 30

    def do_POST(self) -> None:
        status, said, more = self.reply()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(said.encode())), **more}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(said.encode())

    def reply(self) -> Reply:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,12}", length):
            return 411, "Content-Length is needed", {}
        if int(length) > MOST_BYTES:
            return 413, f"more than {MOST_BYTES} bytes", {}
        body = self.rfile.read(int(length))
        headers = {name.lower(): value for name, value in self.headers.items()}
        path, _, query = self.path.partition("?")
        if path.rstrip("/") != "/chatwoot":
            return self.server.take(headers, body)
        if self.server.forwarder is None:
            return 404, "started without --topic, so it does not take Chatwoot's webhooks", {}
        return self.server.forwarder.take(headers, query, body)

    def log_message(self, format: str, *args: object) -> None:
        without_secret = re.sub(r"\?[^\s\"']*", "?…", format % args)
        super().log_message("%s", without_secret)


def chatwoots_secrets(place: str) -> list[str]:
    secrets = read_secret(place, "--chatwoot_secret").split()
    if not secrets or min(map(len, secrets)) < 16:
        raise UsageError(
            f"--chatwoot_secret={place}: must hold secrets of at least 16 characters; Chatwoot "
            "shows the secret of each webhook"
        )
    return secrets


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chatwoot", required=True, help="Chatwoot's address, https://…")
    parser.add_argument("--account", required=True, type=int)
    parser.add_argument("--port", type=int, default=8090)
    parser.add_argument("--webhook_secret", default="env:HOOK_SECRET", help="as in chatflow run")
    parser.add_argument("--topic", default="", help="take Chatwoot's webhooks, and publish here")
    parser.add_argument("--chatwoot_secret", default="env:CHATWOOT_SECRET", help="of its webhooks")
    parser.add_argument("--noted", default="chatwoot-noted.sqlite3", help="file of noted drafts")
    parser.add_argument("--spool", default="chatwoot-spool.sqlite3", help="file of unsent events")
    flags = parser.parse_args()
    account = f"{flags.chatwoot.rstrip('/')}/api/v1/accounts/{flags.account}"
    try:
        token, keys = os.environ["CHATWOOT_TOKEN"], read_keys(flags.webhook_secret)
        if not re.fullmatch("(projects/[^/]+/topics/[^/]+)?", flags.topic):
            raise UsageError(f"--topic: {flags.topic!r} is not projects/PROJECT/topics/NAME")
        secrets = chatwoots_secrets(flags.chatwoot_secret) if flags.topic else []
    except (KeyError, UsageError) as error:
        parser.error(f"{error} is missing" if isinstance(error, KeyError) else str(error))
    relay = Relay(flags.port, account, token, keys, flags.noted)
    if flags.topic:
        relay.forwarder = Forwarder(flags.topic, flags.account, secrets, flags.spool)
    with contextlib.suppress(KeyboardInterrupt), relay:
        print(f"http://127.0.0.1:{relay.server_port}/", flush=True)
        relay.serve_forever()
