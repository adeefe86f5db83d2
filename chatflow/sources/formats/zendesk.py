"""Reads Zendesk's tickets with their comments: one ticket, or a page of tickets with its users.

https://developer.zendesk.com/api-reference/ticketing/tickets/ticket_comments/
https://developer.zendesk.com/api-reference/ticketing/ticket-management/incremental_exports/
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from chatflow.sources.formats.common import (
    Ours,
    Value,
    attributes,
    dicts,
    own_id,
    part,
    without_none,
)


def fits(value: Value) -> bool:
    first: Any = next(dicts(value.get("tickets")), None)
    if first is not None:
        return _is_ticket(first)
    return _is_ticket(part(value.get("ticket"))) or _is_ticket(value)


def _is_ticket(value: Value) -> bool:
    # Freshdesk's tickets are similar, but have `conversations`, which this does not read.
    has_text = "comments" in value or "description" in value
    return "requester_id" in value and has_text and "conversations" not in value


def read(value: Value, name: str) -> Iterator[Ours]:
    users = {str(user.get("id")): user for user in dicts(value.get("users"))}
    if "ticket" in value and "tickets" not in value:
        beside = {"comments": value["comments"]} if "comments" in value else {}
        tickets: list[Value] = [{**part(value["ticket"]), **beside}]
    else:
        tickets = [*dicts(value.get("tickets"))] or [value]
    for ticket in tickets:
        yield _chat(ticket, users)


def _chat(ticket: Value, users: dict[str, Value]) -> Ours:
    comments = ticket.get("comments")
    if isinstance(comments, dict):  # a page of the API
        comments = comments.get("comments")
    said = [_message(comment, ticket, users) for comment in dicts(comments)]
    if not said:  # an export without comments has the first comment as the description
        first = {
            "author_id": ticket.get("requester_id"),
            "body": ticket.get("description"),
            "created_at": ticket.get("created_at"),
            "public": ticket.get("is_public"),
        }
        said = [_message(first, ticket, users)]
    return {
        "chat_id": own_id(ticket, "id"),
        "messages": said,
        "attributes": attributes(
            source_url=ticket.get("url"),
            subject=ticket.get("subject"),
            status=ticket.get("status"),
            priority=ticket.get("priority"),
            tags=ticket.get("tags"),
            channel=part(ticket.get("via")).get("channel"),
            satisfaction=part(ticket.get("satisfaction_rating")).get("score"),
        ),
    }


def _message(comment: Value, ticket: Value, users: dict[str, Value]) -> Ours:
    author = comment.get("author_id")
    known = part(users.get(str(author))).get("role")
    role = str(known) if known else "end-user" if author == ticket.get("requester_id") else "agent"
    return without_none(
        message_id=comment.get("id"),
        user_id=author if author is not None else role,
        role=role,
        text=comment.get("plain_body") or comment.get("body") or comment.get("html_body") or "",
        sent_at=comment.get("created_at"),
        public=comment.get("public"),
    )
