"""Serves the pages and handles their forms, with functions of the console and a request."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import sqlalchemy as sa
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse

from chatflow.console import audit, dashboard, decisions, inbox
from chatflow.console.decisions import DecisionError
from chatflow.console.guard import cookie, cookie_in
from chatflow.console.labels import labelled
from chatflow.console.people import Person, digest_of
from chatflow.console.sessions import LONGEST, METHODS
from chatflow.console.site import Console, is_visit
from chatflow.database import tables
from chatflow.records import LARGEST_INTEGER, now


def _wanted(console: Console, request: Request) -> inbox.Filter:
    """Returns the filter of a request."""
    query = request.query_params
    known = console.unsealed(query.get("sealed", ""))
    return _sealed(console, request, {**query, "sealed": "", **known})


def _sealed(console: Console, request: Request, values: Mapping[str, str]) -> inbox.Filter:
    wanted = inbox.Filter.of(values)
    person: Person = request.scope["person"]
    if not person.reads_ids:  # finding an id would show it
        return dataclasses.replace(wanted, q="", attribute="", sealed="")
    if wanted.sealed:
        return wanted
    sealed = console.sealed({name: getattr(wanted, name) for name in inbox.SEALED})
    return dataclasses.replace(wanted, sealed=sealed)


def search(console: Console, request: Request, form: Mapping[str, str]) -> Response:
    """Leads to the list of a form, by an address that does not say what is searched for."""
    return RedirectResponse(f"/{_sealed(console, request, form).query()}", 303)


def show_inbox(console: Console, request: Request) -> Response:
    wanted = _wanted(console, request)
    person: Person = request.scope["person"]
    decided_id = request.query_params.get("decided", "")
    with console.database.read() as connection:
        found, more = inbox.listed(connection, wanted, person.reads_texts)
        shown: dict[str, Any] = {
            "waiting": inbox.waiting(connection),
            "known_attributes": console.known_attributes(connection),
            "decided": inbox.decided(connection, decided_id, person.name),
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
    form: Mapping[str, str] | None = None,
) -> Response:
    """Shows a draft and its chat; after a failed decision, also the values of its form."""
    wanted = _wanted(console, request)
    draft_id = request.path_params["draft_id"]
    with console.database.read() as connection:
        found = inbox.opened(connection, draft_id)
        if found is None:
            raise HTTPException(404, "There is no such draft.")
        texts = request.scope["person"].reads_texts
        if texts and is_visit(request):
            chat_id = found["draft"]["chat_id"]
            console.audit.note(request, "read", f"draft {draft_id} of chat {chat_id}")
        before, after = inbox.neighbours(connection, wanted, draft_id, texts)
        decided_id = request.query_params.get("decided", "")
        decided = inbox.decided(connection, decided_id, request.scope["person"].name)
        seen_chat = decisions.mark_of(connection, found["chat"])
        conflict = _writer(found, form)
    return console.page(
        request,
        "draft",
        status,
        hidden=console.hidden_in(request, found["draft"], found["chat"], found["analysis"]),
        wanted=wanted,
        **found,
        seen_chat=seen_chat,
        before=before,
        after=after,
        problem=problem,
        conflict=conflict,
        saved=request.query_params.get("saved") == draft_id and not problem,
        typed={name: (form or {}).get(name, "") for name in TYPED},
        reasons=decisions.REASONS,
        characters=decisions.CHARACTERS,
        decided=decided,
    )


def _writer(found: Mapping[str, Any], form: Mapping[str, str] | None) -> str:
    """Returns who wrote the text of a draft after the one that a form is about; "": nobody."""
    draft = found["draft"]
    same = form is None or form.get("version") == str(draft["version"])
    if same or draft["status"] != tables.WAITING:
        return ""
    names = [event["who"] for event in found["history"] if event["action"] == "edited"]
    return str(names[0] if draft["edited_text"] and names else draft["model"])


TYPED = ("text", "reason", "comment")
"""Form fields that are shown again if a decision fails."""


def _number(form: Mapping[str, str], name: str) -> int:
    """Returns an integer field; raises `ValueError` if a database cannot store it."""
    number = int(form.get(name, ""))
    if not 0 <= number <= LARGEST_INTEGER:
        raise ValueError(name)
    return number


ACTIONS = ("approve", "dismiss", "save", "undo")


def decide(console: Console, request: Request, form: Mapping[str, str]) -> Response:
    """Stores the decision of a form and goes on to the next draft, or shows why it failed."""
    person: Person = request.scope["person"]
    if not person.decides:
        raise HTTPException(403, f"Your role, {person.role}, may not decide on drafts.")
    draft_id, action = request.path_params["draft_id"], request.scope["path"].rpartition("/")[2]
    if "version" not in form:
        return show_draft(console, request, 409, "Choose which text you want to send.", form)
    try:
        draft = draft_id, _number(form, "version")
    except ValueError:
        raise HTTPException(400, "This form is incomplete.") from None
    text, chat = form.get("text", ""), form.get("seen_chat", "")
    wanted = _wanted(console, request)
    try:
        hidden = hidden_in_draft(console, request, draft_id)
        with console.database.write() as connection:
            if action == "approve":
                decisions.approve(
                    connection, *draft, chat, text, person.name, console.undo_seconds, hidden
                )
            elif action == "dismiss":
                reason, comment = form.get("reason", ""), form.get("comment", "")
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
    console.audit.note(request, "exported", "labelled.jsonl")

    def lines() -> Iterator[str]:
        with console.database.read() as connection:
            for line in labelled(connection):
                yield line + "\n"

    return StreamingResponse(
        lines(),
        media_type="application/jsonl; charset=utf-8",
        headers={"Content-Disposition": 'attachment; filename="labelled.jsonl"'},
    )


def show_sign_in(
    console: Console, request: Request, status: int = 200, problem: str = "", to: str = ""
) -> Response:
    if request.scope["person"]:
        return RedirectResponse("/", 303)
    to = to or request.query_params.get("to", "/")
    code = request.query_params.get("code", "")
    if code and not console.people.others:
        return _by_code(console, request, code)
    return console.page(request, "sign_in", status, problem=problem, to=to)


def _by_code(console: Console, request: Request, code: str) -> Response:
    """Signs in who opens the address that the console printed at its start."""
    person = console.people.of_token(code)
    if person is None:
        console.audit.note(request, "sign_in_failed", "printed address")
        said = "This address is from another start of the console. Use the one that it printed."
        return console.page(request, "sign_in", 403, problem=said, to="/")
    return begin_session(console, request, RedirectResponse("/", 303), person, "code")


_OWN_PAGE = re.compile(r"/(?![/\\]).*")  # browsers read two slashes as another site


def sign_in(console: Console, request: Request, form: Mapping[str, str]) -> Response:
    to, address = form.get("to", ""), request.scope["address"]
    if console.failures.is_full(address):
        said = "Too many attempts from your address. Wait a minute, then try again."
        return show_sign_in(console, request, 429, said, to)
    person = console.people.of_token(form.get("token", "").strip())
    if person is None:
        console.failures.count(address)
        console.audit.note(request, "sign_in_failed", "token")
        return show_sign_in(console, request, 403, "That token isn't valid, or it has expired.", to)
    response = RedirectResponse(to if _OWN_PAGE.fullmatch(to) else "/", 303)
    method = "token" if console.people.others else "code"
    return begin_session(console, request, response, person, method)


def begin_openid(console: Console, request: Request) -> Response:
    """Sends a person to the OpenID provider."""
    from chatflow.console.openid import seal

    if console.openid is None:
        raise HTTPException(404, "There is no OpenID provider.")
    to = request.query_params.get("to", "/")[:1000]
    address, attempt = console.openid.begin(_way_back(request), to)
    response = RedirectResponse(address, 303)
    value = seal(console.key, attempt)
    response.headers["Set-Cookie"] = cookie(value, request.scope["secure"], 600, OPENID_COOKIE)
    return response


def end_openid(console: Console, request: Request) -> Response:
    """Signs in whom the OpenID provider has sent back."""
    from chatflow.console.openid import SignInError, unseal

    if console.openid is None:
        raise HTTPException(404, "There is no OpenID provider.")
    name, person = "", None
    try:
        if console.failures.is_full(request.scope["address"]):
            raise SignInError("too many attempts from this address")
        attempt = unseal(console.key, cookie_in(request, OPENID_COOKIE))
        if attempt is None:
            raise SignInError("this browser did not begin to sign in")
        name = console.openid.end(_way_back(request), attempt, dict(request.query_params))
        person = console.people.person(name)
        if person is None:
            raise SignInError("has no access")
    except SignInError as error:
        console.failures.count(request.scope["address"])
        console.audit.note(request, "sign_in_failed", f"OpenID: {error}", name)
        said = "You were not signed in. Try again, or ask a lead whether you have access."
        response = console.page(request, "sign_in", 403, problem=said, to="/")
    else:
        to = attempt.to if _OWN_PAGE.fullmatch(attempt.to) else "/"
        response = begin_session(console, request, RedirectResponse(to, 303), person, "openid")
    secure = request.scope["secure"]
    response.headers.append("Set-Cookie", cookie("", secure, 0, OPENID_COOKIE))
    return response


OPENID_COOKIE = "chatflow_openid"


def _way_back(request: Request) -> str:
    scheme = "https" if request.scope["secure"] else "http"
    return f"{scheme}://{request.headers['host']}/sign-in/openid/back"


def begin_session(
    console: Console, request: Request, response: Response, person: Person, method: str
) -> Response:
    """Signs a person in; ends the session that the browser had before."""
    console.sessions.end(request.scope["session"])
    value = console.sessions.begin(person, method, request.scope["address"])
    console.audit.note(request, "signed_in", METHODS[method], person.name)
    age = int(LONGEST.total_seconds())
    response.headers["Set-Cookie"] = cookie(value, request.scope["secure"], age)
    return response


def sign_out(console: Console, request: Request, _: Mapping[str, str]) -> Response:
    console.sessions.end(request.scope["session"])
    console.changes.check_people()
    console.audit.note(request, "signed_out")
    response = RedirectResponse("/sign-in", 303)
    response.headers["Set-Cookie"] = cookie("", request.scope["secure"], 0)
    response.headers["Clear-Site-Data"] = '"cache", "storage"'
    return response


def show_sessions(console: Console, request: Request) -> Response:
    """Shows a person's sessions; to a lead, those of all."""
    person: Person = request.scope["person"]
    if not console.people.has_sessions:
        raise HTTPException(404, "Nobody signs in here.")
    found = console.sessions.listed("" if person.leads else person.name)
    own = digest_of(request.scope["session"])
    return console.page(request, "sessions", sessions=found, own=own, methods=METHODS)


def end_sessions(console: Console, request: Request, form: Mapping[str, str]) -> Response:
    """Ends one session, or all of a person; only a lead may end those of others."""
    person: Person = request.scope["person"]
    if not console.sessions.is_new(request.scope["session"]):
        raise HTTPException(403, "To end sessions, sign out and in again first.")
    key, who = form.get("key", ""), form.get("who", "")
    found = console.sessions.listed("" if person.leads else person.name)
    keys = [each["session_hash"] for each in found if key in ("", each["session_hash"])]
    if not key:
        keys = [each["session_hash"] for each in found if each["who"] == who]
    ended = console.sessions.end_keys(keys)
    console.changes.check_people()
    names = sorted({each["who"] for each in found if each["session_hash"] in keys})
    console.audit.note(request, "session_ended", f"{ended} of {', '.join(names)}")
    return RedirectResponse("/sessions", 303)


def show_audit(console: Console, request: Request) -> Response:
    person: Person = request.scope["person"]
    if not person.leads:
        raise HTTPException(403, f"Your role, {person.role}, may not see the audit log.")
    page = inbox.Filter.of(request.query_params).page
    who, action = (request.query_params.get(name, "")[:200] for name in ("who", "action"))
    found = console.audit.listed(who, action, page)
    return console.page(
        request,
        "audit",
        entries=found[: audit.PAGE],
        more=len(found) > audit.PAGE,
        page=page,
        who=who,
        action=action,
        actions=audit.ACTIONS,
    )


def health(console: Console, _: Request) -> Response:
    """Checks that the database responds; for health probes."""
    with console.database.read() as connection:
        connection.execute(sa.select(1))
    return PlainTextResponse("ok\n")
