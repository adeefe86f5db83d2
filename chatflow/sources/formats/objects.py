"""Reads the formats in which a JSON object is one or more chats, or an event of a chat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

from chatflow.errors import BadInputError, one_line
from chatflow.sources.formats import (
    chatwoot,
    contact_lens,
    cx_insights,
    genesys,
    intercom,
    openai,
    sharegpt,
    telegram,
    zendesk,
)
from chatflow.sources.formats.common import Ours, Value


class Format(Protocol):
    """A module of this folder."""

    def fits(self, value: Value) -> bool:
        """Returns whether an object is of this format."""

    def read(self, value: Value, name: str) -> Iterator[Ours]:
        """Yields its chats and events; `name` is the file's name if it holds only this object."""


FORMATS: Mapping[str, Format] = {
    "cx_insights": cx_insights,
    "contact_lens": contact_lens,
    "genesys": genesys,
    "zendesk": zendesk,
    "intercom": intercom,
    "chatwoot": chatwoot,
    "telegram": telegram,
    "openai": openai,
    "sharegpt": sharegpt,
}
"""Formats by name. An object is of the first format that it fits."""

OURS = "chatflow"

ALL = ("auto", OURS, "csv", "parquet", "slack", "whatsapp", "convokit", *FORMATS)
"""The values of `--input_format`."""


_TITLES = {
    "csv": "CSV", "cx_insights": "CX Insights", "contact_lens": "Contact Lens",
    "genesys": "Genesys Cloud", "whatsapp": "WhatsApp", "convokit": "ConvoKit",
    "openai": "OpenAI", "sharegpt": "ShareGPT",
}  # fmt: skip
_UNITS = {"zendesk": "tickets", "slack": "threads"}


def described(formats: Mapping[str, int], input: Mapping[str, int], messages: int = 0) -> str:
    """Returns a description such as "Zendesk export: 1,204 tickets; 212 private notes left out".

    Args:
      formats: the number of chats and events by format.
      input: what was left out, by name; see `sources.chats`.
      messages: the number of messages, including notes and system messages; 0: not known.
    """
    found = [
        f"{_TITLES.get(name, name.capitalize())} export: {_of(count, _UNITS.get(name, 'chats'))}"
        for name, count in formats.items()
    ]
    private, system = input.get("private_notes", 0), input.get("system_messages", 0)
    counted = [
        _of(messages - private - system, "messages") if messages else "",
        f"{_of(private, 'private notes')} left out" if private else "",
        f"{_of(system, 'system messages')} left out" if system else "",
    ]
    return "; ".join(filter(None, (*found, ", ".join(filter(None, counted)))))


def _of(count: int, units: str) -> str:
    return f"{count:,} {units if count != 1 else units.removesuffix('s')}"


class Found(NamedTuple):
    """The chats and events in an object of another format."""

    format: str
    values: list[Ours]


def as_ours(value: Value, name: str = "", format: str = "auto") -> Found | None:
    """Returns the chats and events of an object, or None if it is in chatflow's own format.

    Args:
      name: the name of the file, if it holds only this object.
      format: the format of the object; `auto`: the first that it fits.

    Raises `BadInputError` (`wrong_shape`) for an object that fits a format but cannot be read.
    """
    if format == OURS or ("chat_id" in value and not openai.fits(value)):
        return None
    known = FORMATS if format not in FORMATS else {format: FORMATS[format]}
    try:
        for key, reader in known.items():
            if reader.fits(value):
                return Found(key, [*reader.read(value, name)])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadInputError("wrong_shape", f"it is of no known format: {one_line(error)}") from None
    return None
