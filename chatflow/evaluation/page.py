"""`--report`: renders an evaluation as one self-contained HTML page."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

import chatflow
from chatflow.errors import UsageError
from chatflow.evaluation.figures import identity, wrong
from chatflow.evaluation.tables import INTERVALS, interval, rows
from chatflow.evaluation.variants import Ran
from chatflow.records import now


def write_page(path: str, report: Mapping[str, Any], ran: Sequence[Ran]) -> None:
    """Writes the page; raises `UsageError` if the file cannot be written."""
    try:
        Path(path).write_text(page(report, ran), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--report={path}: cannot be written: {error}") from None


def page(report: Mapping[str, Any], ran: Sequence[Ran]) -> str:
    """Returns the page as text, with all that chats and models wrote escaped."""
    source = importlib.resources.files("chatflow.evaluation") / "page.html.jinja"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    variants = []
    for each, found in zip(ran, report["variants"], strict=True):
        columns = dict(rows(found))
        variants.append(
            {**found, "rows": columns, "wrong": list(_wrong(each)), "texts": _texts(each, found)}
        )
    return environment.from_string(source.read_text("utf-8")).render(
        report=report,
        variants=variants,
        row_names=list(dict.fromkeys(name for variant in variants for name in variant["rows"])),
        intervals=INTERVALS,
        interval=interval,
        version=chatflow.__version__,
        date=now().strftime("%Y-%m-%d %H:%M UTC"),
    )


def _wrong(ran: Ran) -> Iterator[dict[str, Any]]:
    """Yields the wrongly answered chats with their messages, the most confident first."""
    missed = [judged for judged in ran.judged.values() if not judged.right]
    for judged in sorted(missed, key=lambda j: -(j.confidence or 0)):
        yield {
            **wrong(judged),
            "reason": judged.unanswered,
            "messages": judged.label.chat.messages,
        }


def _texts(ran: Ran, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns each chat's summary and draft, if any, with what the checks found."""
    if found["summaries"] is None:
        return []
    by_kind = [
        {(item["chat_id"], item["user_id"]): item for item in found[kind]["offenders"]}
        for kind in ("summaries", "drafts")
    ]
    texts = []
    for key, judged in ran.judged.items():
        if judged.analysis is None:
            continue
        of_summary, of_draft = (_said(offenders.get(key, {})) for offenders in by_kind)
        texts.append(
            {
                **identity(judged),
                "summary": judged.analysis.summary,
                "quotations": judged.analysis.summary_source == "quotations",
                "draft": judged.draft.text if judged.draft else "",
                "undrafted": judged.undrafted,
                "of_summary": of_summary,
                "of_draft": of_draft,
            }
        )
    return texts


_FINDINGS = {
    "promises": "promises",
    "names": "names not in the chat",
    "numbers": "numbers not in the chat",
    "ungrounded": "stems of words not in the chat",
}


def _said(offender: Mapping[str, Any]) -> list[str]:
    """Returns in words what the checks found in a text."""
    said = [
        f"{title}: {', '.join(dict.fromkeys(offender[name]))}"
        for name, title in _FINDINGS.items()
        if name in offender
    ]
    if "no_apology" in offender:
        said.append("does not apologise")
    if "copies_prompt" in offender:
        said.append("copies the prompt")
    return said
