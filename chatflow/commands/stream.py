"""`chatflow stream`: runs the whole event-driven system on this machine, with a live view."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import math
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from chatflow.errors import BadInputError, UsageError
from chatflow.options import Parser, add_flags, number

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from chatflow.records import Analysis, Draft

PROJECT = "chatflow-local"
EVENTS, ANALYSES, DRAFTS, DEAD_LETTERS, REPLIES = TOPICS = tuple(
    f"projects/{PROJECT}/topics/{name}"
    for name in ("events", "analyses", "drafts", "dead-letters", "replies")
)

DESCRIPTION = """
Starts the Pub/Sub emulator (or uses the one at PUBSUB_EMULATOR_HOST), runs the
pipeline on it, replays chats as live messages, and shows the results, also on the
page of `chatflow console`. Ctrl-C drains the pipeline and stops everything that was
started.

  chatflow stream --rate 2
"""

PASSES_FLAGS_ON = True


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--chats",
        default="samples/chats.jsonl",
        help="chats to replay, in a format that `run` reads (default: %(default)s)",
    )
    parser.add_argument(
        "--rate", type=float, default=1.0, help="messages a second (default: %(default)s)"
    )
    parser.add_switch("stop_when_done", help="end when all chats were replayed")
    parser.add_switch("console", True, "also serve the staff's page (default: true)")
    parser.add_argument(
        "--console_port",
        type=number(int, most=65_535, zero=True),
        default=8080,
        help="port of the staff's page (default: %(default)s)",
    )
    add_flags(parser, leave_out=("input", "id_label"))


class Board:
    """The counts, latencies and newest results to show. Many threads write to it."""

    def __init__(self, newest: int = 8):
        self.published, self.total = 0, 0
        self.sentiments: collections.Counter[str] = collections.Counter()
        self.dead_letters: collections.Counter[str] = collections.Counter()
        self.analyses: collections.deque[Analysis] = collections.deque(maxlen=newest)
        self.drafts: collections.deque[Draft] = collections.deque(maxlen=max(newest // 2, 1))
        self.drafted = self.flagged = self.replies = 0
        self.latencies: collections.deque[float] = collections.deque(maxlen=1000)
        self.note = ""
        self._sent: dict[tuple[str, int], float] = {}
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def sent(self, chat_id: str, revision: int, at: float) -> None:
        with self._lock:
            self._sent[chat_id, revision] = at

    def take(self, messages: Sequence[Any]) -> None:
        for message in messages:
            self.arrived(message)

    def arrived(self, message: Any) -> None:
        """Adds the result in a `PubsubMessage`; a duplicate counts once."""
        from chatflow.records import Analysis, DeadLetter, Draft, Reply, open_record, record_id

        try:
            record = open_record(message.data)
        except BadInputError:
            return
        with self._lock:
            key = f"{type(record).__name__} {record_id(record)}"
            if key in self._seen:
                return
            self._seen.add(key)
            if isinstance(record, Analysis):
                self.sentiments[record.sentiment.name.lower()] += 1
                self.analyses.append(record)
                sent = self._sent.pop((record.chat_id, record.revision), None)
                if sent is not None:
                    self.latencies.append(message.publish_time.timestamp() - sent)
            elif isinstance(record, Draft):
                self.drafted += record.flag is None
                self.flagged += record.flag is not None
                self.drafts.append(record)
            elif isinstance(record, Reply):
                self.replies += 1
            elif isinstance(record, DeadLetter):
                self.dead_letters[f"{record.stage}/{record.reason}"] += 1

    def all_read(self) -> bool:
        """Returns whether the pipeline has read everything published so far."""
        from chatflow import metrics

        return metrics.local_counts().get("lines_read", 0) >= self.published

    def all_arrived(self) -> bool:
        """Returns whether all results that the pipeline has written have arrived."""
        from chatflow import metrics

        now = metrics.local_counts()
        others = ("dead_letters/", "drafts_flagged/")
        counted = sum(count for name, count in now.items() if name.startswith(others))
        written = now.get("analysed", 0) + now.get("drafted", 0) + counted
        drafts = self.drafted + self.flagged
        return self.sentiments.total() + drafts + self.dead_letters.total() >= written

    def percentiles(self) -> tuple[float, float] | None:
        """Returns p50 and p95 of the seconds from a chat's last message to its analysis."""
        from chatflow.console.dashboard import percentiles

        with self._lock:
            return percentiles(self.latencies) if self.latencies else None

    def counts(self) -> dict[str, str]:
        """Returns the figures to show, by title."""
        from chatflow import metrics

        now = metrics.local_counts()
        tones = ", ".join(f"{name} {count}" for name, count in sorted(self.sentiments.items()))
        letters = ", ".join(f"{name} {count}" for name, count in self.dead_letters.items())
        waiting = now.get("asked", 0) - now.get("answered/analysis", 0)
        latency = self.percentiles()
        return {
            "messages": f"{self.published} of {self.total} published, "
            f"{now.get('lines_read', 0)} read",
            "analyses": f"{sum(self.sentiments.values())}" + (f" ({tones})" if tones else ""),
            "at the model": f"{max(waiting, 0)} chats",
            "drafts": f"{self.drafted}"
            + (f", {self.flagged} flagged" if self.flagged else "")
            + (f", {self.replies} approved and sent" if self.replies else ""),
            "dead letters": f"{self.dead_letters.total()}" + (f" ({letters})" if letters else ""),
            "last message to analysis": "p50 {:.1f} s, p95 {:.1f} s".format(*latency)
            if latency
            else "-",
        }

    def text(self) -> str:
        return "; ".join(f"{title}: {value}" for title, value in self.counts().items())

    def render(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table

        from chatflow.running.summary import TONE_STYLES
        from chatflow.running.terminal import draft_text, plain

        counts = Table.grid(padding=(0, 2))
        for title, text in self.counts().items():
            counts.add_row(f"[bold]{title}[/]", plain(text))
        analyses = Table(title="Newest analyses", expand=True)
        analyses.add_column("chat", max_width=20, no_wrap=True)
        analyses.add_column("sentiment", width=9)
        analyses.add_column("summary", ratio=1, no_wrap=True)
        drafts = Table(title="Newest drafts, for review", expand=True)
        drafts.add_column("chat", max_width=20, no_wrap=True)
        drafts.add_column("text", ratio=1)
        with self._lock:
            for analysis in reversed(self.analyses):
                word, style = TONE_STYLES[int(analysis.sentiment)]
                analyses.add_row(
                    plain(analysis.chat_id), f"[{style}]{word}[/]", plain(analysis.summary)
                )
            for draft in reversed(self.drafts):
                drafts.add_row(plain(draft.chat_id), plain(" ".join(draft_text(draft).split())))
        return Group(counts, analyses, drafts, self.note)


@dataclasses.dataclass
class Run:
    """A pipeline that runs in the background; `error` is None unless it has failed."""

    result: Any
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self.ended = threading.Event()
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        try:
            self.result.wait_until_finish()
        except BaseException as error:
            self.error = error
        self.ended.set()


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    from rich.console import Console

    from chatflow import metrics
    from chatflow.commands.run import show_summary
    from chatflow.options import from_flags
    from chatflow.running import publishing
    from chatflow.running.console import console_beside, has_screen
    from chatflow.running.emulator import emulator, make_topics, subscription_of
    from chatflow.running.launch import failures, prepare, sigterm_interrupts
    from chatflow.running.summary import Summary
    from chatflow.sources.chats import customs_of
    from chatflow.sources.puller import follow

    if not 0 < parsed.rate < math.inf:
        raise UsageError(f"--rate={parsed.rate}: must be more than 0")
    customs = customs_of(parsed.roles, parsed.placeholders, parsed.input_format, parsed.columns)
    read = publishing.read_lines(parsed.chats, "--chats", customs)
    chats, others = publishing.chats_of(read, customs)
    if others or not chats:
        found = f"{len(others)} lines or rows are not chats" if others else "has no chats"
        raise UsageError(f"--chats={parsed.chats}: {found}")
    parsed.roles = ""  # they are ours now, and must not be changed a second time
    parsed.input = subscription_of(EVENTS)
    for kind, topic in (("analyses", ANALYSES), ("drafts", DRAFTS), ("dead_letters", DEAD_LETTERS)):
        own = getattr(parsed, kind) or (f"{parsed.output}/{kind}" if parsed.output else "")
        setattr(parsed, kind, ",".join(filter(None, (topic, own))))
    console = Console(stderr=not sys.stdout.isatty())
    board = Board()
    board.total = sum(len(chat.messages) + 1 for chat in chats)
    metrics.reset_local_counts()
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        if not parsed.database:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="chatflow-"))
            parsed.database = f"sqlite:///{folder}/chatflow.db"
        options = from_flags(parsed)
        stack.enter_context(sigterm_interrupts())
        console.print("starting the Pub/Sub emulator")
        host = stack.enter_context(emulator())
        make_topics(TOPICS)
        planned, pipeline, *_ = stack.enter_context(prepare(options, rest, console))
        stack.callback(planned.model.forget)
        results = stack.enter_context(follow(TOPICS[1:]))
        console.print(
            f"Pub/Sub is at PUBSUB_EMULATOR_HOST={host}; from another terminal, send to\n"
            f"  {EVENTS}\nand read the results from\n  " + "\n  ".join(TOPICS[1:]),
            highlight=False,
            soft_wrap=True,
        )
        if parsed.console:
            flags_of_console = [f"--database={options.database}", f"--replies={REPLIES}"]
            if place := options.database_password:
                flags_of_console.append(f"--database_password={place}")
            if "://" in options.keep_raw or options.keep_raw.startswith("sqlite:"):
                flags_of_console.append(f"--raw_database={options.keep_raw}")
            if console.is_terminal and has_screen():
                flags_of_console.append("--open_browser")
            address = stack.enter_context(console_beside(flags_of_console, parsed.console_port))
            console.print(
                f"review the drafts on [bold]{address}[/]", highlight=False, soft_wrap=True
            )
        console.print(f"loading {options.model}", highlight=False)
        run = Run(pipeline.run())
        replay = publishing.Replay(chats, sent=board.sent)
        stop = threading.Event()
        sender = threading.Thread(
            target=_send, args=(replay, parsed.rate, board, stop), daemon=True
        )
        sender.start()
        board.note = "Ctrl-C drains and stops"
        try:
            with show(board, console):
                while not run.ended.is_set():
                    board.take(results())
                    if parsed.stop_when_done and not sender.is_alive() and board.all_read():
                        break
        except KeyboardInterrupt:
            pass
        stop.set()
        sender.join()
        if run.error is None and not run.ended.is_set():
            board.note = "draining: finishing what was read; Ctrl-C again stops at once"
            run.result.drain()
            with show(board, console):
                while not run.ended.is_set():
                    board.take(results())
                give_up = time.monotonic() + 10  # for results still on their way
                while not board.all_arrived() and time.monotonic() < give_up:
                    board.take(results())
        if run.error is not None:
            with failures(planned):
                raise run.error
        board.note = ""
        if console.is_terminal:
            console.print(board.render())
    summary = Summary.of(run.result, time.monotonic() - started, planned)
    show_summary(summary, options)
    return 0


def _send(replay: Any, rate: float, board: Board, stop: threading.Event) -> None:
    from chatflow.running import publishing

    def published(count: int) -> None:
        board.published = count

    try:
        publishing.send(replay, EVENTS, rate, published, stop.wait)
    except UsageError as error:
        board.note = str(error)


def show(board: Board, console: Console) -> Any:
    """Shows the board while the block runs: live in a terminal, else as lines."""
    if not console.is_terminal:
        from chatflow.running.terminal import lines

        return lines(console, board.text)
    from rich.live import Live

    return Live(get_renderable=board.render, console=console, refresh_per_second=4, transient=True)
