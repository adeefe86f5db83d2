"""Drafts as private notes in Chatwoot, where the staff already work.

    export CHATWOOT_TOKEN=…                                     # an agent's, or an agent bot's
    export HOOK_SECRET="whsec_$(openssl rand -base64 32)"       # chatflow's and this one's
    python examples/chatwoot.py --chatwoot https://app.chatwoot.com --account 1 &
    chatflow run --input … --output results --drafts http://localhost:8090/,results/drafts \\
      --webhook_secret env:HOOK_SECRET

The `chat_id` of a chat has to be the number of its conversation in Chatwoot: 42, or chatwoot-42. A
draft becomes a note that customers do not see; nothing is sent to them. What was noted is kept in a
file, so that no draft is noted twice (but one whose answer from Chatwoot is lost, or that is noted
in the moment in which this program is killed, may be: Chatwoot knows no idempotency keys). It
listens on this machine only; for chatflow elsewhere put a server with TLS in front of it.
"""

import argparse
import contextlib
import hmac
import os
import re
import sqlite3
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import requests

from chatflow import BadInputError, Draft, UsageError, parse_record
from chatflow.sinks import read_keys, signed

TOLERANCE = 300  # seconds by which clocks may differ, as the specification's libraries have it
PAUSE = {"Retry-After": "5"}  # seconds
WHY = {
    "low_confidence": "it is not sure enough that this customer is angry",
    "ungrounded": "what it wrote was about something else",
    "refused_phrase": "it wrote what no draft may say",
    "accuses_customer": "it turned what the customer says of us against the customer",
}


def note_of(draft: Draft) -> dict[str, object]:
    """The note, as Chatwoot's API takes it. Nothing here makes one that is not private."""
    text = f"Draft of an apology, for review. It was not sent:\n\n{draft.text}"
    if draft.text is None:
        why = WHY.get(str(draft.flag), draft.flag)
        text = f"⚑ This customer seems angry. There is no draft, for {why}: please write yourself."
    return {"content": text, "message_type": "outgoing", "private": True}


def is_signed(headers: dict[str, str], body: bytes, keys: tuple[bytes, ...]) -> bool:
    """Whether a webhook is chatflow's, and of now; see https://www.standardwebhooks.com."""
    key, seconds = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not re.fullmatch("[0-9]{1,12}", seconds) or abs(time.time() - int(seconds)) > TOLERANCE:
        return False
    given = headers.get("webhook-signature", "").split()
    wanted = signed(keys, key, int(seconds), body)["webhook-signature"].split()
    return any(hmac.compare_digest(a.encode(), b.encode()) for a in given for b in wanted)


class Relay(ThreadingHTTPServer):
    """Takes webhooks, and writes notes."""

    request_queue_size = 128

    def __init__(self, port: int, account: str, token: str, keys: tuple[bytes, ...], noted: str):
        super().__init__(("127.0.0.1", port), Handler)
        self.account, self.token, self.keys = account, token, keys
        self.one_by_one, self.safe = threading.Lock(), True
        self.noted = sqlite3.connect(noted, check_same_thread=False)
        self.noted.execute("CREATE TABLE IF NOT EXISTS noted (draft_id TEXT PRIMARY KEY)")

    def take(self, headers: dict[str, str], body: bytes) -> tuple[int, str, dict[str, str]]:
        """What a webhook is answered: 2xx where it is noted, 429 and 5xx where to try again."""
        if not is_signed(headers, body, self.keys):
            return 401, "the signature is wrong, or too old", {}
        try:
            draft = parse_record(Draft, body)
        except BadInputError as error:
            return 422, f"this is no draft: {error}", {}
        number = re.fullmatch(r"(?:chatwoot-)?([1-9]\d*)", draft.chat_id, re.ASCII)
        if number is None:
            return 422, f"chat_id {draft.chat_id!r} is no conversation of Chatwoot", {}
        with self.one_by_one:
            known = self.noted.execute("SELECT 1 FROM noted WHERE draft_id = ?", [draft.draft_id])
            if known.fetchone():
                return 200, "noted before", {}
            return self.write(number[1], draft)

    def write(self, conversation: str, draft: Draft) -> tuple[int, str, dict[str, str]]:
        if not self.safe:
            return 503, "stopped, for Chatwoot did not keep a note private", PAUSE
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


class Handler(BaseHTTPRequestHandler):
    server: Relay
    timeout = 30

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        status, said, more = self.server.take(headers, body)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(said.encode())), **more}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(said.encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chatwoot", required=True, help="its address, https://…")
    parser.add_argument("--account", required=True, type=int)
    parser.add_argument("--port", type=int, default=8090)
    parser.add_argument("--webhook_secret", default="env:HOOK_SECRET", help="as chatflow's")
    parser.add_argument("--noted", default="chatwoot-noted.sqlite3", help="file of what is noted")
    flags = parser.parse_args()
    account = f"{flags.chatwoot.rstrip('/')}/api/v1/accounts/{flags.account}"
    try:
        token, keys = os.environ["CHATWOOT_TOKEN"], read_keys(flags.webhook_secret)
    except (KeyError, UsageError) as error:
        parser.error(f"{error} is missing" if isinstance(error, KeyError) else str(error))
    relay = Relay(flags.port, account, token, keys, flags.noted)
    with contextlib.suppress(KeyboardInterrupt), relay:
        print(f"http://127.0.0.1:{relay.server_port}/", flush=True)
        relay.serve_forever()
