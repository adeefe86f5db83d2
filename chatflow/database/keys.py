"""Reads the console's secret key, which all consoles of a database share."""

from __future__ import annotations

import hashlib
import hmac

import sqlalchemy as sa

from chatflow.database.tables import keys


def console_key(connection: sa.Connection) -> bytes:
    """Returns the key; the migration that made its table made it."""
    query = sa.select(keys.c.value).where(keys.c.name == "console")
    return bytes.fromhex(connection.execute(query).scalar_one())


def signed(key: bytes, purpose: str, *parts: str) -> str:
    """Returns a code for texts that nobody without the key can make or check."""
    text = "\0".join((purpose, *parts))
    return hmac.new(key, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()
