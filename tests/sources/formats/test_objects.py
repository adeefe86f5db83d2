"""JSON of other systems: each in the structure that its maker documents, with its traps."""

import contextlib
import json
import zipfile
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from conftest import read
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatflow.errors import BadInputError, UsageError
from chatflow.options import NO_CLOUD, Options
from chatflow.pipeline import plan
from chatflow.records import Arrival, Chat, Message, Range
from chatflow.running.launch import execute
from chatflow.sources.formats import FORMATS, as_ours, cx_insights
from chatflow.sources.formats.objects import described
from chatflow.sources.lines import read_lines, root_of
from chatflow.sources.parse import parse_arrival
from chatflow.sources.read import check_input, files_of

CX_INSIGHTS = {
    "conversation_info": {"categories": [{"display_name": "Billing"}]},
    "entries": [
        {"text": "Hello, how can I help?", "role": "AUTOMATED_AGENT", "user_id": 2,
         "start_timestamp_usec": 1_700_000_000_000_000},
        {"text": "My bill is wrong!", "role": "CUSTOMER", "user_id": 1,
         "start_timestamp_usec": 1_700_000_060_000_000},
        {"text": "Let me look.", "role": "AGENT", "user_id": 3, "start_timestamp_usec": 1_000_000},
    ],
}  # fmt: skip

CONTACT_LENS = {
    "Version": "1.1.0", "Channel": "CHAT", "LanguageCode": "en-US",
    "CustomerMetadata": {"ContactId": "c-1", "InstanceId": "i"},
    "Participants": [
        {"ParticipantId": "p1", "ParticipantRole": "CUSTOMER"},
        {"ParticipantId": "p2", "ParticipantRole": "AGENT", "DisplayName": "Dana"},
    ],
    "ConversationCharacteristics": {"Sentiment": {"OverallSentiment": {"CUSTOMER": -3.1}}},
    "Transcript": [
        {"Id": "1", "ParticipantId": "p1", "Type": "MESSAGE", "ContentType": "text/plain",
         "AbsoluteTime": "2026-03-01T10:00:00Z", "Content": "My bill is wrong!"},
        {"Id": "2", "ParticipantRole": "SYSTEM", "ParticipantId": "s", "Type": "EVENT",
         "ContentType": "application/vnd.amazonaws.connect.event.participant.joined",
         "AbsoluteTime": "2026-03-01T10:01:00Z"},
        {"Id": "3", "ParticipantId": "p2", "Type": "MESSAGE", "ContentType": "text/markdown",
         "AbsoluteTime": "2026-03-01T10:02:00Z", "Content": "Let me look."},
        {"Id": "4", "ParticipantId": "p1", "Type": "ATTACHMENT"},
    ],
}  # fmt: skip

GENESYS = {
    "organizationId": "o", "conversationId": "c-1", "communicationId": "m-1", "mediaType": "call",
    "transcripts": [
        {"transcriptId": "t2", "language": "en-us", "phrases": [
            {"phraseIndex": 0, "participantPurpose": "internal", "text": "let me look",
             "decoratedText": "Let me look.", "startTimeMs": 1_772_359_260_000},
            {"phraseIndex": 1, "participantPurpose": "acd", "text": "Dana was assigned",
             "startTimeMs": 1_772_359_210_000},
        ]},
        {"transcriptId": "t1", "language": "en-us", "phrases": [
            {"phraseIndex": 0, "participantPurpose": "external", "text": "my bill is wrong",
             "decoratedText": "My bill is wrong!", "startTimeMs": 1_772_359_200_000,
             "offset": {"milliseconds": 0}, "words": [{"word": "my"}]},
        ]},
    ],
}  # fmt: skip

ZENDESK = {
    "tickets": [
        {"id": 35, "subject": "Bill", "description": "My bill is wrong!", "requester_id": 1,
         "status": "open", "tags": ["vip", "bill"], "url": "https://x.zendesk.com/35.json",
         "created_at": "2026-03-01T10:00:00Z",
         "comments": [
             {"id": 1, "author_id": 1, "body": "My bill is wrong!", "public": True,
              "html_body": "<p>My bill is wrong!</p>", "created_at": "2026-03-01T10:00:00Z"},
             {"id": 2, "author_id": 9, "body": "A difficult one", "public": False,
              "created_at": "2026-03-01T10:01:00Z"},
             {"id": 3, "author_id": 9, "plain_body": "Let me look.", "public": True,
              "created_at": "2026-03-01T10:02:00Z"},
         ]},
        {"id": 36, "subject": "Thanks", "description": "All is well.", "requester_id": 2,
         "created_at": "2026-03-01T11:00:00Z"},
    ],
    "users": [{"id": 1, "role": "end-user"}, {"id": 9, "role": "admin"}],
    "end_of_stream": True,
}  # fmt: skip

INTERCOM = {
    "type": "conversation", "id": "77", "created_at": 1_772_359_200, "state": "closed",
    "source": {"type": "email", "id": "403", "subject": "Bill", "body": "<p>My bill is wrong!</p>",
               "author": {"type": "user", "id": "u1", "name": "Ann"}},
    "conversation_parts": {"total_count": 4, "conversation_parts": [
        {"id": "1", "part_type": "note", "body": "<p>A difficult one</p>",
         "created_at": 1_772_359_260, "author": {"type": "admin", "id": "a1"}},
        {"id": "2", "part_type": "comment", "body": "<p>Let me look.</p>",
         "created_at": 1_772_359_320, "author": {"type": "admin", "id": "a1"}},
        {"id": "3", "part_type": "assignment", "body": None,
         "created_at": 1_772_359_330, "author": {"type": "bot", "id": "b1"}},
        {"id": "4", "part_type": "comment", "body": "<p>I am Fin.</p>",
         "created_at": 1_772_359_340,
         "author": {"type": "admin", "id": "a2", "from_ai_agent": True}},
    ]},
    "conversation_rating": {"rating": 1},
}  # fmt: skip

CHATWOOT = {
    "id": 5, "status": "open", "meta": {"channel": "Channel::WebWidget"},
    "messages": [
        {"id": 1, "content": "My bill is wrong!", "message_type": 0, "created_at": 1_772_359_200,
         "private": False, "sender": {"id": 3, "type": "contact"}},
        {"id": 2, "content": "Dana was assigned", "message_type": 2, "created_at": 1_772_359_210},
        {"id": 3, "content": "A difficult one", "message_type": 1, "created_at": 1_772_359_220,
         "private": True, "sender": {"id": 3, "type": "user"}},
        {"id": 4, "content": "Let me look.", "message_type": 1, "created_at": 1_772_359_230,
         "private": False, "sender": {"id": 3, "type": "user"}},
    ],
}  # fmt: skip

TELEGRAM = {
    "name": "Ann", "type": "personal_chat", "id": 4242,
    "messages": [
        {"id": 1, "type": "service", "date_unixtime": "1772359200", "actor": "Ann",
         "actor_id": "user1", "action": "joined_telegram", "text": ""},
        {"id": 2, "type": "message", "date_unixtime": "1772359260", "from": "Ann",
         "from_id": "user1", "text": ["My bill is ", {"type": "bold", "text": "wrong!"}]},
        {"id": 3, "type": "message", "date_unixtime": "1772359320", "from": None,
         "from_id": "user9", "text": "Let me look."},
    ],
}  # fmt: skip

OPENAI = {
    "messages": [
        {"role": "system", "content": "You are a helpful agent."},
        {"role": "user", "content": [{"type": "text", "text": "My bill is wrong!"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "t", "type": "function"}]},
        {"role": "tool", "content": "{}", "tool_call_id": "t"},
        {"role": "assistant", "content": "Let me look."},
    ]
}

SHAREGPT = {
    "id": "s1",
    "conversations": [
        {"from": "system", "value": "You are a helpful agent."},
        {"from": "human", "value": "My bill is wrong!"},
        {"from": "gpt", "value": "Let me look."},
    ],
}

SAMPLES = {
    "cx_insights": CX_INSIGHTS, "contact_lens": CONTACT_LENS, "genesys": GENESYS,
    "zendesk": ZENDESK, "intercom": INTERCOM, "chatwoot": CHATWOOT, "telegram": TELEGRAM,
    "openai": OPENAI, "sharegpt": SHAREGPT,
}  # fmt: skip


def chats_of(value, name=""):
    counts = Counter()
    found = parse_arrival(Arrival(json.dumps(value).encode(), name=name), timedelta(1),
                          counts=counts)  # fmt: skip
    return found, counts


def test_every_format_has_a_sample():
    assert {*SAMPLES} == {*FORMATS}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_chat_says_what_its_customer_and_staff_said(name):
    """Notes and system lines are kept, marked, and are in no prompt."""
    assert [key for key, known in FORMATS.items() if known.fits(SAMPLES[name])][:1] == [name]
    (chat, *_), counts = chats_of(SAMPLES[name], "export-7")
    assert isinstance(chat, Chat)
    said = [message.text for message in chat.said]
    assert said[:1] == (["Hello, how can I help?"] if name == "cx_insights" else said[:1])
    assert "My bill is wrong!" in said
    assert "Let me look." in said
    assert not {"A difficult one", "You are a helpful agent.", "Dana was assigned"} & {*said}
    (customer,) = chat.users()
    assert chat.texts_of(customer) == ["My bill is wrong!"]
    assert counts[f"formats/{name}"] >= 1


@pytest.mark.parametrize(
    ("name", "chat_id", "attributes"),
    [
        ("cx_insights", "export-7", {"categories": "Billing"}),
        ("contact_lens", "c-1",
         {"language": "en", "channel": "CHAT", "contact_lens_sentiment": "-3.1"}),
        ("genesys", "c-1-m-1", {"channel": "call", "conversation": "c-1", "language": "en"}),
        ("zendesk", "35", {"source_url": "https://x.zendesk.com/35.json", "subject": "Bill",
                           "status": "open", "tags": "vip, bill"}),
        ("intercom", "77", {"subject": "Bill", "channel": "email", "state": "closed",
                            "rating": "1"}),
        ("chatwoot", "5", {"status": "open", "channel": "Channel::WebWidget"}),
        ("telegram", "4242", {"name": "Ann", "channel": "telegram"}),
        ("sharegpt", "s1", {}),
    ],
)  # fmt: skip
def test_ids_and_what_else_is_known_are_kept(name, chat_id, attributes):
    (chat, *_), _ = chats_of(SAMPLES[name], "export-7")
    assert (chat.chat_id, chat.attributes) == (chat_id, attributes)


def test_a_chat_without_an_id_has_one_of_its_content():
    ((one,), _), ((two,), _) = chats_of(OPENAI), chats_of(OPENAI)
    ((other,), _) = chats_of({"messages": OPENAI["messages"][1:]})
    assert one.chat_id == two.chat_id != other.chat_id


def test_a_chat_of_ours_may_have_messages_as_openai_has_them():
    messages = [{**one, "timestamp": 1_772_359_200} for one in OPENAI["messages"]]
    given = {"messages": messages, "chat_id": "7", "attributes": {"tenant": "a"}, "revision": 3}
    ((chat,), _) = chats_of(given)
    assert (chat.chat_id, chat.attributes, chat.revision) == ("7", {"tenant": "a"}, 3)
    assert chat.texts_of("user") == ["My bill is wrong!"]
    assert chat.messages[1].sent_at == datetime(2026, 3, 1, 10, tzinfo=UTC)


TIMES = st.datetimes(datetime(1990, 1, 1), datetime(2090, 1, 1), timezones=st.just(UTC))
SAID = st.builds(
    Message,
    user_id=st.sampled_from(["221", "c", "0", "007", "9" * 20, "ü/=1"]),
    role=st.sampled_from(["customer", "agent", "bot"]),
    text=st.text(st.characters(codec="utf-8", categories="L"), min_size=1),
    sent_at=st.none() | TIMES,
)


@given(said=st.lists(SAID, min_size=1), chat_id=st.text("7a/. ü", min_size=1))
@settings(deadline=None)
def test_a_chat_as_cx_insights_says_the_same_when_it_is_read_again(said, chat_id):
    """Its texts, roles and times, and who is the same; ids are numbers there."""
    said = [Message(user_id="221", role="customer", text="Late"), *said]
    made = Chat(chat_id=chat_id, messages=said, attributes={"categories": "Billing, Late"})
    ((chat,), _) = chats_of(json.loads(made.to_json()))
    value = cx_insights.write(chat)
    entries = value["entries"]
    assert all(0 <= entry["user_id"] < 2**53 for entry in entries)
    assert len({m.user_id for m in said}) == len({entry["user_id"] for entry in entries})
    ((again,), _) = chats_of(value)
    assert again.chat_id == chat_id
    assert again.attributes == chat.attributes
    told = [[(m.role, m.text, m.sent_at) for m in one.messages] for one in (chat, again)]
    assert told[0] == told[1]


def test_what_was_not_said_is_not_in_cx_insights():
    note = Message(user_id="a", role="agent", text="A difficult one", private=True)
    joined = Message(user_id="s", role="system", text="Dana joined")
    image = Message(user_id="c", text="")
    said = Message(user_id="c", text="Late again!")
    answer = Message(user_id="b", text="Sorry.")
    chat = Chat(chat_id="7", messages=[note, joined, image])
    assert cx_insights.write(chat) is None
    value = cx_insights.write(chat.model_copy(update={"messages": (note, joined, said, answer)}))
    told = [(entry["role"], entry["text"]) for entry in value["entries"]]
    assert told == [("CUSTOMER", "Late again!"), ("AGENT", "Sorry.")]


@pytest.mark.parametrize("chat_id", ["7", "../x", ".hidden", "manifest", "a/b", "ü" * 1000, "*?["])
def test_a_chats_file_is_found_in_its_folder_again(tmp_path, chat_id):
    name = cx_insights.file_name(chat_id)
    (tmp_path / name).write_text("{}")
    assert files_of(str(tmp_path), "--input") == [str(tmp_path / name)]


def test_times_are_the_senders_and_none_is_invented():
    ((chat,), _) = chats_of(CX_INSIGHTS)
    assert [m.sent_at for m in chat.messages] == [
        datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC),
        datetime(2023, 11, 14, 22, 14, 20, tzinfo=UTC),
        None,  # a second after the start of a recording
    ]
    assert all(message.sent_at is None for message in chats_of(OPENAI)[0][0].messages)
    ((chat,), _) = chats_of(INTERCOM)
    assert chat.messages[0].sent_at == datetime(2026, 3, 1, 10, tzinfo=UTC)


def test_phrases_of_a_call_are_put_in_order_though_each_side_is_a_transcript():
    ((chat,), _) = chats_of(GENESYS)
    assert [m.role for m in chat.messages] == ["customer", "system", "agent"]
    assert chat.messages[0].sent_at == datetime(2026, 3, 1, 10, tzinfo=UTC)
    offsets = json.loads(json.dumps(GENESYS))
    for transcript in offsets["transcripts"]:
        for phrase in transcript["phrases"]:
            phrase["offset"] = {"milliseconds": phrase.pop("startTimeMs") - 1_772_359_200_000}
    ((chat,), _) = chats_of(offsets)
    assert [m.text for m in chat.said] == ["My bill is wrong!", "Let me look."]
    assert all(message.sent_at is None for message in chat.messages)


def test_who_is_known_of_an_author_counts_before_a_guess():
    first, second = chats_of(ZENDESK)[0]
    assert [m.role for m in first.messages] == ["customer", "agent", "agent"]
    assert [m.private for m in first.messages] == [None, True, None]
    assert (second.chat_id, second.messages[0].text) == ("36", "All is well.")
    assert second.messages[0].role == "customer"
    ((chat,), _) = chats_of(INTERCOM)
    assert [m.role for m in chat.messages] == ["customer", "agent", "agent", "bot"]
    assert [m.text for m in chat.messages][-1] == "I am Fin."
    ids = {m.user_id for m in chats_of(CHATWOOT)[0][0].messages if m.role != "system"}
    assert ids == {"contact-3", "user-3"}  # of two tables with the same numbers


def test_one_ticket_is_read_as_a_page_of_them_is():
    ticket = ZENDESK["tickets"][0]
    alone, page = chats_of(ticket)[0], chats_of(ZENDESK)[0][:1]
    assert [m.text for m in alone[0].messages] == [m.text for m in page[0].messages]
    apart = {"ticket": {**ticket, "comments": None}, "comments": ticket["comments"],
             "users": ZENDESK["users"]}  # fmt: skip
    assert chats_of(apart)[0] == page


@pytest.mark.parametrize("public", [False, "false", 0])
def test_a_note_of_zendesk_stays_one(public):
    ticket = {"id": 1, "requester_id": 1, "description": "A difficult one", "is_public": public}
    ((chat,), _) = chats_of({**ticket, "comments": [
        {"id": 1, "author_id": 1, "body": "Late", "public": True},
        {"id": 2, "author_id": 2, "body": "A difficult one", "public": public},
    ]})  # fmt: skip
    assert [m.text for m in chat.said] == ["Late"]
    with pytest.raises(BadInputError, match="no message with words"):
        chats_of(ticket)


def test_a_ticket_of_freshdesk_is_not_read_by_halves():
    ticket = {"id": 1, "requester_id": 1, "description": "Late", "conversations": [{"body": "x"}]}
    with pytest.raises(BadInputError):
        chats_of(ticket)


def test_the_chats_of_an_account_are_all_read():
    account = {"chats": {"list": [TELEGRAM]}, "left_chats": {"list": [{**TELEGRAM, "id": 5}]}}
    assert [chat.chat_id for chat in chats_of(account)[0]] == ["4242", "5"]


def test_the_id_of_a_pubsub_message_is_that_of_the_chat():
    line = Arrival(json.dumps(OPENAI).encode(), {"chat_id": "7"})
    assert parse_arrival(line, timedelta(1))[0].chat_id == "7"


def test_chatwoots_webhooks_are_messages_and_ends():
    created = {
        "event": "message_created", "id": 9, "content": "My bill is wrong!", "private": False,
        "message_type": "incoming", "created_at": "2026-03-01T10:00:00Z",
        "sender": {"id": 3, "type": "contact"}, "account": {"id": 1},
        "conversation": {"id": 5, "channel": "Channel::Api"},
    }  # fmt: skip
    ((event,), _) = chats_of(created)
    assert (event.chat_id, event.message.text, event.message.message_id) == (
        "5", "My bill is wrong!", "9",
    )  # fmt: skip
    assert (event.message.role, event.message.user_id) == ("customer", "contact-3")
    ((same,), _) = chats_of({**created, "sender": {"id": 3, "name": "Ann"}})  # newer versions
    assert same == event
    ((note,), _) = chats_of({**created, "private": True, "message_type": "outgoing"})
    assert note.message.private
    resolved = {"event": "conversation_status_changed", "id": 5, "status": "resolved",
                "account": {"id": 1}}  # fmt: skip
    ((end,), _) = chats_of(resolved)
    assert (end.chat_id, end.message) == ("5", None)
    for other in ({**resolved, "status": "open"}, {**created, "event": "message_updated"}):
        found, counts = chats_of(other)
        assert (found, counts["input/events_left_out"]) == ([], 1)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_file_of_each_is_found_by_itself(tmp_path, name, indent):
    path = tmp_path / "export.json"
    path.write_text(json.dumps(SAMPLES[name], indent=indent))
    arrivals = [*read_lines(Range(str(path)), 100_000)]
    assert len(arrivals) == (2 if name == "zendesk" else 1)
    chats = [one for arrival in arrivals for one in parse_arrival(arrival, timedelta(1))]
    assert chats == chats_of(SAMPLES[name], "export")[0]


def test_one_command_reads_an_array_of_several_formats(tmp_path, script):
    rule = {"task": "analysis", "answer": {"sentiment": 0, "summary": "A bill is wrong."}}
    path = tmp_path / "export.json"
    path.write_text(json.dumps([*SAMPLES.values()]))
    options = Options(input=str(path), output=f"{tmp_path}/out", model=script(rule))
    counts = execute(options, []).to_dict()
    assert (counts["lost"], counts["dead_letters"], counts["analysed"]) == (0, 0, 10)
    assert counts["formats"] == {name: 2 if name == "zendesk" else 1 for name in SAMPLES}
    assert len({one["chat_id"] for one in read(f"{tmp_path}/out", "analyses")}) == 10


def test_what_was_found_is_one_sentence():
    found = described({"zendesk": 1204}, {"private_notes": 212, "fields_dropped": 3}, 10_093)
    assert found == ("Zendesk export: 1,204 tickets; 9,881 messages, 212 private notes left out")
    several = described({"slack": 1, "csv": 2}, {"system_messages": 1})
    assert several == "Slack export: 1 thread; CSV export: 2 chats; 1 system message left out"


def test_a_format_can_be_said(tmp_path):
    both = {**OPENAI, **SHAREGPT}
    assert as_ours(both).format == "openai"
    assert as_ours(both, format="sharegpt").format == "sharegpt"
    assert as_ours(OPENAI, format="sharegpt") is None
    assert as_ours(OPENAI, format="chatflow") is None
    with pytest.raises(UsageError, match=r"--input_format=xml: must be one of auto, chatflow"):
        plan(Options(input="x", output="y", input_format="xml"), NO_CLOUD)


@pytest.mark.parametrize("form", ["glob", "two", "zip", "zips"])
def test_files_of_one_name_in_two_folders_are_two_chats(tmp_path, form):
    for folder in ("march", "april"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.json").write_text(json.dumps(CX_INSIGHTS))
        with zipfile.ZipFile(tmp_path / f"{folder}.zip", "w") as archive:
            archive.write(tmp_path / folder / "1.json", "1.json")
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        for folder in ("march", "april"):
            archive.write(tmp_path / folder / "1.json", f"{folder}/1.json")
    inputs = {
        "glob": f"{tmp_path}/*/1.json",
        "two": f"{tmp_path}/march/1.json,{tmp_path}/april/1.json",
        "zip": f"{tmp_path}/export.zip",
        "zips": f"{tmp_path}/[am]*.zip",
    }[form]
    paths = check_input(inputs)
    root = root_of(inputs.split(","))
    arrivals = [one for path in paths for one in read_lines(Range(path), 100_000, root=root)]
    chats = [one for arrival in arrivals for one in parse_arrival(arrival, timedelta(1))]
    assert {chat.chat_id for chat in chats} == {"march/1", "april/1"}
    (alone,) = read_lines(Range(f"{tmp_path}/march/1.json"), 100_000)
    assert parse_arrival(alone, timedelta(1))[0].chat_id == "1"


NAMES = [
    "messages", "entries", "Transcript", "CustomerMetadata", "tickets", "ticket", "comments",
    "requester_id", "description", "conversation_parts", "source", "author", "event", "account",
    "conversations", "from", "value", "role", "content", "text", "id", "type", "from_id", "list",
    "chats", "user_id", "body", "created_at", "sender", "message_type", "transcripts", "phrases",
    "conversationId", "startTimeMs", "offset",
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["message", "message_created", "comment", "user"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(NAMES), inner, max_size=6),
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=8))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_an_object_holds_it_is_read_or_named(value):
    found = None
    with contextlib.suppress(BadInputError):
        found, _ = chats_of(value)
    assert found is None or all(one.chat_id for one in found)
