"""`chatflow console`: serves the support staff's page."""

from __future__ import annotations

import argparse
import dataclasses
import getpass
import ipaddress
import secrets
import socket
import sys
import threading
import webbrowser
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from chatflow.errors import UsageError
from chatflow.options import Parser, number
from chatflow.running.runner import quieten

if TYPE_CHECKING:
    from chatflow.console.app import Server
    from chatflow.console.openid import Provider
    from chatflow.console.people import People
    from chatflow.database.connections import Database

DESCRIPTION = """
Serves a page on a database that pipelines write to (chatflow run --database=…): drafts
that wait for review, the angriest and oldest first. Approved drafts are published.

  chatflow console --database sqlite:///chatflow.db --replies replies.jsonl

Without --users, --openid and --identity_header, only this machine can reach it, by the
address that is printed.
"""

PASSES_FLAGS_ON = False

LOOPBACK = "127.0.0.0/8,::1/128"

FILES = 2048
"""Open files that the console needs at most."""


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--database",
        default="sqlite:///chatflow.db",
        help="sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME (default: %(default)s)",
    )
    parser.add_argument(
        "--database_password",
        default="",
        help="where its password is: env:NAME, file:PATH or projects/P/secrets/S/versions/V",
    )
    parser.add_argument(
        "--raw_database",
        default="",
        help="where --keep_raw of the pipeline keeps the values of placeholders such as [EMAIL_1]; "
        "people who decide on drafts see the values, and so does the customer (default: the "
        "same database)",
    )
    parser.add_argument(
        "--replies",
        default="",
        help="where approved replies go: projects/P/topics/T, or a file of JSON Lines",
    )
    parser.add_argument(
        "--undo_seconds",
        type=number(most=86_400, zero=True),
        default=10.0,
        help="how long an approval can be undone, and its reply waits (default: %(default)s)",
    )
    parser.add_argument(
        "--keep_days",
        type=number(most=36_500),
        help="delete chats, with all data about them, this many days after the last thing that "
        "happened to them; not while a draft of theirs waits (default: never)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    parser.add_argument(
        "--port",
        type=number(int, most=65_535, zero=True),
        default=8080,
        help="0: a free one (default: %(default)s)",
    )
    parser.add_argument(
        "--users", default="", metavar="FILE.toml", help="who may sign in, by tokens, and roles"
    )
    parser.add_argument(
        "--new_token",
        default="",
        metavar="NAME:ROLE",
        help="print a new token and its entry of --users, and end; roles: observer, agent, lead",
    )
    parser.add_switch(
        "sign_in",
        True,
        "without --users and the like, ask for the code in the printed address; --nosign_in lets "
        "in every process of this machine, as a lead (default: true)",
    )
    parser.add_argument(
        "--idle_minutes",
        type=number(most=720),
        default=30.0,
        help="people are signed out after this time without opening a page, and after 12 hours "
        "anyway (default: %(default)s)",
    )
    parser.add_argument(
        "--audit_log",
        default="",
        metavar="FILE.jsonl",
        help="also append the audit log, which leads see, to this file, as JSON lines",
    )
    parser.add_argument(
        "--tls_cert",
        default="",
        metavar="FILE.pem",
        help="serve HTTPS with this certificate and its chain",
    )
    parser.add_argument("--tls_key", default="", metavar="FILE.pem", help="its private key")
    parser.add_argument(
        "--openid",
        default="",
        metavar="ISSUER",
        help="address of an OpenID provider that signs people in, such as "
        "https://accounts.google.com; they need an entry of --users, or --default_role",
    )
    parser.add_argument("--openid_client", default="", help="the console's client id there")
    parser.add_argument(
        "--openid_secret",
        default="",
        help="where the client's secret is: env:NAME, file:PATH or projects/P/secrets/S/versions/V",
    )
    parser.add_argument(
        "--openid_claim",
        default="email",
        help="the claim of the ID token that names a person; sub is never given to another one "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--openid_method",
        default="",
        help="how people must have signed in there, by the ID token's claim amr, such as mfa "
        "(default: the provider decides)",
    )
    parser.add_argument(
        "--identity_header",
        default="",
        help="header in which a reverse proxy says who has signed in there, e.g. X-Forwarded-User",
    )
    parser.add_argument(
        "--trusted_proxies",
        default=LOOPBACK,
        help="networks of reverse proxies, whose headers are trusted: --identity_header, "
        "X-Forwarded-For and X-Forwarded-Proto (default: %(default)s)",
    )
    parser.add_argument(
        "--proxy_secret",
        default="",
        help="where the secret is that the proxy sends in X-Chatflow-Proxy-Secret: env:NAME, "
        "file:PATH or projects/P/secrets/S/versions/V",
    )
    parser.add_argument(
        "--default_role",
        default="",
        choices=["", "observer", "agent", "lead"],
        help="role of those whom the proxy or provider has signed in and --users does not name "
        "(default: none, they are refused)",
    )
    parser.add_argument(
        "--allowed_hosts",
        default="",
        help="host names of the console, besides localhost; *: all. Needs a sign-in.",
    )
    parser.add_argument(
        "--redact",
        default="observer",
        help="roles that do not see what chats and drafts say (default: %(default)s)",
    )
    parser.add_switch(
        "mask_ids",
        False,
        "these roles do not see ids of chats and customers, and attributes, either",
    )
    parser.add_argument(
        "--forget_customer",
        default="",
        metavar="USER_ID",
        help="delete all chats in which this customer takes part, with all data about them, also "
        "from the file of --replies, and end",
    )
    parser.add_argument(
        "--export",
        default="",
        metavar="FILE.jsonl",
        help="write people's decisions as labelled chats for evaluate and tune, and end",
    )
    parser.add_switch("open_browser", help="show the page in this machine's browser")
    parser.add_argument("--while_stdin_is_open", action="store_true", help=argparse.SUPPRESS)


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    quieten(local=True)
    try:
        from chatflow.console import people
        from chatflow.console.app import Server
        from chatflow.console.outbox import replies_to
        from chatflow.console.site import Console
    except ImportError as error:
        raise UsageError(
            f"{error.name} is missing; the console needs: pip install 'chatflow[console]'"
        ) from None
    from chatflow.database.connections import Database, password_at

    if parsed.new_token:
        name, _, role = parsed.new_token.rpartition(":")
        token, entry = people.new_token(name, role)
        print(entry)
        print(f"The token, which is shown only now: {token}", file=sys.stderr)
        return 0
    known = people_of(parsed)
    names = [name.strip().lower() for name in parsed.allowed_hosts.split(",") if name.strip()]
    check_place(parsed.host, names, known)
    check_tls(parsed)
    database = Database(parsed.database, password_at(parsed.database_password), connections=20)
    database.upgrade()
    if parsed.export:
        return export(database, parsed.export)
    if parsed.forget_customer:
        return forget_customer(database, raw_database(parsed), parsed)
    served = Console(
        database,
        known,
        replies_to(parsed.replies) if parsed.replies else None,
        raw_database(parsed),
        parsed.undo_seconds,
        keep=timedelta(days=parsed.keep_days) if parsed.keep_days else None,
        hosts=[*people.OWN_HOSTS, parsed.host.lower(), *names],
        idle=timedelta(minutes=parsed.idle_minutes),
        audit_log=parsed.audit_log,
        openid=provider(parsed) if parsed.openid else None,
    )
    listener = listen(parsed.host, parsed.port)
    shown = f"[{parsed.host}]" if ":" in parsed.host else parsed.host
    address = f"{'https' if parsed.tls_cert else 'http'}://{shown}:{listener.getsockname()[1]}/"
    if known.code:
        address += f"sign-in?code={known.code}"
    print(f"console: {address} on {database.uri}", flush=True)
    if not parsed.replies:
        print("approved replies are kept but not sent; --replies sends them", flush=True)
    if parsed.open_browser:
        webbrowser.open(address)
    server = Server(served, listener, parsed.tls_cert, parsed.tls_key)
    raise_file_limit()
    if parsed.while_stdin_is_open:
        threading.Thread(target=_end_with_stdin, args=(server,), daemon=True).start()
    server.serve_forever()
    return 0


def raw_database(parsed: argparse.Namespace) -> Database | None:
    """Returns the database that `--raw_database` names, or None; raises `UsageError`."""
    from chatflow.database.connections import opened, password_at

    if not parsed.raw_database:
        return None
    return opened(parsed.raw_database, password_at(parsed.database_password))


def _end_with_stdin(server: Server) -> None:
    """Stops the console when the process that started it ends."""
    sys.stdin.read()
    server.should_exit = True


def people_of(parsed: argparse.Namespace) -> People:
    """Returns who may use the console; raises `UsageError` for a wrong flag or users file."""
    from chatflow.console.people import ROLES, People, UsersFile

    redacted = frozenset(filter(None, (role.strip() for role in parsed.redact.split(","))))
    if unknown := sorted(redacted - set(ROLES)):
        raise UsageError(f"--redact: {unknown[0]!r} is not a role; roles are {', '.join(ROLES)}")
    try:
        proxies = [
            ipaddress.ip_network(network.strip())
            for network in parsed.trusted_proxies.split(",")
            if network.strip()
        ]
    except ValueError as error:
        raise UsageError(f"--trusted_proxies: {error}") from None
    for name in ("identity_header", "openid"):
        if getattr(parsed, name) and not (parsed.users or parsed.default_role):
            raise UsageError(
                f"--{name}={getattr(parsed, name)}: nobody has a role; give --users=FILE, or "
                "--default_role for all who have signed in there"
            )
    if parsed.identity_header and parsed.openid:
        raise UsageError("--identity_header and --openid: only one of them can sign people in")
    secret = parsed.proxy_secret
    known = People(
        getpass.getuser(),
        UsersFile(parsed.users) if parsed.users else {},
        parsed.identity_header,
        proxies,
        redacted,
        parsed.mask_ids,
        openid=bool(parsed.openid),
        default_role=parsed.default_role,
        proxy_secret=_filled(secret, "--proxy_secret") if secret else "",
    )
    if known.others or not parsed.sign_in:
        return known
    return dataclasses.replace(known, code=secrets.token_urlsafe(24))


def check_place(host: str, names: Sequence[str], known: People) -> None:
    """Raises `UsageError` if others could reach the console without signing in.

    Args:
      names: host names that others may call it by, e.g. through a proxy on this machine.
    """
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError) as error:  # the name is not a valid host name
        raise UsageError(f"--host={host}: {getattr(error, 'strerror', error)}") from None
    local = all(ipaddress.ip_address(str(address)).is_loopback for address in found)
    if not local and not known.others:
        raise UsageError(
            f"--host={host}: others can reach it, so they must sign in; give --users=FILE "
            "(with tokens), or --identity_header=NAME of a reverse proxy in front of it"
        )
    from chatflow.console.people import OWN_HOSTS

    others = sorted(set(names) - set(OWN_HOSTS))
    if others and not known.others:
        raise UsageError(
            f"--allowed_hosts={others[0]}: others can reach it by that name, so they must sign "
            "in; give --users=FILE or --identity_header=NAME"
        )


def _filled(where: str, flag: str) -> str:
    """Returns a secret; raises `UsageError` if it cannot be read or is empty."""
    from chatflow.secrets import read_secret

    if secret := read_secret(where, flag).strip():
        return secret
    raise UsageError(f"{flag}={where}: the secret is empty")


def provider(parsed: argparse.Namespace) -> Provider:
    """Returns the OpenID provider; raises `UsageError` if it cannot be used."""
    if not (parsed.openid_client and parsed.openid_secret):
        raise UsageError("--openid: needs --openid_client and --openid_secret too")
    try:
        from chatflow.console.openid import Provider
    except ImportError as error:
        raise UsageError(
            f"{error.name} is missing; --openid needs: pip install 'chatflow[console]'"
        ) from None
    secret = _filled(parsed.openid_secret, "--openid_secret")
    client = parsed.openid_client, secret, parsed.openid_claim, parsed.openid_method
    return Provider(parsed.openid, *client)


def check_tls(parsed: argparse.Namespace) -> None:
    """Raises `UsageError` for half a certificate, and if people would sign in by plain HTTP."""
    if bool(parsed.tls_cert) != bool(parsed.tls_key):
        raise UsageError("--tls_cert and --tls_key: give both, or neither")
    from_here = parsed.host in ("localhost", "127.0.0.1", "::1")
    if not from_here and not parsed.tls_cert and parsed.trusted_proxies == LOOPBACK:
        raise UsageError(
            f"--host={parsed.host}: others would sign in by plain HTTP; give --tls_cert and "
            "--tls_key, or with --trusted_proxies the network of the proxy that does HTTPS"
        )


def raise_file_limit() -> None:
    """Lets this process have as many connections as the console allows."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FILES:
        most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def listen(host: str, port: int) -> socket.socket:
    """Opens the port before its address is printed; raises `UsageError` if it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=200)
    except OSError as error:
        raise UsageError(f"--port={port}: {error.strerror} ({host})") from None
    # asyncio sets this only on sockets that name their protocol, and this one does not. Without
    # it, the second part of each response waits 40 ms for the browser to acknowledge the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def export(database: Database, path: str) -> int:
    """Writes people's decisions as labelled chats; returns the exit code."""
    from chatflow.console.labels import labelled
    from chatflow.database.connections import private

    count = 0
    try:
        with private(path).open("w", encoding="utf-8") as file, database.read() as connection:
            for line in labelled(connection):
                file.write(line + "\n")
                count += 1
    except OSError as error:
        raise UsageError(f"--export={path}: cannot be written: {error.strerror}") from None
    print(f"{count} labelled chats in {path}")
    return 0


def forget_customer(database: Database, raw: Database | None, parsed: argparse.Namespace) -> int:
    """Deletes a customer's chats; returns the exit code."""
    from chatflow.console.outbox import ReplyFile
    from chatflow.console.retention import forget_chats_of

    ids = forget_chats_of(database, raw or database, parsed.forget_customer)
    print(f"{len(ids)} chats deleted")
    if parsed.replies and "/topics/" not in parsed.replies:
        print(f"{ReplyFile(parsed.replies).remove(ids)} replies deleted from {parsed.replies}")
    return 0
