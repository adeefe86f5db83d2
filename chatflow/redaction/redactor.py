"""Redacts chats, dead letters and log lines."""

from __future__ import annotations

import base64
import codecs
import dataclasses
import functools
import hashlib
import hmac
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

from chatflow.errors import UsageError, one_line
from chatflow.options import RedactionSettings
from chatflow.records import Chat, DeadLetter, Message, RawChat, Redaction
from chatflow.redaction.dlp import Dlp
from chatflow.redaction.kinds import (
    KINDS,
    NAME,
    NATIONAL_IDS,
    Found,
    find,
    recognisers,
    without_overlaps,
)
from chatflow.redaction.names import Names, names_in, of_id, said_in
from chatflow.redaction.placeholders import PLACEHOLDER
from chatflow.secrets import read_secret


class Redacted(NamedTuple):
    """A chat without personal data, and what was in it; `raw` is None if nothing is to be kept."""

    chat: Chat
    raw: RawChat | None
    counts: Counter[str]


@dataclasses.dataclass(frozen=True)
class Redactor:
    """Puts placeholders in the place of personal data.

    In a chat, the same thing has the same placeholder everywhere. An id that is personal data, such
    as an e-mail address, becomes a hash, because ids have to tell chats and people apart.

    Attributes:
      kinds: what to look for; see `kinds.KINDS`.
      countries: whose national ids, addresses and ways to write phone numbers are known.
      patterns: kinds of the user's own: name and regular expression.
      key: makes the hashes of ids unknown to whoever does not have it.
      dlp: a service that is asked, too.
    """

    kinds: frozenset[str]
    countries: tuple[str, ...] = ("US", "GB", "DE")
    patterns: tuple[tuple[str, re.Pattern[str]], ...] = ()
    key: bytes = dataclasses.field(default=b"", repr=False)
    dlp: Dlp | None = None

    @classmethod
    def of(cls, settings: RedactionSettings, project: str = "") -> Self | None:
        """Returns the redactor that the flags ask for, or None; raises `UsageError`."""
        if not settings.redact:
            for flag in ("redact_patterns", "redact_key", "keep_raw"):
                if getattr(settings, flag):
                    raise UsageError(f"--{flag}: only with --redact")
            return None
        kinds: set[str] = set()
        dlp = None
        for word in filter(None, map(str.strip, settings.redact.split(","))):
            if word.startswith("dlp:"):
                dlp = Dlp.of(word.removeprefix("dlp:"), project)
            elif word == "all":
                kinds |= set(KINDS)
            elif word in KINDS:
                kinds.add(word)
            else:
                raise UsageError(
                    f"--redact: {word!r} is not known; known are all, {', '.join(KINDS)}, dlp:…"
                )
        countries = tuple(
            filter(None, (one.strip().upper() for one in settings.redact_countries.split(",")))
        )
        for country in countries:
            if not re.fullmatch("[A-Z]{2}", country):
                raise UsageError(f"--redact_countries: {country!r} must be two letters, as US")
        if "id" in kinds and not set(countries) & set(NATIONAL_IDS):
            raise UsageError(
                f"--redact_countries={settings.redact_countries}: no national ids of these are "
                f"known; known are those of {', '.join(NATIONAL_IDS)}"
            )
        patterns = _read_patterns(settings.redact_patterns) if settings.redact_patterns else ()
        key = read_secret(settings.redact_key, "--redact_key") if settings.redact_key else ""
        return cls(frozenset(kinds), countries, patterns, key.encode(), dlp)

    def find(self, texts: Sequence[str], names: Names, ask: bool = True) -> list[list[Found]]:
        """Returns what is found in each text; `ask` also the service, if there is one."""
        asked = self.dlp.find(texts) if self.dlp and ask else [[] for _ in texts]
        found = []
        for text, service in zip(texts, asked, strict=True):
            known = [Found("", *m.span()) for m in PLACEHOLDER.finditer(text)]  # they stay
            by_form = find(text, self.kinds, self.countries)
            by_name = (Found(NAME, start, end) for start, end, _ in names.find(text))
            every = without_overlaps([*known, *self._own(text), *by_form, *service, *by_name])
            found.append([one for one in every if one.kind])
        return found

    def knows(self, kind: str) -> bool:
        """Returns whether placeholders of a kind, in capital letters, may be this one's."""
        own = {NAME, *recognisers(self.kinds, self.countries), *(name for name, _ in self.patterns)}
        return self.dlp is not None or kind.lower() in own

    def _own(self, text: str) -> Iterator[Found]:
        for kind, pattern in self.patterns:
            for match in pattern.finditer(text):
                if match[0]:
                    yield Found(kind, *match.span())

    def chat(self, chat: Chat) -> Redacted:
        """Returns a chat without personal data.

        Raises `requests.RequestException` if a service that is to be asked does not answer.
        """
        texts = list(_texts_of(chat))
        names = self._names(
            texts,
            *(chat.attributes, *(m.attributes for m in chat.messages)),
            ids=[m.user_id for m in chat.messages],
        )
        session = _Session(self, texts, names)
        messages = tuple(session.message(message) for message in chat.messages)
        made = chat.model_copy(
            update={
                "chat_id": session.id(chat.chat_id),
                "user_id": chat.user_id and session.id(chat.user_id),
                "messages": messages,
                "attributes": session.fields(chat.attributes),
                "redacted": tuple(self._places(messages)),
            }
        )
        raw = None
        if not session.was_redacted:
            raw = RawChat(
                chat_id=made.chat_id, revision=chat.revision, chat=chat, placeholders=session.values
            )
        return Redacted(made, raw, session.counts)

    def _places(self, messages: Sequence[Message]) -> Iterator[Redaction]:
        for number, message in enumerate(messages):
            for found in PLACEHOLDER.finditer(message.text):
                if self.knows(found[1]):
                    start, end = found.span()
                    yield Redaction(message=number, start=start, end=end, kind=found[1].lower())

    def letter(self, letter: DeadLetter) -> DeadLetter:
        """Returns a dead letter without personal data; it can still be replayed."""
        if letter.part is not None:  # of a letter that was redacted before it was divided
            return letter
        payload: Any = letter.payload
        encoding = ""
        if letter.payload_encoding in ("base64", "gzip"):
            content = letter.payload_bytes()
            encoding = _encoding_of(content)
            payload = content.decode(encoding)
        elif letter.payload_encoding == "file":
            payload = ""  # the path is needed to read the file again
        try:
            value = json.loads(payload) if payload.lstrip()[:1] in ("{", "[") else payload
        except ValueError:
            value = payload
        beside = dict(letter.attributes or {})
        texts = [*_strings(value), *beside.values(), letter.error, letter.answer or ""]
        fields = [*_objects(value), beside]
        ids = [one["user_id"] for one in fields if isinstance(one.get("user_id"), str)]
        session = _Session(self, texts, self._names(texts, *fields, ids=ids))
        hidden = session.json(value)
        if not isinstance(value, str):
            hidden = json.dumps(hidden, ensure_ascii=False) if hidden != value else payload
        update: dict[str, Any] = {
            "error": session.text(letter.error),
            "answer": letter.answer and session.text(letter.answer),
            "attributes": session.json(beside) or None,
            "chat_id": letter.chat_id and session.id(letter.chat_id),
        }
        if encoding:
            packed = base64.b64encode(hidden.encode(encoding)).decode()
            update |= {"payload": packed, "payload_encoding": "base64"}
        elif letter.payload_encoding != "file":
            update["payload"] = hidden
        return letter.model_copy(update=update)

    def line(self, text: str) -> str:
        """Returns a log line without personal data, as far as it can be told by the line alone."""
        names = self._names([text]) if NAME in self.kinds else Names(())
        return _Session(self, [text], names, ask=False).text(text)

    def _names(
        self, texts: Iterable[str], *fields: Mapping[str, Any], ids: Iterable[str] = ()
    ) -> Names:
        if NAME not in self.kinds:
            return Names(())
        found = [name for text in texts for name in said_in(text)]
        for one in fields:
            found += names_in({key: value for key, value in one.items() if isinstance(value, str)})
        found += filter(None, map(of_id, ids))
        return Names(name for name in found if not PLACEHOLDER.search(name))


_IDS = frozenset(("chat_id", "user_id", "message_id", "conversation_id", "id", "from_id"))
_NO_WORDS = re.compile(r"\d{4}-\d\d-\d\d[T ][\d:.+Z-]*|[0-9a-f]{32}|[a-z_]{1,30}")
"""Times, hashes and words such as roles: what nobody is recognised by."""

_TIMES = re.compile(r"(?:^|_)(?:at|time|timestamp|date|ts|unixtime|revision)$", re.IGNORECASE)
"""Fields whose numbers are times."""


class _Session:
    """One chat or letter: the same thing has the same placeholder."""

    def __init__(self, redactor: Redactor, texts: Sequence[str], names: Names, ask: bool = True):
        self.redactor, self.names = redactor, names
        self.values: dict[str, str] = {}
        self.counts: Counter[str] = Counter()
        self._known: dict[tuple[str, str], str] = {}
        self._kinds: dict[str, str] = {}  # of ids
        self._last: Counter[str] = Counter()
        different = list(dict.fromkeys(texts))
        found = redactor.find(different, names, ask)
        self._found = dict(zip(different, found, strict=True))
        before = [m for text in different for m in PLACEHOLDER.finditer(text)]
        for match in before:  # a replayed letter has some; theirs must not be given twice
            self._last[match[1]] = max(self._last[match[1]], int(match[2]))
        self.was_redacted = any(redactor.knows(match[1]) for match in before)

    def text(self, text: str) -> str:
        if text not in self._found:
            self._found[text] = self.redactor.find([text], self.names, ask=False)[0]
        parts, at = [], 0
        for kind, start, end in self._found[text]:
            parts += [text[at:start], self.placeholder(kind, text[start:end])]
            at = end
        return "".join([*parts, text[at:]]) if parts else text

    def placeholder(self, kind: str, value: str) -> str:
        if kind == NAME:
            value = self.names.name_of(value)
        key = kind, _plain(kind, value)
        if key not in self._known:
            upper = kind.upper()
            self._last[upper] += 1
            self._known[key] = f"[{upper}_{self._last[upper]}]"
            self.values[self._known[key]] = value
        self.counts[kind] += 1
        return self._known[key]

    def id(self, value: str) -> str:
        """Returns an id, or a hash of one that is personal data."""
        if value not in self._kinds:
            self._kinds[value] = self._kind_of(value)
        if not (kind := self._kinds[value]):
            return value
        self.counts[kind] += 1
        key = self.redactor.key or b"chatflow"
        digest = hmac.new(key, " ".join(value.split()).casefold().encode(), hashlib.sha256)
        return f"{kind}-{digest.hexdigest()[:16]}"

    def _kind_of(self, value: str) -> str:
        kind = ""
        if NAME in self.redactor.kinds and (of_id(value) or self.names.find(value)):
            kind = NAME
        elif re.search(r"[^\d.]", value):  # a number alone is an id like others
            found = self.redactor.find([value], Names(()), ask=False)[0]
            kind = found[0].kind if found else ""
            if not kind and "email" in self.redactor.kinds and re.search(r"\w@\w+[\w.-]", value):
                kind = "email"  # with something of the desk's own before or after it
        return kind

    def message(self, message: Message) -> Message:
        return message.model_copy(
            update={
                "user_id": self.id(message.user_id),
                "message_id": message.message_id and self.id(message.message_id),
                "text": self.text(message.text),
                "original": message.original and self.text(message.original),
                "attributes": self.fields(message.attributes),
            }
        )

    def fields(self, fields: Mapping[str, str]) -> dict[str, str]:
        return {self.text(key): self.field(key, value) for key, value in fields.items()}

    def field(self, key: str, value: str) -> str:
        is_name = NAME in self.redactor.kinds and names_in({key: value})
        if is_name and not PLACEHOLDER.fullmatch(value.strip()):
            return self.placeholder(NAME, value.strip())
        return self.text(value)

    def json(self, value: Any, key: str = "") -> Any:
        """Returns a JSON value without personal data; `key` is the field in which it stands."""
        if isinstance(value, dict):
            return {self.text(name): self.json(one, name) for name, one in value.items()}
        if isinstance(value, list):
            return [self.json(one, key) for one in value]
        if isinstance(value, str) and value:
            if _NO_WORDS.fullmatch(value):
                return value
            return self.id(value) if key in _IDS else self.field(key, value)
        is_number = isinstance(value, int) and abs(value) >= 10**8
        if is_number and key not in _IDS and not _TIMES.search(key):
            hidden = self.text(str(value))
            return value if hidden == str(value) else hidden
        return value


def _plain(kind: str, value: str) -> str:
    """Returns in which form two writings of the same thing are the same."""
    if kind in (NAME, "address", "url"):
        return " ".join(value.split()).casefold()
    if kind == "phone":
        return re.sub(r"\D", "", value)
    return re.sub(r"[\s-]", "", value).casefold()


def _texts_of(chat: Chat) -> Iterator[str]:
    for message in chat.messages:
        yield message.text
        if message.original:
            yield message.original
    for fields in (*(m.attributes for m in chat.messages), chat.attributes):
        yield from fields
        yield from fields.values()


def _strings(value: Any) -> Iterator[str]:
    """Yields the texts in a JSON value, and the numbers that may be somebody's."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield key
            yield from _strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)
    elif isinstance(value, int) and abs(value) >= 10**8:
        yield str(value)


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for one in value.values():
            yield from _objects(one)
    elif isinstance(value, list):
        for one in value:
            yield from _objects(one)


def _encoding_of(content: bytes) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        with_mark = "utf-16"
        try:
            content.decode(with_mark)
            return with_mark
        except UnicodeDecodeError:
            return "latin-1"
    try:
        content.decode()
    except UnicodeDecodeError:
        return "latin-1"  # takes any bytes, and gives them back
    return "utf-8"


@functools.cache
def _read_patterns(path: str) -> tuple[tuple[str, re.Pattern[str]], ...]:
    """Reads `--redact_patterns`: a TOML file of NAME = 'regular expression'."""
    from apache_beam.io.filesystems import FileSystems

    try:
        with FileSystems.open(path) as file:
            found = tomllib.loads(file.read().decode("utf-8-sig"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--redact_patterns={path}: is not TOML: {one_line(error)}") from None
    except Exception as error:  # each filesystem has its own
        raise UsageError(f"--redact_patterns={path}: cannot be read: {one_line(error)}") from None
    patterns = []
    for name, pattern in found.items():
        if not re.fullmatch("[a-z][a-z0-9_]{0,40}", name) or not isinstance(pattern, str):
            raise UsageError(
                f"--redact_patterns={path}: {name}: must be a name in small letters, = and a "
                "regular expression in quotes"
            )
        try:
            patterns.append((name, re.compile(pattern)))
        except re.error as error:
            raise UsageError(f"--redact_patterns={path}: {name}: {error}") from None
    return tuple(patterns)
