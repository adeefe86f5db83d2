"""Stores the decisions that people make about a draft. Each one is a single transaction.

All raise `ConflictError` if the draft changed since the person saw it (`approve` and `dismiss` also
if its chat changed), and `DecisionError` if the draft does not exist or the input is invalid.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from rapidfuzz.distance import Levenshtein

from chatflow.database import tables
from chatflow.database.connections import clock
from chatflow.database.keys import console_key, signed
from chatflow.database.tables import analyses, chats, customers, drafts, history, outbox
from chatflow.database.upserts import supersede
from chatflow.records import Reply, now
from chatflow.redaction.placeholders import hide, like_placeholders, placeholders_in

REASONS = {
    "not_angry_neutral": "Customer is not angry, but neutral",
    "not_angry_happy": "Customer is not angry, but happy",
    "bad_draft": "Draft not usable",
    "already_answered": "Already answered",
    "no_reply_needed": "No reply needed",
    "other": "Other reason",
}
"""Reasons to dismiss a draft. The first two name the tone and become labels."""

CHARACTERS = 10_000
"""Maximum length of a reply or a comment."""


class DecisionError(Exception):
    """The decision was not stored; the message tells the person why."""


class ConflictError(DecisionError):
    """The draft or its chat has changed since the page was made."""


def approve(
    connection: sa.Connection,
    draft_id: str,
    version: int,
    seen_chat: str,
    text: str,
    who: str,
    undo_seconds: float,
    hidden: Mapping[str, str] = {},
) -> None:
    """Approves a text as the reply to a customer; it is published `undo_seconds` later.

    `version` (of the draft) and `seen_chat` (`mark_of` the chat) are those that the person saw.
    The values of `hidden` placeholders are filled in when the reply is published; until then, the
    database contains the placeholders.
    """
    text = hide(_checked(text), hidden)
    if not text:
        raise DecisionError("Write a reply before you approve.")
    draft, seen = _seen(connection, draft_id, seen_chat)
    query = sa.select(analyses.c.redacted).where(analyses.c.analysis_id == draft["analysis_id"])
    is_redacted = connection.execute(query).scalar_one_or_none() is not None
    used = _placeholders(text, draft, seen, hidden) if hidden or is_redacted else []
    written = draft["text"]
    moment = now()
    distance = None if written is None else Levenshtein.normalized_distance(written, text)
    _change(
        connection,
        draft_id,
        version,
        status=tables.APPROVED,
        edited_text=None if text == written else text,
        edit_distance=distance,
        decided_by=who,
        decided_at=moment,
        seen=seen,
    )
    reply = Reply(
        # Not the draft's id: the same chat may come again, and have another reply.
        reply_id=uuid.uuid4().hex,
        edited=text != written,
        text=text,
        approved_by=who,
        approved_at=moment,
        **{name: draft[name] for name in _OF_DRAFT},
    )
    connection.execute(
        sa.insert(outbox).values(
            draft_id=draft_id,
            reply=reply.model_dump(mode="json"),
            placeholders=used or None,
            publish_after=clock(connection) + timedelta(seconds=undo_seconds),
        )
    )
    _note(connection, draft_id, who, "approved", text=text)


def _placeholders(
    text: str, draft: Mapping[str, Any], chat: Mapping[str, Any] | None, hidden: Mapping[str, str]
) -> list[str]:
    """Returns the placeholders of a reply; raises `DecisionError` if one cannot be filled in."""
    said = [draft["text"] or "", *(message["text"] for message in (chat or {}).get("messages", ()))]
    known = {*hidden, *(one for part in said for one in placeholders_in(part))}
    found = like_placeholders(text, known)
    if unknown := [one for one in found if one not in hidden]:
        raise DecisionError(
            f"{unknown[0]} stands for something that was left out of this chat. Write the real "
            "words, or delete it; customers must not see a placeholder."
        )
    return found


_OF_DRAFT = (
    "draft_id", "analysis_id", "chat_id", "user_id", "revision", "model", "prompt_version"
)  # fmt: skip


def dismiss(
    connection: sa.Connection,
    draft_id: str,
    version: int,
    seen_chat: str,
    reason: str,
    comment: str,
    who: str,
    hidden: Mapping[str, str] = {},
) -> None:
    """Removes a draft from the inbox without a reply, for one of `REASONS`."""
    if reason not in REASONS:
        raise DecisionError("Please choose a reason.")
    _, seen = _seen(connection, draft_id, seen_chat)
    comment = hide(_checked(comment), hidden)
    _change(
        connection,
        draft_id,
        version,
        status=tables.DISMISSED,
        reason=reason,
        comment=comment or None,
        decided_by=who,
        decided_at=now(),
        seen=seen,
    )
    _note(connection, draft_id, who, "dismissed", reason=reason, comment=comment or None)


def save(
    connection: sa.Connection,
    draft_id: str,
    version: int,
    text: str,
    who: str,
    hidden: Mapping[str, str] = {},
) -> None:
    """Saves an edited text, so that this or another person can continue later."""
    text = hide(_checked(text), hidden)
    _change(connection, draft_id, version, edited_text=text or None)
    _note(connection, draft_id, who, "edited", text=text)


def undo(connection: sa.Connection, draft_id: str, version: int, who: str) -> None:
    """Reverts a decision; raises `DecisionError` if the reply is already on its way."""
    draft = _locked(connection, draft_id)
    if draft["status"] not in (tables.APPROVED, tables.DISMISSED):
        raise ConflictError("There is nothing to undo.")
    if draft["status"] == tables.APPROVED:
        # The undo and the publisher's lease compete for this row: the first one locks it.
        waits = outbox.c.draft_id == draft_id, outbox.c.leased_by.is_(None)
        gone = connection.execute(sa.delete(outbox).where(*waits, outbox.c.published_at.is_(None)))
        if not gone.rowcount:
            raise DecisionError("It is too late to undo: the reply is on its way.")
    _change(
        connection,
        draft_id,
        version,
        of_status=draft["status"],
        status=tables.WAITING,
        reason=None,
        comment=None,
        edit_distance=None,
        decided_by=None,
        decided_at=None,
        seen=None,
    )
    _note(connection, draft_id, who, "undone")
    supersede(connection, [draft["chat_id"]])


def _checked(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\0", "").strip()
    if len(text) > CHARACTERS:
        raise DecisionError(f"The text is longer than {CHARACTERS:,} characters.")
    return text


def _locked(connection: sa.Connection, draft_id: str) -> dict[str, Any]:
    """Returns the draft and locks the customer's drafts until the transaction ends."""
    of_customer = (
        customers.c.chat_id == drafts.c.chat_id,
        customers.c.user_id == drafts.c.user_id,
    )
    lock = sa.select(customers.c.revision).where(*of_customer, drafts.c.draft_id == draft_id)
    connection.execute(lock.with_for_update(of=customers))
    # Read it after the lock, because it may have changed while this waited.
    found = connection.execute(sa.select(drafts).where(drafts.c.draft_id == draft_id)).mappings()
    draft = found.one_or_none()
    if draft is None:
        raise DecisionError("There is no such draft.")
    return dict(draft)


def mark_of(connection: sa.Connection, chat: Mapping[Any, Any] | None) -> str:
    """Returns a token that changes with the messages of a chat; empty if there is no chat.

    The revision alone is not enough, because a chat from a growing file keeps its revision. It is
    signed, because people who may not read the messages could try out texts on a plain hash.
    """
    if chat is None:
        return ""
    messages = json.dumps(chat["messages"], sort_keys=True)
    return signed(console_key(connection), "chat", str(chat["revision"]), messages)


def _seen(
    connection: sa.Connection, draft_id: str, seen_chat: str
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Returns the draft and its current chat, which must be the same as the person saw."""
    draft = _locked(connection, draft_id)
    query = sa.select(chats).where(chats.c.chat_id == draft["chat_id"])
    chat = connection.execute(query).mappings().one_or_none()
    if chat is None:
        return draft, None
    if mark_of(connection, chat) != seen_chat:
        raise ConflictError("There are new messages in this chat; please look again.")
    kept = ("chat_id", "messages", "attributes", "revision")
    return draft, {name: chat[name] for name in kept}


def _change(
    connection: sa.Connection,
    draft_id: str,
    version: int,
    of_status: str = tables.WAITING,
    **values: Any,
) -> None:
    changed = connection.execute(
        sa.update(drafts)
        .where(
            drafts.c.draft_id == draft_id,
            drafts.c.version == version,
            drafts.c.status == of_status,
        )
        .values(version=version + 1, changed_at=now(), **values)
    )
    if changed.rowcount:
        return
    query = sa.select(drafts.c.status, drafts.c.decided_by, drafts.c.revision, customers.c.revision)
    of_customer = sa.and_(
        customers.c.chat_id == drafts.c.chat_id, customers.c.user_id == drafts.c.user_id
    )
    query = query.join_from(drafts, customers, of_customer).where(drafts.c.draft_id == draft_id)
    found = connection.execute(query).one_or_none()
    if found is None:
        raise DecisionError("There is no such draft.")
    if found.status == tables.SUPERSEDED:
        if found[3] > found[2]:
            raise ConflictError("The customer wrote again: there is a newer analysis of this chat.")
        raise ConflictError("There is a newer draft for this customer; see below.")
    if found.status == tables.WAITING:
        raise ConflictError("Somebody changed this draft; please look again.")
    raise ConflictError(f"This draft was {found.status} by {found.decided_by}.")


def _note(connection: sa.Connection, draft_id: str, who: str, action: str, **more: Any) -> None:
    connection.execute(
        sa.insert(history).values(draft_id=draft_id, at=now(), who=who, action=action, **more)
    )
