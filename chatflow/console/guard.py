"""Decides, as middleware, who may use the console."""

from __future__ import annotations

import re
import secrets
import time
from urllib.parse import urlencode, urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatflow.console.people import Person
from chatflow.console.site import HEADERS, Console

COOKIE = "chatflow_session"


class Guard:
    """Lets in only people who may use the console, and sets the security headers of responses."""

    def __init__(self, app: ASGIApp, console: Console):
        self.app, self.console = app, console

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        session = request.cookies.get(COOKIE) or secrets.token_urlsafe(32)
        scope["session"] = session
        scope["asked"] = time.time()
        secure = self._is_secure(request)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if request.cookies.get(COOKIE) is None and "set-cookie" not in headers:
                    headers.append("Set-Cookie", cookie(session, secure))
            await send(message)

        scope["secure"] = secure
        refusal = self._refusal(request) or await run_in_threadpool(self._sign_in, request)
        await (refusal or self.app)(scope, receive, send_guarded)

    def _is_secure(self, request: Request) -> bool:
        forwarded = request.headers.get("x-forwarded-proto") == "https"
        return request.scope["scheme"] == "https" or (forwarded and self._by_proxy(request))

    def _by_proxy(self, request: Request) -> bool:
        return request.client is not None and self.console.people.is_proxy(request.client.host)

    def _refusal(self, request: Request) -> Response | None:
        """Returns an error response if the request would be refused from anybody; else None."""
        try:
            host = urlsplit(f"//{request.headers.get('host', '')}")
            origin = urlsplit(request.headers.get("origin", f"//{host.netloc}"))
        except ValueError:
            return PlainTextResponse("The header Host or Origin is not an address.\n", 400)
        if "\0" in request.scope["path"] or b"%00" in request.scope["query_string"]:
            return PlainTextResponse("The address must not contain NUL characters.\n", 400)
        known = {"*", host.hostname} & set(self.console.hosts)
        if not known and request.scope["path"] != "/healthz":  # health probes may use any name
            return PlainTextResponse(
                f"This console is not called {host.hostname}; add the name to --allowed_hosts.\n",
                400,
            )
        if request.method not in ("GET", "HEAD"):
            foreign = origin.netloc != host.netloc
            if foreign or request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
                return PlainTextResponse("This form was sent by another site.\n", 403)
        return None

    def _sign_in(self, request: Request) -> Response | None:
        """Identifies the person; returns a response if they must sign in first."""
        people, path = self.console.people, request.url.path
        person: Person | None
        if not people.sign_in:
            person = people.person(people.local)
        elif people.identity_header:
            # Trust this header only from a proxy, and only if it occurs once: if the proxy added
            # its own, the other one may be forged.
            names = request.headers.getlist(people.identity_header)
            said = names[0] if len(names) == 1 and self._by_proxy(request) else ""
            person = people.person(said) if said else None
        else:
            bearer = request.headers.get("authorization", "")
            if bearer.startswith("Bearer "):
                person = people.of_token(bearer.removeprefix("Bearer "))
            else:
                who = self.console.sessions.who(request.scope["session"])
                person = people.person(who) if who else None
        request.scope["person"] = person
        if person or path.startswith("/static/") or path in ("/sign-in", "/healthz"):
            return None
        if people.identity_header:
            return PlainTextResponse(
                "The proxy does not say who you are, or you do not have access.\n", 403
            )
        if "text/html" not in request.headers.get("accept", ""):
            return PlainTextResponse("Please sign in.\n", 401)
        if request.method == "GET":
            place = page_of(request)
            query = f"?{urlencode({'to': place})}" if place != "/" else ""
            return RedirectResponse(f"/sign-in{query}", 303)
        problem = "Your session ended, so nothing was sent. Sign in and try again."
        return self.console.page(request, "sign_in", 401, problem=problem, to=page_of(request))


def page_of(request: Request) -> str:
    """Returns the page that somebody requested, or the page of the form that they sent."""
    path, query = request.url.path, request.url.query
    if of_draft := re.fullmatch(r"(/drafts/[^/]+)/[^/]+", path):
        path = of_draft[1]
    elif request.method != "GET":
        return "/"
    return f"{path}?{query}" if query else path


def cookie(value: str, secure: bool, age: int | None = None) -> str:
    parts = [f"{COOKIE}={value}", "Path=/", "HttpOnly", "SameSite=Lax"]
    parts += ["Secure"] if secure else []
    return "; ".join(parts + ([] if age is None else [f"Max-Age={age}"]))
