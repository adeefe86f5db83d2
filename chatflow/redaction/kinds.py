"""The kinds of personal data, and how each is recognised: by its form, check digits and context.

Numbers are checked by libraries that know them: python-stdnum (IBAN, cards, national ids) and
phonenumbers, Google's libphonenumber.
"""

from __future__ import annotations

import bisect
import functools
import importlib
import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

import phonenumbers
from stdnum import iban, luhn

Span = tuple[int, int]
"""Where something begins and ends in a text, in characters."""


class Found(NamedTuple):
    """Personal data in a text: what it is, and where it begins and ends, in characters."""

    kind: str
    start: int
    end: int


def words_before(text: str, at: int, words: re.Pattern[str], most: int = 40) -> bool:
    """Returns whether one of some words stands in the same line shortly before a place."""
    return words.search(text[max(0, at - most) : at].rpartition("\n")[2]) is not None


# What a number is called that is nobody's: it stands directly before the number.
_OTHER_NUMBER = re.compile(
    r"\b(?:order|invoice|batch|lot|charge|tracking|parcel|shipment|reference|ref|ticket|case|serial|"
    r"imei|isbn|sku|ean|article|item|model|part|booking|confirmation|transaction|version|firmware|"
    r"build|release|bestell\w*|rechnung\w*|auftrag\w*|kunden\w*|sendung\w*|serien\w*|artikel\w*|"
    r"vorgang\w*|pedido|factura|seguimiento)"
    r"[ .:#'\"-]*(?:(?:number|num|no|nr|id|code|nummer|número)\b[ .:#'\"-]*)?"
    r"(?:(?:is|was|ist|lautet|es)\b[ .:#'\"-]*)?(?:\w{1,4}-)?$|#\s?$",
    re.IGNORECASE,
)


Recogniser = Callable[[str, Sequence[str]], Iterator[Span]]
"""Yields where something is in a text, by the text and the countries to think of."""


def of_form(pattern: re.Pattern[str]) -> Recogniser:
    """Returns a recogniser of everything that has a form."""

    def find(text: str, countries: Sequence[str]) -> Iterator[Span]:
        return (found.span() for found in pattern.finditer(text))

    return find


_EMAIL = re.compile(
    r"[^\W_][\w.+%'-]{0,63}(?:@|%40|&#(?:64|x40);|\s?[\[(]\s?at\s?[\])]\s?)"
    r"(?:[^\W_](?:[\w-]{0,62})(?:\.|\s?[\[(]\s?dot\s?[\])]\s?))+(?:[^\W\d_]{2,24}|xn--[\w-]{2,59})"
    r"(?![^\W\d_])",
    re.IGNORECASE,
)


def cards(text: str, countries: Sequence[str]) -> Iterator[Span]:
    """Yields payment cards: of an issuer's range and length, with the right check digit."""
    for run in _GROUPS_OF_DIGITS.finditer(text):
        groups = [(run.start() + g.start(), run.start() + g.end()) for g in _GROUP.finditer(run[0])]
        first = 0
        while first < len(groups):  # other numbers may stand before and after it
            start = groups[first][0]
            for last in range(min(first + 19, len(groups)) - 1, first - 1, -1):
                digits = _NO_DIGIT.sub("", text[start : groups[last][1]])
                if last - first == 1 and text[groups[last][0] - 1] == ".":
                    continue  # a number with decimals
                if _ISSUERS.fullmatch(digits) and luhn.is_valid(digits) and len(set(digits)) > 1:
                    yield start, groups[last][1]
                    first = last
                    break
            first += 1


_GROUPS_OF_DIGITS = re.compile(r"(?<![\w+-])\d+(?:[ ._-]{1,2}\d+)*(?!\w)")
_GROUP = re.compile(r"\d+")
_NO_DIGIT = re.compile(r"\D")
# https://en.wikipedia.org/wiki/Payment_card_number
_ISSUERS = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"
    r"|3[47]\d{13}|(?:6011|65\d\d|64[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}"
    r"|3(?:0[0-5]|[689]\d)\d{11}|62\d{14,17}|(?:5018|5020|5038|5893|6304|6759|676[1-3])\d{8,15}"
)


def ibans(text: str, countries: Sequence[str]) -> Iterator[Span]:
    at = 0
    while found := _IBAN.search(text, at):
        at = found.start() + 1
        ends = [m.end() for m in re.finditer(r"[A-Za-z0-9]", found[0])]
        for end in reversed(ends[14:34]):  # the rest may be the next words
            candidate = found[0][:end].replace(".", "")
            after = text[found.start() + end : found.start() + end + 1]
            if not after.isalnum() and iban.is_valid(candidate, check_country=False):
                yield found.start(), found.start() + end
                at = found.start() + end
                break


_IBAN = re.compile(
    r"(?:(?<![A-Za-z0-9])|(?<=IBAN))[A-Z]{2}\d{2}(?:[ .-]{0,2}[A-Z0-9]){11,40}", re.IGNORECASE
)


def ips(text: str, countries: Sequence[str]) -> Iterator[Span]:
    for found in _IP.finditer(text):
        try:
            address = ipaddress.ip_address(found[0].partition("%")[0])
        except ValueError:
            continue
        around = text[max(0, found.start() - 60) : found.end() + 30]
        # The numbers of versions are small ones.
        is_version = (
            address.version == 4 and int(found[0].split(".")[0]) < 30 and _VERSION.search(around)
        )
        if not (address.is_unspecified or address.is_loopback or is_version):
            yield found.span()


_IP = re.compile(
    r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d|/\d{3})"
    r"|(?<![\w:.])(?=[0-9a-f]*:[0-9a-f:]*:)[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){2,7}"
    r"(?:(?<=:)(?:\d{1,3}\.){3}\d{1,3})?(?:%\w+)?(?![\w:])",
    re.IGNORECASE,
)
_VERSION = re.compile(
    r"\b(?:version\w*|firmware|build|release|ver|fw|ios|android|driver|treiber|kapitel|chapter|"
    r"section|punkt)\b|\bv\d|§|\bv\.?[ ]?(?=\d+\.\d)",
    re.IGNORECASE,
)


def urls(text: str, countries: Sequence[str]) -> Iterator[Span]:
    """Yields addresses that open something to whoever has them: with a token, key or password."""
    if "://" not in text and "www." not in text.casefold():
        return
    for found in _URL.finditer(text):
        url = found[0].rstrip(".,;:!?'\"*_")
        while url.endswith((")", "]", "}")) and url.count("(") < url.count(")") + url.count("]"):
            url = url[:-1].rstrip(".,;:!?'\"")
        if _has_secret(url):
            yield found.start(), found.start() + len(url)


_URL = re.compile(
    r"\b[a-z][a-z0-9+.-]{1,20}://[^\s<>\"“”]+|(?<![\w/@.])www\.[^\s<>\"“”]+", re.IGNORECASE
)
_SECRET_NAME = re.compile(
    r"(?:^|[-_.;])(?:\w*token|\w*key|sig|signature|hmac|secret|password|passwd|pwd|pass|pw|passwort|kennwort|clave|contraseña|auth|"
    r"\w*code|session|\w*sid|sessionid|access|jwt|otp|pin|nonce|ticket|hash|credential|confirm|"
    r"confirmation|reset|verify|verification|invite|magic|login|t|k)(?:$|[-_.])",
    re.IGNORECASE,
)
_NO_SECRET = re.compile(
    r"(?:promo|discount|coupon|country|lang|language|postal|zip|area|product|item|error|currency|"
    r"voucher|sort|status|search|color|colour|utm)_?-?(?:code|key|id|t|k)?",
    re.IGNORECASE,
)
_OPENS = re.compile(
    r"reset|verif|confirm|invit|magic|login|signin|sign-in|auth|activate|unlock|recover|password|"
    r"passwort|session|secure|share|access|token|webhook|hooks",
    re.IGNORECASE,
)


def _has_secret(url: str) -> bool:
    try:
        parts = urlsplit(url if "://" in url else f"https://{url}")
        if parts.password:
            return True
    except ValueError:
        return False
    pairs = [*parse_qsl(parts.query), *parse_qsl(parts.fragment)]
    if any(
        (_SECRET_NAME.search(name) and not _NO_SECRET.fullmatch(name) and len(value) >= 4)
        or _is_random(value)
        for name, value in pairs
    ):
        return True
    if "=" not in parts.fragment and _is_random(parts.fragment):
        return True
    segments = re.split("[/;=]", parts.path)
    opens = _OPENS.search(f"{parts.netloc}{parts.path}")
    return any(_is_random(one) or (opens and _is_token(one)) for one in segments)


def _is_random(text: str) -> bool:
    """Returns whether a text is drawn at random: long, of letters of both cases and digits."""
    return any(
        (len(piece) >= 16 and all(re.search(kind, piece) for kind in ("[a-z]", "[A-Z]", r"\d")))
        or (len(piece) >= 24 and re.fullmatch(r"(?=.*[a-f])(?=.*\d)[0-9a-f]+", piece))
        for piece in re.split(r"[-_.~%=]", text)
    ) or bool(re.fullmatch(r"eyJ[\w-]+\.[\w-]+(?:\.[\w-]*)?", text))


def _is_token(text: str) -> bool:
    """Returns whether a text may be a token where the address says that there is one."""
    without = re.sub(r"[-_.~]", "", text)
    return len(without) >= 10 and bool(
        re.search(r"\d", without) and re.search("[a-z]", without, re.I)
    )


def phones(text: str, countries: Sequence[str]) -> Iterator[Span]:
    """Yields numbers that can be dialled from one of the countries, or that begin with a plus."""
    if sum(map(str.isdigit, text)) < 7:
        return
    seen: list[Span] = []
    for line in _LINES.finditer(text):  # the matcher takes a fourth number after a line's end
        for country in countries:
            for match in phonenumbers.PhoneNumberMatcher(line[0], country):
                start, end = line.start() + match.start, line.start() + match.end
                if any(start < e and s < end for s, e in seen):
                    continue
                if _is_dialled(text, start, end):
                    seen.append((start, end))
                    yield start, end


_LINES = re.compile(r"[^\n]+")
_DIAL = re.compile(
    r"\b(?:phone|call|tel|telephone|mobile|mob|cell|number|whatsapp|text|reach|ring|dial|fax|sms|"
    r"contact|anruf\w*|ruf\w*|handy\w*|nummer|telefon\w*|tel|mobil\w*|erreich\w*|rückruf\w*|"
    r"llam\w+|teléfono|móvil|celular|número)\b",
    re.IGNORECASE,
)
_DATE = re.compile(
    r"(?:19|20)\d\d-\d{5,}|\d{1,4}[./-]\d{1,2}[./-]\d{1,4}(?:[ T]\d{1,2}(?:[:.]\d\d)?)?"
)


def _is_dialled(text: str, start: int, end: int) -> bool:
    """Returns whether a number that could be dialled is meant to be."""
    number = text[start:end]
    called = words_before(text, start, _DIAL)
    if sum(map(str.isdigit, number)) < 8 and not called:
        return False
    if "+" in number or number.startswith("00"):
        return True
    before = text[max(0, start - 60) : start].rpartition("\n")[2]
    if _DATE.fullmatch(number) or re.search(r"[$€£#/_-]\s?$", before):
        return False
    if before.rstrip().endswith("=") and not called:
        return False
    if _OTHER_NUMBER.search(before) and not re.search(r"\b(?:phone|tel\w*)\b", before, re.I):
        return False
    if re.search(r"[\s()/.-]", number):
        return (
            "(" in number or number.startswith("0") or called or _GROUPED.match(number) is not None
        )
    return called or (number.startswith("01") and len(number) >= 11) or number.startswith("07")


_GROUPED = re.compile(r"(?:1[ .-])?[2-9]\d\d[ .-]\d{3}[ .-]\d{4}")


def ssns(text: str, countries: Sequence[str]) -> Iterator[Span]:
    from stdnum.us import ssn

    for found in _SSN.finditer(text):
        if not ssn.is_valid(re.sub(r"\D", "", found[0])):
            continue
        before = text[max(0, found.start() - 60) : found.start()]
        is_grouped = re.search(r"\D", found[0]) and not _OTHER_NUMBER.search(before)
        if is_grouped or words_before(text, found.start(), _SOCIAL):
            yield found.span()


_SSN = re.compile(r"(?:(?<![\w-])|(?<=ssn))\d{3}([ .-]?)\d{2}\1\d{4}(?![\w-]|\.\d)", re.IGNORECASE)
_SOCIAL = re.compile(r"\b(?:ssn?|social|soc|seguro|tax(?:payer)? id|itin)\b", re.IGNORECASE)


# National insurance numbers, by HMRC's manual NIM39110, have no check digit.
_NINO = re.compile(
    r"(?<![A-Za-z0-9-])(?!BG|GB|KN|NK|NT|TN|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z]([ -]?)\d{2}\1"
    r"\d{2}\1\d{2}\1[A-D](?![A-Za-z0-9-])",
    re.IGNORECASE,
)


def nhs_numbers(text: str, countries: Sequence[str]) -> Iterator[Span]:
    from stdnum.gb import nhs

    for found in _NHS.finditer(text):
        around = text[max(0, found.start() - 80) : found.end() + 80]
        is_meant = _HEALTH.search(around) or (
            " " in found[0] and not words_before(text, found.start(), _DIAL)
        )
        if is_meant and nhs.is_valid(re.sub(r"\D", "", found[0])):
            yield found.span()


_NHS = re.compile(r"(?<![\w+-])\d{3}([ -]?)\d{3}\1\d{4}(?![\w-])")
_HEALTH = re.compile(r"\b(?:nhs|health|patient|gp|surgery|hospital)\b", re.IGNORECASE)


def numbers_of(module: str, form: str) -> Recogniser:
    """Returns a recogniser of what has a form, and whose check digits python-stdnum finds right."""
    pattern = re.compile(rf"(?<![\w+.-])(?:{form})(?![\w-]|\.\d)", re.IGNORECASE)

    def find(text: str, countries: Sequence[str]) -> Iterator[Span]:
        is_valid = importlib.import_module(f"stdnum.{module}").is_valid
        for found in pattern.finditer(text):
            before = text[max(0, found.start() - 60) : found.start()]
            if is_valid(found[0]) and not _OTHER_NUMBER.search(before):
                yield found.span()

    return find


def addresses(text: str, countries: Sequence[str]) -> Iterator[Span]:
    """Yields postal addresses that have a street with a number, or a post office box."""
    spans = (
        found.span()
        for country, pattern in _ADDRESSES.items()
        if country in countries
        for found in pattern.finditer(text)
    )
    yield from sorted(spans, key=lambda span: span[0] - span[1])  # the longest counts


_APART = r"(?:[ \t]{0,3},[ \t]{0,3}|[ \t]{0,3}\n[ \t]{0,3}|[ \t]{1,3})"
_LINE = r"(?:[ ]{0,3},[ ]{0,3}|[ ]{0,3}\n[ ]{0,3})"
_UNIT = r"(?:(?:apt|apartment|unit|suite|ste|flat|floor|room|rm)\.?[ ]?#?[ ]?\w{1,5}|\#[ ]?\w{1,5})"
_STREET = (
    r"(?:street|st|avenue|ave|road|rd|boulevard|blvd|lane|ln|drive|dr|court|ct|parkway|pkwy|"
    r"highway|hwy|crescent|cres|gardens|gdns)"
)
_OTHER_STREET = (  # which are words of their own, too
    r"(?:Way|Place|Pl|Terrace|Ter|Circle|Cir|Trail|Trl|Loop|Close|Square|Sq|Row|Parade|Promenade|"
    r"Mews|Grove|Hill|Rise|Walk|Park|Green|View|Broadway|Quay|Wharf)"
)
_NO_STREET = (
    r"(?:across|along|the|in|an?|to|at|of|on|by|from|each|is|its|it|was|they|we|i|you|your|my|our|"
    r"another|days?|weeks?|months?|years?|hours?|mins?|minutes?|km|miles?|quid|nights?|kilos?|"
    r"euros?|pounds?|dollars?|times?|of|off|for|and|or|am|pm|items?|people|different|more|blocks?)"
)
_WORD = r"[A-ZÀ-Þ](?:[^\W\d_]|['’.](?=[^\W\d_])){1,30}(?!\w)"
_CITY = rf"{_WORD}(?:[ -](?:(?:upon|on|in|under|le|of|by|the)[ -])?{_WORD}){{0,3}}"
_STATES = (
    r"(?:A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|PA|RI|"
    r"S[CD]|T[NX]|UT|V[AT]|W[AIVY])"
)
_GERMAN = r"[A-ZÄÖÜ][a-zäöüß.]{1,30}"
_FLAT = r"(?:(?i:flat|apartment|unit)[ ]\w{1,4},?[ ])?"
_POSTCODE = r"[A-Z]{1,2}\d[A-Z\d]?[ ]?\d[A-Z]{2}"
_NUMBERED = (
    rf"\d{{1,6}}[a-zA-Z]?[ ](?:(?i:[NSEW]|north|south|east|west)\.?[ ])?"
    rf"(?:(?i:(?!{_NO_STREET}\b)[a-z0-9][\w'’-]{{0,30}}\.?[ ]){{1,3}}(?i:{_STREET})"
    rf"|(?:[A-Z0-9][\w.'’-]{{0,30}}[ ]){{1,3}}{_OTHER_STREET})\b"
)
_ADDRESSES = {
    "US": re.compile(
        rf"(?i:\bP\.?[ ]?O\.?[ ]?box[ ]\d+)(?:{_APART}{_CITY})?"
        rf"(?:{_APART}{_STATES}(?:{_APART}\d{{5}}(?:-\d{{4}})?)?)?"
        rf"|(?<![\w#$-]){_NUMBERED}(?:[ ](?:NW|NE|SW|SE|N|S|E|W)\b)?(?:{_APART}(?i:{_UNIT}))?"
        rf"(?:{_APART}(?:{_CITY}|(?i:[a-z.]+(?:[ ][a-z.]+){{0,2}}(?={_APART}{_STATES}\b)))"
        rf"{_APART}(?i:{_STATES})\b(?:{_APART}\d{{5}}(?:-\d{{4}})?)?"
        rf"|{_APART}\d{{5}}(?:-\d{{4}})?(?!\d)|,[ ]{_CITY})?"
    ),
    "GB": re.compile(
        rf"(?<![\w#£-]){_FLAT}{_NUMBERED}"
        rf"(?:{_LINE}{_CITY}){{0,3}}(?:{_APART}(?i:{_POSTCODE})\b)?"
        rf"|(?<![\w#£-]){_FLAT}"
        rf"\d{{1,4}}[a-z]?[ ](?:[A-Z][\w'’-]{{0,30}}[ ]?){{1,3}}"
        rf"(?:{_LINE}{_CITY}){{0,3}}{_APART}(?i:{_POSTCODE})\b"
    ),
    "DE": re.compile(
        rf"(?<![\w-])(?:(?:{_GERMAN}[ -]){{0,2}}[A-ZÄÖÜa-zäöü][a-zäöüß]{{0,30}}(?:straße|strasse|"
        r"str\.|str|weg|platz|allee|gasse|ring|damm|ufer|steige?|promenade|chaussee|stieg|graben|"
        r"wall|markt)"
        rf"|(?:{_GERMAN}[ -]){{1,3}}(?:Straße|Strasse|Str\.|Weg|Platz|Allee|Gasse|Ring|Damm|Ufer|"
        r"Promenade)"
        r"|(?:(?:Straße|Platz|Weg|Allee)[ ](?:der|des)|Am|An[ ]der|An[ ]den|Im|In[ ]der|Zum|Zur|"
        r"Auf[ ]de[mr]|Unter[ ]den|Hinter[ ]de[mr]|Alte[rn]?|Neue[rn]?)"
        rf"(?:[ -]{_GERMAN}){{1,3}})"
        r"[ ]\d{1,4}(?:[ ]?[a-hA-H]|-\d{1,3})?(?![\w%€-]|[.,]\d|[ ]?"
        r"(?:Uhr|Euro|EUR|Tage|Minuten|Stunden|Stück))"
        rf"(?:(?:[ ]{{0,3}}[,\n][ ]{{0,3}}(?:D-)?|[ ]in[ ]|[ ])\d{{5}}[ ]{_GERMAN}(?:-{_GERMAN})?"
        rf"(?:[ ](?:a\.[ ]?d\.[ ]?\w{{1,20}}|(?:am|bei|an[ ]der|im|ob[ ]der|in)[ ]{_GERMAN})"
        r"|[ ](?:Bad|Nord|Süd|Ost|West)\b)?)?"
    ),
}


NATIONAL_IDS: dict[str, dict[str, Recogniser]] = {
    "US": {"ssn": ssns},
    "GB": {"nino": of_form(_NINO), "nhs": nhs_numbers},
    "DE": {"steuer_id": numbers_of("de.idnr", r"[1-9]\d([ ]?)\d{3}\1\d{3}\1\d{3}")},
    "FR": {
        "nir": numbers_of("fr.nir", r"[12][ ]?\d\d[ ]?\d\d[ ]?\d[\dAB][ ]?\d{3}[ ]?\d{3}[ ]?\d\d")
    },
    "ES": {
        "dni": numbers_of("es.dni", r"\d{8}[ -]?[A-Z]"),
        "nie": numbers_of("es.nie", r"[XYZ][ -]?\d{7}[ -]?[A-Z]"),
    },
    "IT": {
        "codice_fiscale": numbers_of("it.codicefiscale", r"[A-Z]{6}\d\d[A-Z]\d\d[A-Z]\d{3}[A-Z]")
    },
    "NL": {"bsn": numbers_of("nl.bsn", r"\d{9}|\d{4}\.\d\d\.\d{3}")},
    "CA": {"sin": numbers_of("ca.sin", r"\d{3}([ -])\d{3}\1\d{3}")},
    "BR": {"cpf": numbers_of("br.cpf", r"\d{3}\.\d{3}\.\d{3}-\d\d")},
    "IN": {
        "aadhaar": numbers_of("in_.aadhaar", r"[2-9]\d{3}([ -]?)\d{4}\1\d{4}"),
        "pan": numbers_of("in_.pan", r"[A-Z]{5}\d{4}[A-Z]"),
    },
}
"""The numbers that countries give to people, by country (ISO 3166-1)."""

FIXED: dict[str, Recogniser] = {
    "url": urls,
    "email": of_form(_EMAIL),
    "iban": ibans,
    "card": cards,
    "ip": ips,
    "phone": phones,
    "address": addresses,
}
"""What is recognised in a text alone, in all countries."""

NAME = "name"
"""The kind of what people are called; see `names`."""

ID = "id"
"""The word for all national ids of the countries."""

KINDS = (*FIXED, ID, NAME)
"""The kinds that `--redact` takes."""

_ORDER = ("url", "email", "iban", "card", "id", "ip", "phone", "address")
"""Which of two kinds counts where both fit: the one whose form says more."""


@functools.cache
def recognisers(kinds: frozenset[str], countries: tuple[str, ...]) -> dict[str, Recogniser]:
    """Returns the recogniser of each kind by its name, in the order in which they count."""
    found: dict[str, Recogniser] = {}
    for kind in _ORDER:
        if kind not in kinds:
            continue
        if kind == ID:
            for country in countries:
                found |= NATIONAL_IDS.get(country, {})
        else:
            found[kind] = FIXED[kind]
    return found


_PLAIN = str.maketrans("\xa0\u2007\u2009\u202f\u2010\u2011\u2012\u2013\u2014\u2212", "    ------")
"""Blanks and dashes as typewriters have them; a text keeps its length."""

_NUMBER = re.compile(r"\d")
_WITHOUT_DIGITS = ("url", "email")


def find(text: str, kinds: frozenset[str], countries: tuple[str, ...]) -> list[Found]:
    """Returns what is found in a text, in its order; nothing of it overlaps."""
    text = text.translate(_PLAIN)
    has_digits = _NUMBER.search(text) is not None
    found = [
        Found(kind, start, end)
        for kind, recognise in recognisers(kinds, countries).items()
        if has_digits or kind in _WITHOUT_DIGITS
        for start, end in recognise(text, countries)
    ]
    return without_overlaps(text, found)


def without_overlaps(text: str, found: Iterable[Found]) -> list[Found]:
    """Returns what was found, in the order of the text.

    Where two overlap, the first one here counts; what it leaves of the other stays found.
    """
    kept: list[Found] = []
    for one in found:
        start = one.start
        at = bisect.bisect(kept, start, key=lambda other: other.start)
        if at and kept[at - 1].end > start:
            start = kept[at - 1].end
        while start < one.end:
            end = min(one.end, kept[at].start) if at < len(kept) else one.end
            if any(map(str.isalnum, text[start:end])):
                kept.insert(at, Found(one.kind, start, end))
                at += 1
            if at == len(kept):
                break
            start = max(start, kept[at].end)
            at += 1
    return kept
