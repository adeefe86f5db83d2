"""Shows a run in the terminal: progress while it runs, results and counts at its end."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from chatflow import metrics
from chatflow.errors import BadInputError
from chatflow.records import Analysis, DeadLetter, Draft, Record, Reply, open_record
from chatflow.running.summary import DISTRIBUTIONS, TONE_STYLES, Summary, read_records
from chatflow.sources.formats.objects import described


def results_table(summary: Summary, most: int) -> Table:
    """Returns a table of up to `most` analyses in files, with their drafts."""
    drafts = {
        draft.analysis_id: draft_text(draft)
        for draft in read_records(Draft, summary.readable("drafts"))
    }
    analyses = list(read_records(Analysis, summary.readable("analyses")))
    analyses.sort(key=lambda a: (a.sentiment, a.chat_id, a.user_id))
    table = Table(title="Analyses", show_lines=True, expand=True)
    table.add_column("chat", overflow="fold", max_width=18)
    table.add_column("user", overflow="fold", max_width=14)
    table.add_column("sentiment", width=9)
    table.add_column("summary", ratio=3, overflow="fold")
    table.add_column("draft for review", ratio=4, overflow="fold")
    for analysis in analyses[:most]:
        word, style = TONE_STYLES[int(analysis.sentiment)]
        table.add_row(
            plain(analysis.chat_id),
            plain(analysis.user_id),
            f"[{style}]{analysis.sentiment:+d} {word}[/]" if analysis.sentiment else "0 neutral",
            plain(analysis.summary),
            plain(drafts.get(analysis.analysis_id, "")),
        )
    if len(analyses) > most:
        table.caption = f"{len(analyses) - most} more in the files; --show=N shows more"
    return table


def draft_text(draft: Draft) -> str:
    """Returns the text of a draft, or why there is none."""
    return draft.text or f"⚑ {str(draft.flag).replace('_', ' ')}: no draft, please look"


def plain(text: str) -> str:
    """Returns a text for a terminal, without markup and escape sequences."""
    from rich.markup import escape

    return escape("".join(c for c in text if c.isprintable() or c == "\n"))


def _few(files: list[str]) -> list[str]:
    return files if len(files) <= 5 else [*files[:4], f"and {len(files) - 4} more files"]


def _spaced(parts: dict[str, int]) -> dict[str, int]:
    return {name.replace("_", " "): value for name, value in parts.items() if value}


_SOURCES = {"model": "by the model", "quotations": "composed of quotations"}


def counts_table(summary: Summary) -> Table:
    values = summary.to_dict()
    table = Table(title="Counts", show_header=False)
    table.add_column(style="bold")
    table.add_column()

    def listed(parts: dict[str, int]) -> str:
        return ", ".join(f"{name} {value:,}" for name, value in parts.items()) or "none"

    cached = f", {values['cached_tokens']:,} from a cache" if values["cached_tokens"] else ""
    letters, flagged = values["dead_letters_by_reason"], values["drafts_flagged"]
    rows = {
        "lines read": f"{values['lines_read']:,}, of these {values['chats_read']:,} chats"
        f" and {values['messages_read']:,} messages",
        "found": described(values["formats"], values["input"]),
        "assembled": f"{values['chats_assembled']:,} chats and revisions of messages",
        "analysed": f"{values['analysed']:,} of {values['asked']:,} users asked about: "
        + listed(values["sentiment"]),
        "summaries": listed({_SOURCES[k]: v for k, v in values["summaries"].items()}),
        "drafts": f"{values['drafted']:,} of {summary.get('drafts_asked'):,} angry users"
        + (f"; flagged: {listed(_spaced(flagged))}" if flagged else ""),
        "dead letters": f"{values['dead_letters']:,}" + (f": {listed(letters)}" if letters else ""),
        "left out": listed(_spaced(values["reduced"])),
        "repaired input": listed(_spaced(values["input"])),
        "repaired answers": listed(values["repaired"]),
        "tokens": f"{values['prompt_tokens']:,} read{cached}, {values['answer_tokens']:,} written",
        "time": f"{values['seconds']:,.1f} s, {values['chats_per_second']:.2f} chats a second",
        "lost": f"{values['lost']:,}",
    }
    if not values["formats"]:
        del rows["found"]
    if values["redacted"]:
        rows["redacted"] = listed(_spaced(values["redacted"]))
    if values["skipped"]:
        rows["done before"] = f"{values['skipped']:,} users, whose analysis earlier results hold"
    if values["answers_known"]:
        rows["not asked again"] = f"{values['answers_known']:,} questions, answered before"
    if escalated := values["escalated"]["asked"]:
        kept = sum(values["escalated"]["kept"].values())
        changed = values["escalated"]["changed"]
        rows["second opinions"] = f"{escalated:,}, of which {changed:,} changed the sentiment" + (
            f"; none came for {kept:,}" if kept else ""
        )
    if values["requests"]:
        again = {"made again": values["retries"], "with an answer sent back": values["asked_again"]}
        faults = f"; faults: {listed(values['faults'])}" if values["faults"] else ""
        rows["calls"] = f"{values['requests']:,}, of these {listed(again)}{faults}"
    if values["copies_loaded"]:
        rows["models"] = f"copies loaded {values['copies_loaded']:,}"
    if any(values["updates"].values()):
        rows["updates"] = listed(_spaced(values["updates"]))
    if summary.cost is not None:
        rows["cost"] = f"about {summary.cost:,.4f} US dollars, at the prices of --prices"
    for name, (title, unit) in DISTRIBUTIONS.items():
        if name in summary.distributions:
            spread = summary.distributions[name]
            rows[title] = "{min:,.0f} to {max:,.0f}, mean {mean:,.0f}".format(**spread) + unit
    for kind, files in values["files"].items():
        rows[f"{kind.replace('_', ' ')} in"] = "\n".join(
            _few(files) + values["other_destinations"][kind]
        )
    for name, text in rows.items():
        table.add_row(name, plain(text))
    return table


@contextlib.contextmanager
def progress(console: Console, results: bool = False) -> Iterator[None]:
    """Shows counts, what the run waits for, and with `results` the newest analyses.

    All are of this process. Without a terminal, they are lines.
    """
    metrics.reset_local_counts()
    started = time.monotonic()

    def text() -> str:
        counts = ", ".join(
            f"{what} {count:,}" + (f" of {total:,}" if total != count else "")
            for what, count, total in _state()
        )
        waits = "".join(f"; {wait}" for wait in _waits())
        return f"[{time.monotonic() - started:5.0f} s] {counts}{waits}"

    def first() -> str:
        newest = metrics.results() if results else []
        return f"[{time.monotonic() - started:5.0f} s] {for_people(newest[0])}" if newest else ""

    if console.is_terminal:
        show = in_background(_bars, console, results)
    else:
        show = lines(console, text, first=first)
    with show:
        yield


def _waits() -> list[str]:
    return [f"{what}: {seconds:.0f} s" for what, seconds in metrics.waits()]


@contextlib.contextmanager
def in_background(show: Callable[..., None], *arguments: Any) -> Iterator[None]:
    """Runs a function in a thread, with an event that tells it when to end."""
    done = threading.Event()
    thread = threading.Thread(target=show, args=(*arguments, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def lines(
    console: Console,
    text: Callable[[], str],
    every: float = 5.0,
    first: Callable[[], str] = lambda: "",
) -> Any:
    """Prints lines for logs; returns a context that ends it.

    Args:
      text: what to print every `every` seconds.
      first: what to print once, with rich's markup, as soon as it is not empty.
    """

    def show(done: threading.Event) -> None:
        said, due = False, time.monotonic() + every
        while not done.wait(0.2):
            if not said and (line := first()):
                said = True
                console.print(line, highlight=False, soft_wrap=True)
            if time.monotonic() >= due:
                due += every
                console.print(text(), highlight=False, markup=False, soft_wrap=True)

    return in_background(show)


def _state() -> list[tuple[str, int, int]]:
    """Returns (what, done, total so far) of each step of a run."""
    counts = metrics.local_counts()
    letters = sum(v for k, v in counts.items() if k.startswith("dead_letters/"))
    read = counts.get("lines_read", 0)
    drafts = counts.get("drafted", 0) + sum(
        count for name, count in counts.items() if name.startswith("drafts_flagged/")
    )
    # Of a batch that is not done, the model has read a part.
    analyses = max(counts.get("answered/analysis", 0), counts.get("requests_read", 0))
    tokens = counts.get("tokens", 0)
    return [
        ("lines read", read, read),
        ("analyses", analyses, counts.get("asked", 0)),
        ("drafts", drafts, counts.get("drafts_asked", 0)),
        ("dead letters", letters, letters),
        *([("tokens", tokens, tokens)] if tokens else []),
    ]


def _bars(console: Console, results: bool, done: threading.Event) -> None:
    columns = (
        TextColumn("{task.description:>12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    bars = Progress(*columns, console=console)
    tasks: dict[str, Any] = {}
    with Live(bars, console=console, transient=True, refresh_per_second=5) as live:
        while not done.wait(0.2):
            for what, count, total in _state():
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=None)
                bars.update(tasks[what], completed=count, total=total or None)
            newest = metrics.results() if results else []
            shown = [Text.from_markup(for_people(one), overflow="ellipsis") for one in newest]
            for line in shown:
                line.no_wrap = True
            live.update(Group(*shown, bars, *(Text(wait, "dim") for wait in _waits())))


def for_people(record: Record) -> str:
    """Returns a record for a person, with rich's markup."""
    if isinstance(record, Analysis):
        word, style = TONE_STYLES[int(record.sentiment)]
        said = f"[{style}]{word:<7}[/] {plain(record.chat_id)} {plain(record.user_id)}: "
        return said + plain(record.summary)
    if isinstance(record, Draft):
        text = " ".join(draft_text(record).split())
        return f"[bold]draft[/]   {plain(record.chat_id)} {plain(record.user_id)}: {plain(text)}"
    if isinstance(record, Reply):
        said = f"[bold]reply[/]   {plain(record.chat_id)} {plain(record.user_id)}"
        text = plain(" ".join(record.text.split()))
        return f"{said}, approved by {plain(record.approved_by)}: {text}"
    assert isinstance(record, DeadLetter)
    where = f"{record.stage}/{record.reason}"
    return f"[magenta]dead[/]    {plain(record.chat_id or '-')} {where}: {plain(record.error)}"


def said(data: bytes) -> str:
    """Returns what `chatflow tail` prints of a message."""
    try:
        return for_people(open_record(data))
    except BadInputError as error:
        return f"not a record of chatflow: {error}"
