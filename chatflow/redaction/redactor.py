"""Redacts chats, dead letters and log lines."""

from __future__ import annotations

import base64
import codecs
import dataclasses
import functools
import gzip
import hashlib
import hmac
import json
import logging
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import requests

from chatflow import metrics
from chatflow.errors import BadInputError, UsageError, one_line
from chatflow.options import RedactionSettings
from chatflow.records import Chat, DeadLetter, Message, RawChat, Redaction, unpacked
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

_log = logging.getLogger(__name__)


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
      key: where the key is that makes hashes of ids unknown to whoever does not have it.
      dlp: a service that is asked, too.
    """

    kinds: frozenset[str]
    countries: tuple[str, ...] = ("US", "GB", "DE")
    patterns: tuple[tuple[str, re.Pattern[str]], ...] = ()
    key: str = dataclasses.field(default="", repr=False)
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
        if settings.redact_key:
            _key_at(settings.redact_key)
        return cls(frozenset(kinds), countries, patterns, settings.redact_key, dlp)

    def find(self, texts: Sequence[str], names: Names, ask: bool = True) -> list[list[Found]]:
        """Returns what is found in each text; `ask` also the service, if there is one."""
        asked = self.dlp.find(texts) if self.dlp and ask else [[] for _ in texts]
        found = []
        for text, service in zip(texts, asked, strict=True):
            known = [Found("", *m.span()) for m in PLACEHOLDER.finditer(text)]  # they stay
            by_form = find(text, self.kinds, self.countries)
            by_name = (Found(NAME, start, end) for start, end in names.find(text))
            every = without_overlaps(text, [*known, *self._own(text), *by_form, *service, *by_name])
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
        session = _Session(self, texts, names, is_redacted=chat.redacted is not None)
        messages = tuple(session.message(message) for message in chat.messages)
        made = chat.model_copy(
            update={
                "chat_id": session.id(chat.chat_id),
                "user_id": chat.user_id and session.id(chat.user_id),
                "messages": messages,
                "attributes": session.fields(chat.attributes),
                "redacted": tuple(self._places(messages, session)),
            }
        )
        raw = None
        if chat.redacted is None:  # else it is the dead letter of a redacted one
            raw = RawChat(
                chat_id=made.chat_id, revision=chat.revision, chat=chat, placeholders=session.values
            )
        return Redacted(made, raw, session.counts)

    def _places(self, messages: Sequence[Message], session: _Session) -> Iterator[Redaction]:
        for number, message in enumerate(messages):
            for found in PLACEHOLDER.finditer(message.text):
                if session.is_placeholder(found):
                    start, end = found.span()
                    yield Redaction(message=number, start=start, end=end, kind=found[1].lower())

    def letter(self, letter: DeadLetter) -> DeadLetter:
        """Returns a dead letter without personal data; it can still be replayed.

        What cannot be redacted, by an error of chatflow, is withheld: a letter never has more than
        it should. Raises `requests.RequestException` if a service does not answer.
        """
        if letter.part is not None:  # of a letter that was redacted before it was divided
            return letter
        try:
            return self._letter(letter)
        except requests.RequestException:
            raise
        except Exception as error:
            _log.exception("a dead letter cannot be redacted", exc_info=error)
            metrics.count("redacted/withheld")
            withheld = {"payload": "", "payload_encoding": "utf-8", "answer": None, "chat_id": None}
            return letter.model_copy(
                update={**withheld, "attributes": None, "error": "withheld: it cannot be redacted"}
            )

    def _letter(self, letter: DeadLetter) -> DeadLetter:
        payload, encoding = letter.payload, ""
        if letter.payload_encoding in ("base64", "gzip"):
            content = letter.payload_bytes()
            encoding = _encoding_of(content)
            payload = content.decode(encoding)
        elif letter.payload_encoding == "file":
            payload = ""  # the path is needed to read the file again
        value = _parsed(payload)
        if isinstance(value, str):  # what escapes stand for is found, too
            value = payload = _unescaped(payload)
        beside = dict(letter.attributes or {})
        texts = [*_strings(value), *beside.values(), letter.error, letter.answer or ""]
        fields = [*_objects(value), beside]
        ids = [one["user_id"] for one in fields if isinstance(one.get("user_id"), str)]
        session = _Session(self, texts, self._names(texts, *fields, ids=ids))
        hidden = session.json(value)
        if not isinstance(value, str):
            hidden = _dumped(hidden) if hidden != value else payload
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


_IS_HASH = re.compile(r"[a-z][a-z0-9_]*-[0-9a-f]{16}")

_IDS = frozenset(("chat_id", "user_id", "message_id", "conversation_id", "id", "from_id"))
_NO_WORDS = re.compile(r"\d{4}-\d\d-\d\d[T ][\d:.+Z-]*|[0-9a-f]{32}|[a-z_]{1,30}")
"""Times, hashes and words such as roles: what nobody is recognised by."""

_TIMES = re.compile(r"(?:^|_)(?:at|time|timestamp|date|ts|unixtime|revision)$", re.IGNORECASE)
"""Fields whose numbers are times."""


class _Session:
    """One chat or letter: the same thing has the same placeholder."""

    def __init__(
        self,
        redactor: Redactor,
        texts: Sequence[str],
        names: Names,
        ask: bool = True,
        is_redacted: bool = False,
    ):
        self.redactor, self.names = redactor, names
        self.values: dict[str, str] = {}
        self.counts: Counter[str] = Counter()
        self._known: dict[tuple[str, str], str] = {}
        self._kinds: dict[str, str] = {}  # of ids
        self._last: Counter[str] = Counter()
        different = list(dict.fromkeys(texts))
        found = redactor.find(different, names, ask)
        self._found = dict(zip(different, found, strict=True))
        for match in (m for text in different for m in PLACEHOLDER.finditer(text)):
            if len(match[2]) < 7:  # theirs must not be given twice
                self._last[match[1]] = max(self._last[match[1]], int(match[2]))
            if not is_redacted:  # somebody wrote it
                self.values[match[0]] = match[0]
        self._literal = frozenset(self.values)

    def is_placeholder(self, found: re.Match[str]) -> bool:
        """Returns whether a placeholder stands for something, and was not written by somebody."""
        return found[0] not in self._literal and self.redactor.knows(found[1])

    def text(self, text: str) -> str:
        if text not in self._found:
            self._found[text] = self.redactor.find([text], self.names, ask=False)[0]
        parts, at = [], 0
        for kind, start, end in self._found[text]:
            parts += [text[at:start], self.placeholder(kind, text[start:end])]
            at = end
        return "".join([*parts, text[at:]]) if parts else text

    def placeholder(self, kind: str, value: str) -> str:
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
        key = _key_at(self.redactor.key) if self.redactor.key else b"chatflow"
        digest = hmac.new(key, value.encode("utf-8", "surrogatepass"), hashlib.sha256)
        return f"{kind}-{digest.hexdigest()[:16]}"

    def _kind_of(self, value: str) -> str:
        """Returns what an id is, by the id alone, so that it is the same in each revision."""
        kinds = self.redactor.kinds
        if NAME in kinds and (of_id(value) or re.search(r"[^\W\d_]\s+[^\W\d_]", value)):
            return NAME
        if not re.search(r"[^\d.]", value) or _IS_HASH.fullmatch(value):  # an id like others
            return ""
        if found := self.redactor.find([value], Names(()), ask=False)[0]:
            return found[0].kind
        # With something of the desk's own before or after it.
        return "email" if "email" in kinds and re.search(r"\w@\w+[\w.-]", value) else ""

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
            fields = {self.text(name): self.json(one, name) for name, one in value.items()}
            if value.get("payload_encoding") in ("base64", "gzip"):  # a dead letter
                fields["payload"] = self._packed(value)
            return fields
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

    def _packed(self, letter: Mapping[str, Any]) -> str:
        """Returns the payload of a dead letter in a dead letter, or "" if it cannot be read."""
        try:
            content = unpacked(str(letter.get("payload")), letter["payload_encoding"])
        except BadInputError:
            return ""
        encoding = _encoding_of(content)
        raw = self.text(_unescaped(content.decode(encoding))).encode(encoding)
        if letter["payload_encoding"] == "gzip":
            raw = gzip.compress(raw, mtime=0)
        return base64.b64encode(raw).decode()


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


def _parsed(payload: str) -> Any:
    """Returns the value of JSON, or the text if it is not JSON as chatflow writes it."""
    if payload.lstrip()[:1] not in ("{", "["):
        return payload
    try:
        value = json.loads(payload, object_pairs_hook=_once)
        _dumped(value)
    except (ValueError, RecursionError):
        return payload
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object; raises `ValueError` if a field is there twice, so that none is lost."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a field is there twice")
    return value


def _dumped(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a pair of surrogates
        return json.dumps(value, allow_nan=False)
    return text


def _unescaped(text: str) -> str:
    """Returns broken JSON with its escapes resolved, because "\\n4111…" begins with a letter."""
    if "\\" not in text:
        return text
    text = re.sub(r"\\u00([2-7][0-9A-Fa-f])", lambda m: _ascii(m, chr(int(m[1], 16))), text)
    return re.sub(r"\\[ntr]", "  ", text)


def _ascii(found: re.Match[str], character: str) -> str:
    return found[0] if character in '"\\' else character


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
def _key_at(place: str) -> bytes:
    """Returns the key of `--redact_key`, which workers read themselves; raises `UsageError`."""
    key = read_secret(place, "--redact_key").strip().encode()
    if not key:
        raise UsageError(f"--redact_key={place}: is empty")
    return key


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
        if not re.fullmatch("[a-z][a-z0-9_]{1,40}", name) or not isinstance(pattern, str):
            raise UsageError(
                f"--redact_patterns={path}: {name}: must be a name of two or more small letters, "
                "= and a regular expression in quotes"
            )
        try:
            patterns.append((name, re.compile(pattern)))
        except re.error as error:
            raise UsageError(f"--redact_patterns={path}: {name}: {error}") from None
    return tuple(patterns)
