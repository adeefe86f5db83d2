"""Chats, dead letters and log lines without personal data."""

import base64
import json
import logging
import re
import time

import pytest
from conftest import chat
from hypothesis import given, settings
from hypothesis import strategies as st

from chatflow import Chat, Message, UsageError
from chatflow.dead_letters import dead_letter
from chatflow.errors import BadInputError
from chatflow.options import RedactionSettings
from chatflow.records import Arrival
from chatflow.redaction.logs import redact_logs, stop_redacting
from chatflow.redaction.placeholders import fill, hide
from chatflow.redaction.redactor import Redactor


def redactor(redact="all", **flags):
    return Redactor.of(RedactionSettings(redact=redact, **flags))


def letter_of(element, error="broken"):
    return dead_letter("read", element, BadInputError("wrong_shape", error))


def test_the_same_thing_has_the_same_placeholder_in_a_chat():
    said = redactor().chat(
        chat(
            "I'm Ann Miller, ann@x.org, call (415) 555-2671",
            "Hi Ann, is it ann@x.org or bob@x.org?",
            "ANN@X.ORG, and 415-555-2671. Ann",
        )
    )
    assert [message.text for message in said.chat.messages] == [
        "I'm [NAME_1], [EMAIL_1], call [PHONE_1]",
        "Hi [NAME_2], is it [EMAIL_1] or [EMAIL_2]?",
        "[EMAIL_1], and [PHONE_1]. [NAME_2]",
    ]
    assert said.raw.placeholders == {
        "[NAME_1]": "Ann Miller", "[EMAIL_1]": "ann@x.org", "[PHONE_1]": "(415) 555-2671",
        "[NAME_2]": "Ann", "[EMAIL_2]": "bob@x.org",
    }  # fmt: skip
    assert said.counts == {"name": 3, "email": 4, "phone": 2}


def test_the_record_says_where_placeholders_stand():
    said = redactor("email").chat(chat("Hello", "write to a@x.org or b@x.org"))
    found = [(one.message, one.kind, one.start, one.end) for one in said.chat.redacted]
    text = said.chat.messages[1].text
    assert found == [(1, "email", 9, 18), (1, "email", 22, 31)]
    assert [text[start:end] for *_, start, end in found] == ["[EMAIL_1]", "[EMAIL_2]"]


def test_only_the_kinds_that_are_asked_for():
    text = "ann@x.org, 4111 1111 1111 1111, 203.0.113.7"
    said = redactor("card,ip").chat(chat(text)).chat.messages[0].text
    assert said == "ann@x.org, [CARD_1], [IP_1]"


def test_attributes_ids_and_originals_are_redacted_too():
    message = Message(
        user_id="ann@x.org", role="customer", text="late!", message_id="<17@mail.x.org>",
        original="<p>late!</p> ann@x.org", attributes={"mail": "ann@x.org", "sender_name": "Al Po"},
    )  # fmt: skip
    given_ = Chat(
        chat_id="+49 170 1234567", user_id="ann@x.org", messages=(message,),
        attributes={"customer_name": "Ann Miller", "source_url": "https://x.org/t/7"},
    )  # fmt: skip
    said = redactor().chat(given_).chat
    (only,) = said.messages
    assert re.fullmatch("phone-[0-9a-f]{16}", said.chat_id)
    assert re.fullmatch("email-[0-9a-f]{16}", only.user_id)
    assert said.user_id == only.user_id == redactor().chat(given_).chat.user_id
    assert only.original == "<p>late!</p> [EMAIL_1]"
    assert only.attributes == {"mail": "[EMAIL_1]", "sender_name": "[NAME_1]"}
    assert said.attributes == {"customer_name": "[NAME_2]", "source_url": "https://x.org/t/7"}


def test_names_of_a_messenger_are_ids(monkeypatch):
    messages = (
        Message(user_id="Ann Miller", role="customer", text="where is it?"),
        Message(user_id="Support", role="agent", text="Ann, it left. Miller is on the label."),
    )
    said = redactor().chat(Chat(chat_id="WhatsApp Chat with Ann Miller", messages=messages)).chat
    assert "Ann" not in said.to_json()
    assert "Miller" not in said.to_json()
    assert said.messages[1].user_id == "Support"
    monkeypatch.setenv("KEY", "secret")
    keyed = redactor(redact_key="env:KEY").chat(Chat(chat_id="1", messages=messages)).chat
    assert keyed.messages[0].user_id != said.messages[0].user_id


def test_ids_that_are_numbers_stay():
    message = Message(user_id="4155552671", message_id="1700000000.000100", text="late")
    said = redactor().chat(Chat(chat_id="4111111111111111", messages=(message,))).chat
    assert (said.chat_id, said.messages[0].user_id) == ("4111111111111111", "4155552671")
    assert said.messages[0].message_id == "1700000000.000100"


def test_patterns_of_the_users_own(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text("contract = 'C-\\d{6}'\n")
    own = redactor("email", redact_patterns=str(path))
    assert own.chat(chat("C-123456, a@x.org")).chat.messages[0].text == "[CONTRACT_1], [EMAIL_1]"


def test_what_was_redacted_before_keeps_its_placeholders():
    before = redactor("email").chat(chat("a@x.org wrote", "hello")).chat
    more = Message(user_id="c", role="customer", text="new: b@x.org")
    again = before.model_copy(update={"messages": (*before.messages, more)})
    said = redactor("email").chat(again)
    assert [m.text for m in said.chat.messages] == ["[EMAIL_1] wrote", "hello", "new: [EMAIL_2]"]
    assert [one.message for one in said.chat.redacted] == [0, 2]
    assert said.raw is None  # the raw chat is not this one


def test_what_somebody_writes_like_a_placeholder_stays_what_it_is():
    said = redactor("email").chat(
        chat("[EMAIL_1] is what your mail says, and [EMAIL_999999999]", "a@x.org")
    )
    assert said.chat.messages[1].text == "[EMAIL_2]"
    assert [one.message for one in said.chat.redacted] == [1]
    assert fill(said.chat.messages[0].text, said.raw.placeholders) == said.raw.chat.messages[0].text


@given(
    st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), max_size=3),
    st.sampled_from([str.upper, str.lower, str.title, str.swapcase]),
)
@settings(deadline=None, max_examples=200)
def test_names_of_any_letters_in_any_case(names, cased):
    for name in ("İrem", "Işık", "Straße", *names):
        texts = (f"Hi {name}, thanks", f"my name is {name}", cased(name), f"IŞIK irem {name}'s")
        redactor("name").chat(chat(*texts, attributes={"customer_name": name}))


def test_names_that_are_words_are_names_where_they_end():
    said = redactor("name").chat(
        chat("Hi Will, it is Mark", "Will you come? Mark my words. Will, hurry!")
    )
    assert said.chat.messages[1].text == "Will you come? Mark my words. [NAME_1], hurry!"


def test_fields_that_are_not_of_persons_stay():
    fields = {"product_name": "Premium Basic", "queue.name": "Returns", "user.name": "Ann Po"}
    said = redactor("name").chat(chat("Premium was better", attributes=fields)).chat
    assert said.attributes == {**fields, "user.name": "[NAME_1]"}
    assert said.messages[0].text == "Premium was better"


def test_ids_are_the_same_whatever_a_chat_says():
    first, second = (chat(text, chat_id="chat Ann-7") for text in ("hello", "I am Ann, hello"))
    assert redactor().chat(first).chat.chat_id == redactor().chat(second).chat.chat_id
    hashed = redactor().chat(chat("hello", chat_id="Ann@x.org")).chat
    assert redactor().chat(hashed).chat.chat_id == hashed.chat_id
    assert redactor().chat(chat("hello", chat_id="ann@x.org")).chat.chat_id != hashed.chat_id


SPELLINGS = [
    "_ann@x.org_", "...ann@x.org", "ann@x.org-", "ANN@X.ORG-1", "ann%40x.org", "ann&#64;x.org",
    "4111\xa01111\xa01111\xa01111", "4111.1111.1111.1111", "4111–1111–1111–1111",
    "4111__1111-1111  1111",
    "number:4111111111111111.50", "DE89\xa03704\xa00044\xa00532\xa00130\xa000",
    "IBANDE89370400440532013000",
    "SSN536-22-8726", "536.22.8726", "536\u201122\u20118726",
]  # fmt: skip


@pytest.mark.parametrize("text", SPELLINGS)
def test_spellings(text):
    said = redactor().chat(chat(f"it is {text} ok")).chat.messages[0].text
    assert re.search(r"\[(EMAIL|CARD|IBAN|SSN)_1\]", said), said
    assert not re.search(r"ann|ANN|1111|0532|8726", said), said


HOSTILE = [
    "Aa-", "a", "A", "\n", " ", "A ", "1", "1 ", "1-", "a.", "a@", "@", "- ", "A'", "J. ", "Dear ",
    "12 A ", "Hi A", "x\n", "my name is ", "regards\n", "é", "[", "1.", ":", "a:", "http://", "%40",
    "0 ",
]  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_no_text_takes_long(piece):
    """Four times the text takes about four times the processor, not sixteen times."""
    redact = redactor(redact_countries="US,GB,DE,FR,ES,IT,NL,CA,BR,IN")

    def seconds(length):
        text = piece * (length // len(piece))
        began = time.process_time()
        redact.chat(chat(text))
        redact.line(text)
        return time.process_time() - began

    seconds(100)
    assert seconds(16_000) < 10 * max(seconds(4_000), 0.02)


SECRETS = st.sampled_from(
    ["ann@example.org", "4111 1111 1111 1111", "DE89 3704 0044 0532 0130 00", "203.0.113.7"]
)


@given(st.lists(st.tuples(st.text(st.characters(codec="utf-8"), max_size=20), SECRETS), max_size=6))
@settings(deadline=None, max_examples=50)
def test_a_redacted_chat_is_filled_in_again(parts):
    text = " | ".join(f"{before} {secret} " for before, secret in parts) or "hello"
    said = redactor("email,card,iban,ip").chat(chat(text))
    hidden = said.chat.messages[0].text
    assert not any(secret in hidden for _, secret in parts)
    assert fill(hidden, said.raw.placeholders) == text


def test_what_people_type_is_hidden_again():
    values = {"[NAME_1]": "Ann Miller", "[EMAIL_1]": "ann@x.org"}
    typed = "Dear Ann Miller, we wrote to ann@x.org."
    assert hide(typed, values) == "Dear [NAME_1], we wrote to [EMAIL_1]."
    assert fill(hide(typed, values), values) == typed


# Dead letters.

LINES = {
    "text": b"hello, I am ann@x.org",
    "json": b'{"chat_id": "7", "text": "mail ann@x.org", "sent_at": "2026-03-01T10:00:00Z"}',
    "nested": b'{"messages": [{"body": {"html": "<b>ann@x.org</b>"}}]}',
    "number": b'{"text": 4111111111111111, "at": 1772359202000}',
    "latin-1": "caf\xe9 ann@x.org".encode("latin-1"),
    "utf-16": "ann@x.org".encode("utf-16"),
    "id": b'{"chat_id": "ann@x.org"}',
    "list": b'["ann@x.org"]',
    "cut": b'{"text": "my card\\n4111111111111111 or\\nann@x.org',
    "escaped": b'{"text": "ann\\u0040x.org',
    "surrogate": b'{"text": "ann@x.org \\ud800"}',
    "deep": b"[" * 100_000 + b"ann@x.org",
    "deep and whole": b"[" * 900 + b'"ann@x.org"' + b"]" * 900,
    "twice": b'{"text": "ann@x.org", "a": 1, "a": 2}',
    "large": b'{"text": "ann@x.org", "n": 1e400}',
    "letter": json.dumps(
        {"payload": base64.b64encode(b"I am ann@x.org").decode(), "payload_encoding": "base64"}
    ).encode(),
}


@pytest.mark.parametrize("name", LINES)
def test_a_dead_letter_has_no_personal_data(name):
    letter = letter_of(Arrival(LINES[name], {"from": "ann@x.org"}), "ann@x.org is wrong")
    hidden = redactor().letter(letter)
    payload = hidden.payload_bytes().replace(b"\0", b"")
    inner = json.loads(payload)["payload"] if name == "letter" else ""
    for text in (hidden.to_json().encode(), payload, base64.b64decode(inner)):
        assert b"ann@x.org" not in text
        assert b"4111111111111111" not in text
    assert (hidden.stage, hidden.reason) == ("read", "wrong_shape")
    if name in ("json", "nested", "number"):
        assert isinstance(json.loads(payload), dict)
    if name == "number":
        assert json.loads(payload)["at"] == 1772359202000
    if name == "twice":
        assert payload.endswith(b'"a": 1, "a": 2}')
    if name == "json":
        assert json.loads(payload)["sent_at"] == "2026-03-01T10:00:00Z"


def test_a_letter_without_personal_data_stays_as_it_is():
    letter = letter_of(Arrival(b'{"chat_id":"7",  "text":"late"}'))
    assert redactor().letter(letter) == letter


def test_bytes_that_are_no_text_stay_bytes():
    content = bytes(range(256))
    letter = letter_of(Arrival(content))
    assert base64.b64decode(redactor("email").letter(letter).payload) == content


def test_a_letter_names_its_file_still():
    letter = letter_of(Arrival(b"x"), "of ann@x.org").model_copy(
        update={"payload": "chats/ann@x.org.jsonl#0-", "payload_encoding": "file"}
    )
    hidden = redactor().letter(letter)
    assert (hidden.payload, hidden.error) == ("chats/ann@x.org.jsonl#0-", "of [EMAIL_1]")


def test_what_cannot_be_redacted_is_withheld(monkeypatch):
    def broken(*_):
        raise RuntimeError("ann@x.org")

    monkeypatch.setattr(Redactor, "find", broken)
    hidden = redactor().letter(letter_of(Arrival(b"ann@x.org", {"a": "ann@x.org"})))
    assert "ann@x.org" not in hidden.to_json()
    assert hidden.error == "withheld: it cannot be redacted"


# Logs.


def test_log_lines_and_tracebacks_have_no_personal_data(caplog):
    log = logging.getLogger("chatflow.test")
    redact_logs(redactor().line)
    try:
        log.warning("of %s: %d", "ann@x.org", 3)
        try:
            raise ValueError("4111 1111 1111 1111 is wrong")
        except ValueError:
            log.exception("failed")
        log.warning("%d%% done", 3)
    finally:
        stop_redacting()
    log.warning("after: ann@x.org")
    assert "of [EMAIL_1]: 3" in caplog.text
    assert "ValueError: [CARD_1] is wrong" in caplog.text
    assert "3% done" in caplog.text
    assert caplog.text.count("ann@x.org") == 1


# Flags.


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"redact": "mail"}, "--redact: 'mail' is not known; known are all, url, email"),
        ({"redact": "all", "redact_countries": "Germany"}, "'GERMANY' must be two letters, as US"),
        ({"redact": "id", "redact_countries": "AQ"}, "no national ids of these are known"),
        ({"keep_raw": "x"}, "--keep_raw: only with --redact"),
        ({"redact": "all", "redact_patterns": "nowhere.toml"}, "nowhere.toml: cannot be read"),
        ({"redact": "all", "redact_key": "hunter2"}, "--redact_key: must be env:NAME"),
        ({"redact": "dlp:email"}, "--redact=dlp:email: must be dlp:projects/"),
        ({"redact": "dlp:EMAIL_ADDRESS"}, "--redact=dlp:…: give --project"),
    ],
)
def test_mistakes_in_flags(flags, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        redactor(**{"redact": "", **flags})


@pytest.mark.parametrize("content", ["a = ", "a = '('", "A = 'x'", "a = 1"])
def test_mistakes_in_patterns(tmp_path, content):
    path = tmp_path / "own.toml"
    path.write_text(content)
    with pytest.raises(UsageError, match="--redact_patterns="):
        redactor("all", redact_patterns=str(path))


def test_other_countries():
    texts = {
        "FR": "1 85 05 78 006 084 91", "ES": "54362315K", "IT": "RCCMNL83S18D969H",
        "NL": "1112.22.333", "CA": "123-456-782", "BR": "390.533.447-05", "IN": "2341 2341 2346",
    }  # fmt: skip
    for country, text in texts.items():
        only = redactor("id", redact_countries=country).chat(chat(f"it is {text}, ok"))
        assert only.counts.total() == 1, country
        assert text not in only.chat.messages[0].text
