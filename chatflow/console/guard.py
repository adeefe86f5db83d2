"""Decides, as middleware, who may use the console."""

from __future__ import annotations

import hmac
import re
import secrets
import time
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatflow.console.people import OWN_HOSTS, PROXY_SECRET_HEADER, Person, plain_address
from chatflow.console.site import HEADERS, Console, is_visit

COOKIE = "chatflow_session"

HSTS = f"max-age={365 * 24 * 3600}; includeSubDomains"
"""Tells browsers to use HTTPS alone, for a year."""

SIGN_IN_BYTES, FORM_BYTES = 8_192, 262_144
"""Maximum size of a form: of those who have not signed in, and of others."""

FIELDS = 20
"""Maximum number of fields of a form."""

FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto",
             "x-real-ip")  # fmt: skip
"""Headers that reverse proxies add."""

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(?::[0-9]{1,5})?", re.ASCII)

REFUSED = {400, 403, 405, 413, 415, 429}
"""Statuses of responses that are noted in the audit log; not 401, which open pages get again and
again when their session has ended."""


class Guard:
    """Lets in only people who may use the console, and sets the security headers of responses."""

    def __init__(self, app: ASGIApp, console: Console):
        self.app, self.console = app, console

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        scope["asked"], scope["person"] = time.time(), None
        scope["address"] = self._address(request)
        scope["secure"] = secure = self._is_secure(request)
        scope["local"] = self._host(request) in OWN_HOSTS
        known = cookie_in(request)
        scope["session"] = session = known or secrets.token_urlsafe(32)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if secure and not scope["local"]:
                    headers["Strict-Transport-Security"] = HSTS
                if not known and "set-cookie" not in headers:
                    headers.append("Set-Cookie", cookie(session, secure))
                if message["status"] in REFUSED:
                    what = f"{message['status']} {scope['method']} {scope['path']}"
                    self.console.audit.note(request, "refused", what)
            await send(message)

        refusal = self._refusal(request)
        if refusal is None and known:
            refusal = await run_in_threadpool(self._sign_in, request, True)
        elif refusal is None:  # strangers take no thread and no connection of the database
            refusal = self._sign_in(request, False)
        await (refusal or self.app)(scope, receive, send_guarded)

    def _by_proxy(self, request: Request) -> bool:
        return request.client is not None and self.console.people.is_proxy(request.client.host)

    def _address(self, request: Request) -> str:
        """Returns the client's address: the last one that is not a trusted proxy."""
        address = plain_address(request.client.host) if request.client else ""
        if self._by_proxy(request):
            named = ",".join(request.headers.getlist("x-forwarded-for")).split(",")
            for each in reversed([one.strip() for one in named if one.strip()]):
                address = plain_address(each)
                if not self.console.people.is_proxy(each):
                    break
        return address

    def _is_secure(self, request: Request) -> bool:
        forwarded = request.headers.get("x-forwarded-proto") == "https"
        return request.scope["scheme"] == "https" or (forwarded and self._by_proxy(request))

    def _host(self, request: Request) -> str | None:
        """Returns the host name of a request, in lower case; None if it is not a name."""
        names = request.headers.getlist("host")
        found = _HOST.fullmatch(names[0]) if len(names) == 1 else None
        return found[1].strip("[]").lower() if found else None

    def _refusal(self, request: Request) -> Response | None:
        """Returns an error response if the request would be refused from anybody; else None."""
        host, path = self._host(request), request.scope["path"]
        try:
            origin = urlsplit(request.headers.get("origin", f"//{request.headers.get('host')}"))
        except ValueError:
            origin = None
        if host is None or origin is None:
            return PlainTextResponse("The header Host or Origin is not an address.\n", 400)
        if "\0" in path or b"%00" in request.scope["query_string"]:
            return PlainTextResponse("The address must not contain NUL characters.\n", 400)
        if "transfer-encoding" in request.headers and "content-length" in request.headers:
            said = "The length of the request is given in two ways.\n"
            return PlainTextResponse(said, 400, {"Connection": "close"})
        if path == "/healthz":  # health probes may use any name
            return None
        if not {"*", host} & set(self.console.hosts):
            return PlainTextResponse(
                f"This console is not called {host}; add the name to --allowed_hosts.\n", 400
            )
        if not self.console.people.others and any(name in request.headers for name in FORWARDED):
            return PlainTextResponse(
                "A proxy has passed this request on. Others can reach the console by it, so they "
                "must sign in; see --users, --openid and --identity_header.\n",
                403,
            )
        if not (request.scope["secure"] or host in OWN_HOSTS):
            return PlainTextResponse(
                "Use https://. If a proxy in front of the console does that, it must send "
                "X-Forwarded-Proto, and its network must be in --trusted_proxies.\n",
                403,
            )
        if request.method not in ("GET", "HEAD"):
            foreign = origin.netloc != request.headers["host"]
            if foreign or request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
                return PlainTextResponse("This form was sent by another site.\n", 403)
            length = request.headers.get("content-length", "0")
            if not re.fullmatch("[0-9]{1,9}", length) or int(length) > limit_of(request):
                return PlainTextResponse("The form is too large.\n", 413, {"Connection": "close"})
        return None

    def _sign_in(self, request: Request, has_cookie: bool) -> Response | None:
        """Identifies the person; returns a response if they must sign in first."""
        people, path = self.console.people, request.scope["path"]
        person: Person | None = None
        bearer = request.headers.get("authorization", "")
        if not people.sign_in:
            person = people.person(people.local)
        elif people.identity_header:
            person = self._named_by_proxy(request)
        elif bearer.startswith("Bearer "):
            if self.console.failures.is_full(request.scope["address"]):
                return PlainTextResponse("Too many attempts; wait a minute.\n", 429)
            person = people.of_token(bearer.removeprefix("Bearer "))
            if person is None:
                self.console.failures.count(request.scope["address"])
                self.console.audit.note(request, "sign_in_failed", "token in a header")
        elif has_cookie:
            person = self.console.sessions.who(request.scope["session"], is_visit(request))
        request.scope["person"] = person
        if (
            person
            and (people.identity_header or bearer)
            and not self.console.met.count(person.name)
        ):
            by = "proxy" if people.identity_header else "token in a header"
            self.console.audit.note(request, "signed_in", by)
        if person or path.startswith("/static/") or path in OPEN:
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

    def _named_by_proxy(self, request: Request) -> Person | None:
        """Returns whom the proxy has signed in.

        Its header counts only if it occurs once: if the proxy added its own, the other one may be
        forged.
        """
        people = self.console.people
        secret = request.headers.get(PROXY_SECRET_HEADER, "")
        names = request.headers.getlist(people.identity_header)
        if not self._by_proxy(request) or len(names) != 1:
            return None
        if not hmac.compare_digest(secret.encode(), people.proxy_secret.encode()):
            return None
        return people.person(names[0])


OPEN = ("/sign-in", "/sign-in/openid", "/sign-in/openid/back", "/healthz")
"""Pages of those who have not signed in."""


class FormError(Exception):
    """A form cannot be read; `status` says why to the browser."""

    def __init__(self, status: int, said: str):
        super().__init__(said)
        self.status = status


def limit_of(request: Request) -> int:
    """Returns the maximum size of a request's form."""
    return SIGN_IN_BYTES if request.scope["path"] in OPEN else FORM_BYTES


async def read_form(request: Request) -> dict[str, str]:
    """Returns the fields of a form; raises `FormError` if it is too large or not a form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise FormError(415, "This is not a form of the console.")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit_of(request):
            raise FormError(413, "The form is too large.")
    try:
        # It counts the separators before it reads the fields.
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=FIELDS)
    except ValueError:
        raise FormError(400, "This is not a form of the console.") from None
    if len(dict(pairs)) < len(pairs):
        raise FormError(400, "A field of the form is there twice.")
    return {name: value.replace("\0", "\N{REPLACEMENT CHARACTER}") for name, value in pairs}


def page_of(request: Request) -> str:
    """Returns the page that somebody requested, or the page of the form that they sent."""
    path, query = request.scope["path"], request.scope["query_string"].decode("latin-1")
    if of_draft := re.fullmatch(r"(/drafts/[^/]+)/[^/]+", path):
        path = of_draft[1]
    elif request.method != "GET":
        return "/"
    return f"{path}?{query}" if query else path


def _full_name(name: str, secure: bool) -> str:
    """Returns a cookie's name; browsers let nobody else set one that begins with __Host-."""
    return f"__Host-{name}" if secure else name


def cookie(value: str, secure: bool, age: int | None = None, name: str = COOKIE) -> str:
    # Lax and not Strict, so that links to drafts from elsewhere work. What changes something needs
    # a form of the same origin.
    parts = [f"{_full_name(name, secure)}={value}", "Path=/", "HttpOnly", "SameSite=Lax"]
    parts += ["Secure"] if secure else []
    return "; ".join(parts + ([] if age is None else [f"Max-Age={age}"]))


def cookie_in(request: Request, name: str = COOKIE) -> str:
    """Returns the value of a cookie; "" if it is not there, or there twice."""
    said = "; ".join(request.headers.getlist("cookie"))
    found = [part.strip().partition("=") for part in said.split(";")]
    full = _full_name(name, request.scope["secure"])
    values = [value for known, _, value in found if known == full]
    return values[0] if len(values) == 1 else ""
