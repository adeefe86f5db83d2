"""Computes the figures of the dashboard: volumes, tones, latencies and decisions on drafts."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from chatflow.console.decisions import REASONS
from chatflow.database import tables
from chatflow.database.tables import (
    analyses,
    chat_attributes,
    chats,
    dead_letters,
    drafts,
    outbox,
)

PERIODS = {
    "day": ("24 hours", timedelta(hours=24), timedelta(hours=1)),
    "week": ("7 days", timedelta(days=7), timedelta(hours=6)),
    "month": ("30 days", timedelta(days=30), timedelta(days=1)),
    "quarter": ("90 days", timedelta(days=90), timedelta(days=3)),
}
"""Period name to title, length, and length of each bar of the charts."""

SAMPLE = 5000
"""Latencies and edit distances are computed from this many newest values."""

DISTANCES = (
    (0.0, "as written"),
    (0.1, "up to 10%"),
    (0.3, "up to 30%"),
    (0.6, "up to 60%"),
    (1.0, "more"),
)
"""Bins of edit distances: upper end and title."""


@dataclasses.dataclass(frozen=True)
class Bar:
    """The number of analyses of each tone in one part of the period."""

    begins: datetime
    angry: int = 0
    neutral: int = 0
    happy: int = 0

    @property
    def total(self) -> int:
        return self.angry + self.neutral + self.happy


@dataclasses.dataclass(frozen=True)
class Work:
    """Decisions on the drafts of one model and prompt version.

    `flagged` counts drafts without a text by the model. `distances` compares approved texts with
    the model's texts, from 0 (the same) to 1.
    """

    model: str
    prompt_version: str
    approved: int
    dismissed: int
    flagged: int
    distances: Sequence[float]

    @property
    def approval_rate(self) -> float | None:
        return share(self.approved, self.approved + self.dismissed)

    @property
    def median_distance(self) -> float | None:
        return statistics.median(self.distances) if self.distances else None


def share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def figures(
    connection: sa.Connection, period: str, attribute: str, moment: datetime
) -> dict[str, Any]:
    """Returns all values of the dashboard, for the period of `PERIODS` that ends at `moment`.

    They include the share of angry customers for each value of `attribute` (default: the first).
    """
    _, length, step = PERIODS[period]
    since = moment - length
    names = sorted(
        connection.execute(sa.select(chat_attributes.c.name).distinct().limit(100)).scalars()
    )
    attribute = attribute if attribute in names else (names[0] if names else "")
    bars = _bars(connection, since, moment, step)
    work = _work(connection, since)
    approved, dismissed = (
        sum(getattr(w, name) for w in work) for name in ("approved", "dismissed")
    )
    distances = [distance for each in work for distance in each.distances]
    totals = {
        tone: sum(getattr(bar, tone) for bar in bars) for tone in ("angry", "neutral", "happy")
    }
    return {
        "since": since,
        "bars": bars,
        "analyses": sum(totals.values()),
        "chats": _count(connection, analyses.c.chat_id.distinct(), analyses.c.analysed_at >= since),
        "tones": totals,
        "angry_share": share(totals["angry"], sum(totals.values())),
        "attribute": attribute,
        "attributes": names,
        "by_attribute": _by_attribute(connection, since, attribute) if attribute else [],
        "analysis_latency": _spread(_analysis_seconds(connection, since)),
        "review_latency": _spread(_review_seconds(connection, since)),
        "drafts": _count(connection, drafts.c.draft_id, drafts.c.drafted_at >= since),
        "waiting": _count(connection, drafts.c.draft_id, drafts.c.status == tables.WAITING),
        "oldest": connection.execute(
            sa.select(sa.func.min(drafts.c.drafted_at)).where(drafts.c.status == tables.WAITING)
        ).scalar(),
        "approved": approved,
        "dismissed": dismissed,
        "approval_rate": share(approved, approved + dismissed),
        "distances": _bins(distances),
        "median_distance": statistics.median(distances) if distances else None,
        "reasons": _reasons(connection, since),
        "work": work,
        "dead_letters": _dead_letters(connection, since),
        "replies": _replies(connection, since),
    }


def _count(connection: sa.Connection, column: Any, *where: Any) -> int:
    return int(connection.execute(sa.select(sa.func.count(column)).where(*where)).scalar_one())


def _bars(
    connection: sa.Connection, since: datetime, moment: datetime, step: timedelta
) -> list[Bar]:
    seconds = int(step.total_seconds())
    at = sa.extract("epoch", analyses.c.analysed_at)
    begins = (at - at % seconds).label("begins")
    query = (
        sa.select(begins, analyses.c.sentiment, sa.func.count().label("number"))
        .where(analyses.c.analysed_at >= since)
        .group_by(begins, analyses.c.sentiment)
    )
    found: dict[int, dict[str, int]] = {}
    for row in connection.execute(query):
        tone = {-1: "angry", 0: "neutral", 1: "happy"}[row.sentiment]
        found.setdefault(int(row.begins), {})[tone] = row.number
    first = int(since.timestamp()) // seconds * seconds
    moments = range(first, int(moment.timestamp()) + 1, seconds)
    return [Bar(datetime.fromtimestamp(at, UTC), **found.get(at, {})) for at in moments]


def _by_attribute(
    connection: sa.Connection, since: datetime, name: str
) -> list[tuple[str, int, int]]:
    """Returns each value with its customers, and how many are angry in their newest analysis."""
    newest_first = analyses.c.revision.desc(), analyses.c.analysed_at.desc(), analyses.c.analysis_id
    of_customer = sa.func.row_number().over(
        partition_by=(analyses.c.chat_id, analyses.c.user_id), order_by=newest_first
    )
    ranked = (
        sa.select(analyses.c.chat_id, analyses.c.sentiment, of_customer.label("place"))
        .where(analyses.c.analysed_at >= since)
        .subquery()
    )
    angry = sa.func.sum(sa.case((ranked.c.sentiment == -1, 1), else_=0))
    query = (
        sa.select(chat_attributes.c.value, sa.func.count(), angry)
        .select_from(ranked.join(chat_attributes, chat_attributes.c.chat_id == ranked.c.chat_id))
        .where(ranked.c.place == 1, chat_attributes.c.name == name)
        .group_by(chat_attributes.c.value)
        .order_by(sa.func.count().desc(), chat_attributes.c.value)
        .limit(12)
    )
    return [(value, count, int(bad)) for value, count, bad in connection.execute(query)]


def _analysis_seconds(connection: sa.Connection, since: datetime) -> list[float]:
    of_chat = sa.and_(
        chats.c.chat_id == analyses.c.chat_id, chats.c.revision == analyses.c.revision
    )
    query = (
        sa.select(analyses.c.analysed_at, chats.c.last_message_at)
        .select_from(analyses.join(chats, of_chat))
        .where(analyses.c.analysed_at >= since, chats.c.last_message_at.is_not(None))
        .order_by(analyses.c.analysed_at.desc())
        .limit(SAMPLE)
    )
    return [(end - begin).total_seconds() for end, begin in connection.execute(query)]


def _review_seconds(connection: sa.Connection, since: datetime) -> list[float]:
    query = (
        sa.select(drafts.c.decided_at, drafts.c.drafted_at)
        .where(drafts.c.decided_at >= since)
        .order_by(drafts.c.decided_at.desc())
        .limit(SAMPLE)
    )
    return [(end - begin).total_seconds() for end, begin in connection.execute(query)]


def _spread(values: Sequence[float]) -> tuple[float, float] | None:
    return percentiles(values) if values else None


def _work(connection: sa.Connection, since: datetime) -> list[Work]:
    columns = drafts.c.model, drafts.c.prompt_version
    decided = drafts.c.decided_at >= since
    approved, dismissed = (
        sa.func.sum(sa.case((drafts.c.status == status, 1), else_=0))
        for status in (tables.APPROVED, tables.DISMISSED)
    )
    counted = (
        sa.select(*columns, approved, dismissed, sa.func.count(drafts.c.flag))
        .where(decided, drafts.c.status.in_((tables.APPROVED, tables.DISMISSED)))
        .group_by(*columns)
        .order_by(*columns)
    )
    newest = (
        sa.select(*columns, drafts.c.edit_distance)
        .where(decided, drafts.c.edit_distance.is_not(None))
        .order_by(drafts.c.decided_at.desc())
        .limit(SAMPLE)
    )
    distances: dict[tuple[str, str], list[float]] = {}
    for model, version, distance in connection.execute(newest):
        distances.setdefault((model, version), []).append(distance)
    return [
        Work(model, version, int(good), int(bad), flagged, distances.get((model, version), []))
        for model, version, good, bad, flagged in connection.execute(counted)
    ]


def _bins(distances: Sequence[float]) -> list[tuple[str, int]]:
    least, bins = -1.0, []
    for most, title in DISTANCES:
        bins.append((title, sum(least < distance <= most for distance in distances)))
        least = most
    return bins


def _reasons(connection: sa.Connection, since: datetime) -> list[tuple[str, int]]:
    query = (
        sa.select(drafts.c.reason, sa.func.count())
        .where(drafts.c.decided_at >= since, drafts.c.status == tables.DISMISSED)
        .group_by(drafts.c.reason)
        .order_by(sa.func.count().desc(), drafts.c.reason)
    )
    return [(REASONS.get(name, name), count) for name, count in connection.execute(query)]


def _dead_letters(connection: sa.Connection, since: datetime) -> list[tuple[str, int, datetime]]:
    """Returns stage and reason, count, and time of the last one."""
    at = dead_letters.c.failed_at
    query = (
        sa.select(dead_letters.c.stage, dead_letters.c.reason, sa.func.count(), sa.func.max(at))
        .where(at >= since)
        .group_by(dead_letters.c.stage, dead_letters.c.reason)
        .order_by(sa.func.count().desc(), dead_letters.c.stage, dead_letters.c.reason)
    )
    return [(f"{stage}/{reason}", n, last) for stage, reason, n, last in connection.execute(query)]


def _replies(connection: sa.Connection, since: datetime) -> dict[str, Any]:
    waits = outbox.c.published_at.is_(None)
    failing = sa.select(outbox.c.error).where(waits, outbox.c.error.is_not(None)).limit(1)
    return {
        "published": _count(connection, outbox.c.draft_id, outbox.c.published_at >= since),
        "waiting": _count(connection, outbox.c.draft_id, waits),
        "error": connection.execute(failing).scalar(),
    }


def percentiles(values: Iterable[float]) -> tuple[float, float]:
    """Returns p50 and p95 of at least one value."""
    in_order = sorted(values)
    cuts = statistics.quantiles([in_order[0], *in_order], n=100, method="inclusive")
    return cuts[49], cuts[94]
