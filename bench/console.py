"""Measures the console under load: its speed, and what is lost or doubled by killed processes.

  python bench/console.py                          # all of it, on SQLite and on PostgreSQL
  python bench/console.py --soak 600 --drafts 0    # ten minutes of the soak alone
  python bench/console.py --soak 0 --drafts 10000  # the speed of the pages with 10,000 drafts

In the soak, workers write the same records over and over, people review drafts by HTTP (several
people the same draft), and two console processes publish to one file. One of the two is killed
(SIGKILL) again and again. At the end the data are checked; the exit code is 1 if something was
lost or doubled. `--json` prints the figures as a line of JSON.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import html
import itertools
import json
import logging
import multiprocessing
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from postgres import MissingError, postgres

from chatflow.console.dashboard import percentiles
from chatflow.database import tables
from chatflow.database.connections import Database
from chatflow.database.upserts import upsert, values_of
from chatflow.records import Analysis, Chat, Draft, Message, Record, now
from chatflow.sinks import database as sql

SIDES = ("SQLite", "PostgreSQL")
TARGET = 0.1
"""The most seconds that the inbox may take."""

KINDS = {"chats": Chat, "analyses": Analysis, "drafts": Draft}
REVISIONS = 4
WORDS = "parcel late broken refund driver street cold wrong missing order voucher app".split()


@dataclasses.dataclass(frozen=True)
class Load:
    """The load of a soak.

    Attributes:
      kill_every: seconds from one SIGKILL to the next, of either console in turn.
      lease: the console's own LEASE_SECONDS, if not None.
      least: actions that must happen at least once; readers stay for them, a minute at most.
      chats_per_second: new chats a second, of four revisions each.
      pause: of a writer after a bundle, and of a reader after a page; mean seconds.
      in_processes: writers are processes and not threads.
    """

    seconds: float = 120
    writers: int = 8
    readers: int = 50
    kill_every: float = 20
    lease: float | None = None
    undo_seconds: float = 1
    least: frozenset[str] = frozenset()
    chats_per_second: float = 10
    pause: float = 0.25
    in_processes: bool = True


# What is written.


def records_of(began: datetime, number: int, revision: int) -> dict[str, Record]:
    """Returns a chat's revision by kind, always the same. One in five is not angry: no draft."""
    key = {"chat_id": f"chat-{number}", "user_id": f"customer-{number}", "revision": revision}
    noise = random.Random(number)
    moment = began - timedelta(minutes=50) + timedelta(seconds=number / 20 + revision)
    made = {"model": "gemma", "prompt_version": "p1"}
    angry = (number + revision) % 5 > 0
    messages = tuple(
        Message(
            user_id=("kim", key["user_id"])[n % 2],
            role=("agent", "customer")[n % 2],
            text=f"About {' '.join(noise.choices(WORDS, k=15))} {number}",
            sent_at=moment,
        )
        for n in range(4 + revision)
    )
    attributes = {"tenant": ("acme", "bolt", "crow")[number % 3], "revision": str(revision)}
    name = f"{number}r{revision}"
    found: dict[str, Record] = {
        "chats": Chat(
            chat_id=key["chat_id"], messages=messages, revision=revision, attributes=attributes
        ),
        "analyses": Analysis(
            analysis_id=f"a{name}", sentiment=-1 if angry else 0, summary=f"Summary of {name}.",
            confidence=0.5 + number % 50 / 100, analysed_at=moment, **key, **made,
        ),
    }  # fmt: skip
    if angry:
        flagged = (number + revision) % 11 == 0
        text = {"flag": "ungrounded"} if flagged else {"text": f"We are sorry about {name}."}
        found["drafts"] = Draft(
            draft_id=f"d{name}", analysis_id=f"a{name}", drafted_at=moment, **key, **made, **text
        )
    return found


Written = set[tuple[str, int, int]]
"""Kind, number and revision."""


@dataclasses.dataclass
class WriterReport:
    """The result of a writer. `waited` has the database's messages before retries."""

    written: Written = dataclasses.field(default_factory=set)
    records: int = 0
    refused: int = 0
    waited: list[str] = dataclasses.field(default_factory=list)
    error: str = ""


def write(
    uri: str, load: Load, began: datetime, seed: int, give: Callable[[WriterReport], None]
) -> None:
    """Writes as a worker does: bundles of one or all kinds, in no order, that others also write."""
    report = WriterReport()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: report.waited.append(record.getMessage()[:200])  # type: ignore[method-assign]
    logging.getLogger(sql.__name__).parent.addHandler(handler)  # type: ignore[union-attr]
    noise = random.Random(seed)
    try:
        fn = sql._UpsertDoFn(uri)
        fn.setup()
        while (passed := (now() - began).total_seconds()) < load.seconds:
            newest = int(passed * load.chats_per_second) + 20
            kinds = noise.choice([*([kind] for kind in KINDS), list(KINDS)])
            bundle = {}
            for _ in range(20):
                number = max(newest - int(noise.expovariate(1 / 50)), 0)
                revision = noise.randrange(REVISIONS)
                for kind, record in records_of(began, number, revision).items():
                    if kind in kinds and noise.random() < 0.7:
                        bundle[kind, number, revision] = record
            records = list(bundle.values())
            noise.shuffle(records)
            report.refused += len(list(fn.process(records)))
            report.written |= bundle.keys()
            report.records += len(records)
            time.sleep(load.pause * 2 * noise.random())
    except Exception as error:
        report.error = f"{type(error).__name__}: {error}"[:300]
    logging.getLogger(sql.__name__).parent.removeHandler(handler)  # type: ignore[union-attr]
    give(report)


@contextlib.contextmanager
def writing(uri: str, load: Load, began: datetime) -> Iterator[list[WriterReport]]:
    """Runs writers; yields a list that has their reports at the end."""
    context = multiprocessing.get_context("fork")
    kind: Any = context.Process if load.in_processes else threading.Thread
    queue: Any = context.Queue()
    writers = [
        kind(target=write, args=(uri, load, began, seed, queue.put)) for seed in range(load.writers)
    ]
    reports: list[WriterReport] = []
    for writer in writers:
        writer.start()
    yield reports
    reports += [queue.get(timeout=load.seconds + 120) for _ in writers]
    for writer in writers:
        writer.join()


# The consoles.


class Served:
    """A `chatflow console` in a separate process, which can be killed and restarted."""

    START = (
        "import sys; from chatflow.cli import main; from chatflow.console import outbox\n"
        "if lease := float(sys.argv.pop(1)): outbox.LEASE_SECONDS = lease\n"
        "sys.exit(main(['console', *sys.argv[1:]]))"
    )

    def __init__(self, uri: str, log: Path, *flags: str, lease: float | None = None):
        self.command = [
            sys.executable, "-c", self.START, str(lease or 0), "--database", uri, "--port", "0",
            "--nosign_in", *flags,
        ]  # fmt: skip
        self.log = log
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.address = ""
        self.starting = threading.Thread(target=self._start)
        self.starting.start()

    def _start(self) -> None:
        assert self.process.stdout
        with contextlib.suppress(IndexError):  # it was killed before it printed its address
            self.address = self.process.stdout.readline().split()[1].rstrip("/")

    def wait(self) -> None:
        """Waits until it answers."""
        self.starting.join()
        assert self.address, self.log.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.starting.join()
        assert self.process.stdout
        self.process.stdout.close()


@contextlib.contextmanager
def served(count: int, *args: Any, **fields: Any) -> Iterator[list[Served]]:
    consoles: list[Served] = []
    try:
        for _ in range(count):
            consoles.append(Served(*args, **fields))
        for console in consoles:
            console.wait()
        yield consoles
    finally:
        for console in consoles:
            console.kill()


# Those who review.

YES, NO, UNKNOWN = "yes", "no", "unknown"
"""The outcome of a request; unknown if the process was killed before it answered."""


@dataclasses.dataclass
class Seen:
    """The observations of all readers.

    Attributes:
      seconds: of answered requests, by kind.
      attempts: draft, action and text (or comment), and the answer.
      errors: connections that failed, by kind of failure.
      statuses: answers by status.
    """

    seconds: dict[str, list[float]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(list)
    )
    attempts: list[tuple[str, str, str, str]] = dataclasses.field(default_factory=list)
    errors: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    statuses: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    broken: list[str] = dataclasses.field(default_factory=list)

    def requests(self) -> int:
        return sum(map(len, self.seconds.values()))

    def done(self) -> set[str]:
        """Returns the actions that succeeded, of some draft."""
        return {action for _, action, _, answer in self.attempts if answer == YES}


class Reader(threading.Thread):
    """A person who looks at lists and reviews drafts, mostly those on top, as others do."""

    def __init__(self, number: int, consoles: list[Served], load: Load, until: float, seen: Seen):
        super().__init__()
        self.noise = random.Random(number)
        self.number, self.consoles, self.load, self.seen = number, consoles, load, seen
        self.mine, self.until, self.texts = number % len(consoles), until, 0
        self.client = httpx.Client(headers={"Accept": "text/html"}, timeout=60)

    def run(self) -> None:
        try:
            time.sleep(self.noise.random())
            while self.stays():
                self.noise.choices(
                    [self.look, self.search, self.figures, self.review], [3, 2, 1, 6]
                )[0]()
                self.think()
        except Exception as error:
            self.seen.broken.append(f"a reader: {type(error).__name__}: {error}")
        self.client.close()

    def stays(self) -> bool:
        late = time.monotonic() - self.until
        return late < 0 or (late < 60 and not self.load.least <= self.seen.done())

    def think(self) -> None:
        time.sleep(self.load.pause * 2 * self.noise.random())

    def ask(self, kind: str, path: str, form: dict[str, str] | None = None) -> httpx.Response | str:
        """Returns an answer; `NO` if the console was not reached, `UNKNOWN` if it was killed."""
        if not self.consoles[self.mine].address:
            self.mine = (self.mine + 1) % len(self.consoles)
        address = self.consoles[self.mine].address
        began = time.monotonic()
        try:
            method = "GET" if form is None else "POST"
            answer = self.client.request(method, address + path, data=form)
        except httpx.TransportError as error:
            self.mine = (self.mine + 1) % len(self.consoles)
            self.seen.errors[type(error).__name__] += 1
            time.sleep(0.05)
            return NO if isinstance(error, httpx.ConnectError) else UNKNOWN
        self.seen.seconds[kind].append(time.monotonic() - began)
        self.seen.statuses[answer.status_code] += 1
        if answer.status_code >= 500 or answer.status_code == 403:
            self.seen.broken.append(f"{kind} {path}: {answer.status_code}")
        return answer

    def get(self, kind: str, path: str) -> str:
        answer = self.ask(kind, path)
        return "" if isinstance(answer, str) else answer.text

    def look(self) -> None:
        sort = self.noise.choice(["urgent", "oldest", "angriest", "newest"])
        status = self.noise.choice(["waiting"] * 3 + ["approved", "superseded"])
        self.get("inbox", f"/?sort={sort}&status={status}")

    def search(self) -> None:
        self.get("search", f"/?q={'+'.join(self.noise.choices(WORDS, k=2))}")

    def figures(self) -> None:
        self.get(*self.noise.choice([("dashboard", "/dashboard"), ("history", "/history")]))

    def review(self) -> None:
        found = re.findall(r'href="/drafts/([^"?]+)', self.get("inbox", "/"))
        if not found:
            return
        draft_id = self.noise.choice(found[:3] if self.noise.random() < 0.5 else found)
        form = self.form(draft_id)
        if "seen_chat" not in form:
            return  # somebody was faster
        self.think()
        action = self.noise.choices(["approve", "dismiss", "save"], [6, 2, 1])[0]
        self.texts += 1
        text = f"Sorry, says {self.number}: {self.texts}."
        if action == "approve" and form["text"] and self.noise.random() < 0.3:
            text = form["text"]
        said = self.decide(draft_id, action, text, form)
        if action != "save" and said == YES and self.noise.random() < 0.3:
            form = self.form(draft_id)
            if "version" in form and "seen_chat" not in form:
                self.decide(draft_id, "undo", "", form)

    def form(self, draft_id: str) -> dict[str, str]:
        page = self.get("draft", f"/drafts/{draft_id}")
        fields = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', page))
        text = re.search(r"<textarea[^>]*>([^<]*)</textarea>", page)
        return fields | {"text": html.unescape(text[1]) if text else ""}

    def decide(self, draft_id: str, action: str, text: str, form: dict[str, str]) -> str:
        sent = form | {"text": text, "comment": text, "reason": "other"}
        answer = self.ask(action, f"/drafts/{draft_id}/{action}", sent)
        if not isinstance(answer, str):
            answer = YES if answer.status_code == 303 else NO
        self.seen.attempts.append((draft_id, action, text, answer))
        return answer


# What is checked.

DONE = {"approve": "approved", "dismiss": "dismissed", "save": "edited", "undo": "undone"}


def rows(database: Database, table: sa.Table) -> list[dict[str, Any]]:
    with database.read() as connection:
        query = sa.select(table).order_by(*table.primary_key.columns)
        return [dict(row) for row in connection.execute(query).mappings()]


def check(
    database: Database, replies: Path, began: datetime, written: Written, seen: Seen
) -> list[str]:
    """Returns what was lost, doubled or is otherwise wrong; an empty list if all is well."""
    drafts = {row["draft_id"]: row for row in rows(database, tables.drafts)}
    return [
        *_check_records(database, drafts, began, written),
        *_check_decisions(rows(database, tables.history), drafts, seen),
        *_check_replies(database, drafts, replies),
    ]


def _check_records(
    database: Database, drafts: dict[str, dict[str, Any]], began: datetime, written: Written
) -> Iterator[str]:
    """Yields errors unless every written record is stored once, in its newest revision."""
    newest_chat: dict[int, int] = {}
    newest: dict[int, int] = {}
    wanted: dict[str, dict[str, Any]] = {"analyses": {}, "drafts": {}}
    for kind, number, revision in written:
        if kind == "chats":
            newest_chat[number] = max(newest_chat.get(number, 0), revision)
        else:
            newest[number] = max(newest.get(number, 0), revision)
            record = values_of(records_of(began, number, revision)[kind])
            wanted[kind][record["analysis_id" if kind == "analyses" else "draft_id"]] = record
    wanted["chats"] = {
        f"chat-{number}": records_of(began, number, revision)["chats"].model_dump(
            mode="json", include={"chat_id", "revision", "attributes"}
        )
        for number, revision in newest_chat.items()
    }
    known = {
        "chats": {row["chat_id"]: row for row in rows(database, tables.chats)},
        "analyses": {row["analysis_id"]: row for row in rows(database, tables.analyses)},
        "drafts": drafts,
    }
    for kind, records in wanted.items():
        if missing := records.keys() - known[kind].keys():
            yield f"{len(missing)} {kind} were lost, such as {min(missing)}"
        if more := known[kind].keys() - records.keys():
            yield f"{len(more)} {kind} were never written, such as {min(more)}"
        for key in records.keys() & known[kind].keys():
            row, record = known[kind][key], records[key]
            if other := [name for name in record if row[name] != record[name]]:
                yield f"{kind}: {key} has another {other[0]}: {row[other[0]]!r}"
    attributes: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for row in rows(database, tables.chat_attributes):
        attributes[row["chat_id"]][row["name"]] = row["value"]
    for key, row in known["chats"].items():
        if attributes[key] != row["attributes"]:
            yield f"{key}: its attributes are {attributes[key]}, not {row['attributes']}"
    for key, draft in drafts.items():
        number = int(draft["chat_id"].removeprefix("chat-"))
        is_old = draft["revision"] < newest.get(number, 0)
        if is_old and draft["status"] == tables.WAITING:
            yield f"{key} waits, although revision {newest[number]} exists"
        if not is_old and draft["status"] == tables.SUPERSEDED:
            yield f"{key} is superseded, although nothing is newer"


def _check_decisions(
    history: list[dict[str, Any]], drafts: dict[str, dict[str, Any]], seen: Seen
) -> Iterator[str]:
    """Yields errors unless each draft was decided once, or once after each undo, as answered."""
    answered = {
        said: collections.Counter((d, DONE[a], t) for d, a, t, s in seen.attempts if s == said)
        for said in (YES, UNKNOWN)
    }
    happened = collections.Counter(
        (event["draft_id"], event["action"], event["text"] or event["comment"] or "")
        for event in history
    )
    for key in happened.keys() | answered[YES].keys():
        least = answered[YES][key]
        if not least <= happened[key] <= least + answered[UNKNOWN][key]:
            yield f"{key} was answered {least} times, but is stored {happened[key]} times"
    status = dict.fromkeys(drafts, tables.WAITING)
    texts: dict[str, str] = {}
    for event in history:
        key, action = event["draft_id"], event["action"]
        decided = status[key] != tables.WAITING
        if decided != (action == "undone"):
            yield f"{key} was {action} when it was {status[key]}"
        if action != "edited":
            status[key] = tables.WAITING if action == "undone" else action
        texts[key] = event["text"] or texts.get(key, "")
    for key, draft in drafts.items():
        found = draft["status"]
        if (tables.WAITING if found == tables.SUPERSEDED else found) != status[key]:
            yield f"{key} is {found}, although it was {status[key]} last"
        if found == tables.APPROVED and (draft["edited_text"] or draft["text"]) != texts[key]:
            yield f"{key} does not have the approved text"


def _check_replies(
    database: Database, drafts: dict[str, dict[str, Any]], replies: Path
) -> Iterator[str]:
    """Yields errors unless each approved draft has one reply in the file, with its text."""
    lines = [json.loads(line) for line in replies.read_text().splitlines()]
    ids = collections.Counter(line["draft_id"] for line in lines)
    approved = {
        key: draft["edited_text"] or draft["text"]
        for key, draft in drafts.items()
        if draft["status"] == tables.APPROVED
    }
    if twice := [key for key, count in ids.items() if count > 1]:
        yield f"{len(twice)} replies were published more than once, such as {twice[0]}"
    if lost := approved.keys() - ids.keys():
        yield f"{len(lost)} replies were lost, such as {min(lost)}"
    if more := ids.keys() - approved.keys():
        yield f"{len(more)} replies are of drafts that are not approved, such as {min(more)}"
    for line in lines:
        if line["text"] != approved.get(line["draft_id"], line["text"]):
            yield f"the reply of {line['draft_id']} says {line['text']!r}, which nobody approved"
    for row in rows(database, tables.outbox):
        if row["published_at"] is None:
            yield f"the reply of {row['draft_id']} was not published in time"


# The soak.


def soak(uri: str, folder: Path, load: Load, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs writers, readers and kills; returns the figures, and what is wrong at the end."""
    replies, log = folder / "replies.jsonl", folder / "consoles.log"
    seen, kills = Seen(), 0
    flags = ("--replies", str(replies), "--undo_seconds", str(load.undo_seconds))
    with contextlib.ExitStack() as stack:
        consoles = stack.enter_context(served(2, uri, log, *flags, lease=load.lease))
        began, started = now(), time.monotonic()
        reports = stack.enter_context(writing(uri, load, began))
        until = started + load.seconds
        readers = [Reader(i, consoles, load, until, seen) for i in range(load.readers)]
        for reader in readers:
            reader.start()
        next_kill, next_word = started + load.kill_every, started + 10
        while (moment := time.monotonic()) < until:
            if moment >= next_kill:
                for console in consoles:
                    console.wait()  # so that one of them always answers
                console = consoles[kills % len(consoles)]
                console.kill()
                console.start()
                kills += 1
                next_kill += load.kill_every
            if moment >= next_word:
                decided = sum(answer == YES for *_, answer in seen.attempts)
                say(
                    f"{moment - started:5.0f} s: {seen.requests()} requests, {decided} decisions, "
                    f"{kills} kills, {sum(seen.errors.values())} lost connections"
                )
                next_word += 10
            time.sleep(0.1)
        for reader in readers:
            reader.join()
        read_for = time.monotonic() - started
        database = Database(uri)
        drained, is_drained = time.monotonic(), False
        while not is_drained and time.monotonic() - drained < (load.lease or 60) + 40:
            time.sleep(0.2)
            is_drained = all(row["published_at"] for row in rows(database, tables.outbox))
        drained = time.monotonic() - drained
        say(f"      the last reply was published {drained:.1f} s after the last reader left")
    written: Written = set().union(*(report.written for report in reports))
    wrong = check(database, replies, began, written, seen)
    wrong += [f"a writer: {report.error}" for report in reports if report.error]
    wrong += seen.broken
    wrong += [f"readers saw {name}" for name in seen.errors if "Timeout" in name]
    lags = [
        (row["published_at"] - row["publish_after"]).total_seconds()
        for row in rows(database, tables.outbox)
        if row["published_at"]
    ]
    deadlocks = None
    if not database.is_sqlite:
        with database.read() as connection:
            query = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
            deadlocks = connection.execute(sa.text(query)).scalar_one()
    decided = collections.Counter(event["action"] for event in rows(database, tables.history))
    database.close()
    records = sum(report.records for report in reports)
    return {
        "seconds": load.seconds,
        "requests_per_second": seen.requests() / read_for,
        "latency": {kind: percentiles(values) for kind, values in sorted(seen.seconds.items())},
        "worst": max(itertools.chain(*seen.seconds.values()), default=0.0),
        "requests": {kind: len(values) for kind, values in sorted(seen.seconds.items())},
        "records_per_second": records / load.seconds,
        "records": records,
        "different_records": len(written),
        "writers_waited": list(itertools.chain(*(report.waited for report in reports))),
        "deadlocks": deadlocks,
        "decisions": dict(decided),
        "conflicts": seen.statuses[409],
        "unknown": sum(answer == UNKNOWN for *_, answer in seen.attempts),
        "replies": len(replies.read_text().splitlines()),
        "published_after": percentiles(lags) if lags else (0.0, 0.0),
        "published_after_worst": max(lags, default=0.0),
        "kills": kills,
        "lost_connections": dict(seen.errors),
        "statuses": dict(sorted(seen.statuses.items())),
        "drained": drained,
        "logged": collections.Counter(
            re.sub(r"\d+|/drafts/\S+", "…", line)[:160]
            for line in log.read_text().splitlines()
            if line.startswith(("ERROR", "WARN", "sqlalchemy.", "psycopg.", "sqlite3."))
        ),
        "wrong": wrong,
    }


# Pages.


def pages(uri: str, folder: Path, drafts: int, requests: int) -> dict[str, Any]:
    """Returns p50 and p95 of the seconds of GETs, one after another, by page."""
    began = now()
    database = Database(uri)
    database.upgrade()
    numbers = (number for number in itertools.count() if (number + 1) % 5)  # these are angry
    some = list(itertools.islice(numbers, drafts))
    for start in range(0, drafts, 500):
        with database.write() as connection:
            found = (records_of(began, number, 1) for number in some[start : start + 500])
            upsert(connection, [record for of in found for record in of.values()])
    if not database.is_sqlite:
        with database.write() as connection:
            connection.execute(sa.text("ANALYZE"))  # as the server does by itself within a minute
    database.close()
    noise = random.Random(1)
    addresses: dict[str, Callable[[], str]] = {
        "inbox": lambda: "/",
        "inbox, page 20": lambda: "/?page=19",
        "search": lambda: f"/?q={'+'.join(noise.choices(WORDS, k=2))}",
        "search, one found": lambda: f"/?q=chat-{noise.choice(some)}",
        "draft": lambda: f"/drafts/d{noise.choice(some)}r1",
        "dashboard": lambda: "/dashboard",
    }
    figures: dict[str, Any] = {"drafts": drafts}
    with (
        served(1, uri, folder / "pages.log") as (console,),
        httpx.Client(base_url=console.address) as client,
    ):
        for name, address in addresses.items():
            assert client.get(address()).is_success  # the first one compiles a template
            seconds = []
            for _ in range(requests):
                path = address()
                moment = time.perf_counter()
                assert client.get(path).is_success
                seconds.append(time.perf_counter() - moment)
            figures[name] = percentiles(seconds)
    return figures


# All of it.


@contextlib.contextmanager
def databases(sides: Iterable[str], folder: Path, out: Console) -> Iterator[dict[str, Any]]:
    """Yields, by side, a function that creates a database of a name and returns its URI."""
    made: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        if "SQLite" in sides:
            made["SQLite"] = lambda name: f"sqlite:///{folder}/{name}.db"
        if "PostgreSQL" in sides:
            try:
                server = stack.enter_context(postgres())
            except MissingError as error:
                out.print(f"PostgreSQL is left out: {error}")
            else:
                made["PostgreSQL"] = lambda name: _create(server, name)
        yield made


def _create(server: str, name: str) -> str:
    engine = sa.create_engine(f"{server}postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return f"{server}{name}"


def bench() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--soak", type=float, default=120, help="seconds; 0: none")
    parser.add_argument("--drafts", type=int, default=10_000, help="drafts that wait; 0: no pages")
    parser.add_argument("--requests", type=int, default=200, help="requests of each page")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--readers", type=int, default=50)
    parser.add_argument("--kill_every", type=float, default=20, help="seconds")
    parser.add_argument("--pause", type=float, default=0.25, help="mean seconds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    load = Load(
        options.soak, options.writers, options.readers, options.kill_every, pause=options.pause
    )
    figures: dict[str, Any] = {}
    out = Console(stderr=True, highlight=False)
    with (
        tempfile.TemporaryDirectory(prefix="chatflow-bench-") as scratch,
        databases(options.sides.split(","), Path(scratch), out) as made,
    ):
        for side, new in made.items():
            folder = Path(scratch) / side
            folder.mkdir()
            figures[side] = {}
            if options.soak:
                out.print(f"{side}: soak")
                figures[side]["soak"] = soak(new("soak"), folder, load, out.print)
            if options.drafts:
                out.print(f"{side}: pages of {options.drafts:,} drafts")
                figures[side]["pages"] = pages(
                    new("pages"), folder, options.drafts, options.requests
                )
    if options.json:
        print(json.dumps(figures))
    else:
        show(figures)
    wrong = [
        f"{side}: {what}"
        for side, found in figures.items()
        for what in found.get("soak", {}).get("wrong", ())
    ]
    for what in wrong[:20]:
        out.print(what, markup=False)
    return 1 if wrong else 0


def show(figures: dict[str, Any]) -> None:
    soaks = {side: found["soak"] for side, found in figures.items() if "soak" in found}
    measured = {side: found["pages"] for side, found in figures.items() if "pages" in found}
    if soaks:
        table = _table("Soak", soaks)
        lines: dict[str, Callable[[dict[str, Any]], str]] = {
            "requests/s": lambda f: f"{f['requests_per_second']:.0f}",
            "records written/s": lambda f: f"{f['records_per_second']:.0f}",
            "each record, times": lambda f: f"{f['records'] / max(f['different_records'], 1):.1f}",
            "tries of writers that failed": lambda f: str(len(f["writers_waited"])),
            "deadlocks": lambda f: "–" if f["deadlocks"] is None else str(f["deadlocks"]),
            "approved, dismissed": lambda f: _counts(f["decisions"], "approved", "dismissed"),
            "undone, edited": lambda f: _counts(f["decisions"], "undone", "edited"),
            "somebody was faster (409)": lambda f: str(f["conflicts"]),
            "replies": lambda f: str(f["replies"]),
            "kills": lambda f: str(f["kills"]),
            "lost connections": lambda f: str(sum(f["lost_connections"].values())),
            "decisions without an answer": lambda f: str(f["unknown"]),
            "5xx": lambda f: str(sum(n for s, n in f["statuses"].items() if s >= 500)),
            "published after, p50 / worst": lambda f: (
                f"{f['published_after'][0]:.1f} s / {f['published_after_worst']:.1f} s"
            ),
            "outbox empty after": lambda f: f"{f['drained']:.1f} s",
            "lost, doubled or wrong": lambda f: str(len(f["wrong"])),
        }
        for title, value in lines.items():
            table.add_row(title, *(value(found) for found in soaks.values()))
        Console().print(table)
        table = _table("Soak: p50 / p95, ms", soaks)
        table.add_row("worst of all", *(f"{found['worst'] * 1000:.0f}" for found in soaks.values()))
        for kind in sorted(set().union(*(found["latency"] for found in soaks.values()))):
            table.add_row(kind, *(_ms(found["latency"].get(kind)) for found in soaks.values()))
        Console().print(table)
        for side, found in soaks.items():
            for line, count in collections.Counter(found["logged"]).most_common(5):
                Console().print(f"{side}, log, {count} times: {line}", markup=False)
    if measured:
        some = next(iter(measured.values()))
        table = _table(f"Pages, {some['drafts']:,} waiting drafts: p50 / p95, ms", measured)
        for kind in some:
            if kind != "drafts":
                table.add_row(kind, *(_ms(found[kind]) for found in measured.values()))
        Console().print(table)
        for side, found in measured.items():
            if found["inbox"][0] > TARGET:
                Console().print(f"{side}: the inbox misses its target of {TARGET * 1000:.0f} ms")


def _table(title: str, sides: Iterable[str]) -> Table:
    table = Table(title=title)
    table.add_column("")
    for side in sides:
        table.add_column(side, justify="right")
    return table


def _ms(spread: tuple[float, float] | None) -> str:
    return "–" if spread is None else f"{spread[0] * 1000:.0f} / {spread[1] * 1000:.0f}"


def _counts(found: dict[str, int], *names: str) -> str:
    return ", ".join(str(found.get(name, 0)) for name in names)


if __name__ == "__main__":
    sys.exit(bench())
