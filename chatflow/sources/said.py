"""Turns the text of a message into the words that its author wrote.

Help desks and messengers add text that nobody said: HTML, quoted mail, signatures, images in
base64, "This message was deleted", invisible characters. Models mistake all of it for words.
"""

from __future__ import annotations

import functools
import html
import re
from html.parser import HTMLParser
from importlib import resources
from typing import NamedTuple

INVISIBLE = "invisible_characters"
HTML = "html"
DATA = "inline_data"
QUOTED = "quoted_mail"
SIGNATURE = "signatures"
PLACEHOLDER = "placeholders"


class Said(NamedTuple):
    """The words of a message ("" if it has none), and the names of what was left out."""

    text: str
    left_out: tuple[str, ...]


def placeholder(text: str) -> str:
    """Returns a text as placeholders are compared: `<Media Omitted>` becomes `[media omitted]`.

    A word that people also use, such as "image", is a placeholder only in brackets.
    """
    words = " ".join(_NO_WORD.sub(" ", text.casefold()).split())
    return f"[{words}]" if _IN_BRACKETS.fullmatch(text) else words


_NO_WORD = re.compile(r"[\W_]+")
_IN_BRACKETS = re.compile(r"\s*[\[<({].*[\])>}]\s*", re.DOTALL)


PLACEHOLDERS: frozenset[str] = frozenset(
    placeholder(line)
    for line in resources.files(__package__).joinpath("placeholders.txt").read_text().splitlines()
    if line and not line.startswith("#")
)
"""What help desks and messengers write instead of words."""

_LONGEST_PLACEHOLDER = 200
_LONGEST_MAIL = 200_000  # characters; a longer text is not mail that a person wrote


def said(text: str, placeholders: frozenset[str] = PLACEHOLDERS) -> Said:
    """Returns what the author of a message wrote.

    Emoji, the order of lines and the author's wording stay. If nothing would remain without the
    quotation or the signature, it stays too.
    """
    left_out = []
    if not _PLAIN.fullmatch(text) or "data:" in text:
        for name, step in _STEPS:
            before, text = text, step(text)
            if text != before:
                left_out.append(name)
    if text.strip() and len(text) <= _LONGEST_PLACEHOLDER:
        without = "" if _is_placeholder(text, placeholders) else text
        if without and ("(" in text or "<" in text):
            without = _ADDED.sub("", text)
        if without != text:
            text = without
            left_out.append(PLACEHOLDER)
    return Said(text.strip(), tuple(left_out))


# Most messages are one such line, in which no step below finds anything.
_PLAIN = re.compile(r"[ -%'-;=?-~¡-¬®-˿]{0,199}")
_LEFT = re.compile(r"\[(?:image|file|data)\]")  # what this module writes instead of data


def _is_placeholder(text: str, placeholders: frozenset[str]) -> bool:
    first = _FIRST_WORD.search(text)
    if first and first[0].casefold() not in _first_words(placeholders):
        return False
    form = placeholder(text)
    is_known = form in placeholders or form.strip("[]") in placeholders
    return is_known or not _LEFT.sub("", text).strip()


_FIRST_WORD = re.compile(r"[^\W_]+")


@functools.lru_cache(maxsize=8)
def _first_words(placeholders: frozenset[str]) -> frozenset[str]:
    ours = ("image", "file", "data")
    return frozenset((*ours, *(form.strip("[]").split(" ")[0] for form in placeholders)))


# Zero-width characters, direction marks, fillers, soft hyphens, and control characters except tabs
# and line ends. The joiner in emoji, the non-joiner of Persian and variation selectors stay.
_UNSEEN = re.compile(
    "[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f-\\x84\\x86-\\x9f\u00ad\u061c\u115f\u1160\u17b4\u17b5"
    "\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb"
    "\U000e0001]"
    # Characters of the tag block spell hidden text, except in a flag such as that of Wales.
    "|(?<![\U0001f3f4\U000e0020-\U000e007e])[\U000e0020-\U000e007f]+"
)
_ONLY_JOINERS = re.compile(r"[\s\u200c\u200d\u2800\ufe00-\ufe0f]*")


def without_invisible(text: str) -> str:
    if (text.isascii() and text.isprintable()) or not text.strip():
        return text
    text = _UNSEEN.sub("", text)
    return "" if _ONLY_JOINERS.fullmatch(text) else text


_BREAKS = (
    "address article aside blockquote br dd div dl dt figure footer form h1 h2 h3 h4 h5 h6 header "
    "hr li main nav ol p pre section table td th tr ul"
).split()
_INLINE = (
    "a abbr b body center cite code em font html i img label q small span strike strong sub sup "
    "tbody thead u"
).split()
_OTHER = (
    "area audio big button caption circle col colgroup del details dfn fieldset g head iframe "
    "input ins kbd legend link map mark meta noscript object o:p option param path picture rect "
    "samp script select source style summary svg template textarea tfoot time title "
    "tt var video wbr"
).split()
_KNOWN = frozenset((*_BREAKS, *_INLINE, *_OTHER))
_TAG = re.compile(rf"<(/?)({'|'.join((*_BREAKS, *_INLINE))})(?:\s[^<>]*)?(/?)>", re.IGNORECASE)
_BEGIN_TAG = re.compile(rf"<(?:{'|'.join((*_BREAKS, *_INLINE))})[\s>]", re.IGNORECASE)
_END_TAG = re.compile(rf"</(?:{'|'.join((*_BREAKS, *_INLINE))})\s*>", re.IGNORECASE)
_LONE_TAG = re.compile(r"<(?:br|hr)\s*/?>|<img\s[^<>]*>|<!doctype html", re.IGNORECASE)
_HIDDEN = frozenset(("head", "script", "style", "template", "title"))
_VOID = frozenset(("br", "hr", "img", "input", "link", "meta", "wbr", "col", "source"))
_ENTITY = re.compile(r"&(?:nbsp|amp|lt|gt|quot|apos|#39|#x27|[lr]s?quo|[lr]dquo|hellip|[mn]dash);")


class _Text(HTMLParser):
    """Collects the text of HTML; leaves out hidden parts and quoted mail."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.open: list[str] = []
        self.skipped_from: int | None = None
        self.quotes = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _KNOWN:  # the author's own, such as "<order number>"
            self.handle_data(self.get_starttag_text() or "")
            return
        values = {name: value or "" for name, value in attrs}
        if tag in _BREAKS:
            self.parts.append("\n")
        if self.skipped_from is None:
            if tag == "li":
                self.parts.append("- ")
            elif tag == "img":
                self.parts.append(f" {values['alt']} " if _is_emoji(values) else " [image] ")
        if tag in _VOID:
            return
        quotes = _is_quote(tag, values)
        if self.skipped_from is None and (tag in _HIDDEN or quotes or _is_unseen(values)):
            self.skipped_from = len(self.open)
            self.quotes |= quotes
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _KNOWN:
            self.handle_data(f"</{tag}>")
            return
        if tag in _BREAKS and tag not in _VOID:
            self.parts.append("\n")
        if tag in self.open:
            while self.open.pop() != tag:
                pass
            if self.skipped_from is not None and len(self.open) <= self.skipped_from:
                self.skipped_from = None

    def handle_data(self, data: str) -> None:
        if self.skipped_from is None:
            self.parts.append(re.sub(r"\s+", " ", data))

    def text(self) -> str:
        lines = (" ".join(line.split()) for line in "".join(self.parts).split("\n"))
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _is_emoji(values: dict[str, str]) -> bool:
    alt = values.get("alt", "")
    return 0 < len(alt) <= 8 and not alt.isascii()


def _is_quote(tag: str, values: dict[str, str]) -> bool:
    names = values.get("class", "").lower()
    of_mail = "quote" in names or "moz-cite" in names or "yahoo_quoted" in names
    return of_mail or (tag == "blockquote" and values.get("type") == "cite")


def _is_unseen(values: dict[str, str]) -> bool:
    style = values.get("style", "").replace(" ", "").lower()
    return "hidden" in values or "display:none" in style or "visibility:hidden" in style


def without_html(text: str) -> str:
    if "<" in text and (
        _LONE_TAG.search(text) or (_BEGIN_TAG.search(text) and _END_TAG.search(text))
    ):
        reader = _Text()
        try:
            if text.count("<!") > 1000:  # unclosed comments take quadratic time
                raise AssertionError
            reader.feed(text)
            reader.close()
        except AssertionError:  # raised by Python's parser at "<![" without a known word
            return " ".join(_TAG.sub(" ", text).split())
        if (found := reader.text()) or not reader.quotes:
            return found
        return " ".join(_TAG.sub(" ", text).split())
    return _ENTITY.sub(_character, text) if "&" in text else text


def _character(found: re.Match[str]) -> str:
    return html.unescape(found[0]).replace("\xa0", " ")


_URI = re.compile(
    r"!?\[[^\]\n]{0,200}\]\(data:[^)\s]*\)|data:(?:[\w.+-]+/[\w.+-]+|(?=;base64))(?:;[\w.=+-]+)*,"
    r"(?:[A-Za-z0-9+/=_%-]|\s(?=[A-Za-z0-9+/=]{40}))*"
)
_LINES = re.compile(r"(?:^[A-Za-z0-9+/=]{60,}[ \t]*\r?\n){3,}(?:[A-Za-z0-9+/=]+[ \t]*$)?", re.M)
_RUN = re.compile(r"[A-Za-z0-9+/=_-]{200,}")


def without_data(text: str) -> str:
    if len(text) < 40:
        return text
    if "data:" in text:
        text = _URI.sub(lambda m: "[image]" if "image/" in m[0][:200] else "[file]", text)
    if len(text) >= 200:
        text = _RUN.sub(_data, _LINES.sub(_data, text))
    return text


def _data(run: re.Match[str]) -> str:
    """Replaces base64 and tokens, which have both cases and digits; a customer may shout AAAA…"""
    found = run[0]
    has = [re.search(kind, found) for kind in ("[a-z]", "[A-Z]", r"\d")]
    is_hex = re.fullmatch(r"[0-9a-fA-F]+", found) and not found.isdigit() and not found.isalpha()
    return "[data]" if all(has) or is_hex else found


# "On 3 March 2026, Ann <a@b.c> wrote:" in the most frequent languages, sometimes over two lines.
_WROTE = re.compile(
    r"^[ \t]*(?:On\b[^\n]{4,200}?(?:\n[^\n]{0,120}?)?\bwrote|Am\b[^\n]{4,200}?(?:\n[^\n]{0,120}?)?"
    r"\bschrieb[^\n]{0,80}|Le\b[^\n]{4,200}?(?:\n[^\n]{0,120}?)?\ba écrit|El\b[^\n]{4,200}?"
    r"(?:\n[^\n]{0,120}?)?\bescribió|Il\b[^\n]{4,200}?(?:\n[^\n]{0,120}?)?\bha scritto|"
    r"Em\b[^\n]{4,200}?(?:\n[^\n]{0,120}?)?\bescreveu|Op\b[^\n]{4,200}?(?:\n[^\n]{0,120}?)?"
    r"\bschreef[^\n]{0,80}|W dniu\b[^\n]{4,200}?\bnapisał\(?a?\)?)[ \t\xa0]?:[ \t]*$",
    re.MULTILINE,
)
_ORIGINAL = re.compile(
    r"^[ \t>]*-{2,}[ ]?(?:Original Message|Forwarded message|Ursprüngliche Nachricht|"
    r"Message d'origine|Mensaje original|Messaggio originale|Mensagem original|"
    r"Oorspronkelijk bericht)[ ]?-{2,}[ \t]*$"
    r"|^_{10,}[ \t]*\n(?=(?:From|Von|De|Da|Van):)"
    r"|^\*?(?:From|Von|De|Da|Van):\*?[ \t][^\n]+\n(?:[^\n]*\n){0,2}?"
    r"\*?(?:Sent|Date|Gesendet|Datum|Envoyé|Enviado|Inviato|Data|Verzonden):\*?[ \t][^\n]+\n"
    r"|^[ \t]*#{2,}-? ?Please type your reply above this line[^\n]*$",
    re.MULTILINE | re.IGNORECASE,
)
_QUOTE = re.compile(r"^[ \t]*>(?!\s*\d)[^\n]*(?:\n|\Z)(?:[ \t]*>[^\n]*(?:\n|\Z))*", re.MULTILINE)


def without_quotes(text: str) -> str:
    if not (12 <= len(text) <= _LONGEST_MAIL and (">" in text or ":" in text)):
        return text
    kept = text
    if found := _ORIGINAL.search(kept):
        kept = kept[: found.start()]
    if found := _WROTE.search(kept):
        after = kept[found.end() :].lstrip("\n")
        quoted = re.match(r"\s*>", after)  # else all that follows is the quoted mail, without marks
        kept = kept[: found.start()] + (_QUOTE.sub("", after) if quoted else "")
    kept = _QUOTE.sub(_unquoted, kept)
    return kept if _has_words(kept) else text


def _unquoted(found: re.Match[str]) -> str:
    """Drops several marked lines, or one at the start, as a quotation; keeps "> 3 weeks"."""
    lines = found[0].count("\n") + (not found[0].endswith("\n"))
    return "" if lines > 1 or not found.string[: found.start()].strip() else found[0]


_SENT_FROM = (
    r"(?:Sent (?:from|via) (?:my )?[^\n]{2,60}|Get Outlook for [^\n]{2,40}|"
    r"Von meinem [^\n]{2,40} gesendet|Gesendet (?:von|mit) [^\n]{2,60}|Envoyé (?:de|depuis) "
    r"[^\n]{2,60}|Enviado (?:desde|do meu|de) [^\n]{2,60}|Inviato da[^\n]{2,60}|"
    r"Verzonden vanaf [^\n]{2,60})"
)
_SIGNATURE = re.compile(rf"^(?:--[ ]?|__ ?|{_SENT_FROM})$", re.MULTILINE | re.IGNORECASE)
_CLOSING = re.compile(
    r"^[ \t]*(?:(?:kind|best|warm)(?:est)? (?:regards|wishes)|regards|sincerely|yours (?:truly|"
    r"sincerely|faithfully)|mit freundlichen grüßen|viele grüße|freundliche grüße|cordialement|"
    r"bien à vous|saludos(?: cordiales)?|atentamente|cordiali saluti|distinti saluti|"
    r"atenciosamente|met vriendelijke groet(?:en)?)[,.!]?[ \t]*\n",
    re.MULTILINE | re.IGNORECASE,
)
_CONTACT = re.compile(r"https?://|www\.|\S@\S|(?:\+|\b0)\d[\d ()/.-]{6,}|\|", re.IGNORECASE)


def without_signature(text: str) -> str:
    if "\n" not in text or len(text) > _LONGEST_MAIL:
        return text
    kept = text
    if found := _SIGNATURE.search(kept, _last_lines(kept)):
        kept = kept[: found.start()]
    if found := _CLOSING.search(kept, _last_lines(kept)):
        below = kept[found.end() :]
        if _CONTACT.search(below) and "?" not in below:
            kept = kept[: found.start()]
    return kept if _has_words(kept) else text


def _last_lines(text: str, most: int = 15) -> int:
    """Returns where the last lines of a text start."""
    at = len(text)
    for _ in range(most):
        if (at := text.rfind("\n", 0, at)) < 0:
            return 0
    return at + 1


def _has_words(text: str) -> bool:
    return re.search(r"\w", text) is not None


# "IMG-20260101-WA0001.jpg (file attached)" and "<This message was edited>", as messengers export.
_ADDED = re.compile(
    r"[ \t]*[\w-][\w.-]*\.\w{2,5} ?\((?:file attached|datei angehängt|archivo adjunto|"
    r"fichier joint|file allegato|arquivo anexado|bestand bijgevoegd)\)"
    r"|<(?:attached|angehängt|anhang|adjunto|allegato|anexado|pièce jointe)\s?: ?[^<>\n]+>"
    r"|<(?:this message was edited|diese nachricht wurde bearbeitet|se editó este mensaje|"
    r"ce message a été modifié)>",
    re.IGNORECASE,
)

_STEPS = (
    (INVISIBLE, without_invisible),
    (DATA, without_data),
    (HTML, without_html),
    (QUOTED, without_quotes),
    (SIGNATURE, without_signature),
)
