"""What other systems write: lenient in what does not matter, strict in ids and words."""

import json
from collections import Counter
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatflow.errors import BadInputError, UsageError
from chatflow.records import Chat, Message, load_object
from chatflow.sources.chats import customs_of, read_chat

TEN = datetime(2026, 3, 1, 10, tzinfo=UTC)


def line(**fields):
    chat = {"chat_id": "7", "messages": [{"user_id": "1", "text": "hi"}], **fields}
    return json.dumps(chat).encode()


def read(*messages, customs=customs_of("", ""), **fields):
    """A chat of messages with an author and a text, and what was mended or left out."""
    counts = Counter()
    whole = [
        {"user_id": "c", "role": "customer", "text": "late", **message} for message in messages
    ]
    chat = read_chat({"chat_id": "7", "messages": whole, **fields}, customs, counts)
    return chat, {name.removeprefix("input/"): count for name, count in counts.items()}


@pytest.mark.parametrize(
    ("raw", "reason", "says"),
    [
        (b"not json", "not_json", "not JSON"),
        (b'{"chat_id": "7"', "not_json", "not JSON"),
        (b'{"a": NaN}', "not_json", "not JSON"),
        (b'{"a": "\\ud800"}', "not_json", "not JSON"),
        (b"[" * 100_000, "not_json", "not JSON"),
        (b'{"chat_id": "\xff"}', "not_utf8", "not UTF-8"),
        (b'[{"chat_id": "7"}]', "not_an_object", "list"),
        (b"7", "not_an_object", "int"),
        (line(messages=[]), "no_messages", "chat 7"),
        (line(messages="hi"), "wrong_shape", "messages: a list is needed, found a string"),
        (line(messages=["hi"]), "wrong_shape", "messages.0: an object is needed, found a string"),
        (line(messages=[{"text": "x"}]), "wrong_shape", "messages.0.user_id"),
        (line(messages=[{"user_id": "1", "text": ["x"]}]), "wrong_shape", "messages.0.text"),
        (line(messages=[{"user_id": True, "text": "x"}]), "wrong_shape", "user_id"),
        (line(revision=5).replace(b"5", b"5" * 5000), "not_json", "not JSON"),
        (line(chat_id=""), "wrong_shape", "chat_id"),
        (line(chat_id=None), "wrong_shape", "chat_id"),
        (line(messages=[{"user_id": "1", "text": " \n"}]), "no_text", "chat 7"),
        (line(user_id="2"), "no_customer", "user 2"),
        (line(messages=[{"user_id": "1", "text": "x", "role": "bot"}]), "no_customer", "bot"),
        (line(messages=[{"user_id": "1", "text": "x", "role": "boss"}]), "no_customer", "--roles"),
    ],
)  # fmt: skip
def test_a_bad_line_says_what_is_wrong(raw, reason, says):
    with pytest.raises(BadInputError) as caught:
        read_chat(load_object(raw))
    assert caught.value.reason == reason
    assert says in str(caught.value)


def test_integer_ids_become_strings_and_unknown_fields_are_ignored():
    raw = line(chat_id=4116, messages=[{"user_id": 221.0, "text": "hi", "mood": 1}], flow="x")
    chat = read_chat(load_object(raw))
    assert (chat.chat_id, chat.messages[0].user_id) == ("4116", "221")


def test_a_byte_order_mark_and_a_carriage_return_are_taken():
    assert read_chat(load_object(b"\xef\xbb\xbf" + line() + b"\r")).chat_id == "7"


def test_empty_messages_and_repeated_message_ids_are_left_out_and_counted():
    chat, counts = read(
        {"text": "one", "message_id": 1},
        {"text": "   ", "message_id": 2},
        {"text": None},
        {"text": "one again", "message_id": "1"},
        {"text": "no id"},
        {"text": "no id"},
    )
    assert [m.text for m in chat.messages] == ["one", "no id", "no id"]
    assert counts == {"empty_messages": 2, "duplicate_messages": 1}
    with_null = {"chat_id": "7", "messages": [None, {"user_id": "c", "text": "late"}]}
    assert len(read_chat(with_null).messages) == 1


SIDE = ("message_id", "sent_at", "attributes", "role", "original", "private", "type", "mood")
jsons = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(SIDE), jsons), st.dictionaries(
    st.sampled_from(("user_id", "attributes", "revision", "language")), jsons
))  # fmt: skip
def test_no_value_of_a_side_field_costs_the_chat(of_message, of_chat):
    said = {"user_id": "c", "role": "customer", "text": "It is late."}
    if isinstance(of_chat.get("user_id"), (str, int, float)):
        of_chat["user_id"] = "c"  # another user wrote nothing
    whole = {"chat_id": "7", "messages": [{**said, "text": "And?", **of_message}, said], **of_chat}
    chat = read_chat(whole)
    assert "It is late." in [m.text for m in chat.messages]
    assert read_chat(load_object(chat.to_json().encode())) == chat


@given(jsons, jsons, jsons, jsons)
def test_any_value_of_any_field_is_a_chat_or_a_clear_error(chat_id, messages, user_id, text):
    one = {"user_id": user_id, "text": text}
    for listed in (messages, [messages], [one, messages], [one]):
        try:
            found = read_chat({"chat_id": chat_id, "messages": listed}).chat_id
        except BadInputError as error:
            found = error.reason
        assert found


@given(st.binary())
def test_any_bytes_are_a_chat_or_a_clear_error(raw):
    try:
        found = read_chat(load_object(raw)).chat_id
    except BadInputError as error:
        found = error.reason
    assert found


@pytest.mark.parametrize(
    ("field", "value", "found", "counted"),
    [
        ("attributes", {"n": 5, "b": True, "x": None, "l": [1]},
         {"n": "5", "b": "true", "l": "[1]"}, {"fields_coerced": 3}),
        ("attributes", [], {}, {"fields_dropped": 1}),
        ("attributes", None, {}, {}),
        ("message_id", "", None, {}),
        ("message_id", {}, None, {"fields_dropped": 1}),
        ("message_id", 7.0, "7", {}),
        ("role", 5, "5", {"unknown_roles": 1}),
        ("role", "", None, {}),
        ("role", ["x"], None, {"fields_dropped": 1}),
        ("sent_at", "", None, {}),
        ("sent_at", "soon", None, {"fields_dropped": 1}),
        ("sent_at", "0001-01-01T00:00:00+02:00", None, {"fields_dropped": 1}),
        ("sent_at", "9999-12-31T23:59:59-02:00", None, {"fields_dropped": 1}),
        ("sent_at", "1970-01-01T00:00:00Z", None, {"fields_dropped": 1}),
        ("sent_at", 10**400, None, {"fields_dropped": 1}),
        ("sent_at", "2026-03-01T11:00:00+01:00", TEN, {}),
        ("sent_at", int(TEN.timestamp()), TEN, {}),
        ("sent_at", str(int(TEN.timestamp())), TEN, {}),
        ("sent_at", int(TEN.timestamp()) * 1_000, TEN, {}),
        ("sent_at", int(TEN.timestamp()) * 1_000_000, TEN, {}),
        ("sent_at", int(TEN.timestamp()) * 1_000_000_000, TEN, {}),
        ("text", 42, "42", {"fields_coerced": 1}),
    ],
)  # fmt: skip
def test_side_fields_are_mended_or_left_out(field, value, found, counted):
    chat, counts = read({}, {field: value}, user_id="c")
    assert getattr(chat.messages[1], field) == found
    assert counts == counted


def test_fields_of_a_chat_that_cannot_be_are_left_out():
    for name, value in (("user_id", ""), ("user_id", {}), ("attributes", "x"), ("revision", -1),
                        ("revision", 2**63), ("revision", "new")):  # fmt: skip
        chat, _ = read({}, **{name: value})
        assert (chat.user_id, chat.attributes, chat.revision) == (None, {}, 1)
    assert read({}, revision="12")[0].revision == 12
    assert read({}, revision=0)[0].revision == 0


def test_a_message_without_an_author_is_its_roles():
    chat, _ = read({"user_id": None}, {"user_id": "", "role": "AGENT"})
    assert [m.user_id for m in chat.messages] == ["customer", "agent"]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("CUSTOMER", "customer"), ("END_USER", "customer"), ("End-User", "customer"),
        ("visitor", "customer"), ("user", "customer"), ("assistant", "bot"),
        ("AUTOMATED_AGENT", "bot"), (" Operator ", "agent"), ("admin", "agent"),
        ("System", "system"), ("Wizard", "Wizard"),
    ],
)  # fmt: skip
def test_roles_of_other_systems(theirs, ours):
    chat, counts = read({}, {"role": theirs})
    assert chat.messages[1].role == ours
    assert counts.get("unknown_roles", 0) == (ours == "Wizard")


def test_users_add_roles_and_placeholders(tmp_path):
    texts = tmp_path / "placeholders.txt"
    texts.write_text("Poruka je izbrisana\n\n")
    customs = customs_of("Wizard=agent, kupac=customer", str(texts))
    chat, counts = read(
        {"role": "KUPAC"}, {"role": "wizard"}, {"role": "kupac", "text": "poruka je izbrisana."},
        customs=customs,
    )  # fmt: skip
    assert [m.role for m in chat.messages] == ["customer", "agent", "customer"]
    assert [m.text for m in chat.said] == ["late", "late"]
    assert counts == {"placeholders": 1}


@pytest.mark.parametrize(
    ("roles", "placeholders", "says"),
    [
        ("boss", "", "--roles: 'boss' must be THEIRS=OURS"),
        ("boss=chief", "", "OURS one of customer, agent, bot, system"),
        ("", "/none.txt", "--placeholders: '/none.txt' cannot be read"),
    ],
)
def test_wrong_customs_are_said(roles, placeholders, says):
    with pytest.raises(UsageError, match=says):
        customs_of(roles, placeholders)


@pytest.mark.parametrize(
    "fields",
    [
        {"private": True}, {"private": "true"}, {"private": 1}, {"public": False},
        {"public": "false"}, {"is_internal": True}, {"isPrivate": True}, {"part_type": "note"},
        {"type": "internal_note"}, {"visibility": "internal"}, {"role": "note"},
        {"attributes": {"private": "true"}}, {"attributes": {"public": False}},
    ],
)  # fmt: skip
def test_private_notes_are_kept_and_not_said(fields):
    chat, counts = read({}, {"role": "agent", "text": "a fraudster", **fields})
    assert [m.text for m in chat.messages] == ["late", "a fraudster"]
    assert [m.text for m in chat.said] == ["late"]
    assert counts["private_notes"] == 1
    assert read_chat(load_object(chat.to_json().encode())) == chat


@pytest.mark.parametrize(
    "fields", [{"private": False}, {"public": True}, {"private": None}, {"type": "message"}]
)
def test_other_messages_are_said(fields):
    assert len(read({}, fields)[0].said) == 2


@pytest.mark.parametrize(
    "fields", [{"role": "system"}, {"message_type": 2}, {"type": "event"}, {"subtype": "activity"}]
)
def test_system_messages_are_kept_and_not_said(fields):
    chat, counts = read({}, {"text": "Dana joined the chat", "role": "agent", **fields})
    assert (len(chat.messages), len(chat.said), counts["system_messages"]) == (2, 1, 1)
    assert chat.messages[1].role == "system"


def at(second, **fields):
    return {"sent_at": f"2026-03-01T10:00:{second:02}Z", "text": str(second), **fields}


def test_messages_are_in_the_order_of_time():
    chat, counts = read(at(9), at(5, role="agent"), at(1))
    assert [m.text for m in chat.messages] == ["1", "5", "9"]
    assert counts == {"chats_sorted": 1}
    chat, counts = read({"text": "first"}, at(1), {"text": "after 1"}, at(2))
    assert [m.text for m in chat.messages] == ["first", "1", "after 1", "2"]
    assert counts == {}


def test_the_revision_follows_from_the_content():
    """As `AssembleChats` numbers the same messages."""
    short, longer = read(at(1), at(2))[0], read(at(1), at(2), at(3))[0]
    assert short.revision == int(TEN.timestamp() * 1000) + 2000 + 2
    assert short.revision < longer.revision
    late = read(at(1), at(0), at(2))[0]
    assert short.revision < late.revision < longer.revision
    assert read({}, {})[0].revision == 2 < read({}, {}, {})[0].revision


@given(st.lists(st.tuples(st.sampled_from("ab"), st.text(min_size=1, max_size=3)), min_size=1))
def test_other_content_has_another_hash(said):
    chat = Chat(chat_id="7", messages=[Message(user_id=u, text=t) for u, t in said])
    longer = chat.model_copy(update={"messages": (*chat.messages, chat.messages[0])})
    other = chat.model_copy(
        update={
            "messages": (chat.messages[0].model_copy(update={"text": "other"}), *chat.messages[1:])
        }
    )
    assert chat.content() == Chat.model_validate_json(chat.to_json()).content()
    assert len({chat.content(), longer.content(), other.content()}) == 3
