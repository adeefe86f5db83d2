"""`chatflow console`: serves the page."""

from __future__ import annotations

import argparse
import getpass
import ipaddress
import socket
import sys
import threading
import webbrowser
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from chatflow.console.people import OWN_HOSTS
from chatflow.errors import UsageError
from chatflow.running.launch import quieten

if TYPE_CHECKING:
    from chatflow.console.app import Server
    from chatflow.console.people import People
    from chatflow.database.connections import Database


def console(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    """The command; see `chatflow console --help`."""
    if rest:
        raise UsageError(f"unknown flag {rest[0]}; see chatflow console --help")
    quieten(local=True)
    try:
        from chatflow.console import people
        from chatflow.console.app import Server
        from chatflow.console.outbox import replies_to
        from chatflow.console.site import Console
    except ImportError as error:
        raise UsageError(
            f"{error.name} is missing: pip install 'chatflow[console]' has all of the console"
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
    database = Database(parsed.database, password_at(parsed.database_password), connections=20)
    database.upgrade()
    if parsed.export:
        return export(database, parsed.export)
    served = Console(
        database,
        known,
        replies_to(parsed.replies) if parsed.replies else None,
        parsed.undo_seconds,
        keep=timedelta(days=parsed.keep_days) if parsed.keep_days else None,
        hosts=[*OWN_HOSTS, parsed.host.lower(), *names],
    )
    listener = listen(parsed.host, parsed.port)
    shown = f"[{parsed.host}]" if ":" in parsed.host else parsed.host
    address = f"http://{shown}:{listener.getsockname()[1]}/"
    print(f"console: {address} on {database.uri}", flush=True)
    if not parsed.replies:
        print("approved replies are kept, and not sent: no --replies", flush=True)
    if parsed.open_browser:
        webbrowser.open(address)
    server = Server(served, listener)
    if parsed.while_stdin_is_open:
        threading.Thread(target=_end_with_stdin, args=(server,), daemon=True).start()
    server.serve_forever()
    return 0


def _end_with_stdin(server: Server) -> None:
    """Ends the console when the process that started it has ended."""
    sys.stdin.read()
    server.should_exit = True


def people_of(parsed: argparse.Namespace) -> People:
    """Who may use the console, by the flags.

    Raises:
      UsageError: a file or a flag that says it has a mistake.
    """
    from chatflow.console.people import ROLES, People, read_users

    redacted = frozenset(filter(None, (role.strip() for role in parsed.redact.split(","))))
    if unknown := sorted(redacted - set(ROLES)):
        raise UsageError(f"--redact: {unknown[0]!r} is no role; roles are {', '.join(ROLES)}")
    try:
        proxies = [
            ipaddress.ip_network(network.strip())
            for network in parsed.trusted_proxies.split(",")
            if network.strip()
        ]
    except ValueError as error:
        raise UsageError(f"--trusted_proxies: {error}") from None
    return People(
        getpass.getuser(),
        read_users(parsed.users) if parsed.users else {},
        parsed.identity_header,
        proxies,
        redacted,
    )


def check_place(host: str, names: Sequence[str], known: People) -> None:
    """Makes sure that nobody from elsewhere gets in without signing in.

    Args:
      names: by which it may be called; from elsewhere, e.g. through a proxy on this machine.

    Raises:
      UsageError: they would.
    """
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise UsageError(f"--host={host}: {error.strerror}") from None
    local = all(ipaddress.ip_address(str(address)).is_loopback for address in found)
    if not local and not known.sign_in:
        raise UsageError(
            f"--host={host}: others can reach it, so they have to sign in; give --users=FILE "
            "(with tokens), or --identity_header=NAME of a reverse proxy in front of it"
        )
    others = sorted(set(names) - set(OWN_HOSTS))
    if others and not known.sign_in:
        raise UsageError(
            f"--allowed_hosts={others[0]}: others can reach it by that name, so they have to sign "
            "in; give --users=FILE or --identity_header=NAME"
        )


def listen(host: str, port: int) -> socket.socket:
    """Takes the port, before anything is said of it.

    Raises:
      UsageError: it is taken by another.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=200)
    except OSError as error:
        raise UsageError(f"--port={port}: {error.strerror} ({host})") from None
    # asyncio does so only for sockets that name their protocol, and this one names none. Without
    # it, the second part of each answer waits 40 ms for the browser to acknowledge the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def export(database: Database, path: str) -> int:
    """Writes what people decided as labelled chats."""
    from chatflow.console.labels import labelled

    count = 0
    try:
        with open(path, "w", encoding="utf-8") as file, database.read() as connection:
            for line in labelled(connection):
                file.write(line + "\n")
                count += 1
    except OSError as error:
        raise UsageError(f"--export={path}: cannot be written: {error.strerror}") from None
    print(f"{count} labelled chats in {path}")
    return 0
