"""Serves the pages and handles their forms, with functions of the console and a request."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import sqlalchemy as sa
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse

from chatflow.console import dashboard, decisions, inbox
from chatflow.console.decisions import DecisionError
from chatflow.console.guard import cookie
from chatflow.console.labels import labelled
from chatflow.console.people import SESSION, Person
from chatflow.console.site import Console
from chatflow.records import LARGEST_INTEGER, now


def show_inbox(console: Console, request: Request) -> Response:
    wanted = inbox.Filter.of(request.query_params)
    person: Person = request.scope["person"]
    decided_id = request.query_params.get("decided", "")
    with console.database.read() as connection:
        found, more = inbox.listed(connection, wanted, person.reads_texts)
        shown: dict[str, Any] = {
            "waiting": inbox.waiting(connection),
            "known_attributes": console.known_attributes(connection),
            "decided": inbox.decided(connection, decided_id),
        }
    # After the block, because it may need a connection of the same pool.
    hidden = console.hidden_in(request, *found)
    return console.page(
        request,
        "inbox",
        hidden=hidden,
        wanted=wanted,
        drafts=found,
        more=more,
        inbox=inbox,
        **shown,
    )


def show_draft(
    console: Console,
    request: Request,
    status: int = 200,
    problem: str = "",
    form: FormData | None = None,
) -> Response:
    """Shows a draft and its chat; after a failed decision, also the values of its form."""
    wanted = inbox.Filter.of(request.query_params)
    draft_id = request.path_params["draft_id"]
    with console.database.read() as connection:
        found = inbox.opened(connection, draft_id)
        if found is None:
            raise HTTPException(404, "There is no such draft.")
        texts = request.scope["person"].reads_texts
        before, after = inbox.neighbours(connection, wanted, draft_id, texts)
        decided = inbox.decided(connection, request.query_params.get("decided", ""))
    return console.page(
        request,
        "draft",
        status,
        hidden=console.hidden_in(request, found["draft"], found["chat"], found["analysis"]),
        wanted=wanted,
        **found,
        seen_chat=decisions.mark_of(found["chat"]),
        before=before,
        after=after,
        problem=problem,
        saved=request.query_params.get("saved") == draft_id and not problem,
        typed={name: _text(form or FormData(), name) for name in TYPED},
        reasons=decisions.REASONS,
        characters=decisions.CHARACTERS,
        decided=decided,
    )


TYPED = ("text", "reason", "comment")
"""Form fields that are shown again if a decision fails."""


def _text(form: FormData, name: str) -> str:
    value = form.get(name, "")
    return value if isinstance(value, str) else ""


def _number(form: FormData, name: str) -> int:
    """Returns an integer field; raises `ValueError` if a database cannot store it."""
    number = int(_text(form, name))
    if not 0 <= number <= LARGEST_INTEGER:
        raise ValueError(name)
    return number


ACTIONS = ("approve", "dismiss", "save", "undo")


def decide(console: Console, request: Request, form: FormData) -> Response:
    """Stores the decision of a form and goes on to the next draft, or shows why it failed."""
    person: Person = request.scope["person"]
    if not person.decides:
        raise HTTPException(403, f"Your role, {person.role}, may not decide on drafts.")
    draft_id, action = request.path_params["draft_id"], request.url.path.rpartition("/")[2]
    try:
        draft = draft_id, _number(form, "version")
    except ValueError:
        raise HTTPException(400, "This form is incomplete.") from None
    text, chat = _text(form, "text"), _text(form, "seen_chat")
    wanted = inbox.Filter.of(request.query_params)
    try:
        hidden = hidden_in_draft(console, request, draft_id)
        with console.database.write() as connection:
            if action == "approve":
                decisions.approve(
                    connection, *draft, chat, text, person.name, console.undo_seconds, hidden
                )
            elif action == "dismiss":
                reason, comment = _text(form, "reason"), _text(form, "comment")
                decisions.dismiss(connection, *draft, chat, reason, comment, person.name, hidden)
            elif action == "save":
                decisions.save(connection, *draft, text, person.name, hidden)
            else:
                decisions.undo(connection, *draft, person.name)
    except DecisionError as error:
        return show_draft(console, request, 409, str(error), form)
    if action == "undo":
        return RedirectResponse(f"/drafts/{draft_id}{wanted.query()}", 303)
    if action == "save":
        return RedirectResponse(f"/drafts/{draft_id}{wanted.query(saved=draft_id)}", 303)
    # The draft has left the list, so continue with the first one.
    wanted = dataclasses.replace(wanted, page=0)
    with console.database.read() as connection:
        _, after = inbox.neighbours(connection, wanted, draft_id, person.reads_texts)
    place = f"/drafts/{after}" if after else "/"
    return RedirectResponse(f"{place}{wanted.query(decided=draft_id)}", 303)


def hidden_in_draft(console: Console, request: Request, draft_id: str) -> Mapping[str, str]:
    """Returns what the placeholders of a draft's chat stand for."""
    with console.database.read() as connection:
        found = inbox.drafted(connection, draft_id)
    return next(iter(console.hidden_in(request, found).values()), {})


def show_history(console: Console, request: Request) -> Response:
    page = inbox.Filter.of(request.query_params).page
    who = request.query_params.get("who", "")[:200]
    with console.database.read() as connection:
        found = inbox.events(connection, who=who, page=page)
    hidden = console.hidden_in(request, *(event for event in found if event["chat_id"]))
    return console.page(
        request,
        "history",
        hidden=hidden,
        events=found[: inbox.PAGE],
        more=len(found) > inbox.PAGE,
        page=page,
        who=who,
        reasons=decisions.REASONS,
    )


def show_dashboard(console: Console, request: Request) -> Response:
    period = request.query_params.get("period", "")
    period = period if period in dashboard.PERIODS else "day"
    attribute = request.query_params.get("attribute", "")
    with console.database.read() as connection:
        found = dashboard.figures(connection, period, attribute, now())
    return console.page(
        request, "dashboard", period=period, periods=dashboard.PERIODS, figures=found
    )


def export(console: Console, request: Request) -> Response:
    person: Person = request.scope["person"]
    if not person.exports:
        raise HTTPException(403, f"Your role, {person.role}, may not export chats.")

    def lines() -> Iterator[str]:
        with console.database.read() as connection:
            for line in labelled(connection):
                yield line + "\n"

    return StreamingResponse(
        lines(),
        media_type="application/jsonl",
        headers={"Content-Disposition": 'attachment; filename="labelled.jsonl"'},
    )


def show_sign_in(
    console: Console, request: Request, status: int = 200, problem: str = "", to: str = ""
) -> Response:
    if request.scope["person"]:
        return RedirectResponse("/", 303)
    to = to or request.query_params.get("to", "/")
    return console.page(request, "sign_in", status, problem=problem, to=to)


_OWN_PAGE = re.compile(r"/(?![/\\]).*")  # browsers read two slashes as another site


def sign_in(console: Console, request: Request, form: FormData) -> Response:
    to, person = _text(form, "to"), console.people.of_token(_text(form, "token").strip())
    if person is None:
        return show_sign_in(console, request, 403, "That token isn't valid.", to)
    response = RedirectResponse(to if _OWN_PAGE.fullmatch(to) else "/", 303)
    value = console.sessions.begin(person)
    age = int(SESSION.total_seconds())
    response.headers["Set-Cookie"] = cookie(value, request.scope["secure"], age)
    return response


def sign_out(console: Console, request: Request, _: FormData) -> Response:
    console.sessions.end(request.scope["session"])
    response = RedirectResponse("/sign-in", 303)
    response.headers["Set-Cookie"] = cookie("", request.scope["secure"], 0)
    return response


def health(console: Console, _: Request) -> Response:
    """Checks that the database responds; for health probes."""
    with console.database.read() as connection:
        connection.execute(sa.select(1))
    return PlainTextResponse("ok\n")
