"""Attacks the console, and measures whether it still answers.

  python bench/attack.py                  # all attacks, five seconds each
  python bench/attack.py --seconds 20 --only bodies,streams
  python bench/attack.py --code ../older  # the console of another checkout

It starts a `chatflow console` with users, a database of chats that mean harm, and 1024 open files,
as is usual. The exit code is 1 if something got through, or if at the end the console takes longer
than 100 ms for a page. The attackers and the console share the processors of this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import http.client
import os
import re
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from consoles import angry_chat, write

from chatflow.console.people import new_token
from chatflow.database.connections import Database

ROOT = Path(__file__).parent.parent

TARGET = 0.1
"""The most seconds that a page may take after all attacks."""

FILES = 1024
FORM = (
    b"POST /sign-in HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    b"Content-Type: application/x-www-form-urlencoded\r\n"
)
HARM = (
    "=HYPERLINK(\"https://evil.example\",\"refund\")", "@SUM(1+1)*cmd|' /C calc'!A0",
    "<script>document.title='harm'</script>", "\u202e\u2066lanretni\u2069 \u200bagent",
    "'; DROP TABLE drafts; --", "{{ 7 * 7 }}", "\"><img src=x onerror=alert(1)>",
)  # fmt: skip
"""What chats say, also as ids and attributes."""


class Target:
    """A console in a separate process."""

    def __init__(self, folder: Path, code: Path):
        self.folder, self.token = folder, ""
        self.token, entry = new_token("lead", "lead")
        (folder / "users.toml").write_text(entry)
        environment = {**os.environ, "PYTHONPATH": f"{code}:{os.environ.get('PYTHONPATH', '')}"}
        command = [
            sys.executable, "-m", "chatflow", "console", "--port=0",
            f"--database=sqlite:///{folder}/chatflow.db", f"--users={folder}/users.toml",
        ]  # fmt: skip
        run = [*command, f"--export={folder}/none.jsonl"]
        subprocess.run(run, env=environment, cwd=folder, check=True, capture_output=True)
        if code == ROOT:
            self.fill()
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=self.log,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES)),
        )  # fmt: skip
        assert self.process.stdout
        self.address = self.process.stdout.readline().split()[1].rstrip("/")
        self.port = int(self.address.rpartition(":")[2])

    def fill(self) -> None:
        database = Database(f"sqlite:///{self.folder}/chatflow.db")
        for number, harm in enumerate(HARM):
            chat, analysis, draft = angry_chat(number, text=harm)
            ids = {"chat_id": f"{number} {harm}"}
            write(
                database,
                chat.model_copy(update={**ids, "attributes": {harm: harm}}),
                analysis.model_copy(update={**ids, "summary": harm}),
                draft.model_copy(update={**ids, "text": harm}),
            )
        database.close()

    def opened(self, data: bytes = b"") -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=2)
        client.sendall(data)
        return client

    def signed_in(self) -> httpx.Client:
        client = httpx.Client(base_url=self.address, headers={"Accept": "text/html"}, timeout=10)
        page = client.get("/sign-in").text
        found = re.search(r'name="csrf" value="([^"]*)"', page)
        assert found, page
        form = {"csrf": found[1], "token": self.token}
        assert client.post("/sign-in", data=form).status_code == 303
        return client

    def probe(self) -> float | None:
        """Returns the seconds that a page took; None if it did not come within three."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=3)
        began = time.perf_counter()
        try:
            client.request("GET", "/sign-in")
            answer = client.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            client.close()
        return time.perf_counter() - began if answer.status == 200 else None

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


Attack = Callable[[Target, threading.Event], None]


def over_and_over(data: bytes, more: bytes = b"", pause: float = 0) -> Attack:
    """Returns an attack that sends something, and then more of it as long as it is taken."""

    def attack(target: Target, ends: threading.Event) -> None:
        while not ends.is_set():
            with contextlib.suppress(OSError), target.opened(data) as client:
                while more and not ends.wait(pause):
                    client.sendall(more)
                client.settimeout(0.5)
                client.recv(1000)

    return attack


def held(data: bytes, count: int) -> Attack:
    """Returns an attack that holds connections open after the same data; opens lost ones anew."""

    def attack(target: Target, ends: threading.Event) -> None:
        kept: list[socket.socket] = []
        while not ends.wait(0.005):
            if len(kept) < count:
                with contextlib.suppress(OSError):
                    kept.append(target.opened(data))
                continue
            for client in filter(is_closed, list(kept)):
                client.close()
                kept.remove(client)
        for client in kept:
            client.close()

    return attack


def is_closed(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return not client.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def guess(target: Target, ends: threading.Event) -> None:
    client = httpx.Client(base_url=target.address, timeout=3)
    while not ends.is_set():
        with contextlib.suppress(httpx.HTTPError, TypeError):
            page = client.get("/sign-in").text
            csrf = re.search(r'name="csrf" value="([^"]*)"', page)
            form = {"csrf": csrf[1] if csrf else "", "token": os.urandom(8).hex()}
            client.post("/sign-in", data=form)


def listen(target: Target, ends: threading.Event) -> None:
    """Opens 600 streams of one session."""
    with contextlib.suppress(httpx.HTTPError, AssertionError):
        cookie = "; ".join(f"{k}={v}" for k, v in target.signed_in().cookies.items())
        head = f"GET /changes HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: {cookie}\r\n\r\n"
        held(head.encode(), 600)(target, ends)


def odd(target: Target, ends: threading.Event) -> None:
    """Sends what can be read in two ways, and bytes of other protocols."""
    get = b"GET / HTTP/1.1\r\n"
    heads = [
        *(get + b"Host: " + host + b"\r\n\r\n" for host in (
            b"evil.example", b"127.0.0.1/static/x?", b"127.0.0.1:abc", b"x@127.0.0.1", b"[", b"")),
        get + b"Host: 127.0.0.1\r\nHost: evil.example\r\n\r\n",
        get + b"Host: 127.0.0.1\r\nX: a\r\n b\r\n\r\n",
        b"GET / HTTP/1.1\nHost: 127.0.0.1\n\n",
        get + b"X: " + b"x" * 70_000,
        get + b"Host: 127.0.0.1\r\n" + b"X: y\r\n" * 5_000 + b"\r\n",
        FORM + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        FORM + b"Content-Length: -1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]  # fmt: skip
    while not ends.is_set():
        for head in heads:
            with contextlib.suppress(OSError), target.opened(head) as client:
                client.settimeout(1)
                if client.recv(100).startswith(b"HTTP/1.1 200"):
                    GOT_THROUGH.add(f"head: {head[:60]!r}")


GOT_THROUGH: set[str] = set()

ATTACKS: dict[str, tuple[int, Attack]] = {
    "bodies": (20, over_and_over(FORM + b"Content-Length: 999999999999\r\n\r\n", b"&" * 65_536)),
    "bodies without a length": (
        20,
        over_and_over(
            FORM + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"&" * 65_536 + b"\r\n"
        ),
    ),
    "slow bodies": (4, held(FORM + b"Content-Length: 100\r\n\r\ntoken=", 300)),
    "half-open requests": (4, held(b"GET / HTTP/1.1\r\nHost: 127", 300)),
    "silent connections": (4, held(b"", 300)),
    "drip": (50, over_and_over(b"GET / HTTP/1.1\r\n", b"X: y\r\n", 0.5)),
    "tokens": (10, guess),
    "hosts and heads": (4, odd),
    "streams": (1, listen),
}
"""Attackers at once, and what each does."""


@contextlib.contextmanager
def attacked(target: Target, name: str) -> Iterator[None]:
    count, attack = ATTACKS[name]
    ends = threading.Event()
    threads = [threading.Thread(target=attack, args=(target, ends)) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ends.set()
        for thread in threads:
            thread.join()


def look_at_texts(target: Target) -> None:
    """Notes what chats that mean harm do to the pages and to a table."""
    with contextlib.closing(target.signed_in()) as client:
        ids = re.findall(r'id="draft-([^"]+)"', client.get("/").text)
        pages = {path: client.get(path).text for path in
                 ("/", "/history", "/dashboard", *(f"/drafts/{each}" for each in ids))}  # fmt: skip
    for path, page in pages.items():
        shown = re.sub(r"<textarea.*?</textarea>", "", page, flags=re.DOTALL)
        text = re.sub(r"<[^>]*>", "", shown)
        for harm in ("<script>document", "<img src=x", ">49<"):
            if harm in shown:
                GOT_THROUGH.add(f"{path}: {harm!r}")
        GOT_THROUGH.update(f"{path}: {c!r}" for c in "\u202e\u2066\u200b" if c in text)
    path = target.folder / "conversations.csv"
    uri = f"sqlite:///{target.folder}/chatflow.db"
    command = [sys.executable, "-m", "chatflow", "export", uri, str(path)]
    subprocess.run(command, check=True, capture_output=True)
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.reader(file):
            GOT_THROUGH.update(f"csv: {cell[:40]}" for cell in row if cell[:1] in ("=", "@"))


def percentile(found: list[float | None], share: float) -> float:
    times = sorted(3.0 if each is None else each for each in found)
    return times[min(int(len(times) * share), len(times) - 1)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--only", default=",".join(ATTACKS))
    parser.add_argument("--code", type=Path, default=ROOT, help="another checkout")
    parsed = parser.parse_args()
    table = Table("attack", "attackers", "median ms", "p95 ms", "no page in 3 s", "afterwards ms")
    with tempfile.TemporaryDirectory() as folder:
        target = Target(Path(folder), parsed.code)
        try:
            if parsed.code == ROOT:  # another one may have other tables
                look_at_texts(target)
            for name in parsed.only.split(","):
                found: list[float | None] = []
                with attacked(target, name):
                    until = time.monotonic() + parsed.seconds
                    while time.monotonic() < until:
                        found.append(target.probe())
                        time.sleep(0.1)
                after = [target.probe() for _ in range(5)]
                table.add_row(
                    name, str(ATTACKS[name][0]),
                    f"{1000 * percentile(found, 0.5):.0f}", f"{1000 * percentile(found, 0.95):.0f}",
                    f"{sum(each is None for each in found)} of {len(found)}",
                    f"{1000 * percentile(after, 0.5):.0f}",
                )  # fmt: skip
            last = []
            for _ in range(20):
                time.sleep(0.2)
                last.append(target.probe())
            lines = (target.folder / "log").read_text().count("\n")
        finally:
            target.end()
    out = Console(width=110)
    out.print(table)
    took = percentile(last, 0.95)
    median = statistics.median(3.0 if each is None else each for each in last)
    out.print(
        f"at the end: median {1000 * median:.0f} ms, p95 {1000 * took:.0f} ms; {lines} log lines"
    )
    for each in sorted(GOT_THROUGH):
        out.print(f"got through: {each}", markup=False)
    return 1 if GOT_THROUGH or took > TARGET else 0


if __name__ == "__main__":
    sys.exit(main())
