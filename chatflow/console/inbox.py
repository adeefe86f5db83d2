"""Reads the review inbox: the list with its filters, and one draft with its chat."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any
from urllib.parse import urlencode

import sqlalchemy as sa

from chatflow.database import tables
from chatflow.database.tables import analyses, chat_attributes, chats, drafts, history, outbox
from chatflow.records import now

PAGE = 50
"""Drafts per page of the inbox."""

JUST_NOW = timedelta(minutes=10)
"""How long after a decision a link may show it, with its button to undo it."""

ANGER_SECONDS = 3600.0
"""Waiting this long (an hour) counts as much as an anger confidence of 1 instead of 0."""

STATUSES = (tables.WAITING, tables.APPROVED, tables.DISMISSED, tables.SUPERSEDED)
SORTS = {
    "urgent": "angriest and oldest first",
    "oldest": "oldest first",
    "angriest": "angriest first",
    "newest": "newest first",
}
KINDS = {"": "all", "text": "with a draft", "flag": "needs a reply"}


SEALED = ("q", "attribute")
"""Fields of a filter that may be personal data."""


@dataclasses.dataclass(frozen=True)
class Filter:
    """Which drafts to list, and in which order; this is the query string of the page.

    `q` is the text to find in ids, messages, summaries and drafts; `attribute` is NAME=VALUE of the
    chat; `page` counts from 0. Links have `sealed` in the place of `q` and `attribute`, because
    proxies and browsers keep addresses.
    """

    status: str = tables.WAITING
    sort: str = "urgent"
    kind: str = ""
    q: str = ""
    attribute: str = ""
    page: int = 0
    sealed: str = ""

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Filter:
        """Returns the filter of a form, or of a query string once it is unsealed.

        Ignores unknown values.
        """
        page = query.get("page", "")
        status, sort, kind = query.get("status"), query.get("sort"), query.get("kind")
        return cls(
            status if status in STATUSES else tables.WAITING,
            sort if sort in SORTS else "urgent",
            kind if kind in KINDS else "",
            query.get("q", "").strip()[:200],
            query.get("attribute", "").replace("\r\n", "\n")[:2000],  # forms send CRLF
            int(page) if re.fullmatch(r"[0-9]{1,5}", page) else 0,
            query.get("sealed", ""),
        )

    def query(self, **changes: Any) -> str:
        """Returns a query string with "?", without defaults; `changes` may add other names."""
        values = {n: value for n, value in vars(self).items() if n not in SEALED} | changes
        parts = {n: value for n, value in values.items() if value != getattr(Filter, n, None)}
        return f"?{urlencode(parts)}" if parts else ""

    @property
    def narrows(self) -> bool:
        """Returns whether the filter leaves out some drafts of its status."""
        return bool(self.q or self.attribute or self.kind)


_anger = sa.func.coalesce(analyses.c.confidence, 1.0)
waits_since = sa.func.coalesce(drafts.c.waits_since, drafts.c.drafted_at)
"""When the customer last wrote: a draft that is written anew does not wait for less time."""

_ORDER: dict[str, tuple[Any, ...]] = {
    "urgent": (sa.extract("epoch", waits_since) - ANGER_SECONDS * _anger, drafts.c.draft_id),
    "oldest": (waits_since, drafts.c.draft_id),
    "angriest": (_anger.desc(), waits_since, drafts.c.draft_id),
    "newest": (waits_since.desc(), drafts.c.draft_id),
}


def _found(wanted: Filter, texts: bool, *columns: Any) -> sa.Select[Any]:
    joined = drafts.outerjoin(analyses, analyses.c.analysis_id == drafts.c.analysis_id)
    found = sa.select(*columns).select_from(joined).where(drafts.c.status == wanted.status)
    if wanted.kind == "text":
        found = found.where(drafts.c.flag.is_(None))
    elif wanted.kind == "flag":
        found = found.where(drafts.c.flag.is_not(None))
    if wanted.attribute:
        both = wanted.attribute  # names may also contain "="
        pairs = [(both[:at], both[at + 1 :]) for at, sign in enumerate(both) if sign == "="]
        having = sa.exists().where(
            chat_attributes.c.chat_id == drafts.c.chat_id,
            sa.tuple_(chat_attributes.c.name, chat_attributes.c.value).in_(pairs),
        )
        found = found.where(having)
    if wanted.q:
        places = [drafts.c.chat_id, drafts.c.user_id]
        if texts:  # otherwise a search reveals hidden texts
            places += [analyses.c.summary, drafts.c.text, drafts.c.edited_text]
        holding = [place.icontains(wanted.q, autoescape=True) for place in places]
        if texts:
            in_chat = sa.exists().where(
                chats.c.chat_id == drafts.c.chat_id,
                chats.c.search_text.contains(wanted.q.casefold(), autoescape=True),
            )
            holding.append(in_chat)
        found = found.where(sa.or_(*holding))
    order = _ORDER[wanted.sort]
    if wanted.status != tables.WAITING and wanted.sort == "urgent":
        order = (drafts.c.changed_at.desc(), drafts.c.draft_id)
    return found.order_by(*order)


def listed(
    connection: sa.Connection, wanted: Filter, texts: bool = True
) -> tuple[list[dict[str, Any]], bool]:
    """Returns a page of drafts and whether there are more; without `texts`, searches only ids."""
    columns = (
        *(drafts.c[name] for name in _LISTED),
        analyses.c.summary,
        analyses.c.sentiment,
        analyses.c.confidence,
    )
    found = _found(wanted, texts, *columns).limit(PAGE + 1).offset(PAGE * wanted.page)
    rows = _rows(connection, found)
    of_chat = attributes_of(connection, [row["chat_id"] for row in rows])
    for row in rows:
        row["attributes"] = of_chat.get(row["chat_id"], {})
    return rows[:PAGE], len(rows) > PAGE


_LISTED = (
    "draft_id", "chat_id", "user_id", "revision", "text", "edited_text", "flag", "drafted_at",
    "waits_since", "status", "version", "decided_by", "decided_at", "reason",
)  # fmt: skip


def neighbours(
    connection: sa.Connection, wanted: Filter, draft_id: str, texts: bool = True
) -> tuple[str | None, str | None]:
    """Returns the drafts before and after one in a list; if it is not listed, None and the first.

    A list may be long, so the search starts one page before `wanted.page`.
    """
    found = _found(wanted, texts, drafts.c.draft_id)
    found = found.limit(1000).offset(PAGE * max(0, wanted.page - 1))
    ids = list(connection.execute(found).scalars())
    if draft_id not in ids:
        if wanted.page:
            return neighbours(connection, dataclasses.replace(wanted, page=0), draft_id, texts)
        return None, ids[0] if ids else None
    place = ids.index(draft_id)
    return ids[place - 1] if place else None, ids[place + 1] if place + 1 < len(ids) else None


def attributes_of(connection: sa.Connection, chat_ids: Sequence[str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    query = sa.select(chat_attributes).where(chat_attributes.c.chat_id.in_(chat_ids))
    for row in connection.execute(query.order_by(chat_attributes.c.name)):
        found.setdefault(row.chat_id, {})[row.name] = row.value
    return found


def known_attributes(connection: sa.Connection, most: int = 100) -> list[str]:
    """Returns the most frequent NAME=VALUE pairs of chats, in alphabetical order."""
    name, value = chat_attributes.c.name, chat_attributes.c.value
    query = sa.select(name, value).group_by(name, value)
    rows = connection.execute(query.order_by(sa.func.count().desc(), name, value).limit(most))
    return sorted(f"{row.name}={row.value}" for row in rows)


def waiting(connection: sa.Connection) -> int:
    """Returns how many drafts wait for review."""
    query = sa.select(sa.func.count()).where(drafts.c.status == tables.WAITING)
    return int(connection.execute(query).scalar_one())


def state(connection: sa.Connection) -> str:
    """Returns a token that changes whenever the inbox does."""
    counted = sa.select(sa.func.count(), sa.func.max(drafts.c.changed_at))
    values = [
        *connection.execute(counted.where(drafts.c.status == tables.WAITING)).one(),
        connection.execute(sa.select(sa.func.max(history.c.history_id))).scalar(),
        connection.execute(sa.select(sa.func.max(analyses.c.analysed_at))).scalar(),
        connection.execute(sa.select(sa.func.max(outbox.c.published_at))).scalar(),
    ]
    return "/".join(map(str, values))


def opened(connection: sa.Connection, draft_id: str) -> dict[str, Any] | None:
    """Returns a draft with its analysis, chat, history and reply; None if it does not exist."""
    draft = _row(connection, drafts.c.draft_id, draft_id)
    if draft is None:
        return None
    of_customer = drafts.c.chat_id == draft["chat_id"], drafts.c.user_id == draft["user_id"]
    others = sa.select(drafts.c.draft_id, drafts.c.status, drafts.c.drafted_at).where(
        *of_customer, drafts.c.draft_id != draft_id
    )
    return {
        "draft": draft,
        "analysis": _row(connection, analyses.c.analysis_id, draft["analysis_id"]),
        "chat": _row(connection, chats.c.chat_id, draft["chat_id"]),
        "reply": _row(connection, outbox.c.draft_id, draft_id),
        "history": events(connection, draft_id),
        "others": _rows(connection, others.order_by(drafts.c.drafted_at.desc()).limit(10)),
    }


def drafted(connection: sa.Connection, draft_id: str) -> dict[str, Any] | None:
    """Returns a draft alone, or None if it does not exist."""
    return _row(connection, drafts.c.draft_id, draft_id)


def decided(connection: sa.Connection, draft_id: str, who: str) -> dict[str, Any] | None:
    """Returns a draft with its reply; None if this person did not decide on it just now."""
    draft = _row(connection, drafts.c.draft_id, draft_id) if draft_id else None
    if draft is None or draft["status"] not in (tables.APPROVED, tables.DISMISSED):
        return None
    if draft["decided_by"] != who or draft["decided_at"] < now() - JUST_NOW:
        return None
    return {"draft": draft, "reply": _row(connection, outbox.c.draft_id, draft_id)}


def _rows(connection: sa.Connection, query: Any) -> list[dict[str, Any]]:
    return [dict(row) for row in connection.execute(query).mappings()]


def _row(connection: sa.Connection, key: sa.Column[Any], value: str) -> dict[str, Any] | None:
    found = _rows(connection, sa.select(key.table).where(key == value))
    return found[0] if found else None


def events(
    connection: sa.Connection, draft_id: str = "", who: str = "", page: int = 0
) -> list[dict[str, Any]]:
    """Returns people's actions, newest first; for one draft or all, by one person or all."""
    query = sa.select(history, drafts.c.chat_id, drafts.c.revision).outerjoin(
        drafts, drafts.c.draft_id == history.c.draft_id
    )
    if draft_id:
        query = query.where(history.c.draft_id == draft_id)
    if who:
        query = query.where(history.c.who == who)
    query = query.order_by(history.c.history_id.desc()).limit(PAGE + 1).offset(PAGE * page)
    return _rows(connection, query)
