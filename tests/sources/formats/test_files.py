"""Tables, WhatsApp's texts and Slack's archives: rows in are messages, left out or dead letters."""

import gzip
import io
import json
import tracemalloc
import zipfile
from datetime import UTC, datetime, timedelta

import pytest
from conftest import read
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatflow.cli import main
from chatflow.errors import UsageError
from chatflow.options import NO_CLOUD, Options
from chatflow.pipeline import plan
from chatflow.records import Range
from chatflow.running.launch import execute
from chatflow.sources.chats import customs_of
from chatflow.sources.formats.tables import columns_of
from chatflow.sources.lines import about, fault_of, ranges_of, read_lines
from chatflow.sources.parse import parse_arrival
from chatflow.sources.read import check_input

TICKETS = """Ticket ID,Author Role,Body,Created At,Public,Product
7,end-user,"My kettle is broken,
I am furious",2026-03-01T10:00:00Z,true,kettle
8,end-user,"Thank you, all good",2026-03-01T10:01:00Z,true,pan
7,agent,We are sorry,2026-03-01T10:05:00Z,true,kettle
7,agent,Customer is a pain,2026-03-01T10:06:00Z,false,kettle
,agent,lost,2026-03-01T10:06:00Z,true,pan
9,end-user,too,few
"""


@pytest.fixture
def file(tmp_path):
    def write(content, name="export.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def chats_in(path, **flags):
    """The chats of a file by id, and the errors of what is none."""
    customs = customs_of("", "", flags.get("format", "auto"), flags.get("columns", ""))
    chats, errors = {}, []
    for arrival in read_lines(Range(path), 1_000_000, customs=customs):
        try:
            for chat in parse_arrival(arrival, timedelta(1), customs):
                chats[chat.chat_id] = chat
        except Exception as error:
            errors.append(str(error))
    return chats, errors


def said(chat):
    return [(message.role, message.text) for message in chat.said]


def test_a_table_is_chats_whatever_the_order_of_its_rows(file):
    path = file(TICKETS)
    chats, errors = chats_in(path)
    assert [*chats] == ["7", "8"]
    assert said(chats["7"]) == [
        ("customer", "My kettle is broken,\nI am furious"),
        ("agent", "We are sorry"),
    ]
    assert chats["7"].messages[2].private
    assert chats["7"].messages[0].sent_at == datetime(2026, 3, 1, 10, tzinfo=UTC)
    assert chats["7"].attributes == {"Product": "kettle"}
    assert errors == ["there is no Ticket ID", "4 cells under 6 columns"]
    assert about(path) == (
        "a table; its columns are read as "
        "--columns='chat=Ticket ID,text=Body,who=Author Role,at=Created At'"
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("2026-03", "2026-03").encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: gzip.compress(text.encode()),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace(",", ";").replace(";\nI", ",\nI").encode(),
        lambda text: text.replace(",", "\t").encode(),
    ],
)
def test_encodings_and_delimiters_are_found(file, change):
    chats, errors = chats_in(file(change(TICKETS), "export"))
    assert [*chats] == ["7", "8"]
    assert len(errors) == 2


def test_a_table_that_ends_too_early_is_read_up_to_there(file):
    packed = gzip.compress(("chat_id,role,text\n" + "".join(
        f"{n},customer,message {n * 7919 % 1000}\n" for n in range(5000))).encode())  # fmt: skip
    chats, errors = chats_in(file(packed[: len(packed) // 2], "export.csv.gz"))
    assert 1000 < len(chats) < 5000
    assert "ends too early" in errors[-1]


def test_a_column_that_marks_notes_is_heeded(file):
    text = "chat_id,role,text,visibility\n1,customer,late,public\n1,agent,difficult,internal\n"
    assert said(chats_in(file(text))[0]["1"]) == [("customer", "late")]
    ends = "chat_id,role,text,public\n1,customer,late,true,\n1,agent,difficult,false,\n"
    assert said(chats_in(file(ends))[0]["1"]) == [("customer", "late")]


@pytest.mark.parametrize(
    ("mark", "private"), [("1.0", True), ("0.0", False), ("internal", True), ("", False)]
)
def test_a_mark_of_notes_can_be_in_any_column(file, mark, private):
    text = f"chat_id,role,text,staff,type\n1,customer,late,,Service\n1,agent,difficult,{mark},x\n"
    chat = chats_in(file(text), columns="private=staff")[0]["1"]
    assert chat.messages[0].role == "customer"  # what `type` says is not its role
    assert bool(chat.messages[1].private) is private


def test_tables_as_pandas_and_excel_write_them(file):
    index = ",chat_id,role,text\n0,3.0,customer,late\n1,3,agent,sorry\n"
    assert said(chats_in(file(index))[0]["3"]) == [("customer", "late"), ("agent", "sorry")]
    excel = "sep=;\n\nchat_id;role;text\n3;customer;late\n"
    assert said(chats_in(file(excel))[0]["3"]) == [("customer", "late")]
    (packed,) = chats_in(file(gzip.compress(b"chat_id,text\n3,late\n"), "x.csv.gz"))[0].values()
    assert packed.texts_of("customer") == ["late"]
    _, (error,) = chats_in(file("chat_id,text\n3,late,more\n"))
    assert error == "3 cells under 2 columns"
    (arrival,) = read_lines(Range(file("chat_id,text\n3,late,more\n")), 1000)
    assert "more" in json.loads(arrival.line)["row"].values()


def test_nobody_is_invented_where_an_author_is_missing(file):
    text = "chat_id,author,text\n1,Ann,late\n1,,who is this\n"
    _, errors = chats_in(file(text))
    assert len(errors) == 1
    assert "user_id: it is missing" in errors[0]


def test_a_large_table_is_read_as_a_whole(file, monkeypatch):
    monkeypatch.setattr("chatflow.sources.lines.RANGE", 100)
    path = file("chat_id,text\n" + "1,late\n" * 50)
    assert ranges_of(path, 400) == [Range(path)]
    other = file("chat_id,text\n" + "1,late\n" * 50, "export")
    assert ranges_of(other, 400, customs_of("", "", "csv")) == [Range(other)]


def test_letters_of_windows_are_read(file):
    text = "chat_id,role,text\n1,customer,“Größe” à côté\n2,customer,schön\n"
    assert [c.messages[0].text for c in chats_in(file(text.encode("cp1252")))[0].values()] == [
        "“Größe” à côté", "schön",
    ]  # fmt: skip
    mixed = text.encode("cp1252") + "3,customer,Grüße\n".encode()
    assert chats_in(file(mixed))[0]["3"].messages[0].text == "Grüße"


def test_a_parquet_table_is_read_like_one_of_text(file, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "conversation_id": [1, 2, 1, None],
            "role": ["customer", "customer", "agent", "agent"],
            "message": ["It is late", "Thanks", "We are sorry", "lost"],
            "sent_at": [datetime(2026, 3, 1, 10, minute) for minute in range(4)],
            "score": [0.5, None, float("nan"), 1.0],
        }
    )
    path = str(tmp_path / "export.parquet")
    pq.write_table(table, path)
    chats, errors = chats_in(path)
    assert said(chats["1"]) == [("customer", "It is late"), ("agent", "We are sorry")]
    assert chats["2"].messages[0].sent_at == datetime(2026, 3, 1, 10, 1, tzinfo=UTC)
    assert errors == ["there is no conversation_id"]
    assert fault_of(path) is None


TWEETS = """tweet_id,author_id,inbound,created_at,text,response_tweet_id,in_response_to_tweet_id
5,Air,False,Tue Oct 31 22:12:00 +0000 2017,Send us your number,,3
1,115712,True,Tue Oct 31 22:08:27 +0000 2017,"@Air my bag is gone",2,
2,Air,False,Tue Oct 31 22:10:00 +0000 2017,We are sorry,3,1
3,115712,True,Tue Oct 31 22:11:00 +0000 2017,Since Monday!,5,2
9,7,True,Tue Oct 31 22:11:00 +0000 2017,An answer to one that is not here,,8
"""


def test_replies_are_chats_of_what_they_answer(file):
    """The data set of customer support on Twitter; a reply may stand before what it answers."""
    chats, errors = chats_in(file(TWEETS))
    assert not errors
    assert [*chats] == ["1", "9"]
    assert [m.message_id for m in chats["1"].messages] == ["1", "2", "3", "5"]
    assert [m.role for m in chats["1"].messages] == ["customer", "agent", "customer", "agent"]
    assert chats["1"].messages[0].sent_at == datetime(2017, 10, 31, 22, 8, 27, tzinfo=UTC)


def test_a_table_without_an_author_is_of_customers(file):
    chats, _ = chats_in(file("id,review\n1,It broke\n2,Fine\n"), columns="chat=id,text=review")
    assert said(chats["1"]) == [("customer", "It broke")]


def test_columns_are_taken_only_where_there_is_no_doubt():
    assert str(columns_of(["ticketId", "from", "Message"], {})) == (
        "chat=ticketId,text=Message,user=from"
    )
    with pytest.raises(UsageError, match=r"may be the text: text, body; .*--columns=text=text"):
        columns_of(["chat_id", "text", "body"], {})
    with pytest.raises(UsageError, match=r"which column is the chat: there are text, a"):
        columns_of(["text", "a"], {})
    with pytest.raises(UsageError, match="there is no column 'x' for chat; there are text, a"):
        columns_of(["text", "a"], {"chat": "x"})
    with pytest.raises(UsageError, match="'colour=a' must be FIELD=COLUMN"):
        plan(Options(input="x", output="y", columns="colour=a"), NO_CLOUD)


def test_what_is_not_clear_is_one_line_and_nothing_runs(file, tmp_path, capsys):
    path = file("a,b,c\n1,2,3\n")
    assert main(["run", "--input", path, "--output", f"{tmp_path}/out"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "which column is the chat and the text: there are a, b, c" in said
    assert "--columns=chat=COLUMN,text=COLUMN" in said


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["1", "2", "3", ""]),
            st.sampled_from(["customer", "agent", "system"]),
            st.text(st.characters(exclude_categories=["C"]), max_size=20),
        ),
        max_size=30,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_row_is_lost(tmp_path, rows):
    import csv

    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerows([("chat_id", "role", "text"), *rows])
    path = tmp_path / "rows.csv"
    path.write_text(out.getvalue(), newline="")
    arrivals = [*read_lines(Range(str(path)), 1_000_000, customs=customs_of("", "", "csv"))]
    values = [json.loads(arrival.line) for arrival in arrivals]
    bad = [value for value in values if value["chat_id"] is None]
    messages = [m for value in values if value["chat_id"] for m in value["messages"]]
    assert len(bad) == sum(chat == "" for chat, _, _ in rows)
    assert len(bad) + len(messages) == len(rows)


def test_a_large_table_needs_little_memory(file):
    rows = (f"{n % 5000},customer,message {n} {'x' * 200}\n" for n in range(60_000))
    path = file("chat_id,role,text\n" + "".join(rows))
    tracemalloc.start()
    chats = sum(1 for _ in read_lines(Range(path), 1_000_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert chats == 5000
    assert peak < 6e6


IOS = """\u200e[15/01/24, 10:30:45] Ann: \u200eMessages and calls are end-to-end encrypted.
[15/01/24, 10:31:02] Ann: My kettle is broken
and I am furious: really
[15/01/24, 10:32:00] Shop: We are sorry
[15/01/24, 10:33:00] Ann: \u200e<attached: 00000004-PHOTO.jpg>
"""
ANDROID = """12/5/25, 10:30 PM - Messages and calls are end-to-end encrypted.
12/5/25, 10:31 PM - Ann: My kettle is broken
12/15/25, 12:05 AM - Shop: We are sorry
"""


def test_a_text_of_whatsapp_is_a_chat(file):
    (chat,) = chats_in(file(IOS, "WhatsApp Chat with Ann.txt"))[0].values()
    assert chat.chat_id == "Ann"
    assert chat.texts_of("Ann")[-1] == "My kettle is broken\nand I am furious: really"
    assert chat.texts_of("Shop") == ["We are sorry"]
    assert chat.messages[1].sent_at == datetime(2024, 1, 15, 10, 31, 2, tzinfo=UTC)
    assert chat.users() == ("Ann",)


def test_a_text_of_whatsapp_is_found_without_marks_and_survives_odd_lines(file):
    plain = IOS.replace("\u200e", "") + "[16/01/24, 99:10:00] Ann: no such time\n"
    (chat,) = chats_in(file(plain, "WhatsApp Chat with Dr. Smith.txt"))[0].values()
    assert chat.chat_id == "Dr. Smith"
    assert "99:10:00" in chat.messages[-1].text or "99:10:00" in chat.messages[-1].original


def test_a_text_of_whatsapp_may_be_in_windows_letters(file):
    text = "[15/01/24, 10:30:45] Zoë: “Größe” 42?\n[15/01/24, 10:31:02] Shop: Grüße\n"
    (chat,) = chats_in(file(text.encode("cp1252"), "x.txt"))[0].values()
    assert [(m.user_id, m.text) for m in chat.messages] == [
        ("Zoë", "“Größe” 42?"),
        ("Shop", "Grüße"),
    ]


def test_a_zip_of_whatsapp_is_its_text_without_what_lies_beside(tmp_path):
    path = tmp_path / "WhatsApp Chat - Ann.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("00000004-PHOTO.jpg", b"\xff\xd8\xff" + bytes(100))
        archive.writestr("_chat.txt", IOS)
    assert fault_of(str(path)) is None
    (chat,) = chats_in(str(path))[0].values()
    assert chat.chat_id == "Ann"


def test_the_order_of_day_and_month_is_that_of_the_whole_file(file):
    (chat,) = chats_in(file(ANDROID, "WhatsApp Chat with Ann.txt"))[0].values()
    assert [m.role for m in chat.messages] == ["system", None, None]
    assert chat.messages[1].sent_at == datetime(2025, 12, 5, 22, 31, tzinfo=UTC)
    assert chat.messages[2].sent_at == datetime(2025, 12, 15, 0, 5, tzinfo=UTC)
    unclear = ANDROID.replace("12/15/25", "12/6/25")
    ((chat,), _) = (lambda found: ([*found[0].values()], found[1]))(
        chats_in(file(unclear, "x.txt"))
    )
    assert all(message.sent_at is None for message in chat.messages)


UTTERANCES = [
    {"id": "u3", "speaker": "ann", "conversation_id": "u1", "reply_to": "u2", "text": "Monday!",
     "timestamp": 1772359320, "meta": {"parsed": [{"rt": 0}], "score": 4}, "vectors": []},
    {"id": "u4", "speaker": "bob", "conversation_id": "u4", "reply_to": None, "text": "Thanks",
     "timestamp": "None", "meta": {}},
    {"id": "u1", "speaker": "ann", "conversation_id": "u1", "reply_to": None,
     "timestamp": "1772359200", "text": "My bag is gone", "meta": {}},
    {"id": "u2", "speaker": "air", "conversation_id": "u1", "reply_to": "u1",
     "timestamp": 1772359260.5, "text": "Since when?", "meta": {}},
]  # fmt: skip
CORPUS = {
    "utterances.jsonl": "".join(json.dumps(one) + "\n" for one in UTTERANCES),
    "conversations.json": json.dumps({"u1": {"meta": {"topic": "bags"}, "vectors": []}, "u4": {}}),
    "speakers.json": json.dumps({
        "ann": {"meta": {"role": "customer"}}, "air": {"meta": {"role": "agent"}},
        "bob": {"meta": {}, "vectors": []},
    }),
    "corpus.json": "{}",
    "index.json": json.dumps({"utterances-index": {"score": ["<class 'int'>"]}, "version": 1}),
}  # fmt: skip


def corpus_as(form, tmp_path):
    folder = tmp_path / "air-corpus"
    folder.mkdir()
    for name, text in CORPUS.items():
        (folder / name).write_text(text)
    if form == "file":
        return str(folder / "utterances.jsonl")
    if form == "array":  # of the first version
        (folder / "utterances.json").write_text(json.dumps(UTTERANCES, indent=1))
        (folder / "utterances.jsonl").unlink()
    if form == "zip":
        path = tmp_path / "air-corpus.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name in CORPUS:
                archive.write(folder / name, f"air-corpus/{name}")
        return str(path)
    return str(folder)


@pytest.mark.parametrize("form", ["file", "array", "folder", "zip"])
def test_a_corpus_of_convokit_is_its_conversations(tmp_path, form):
    (path,) = check_input(corpus_as(form, tmp_path))
    assert about(path) == "a corpus of ConvoKit"
    chats, errors = chats_in(path)
    assert errors == []
    assert [*chats] == ["u1", "u4"]
    assert said(chats["u1"]) == [
        ("customer", "My bag is gone"), ("agent", "Since when?"), ("customer", "Monday!"),
    ]  # fmt: skip
    assert chats["u1"].attributes == {"topic": "bags"}
    assert chats["u1"].messages[2].attributes == {"score": "4"}
    assert chats["u1"].messages[0].sent_at == datetime(2026, 3, 1, 10, tzinfo=UTC)
    assert chats["u4"].messages[0].sent_at is None


def test_utterances_alone_of_an_earlier_version_follow_what_they_reply_to(file):
    lines = [
        {"id": "b", "user": "x", "root": "a", "reply-to": "a", "text": "second", "timestamp": 5},
        {"id": "c", "user": "y", "root": "a", "reply-to": "b", "text": "third", "timestamp": 9},
        {"id": "a", "user": "y", "root": "a", "reply-to": None, "text": "first", "timestamp": 0},
    ]
    chats, _ = chats_in(file("".join(json.dumps(one) + "\n" for one in lines), "utterances.jsonl"))
    assert [m.text for m in chats["a"].messages] == ["first", "second", "third"]
    assert all(message.sent_at is None for message in chats["a"].messages)


def test_what_is_broken_in_a_corpus_costs_nothing_else(tmp_path):
    path = corpus_as("file", tmp_path)
    with open(path, "a") as utterances:
        utterances.write('{"broken\n{"id": "u9", "speaker": "ann", "text": "lost"}\n[1]\n')
    (tmp_path / "air-corpus" / "speakers.json").write_text('{"ann": {"meta": {"role": "customer"')
    chats, errors = chats_in(path)
    assert [*chats] == ["u1", "u4"]
    assert "Unterminated string" in errors[0]
    assert errors[1:3] == ["there is no conversation_id", "it is not an object"]
    assert "speakers.json" in errors[3]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["1", "2", "", None, 3]),
            st.sampled_from(["ann", "bob", "", None]),
            st.text(max_size=10) | st.none(),
            st.integers() | st.none() | st.text(max_size=5),
            st.integers(0, 9) | st.none(),
        ),
        max_size=20,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_utterance_is_lost(tmp_path, rows):
    path = tmp_path / "utterances.jsonl"
    with path.open("w") as out:
        for number, (chat, speaker, text, at, to) in enumerate(rows):
            one = {"id": f"u{number}", "conversation_id": chat, "speaker": speaker, "text": text,
                   "timestamp": at, "reply_to": f"u{to}"}  # fmt: skip
            out.write(json.dumps(one) + "\n")
    arrivals = [*read_lines(Range(str(path)), 1_000_000, customs=customs_of("", "", "convokit"))]
    values = [json.loads(arrival.line) for arrival in arrivals]
    bad = [value for value in values if value["chat_id"] is None]
    ids = {m["message_id"] for value in values if value["chat_id"] for m in value["messages"]}
    assert len(bad) == sum(chat in ("", None) for chat, *_ in rows)
    assert len(bad) + len(ids) == len(rows)


def slack(path):
    day = [
        {"type": "message", "user": "U1", "text": "<@U2> my bill is wrong, see <https://x.y|this>",
         "ts": "1772359200.000100", "thread_ts": "1772359200.000100"},
        {"type": "message", "subtype": "channel_join", "user": "U2", "ts": "1772359201.000100",
         "text": "<@U2> has joined the channel"},
    ]  # fmt: skip
    later = [
        {"type": "message", "user": "U2", "text": "Let me look &amp; see", "client_msg_id": "m3",
         "ts": "1772445600.000100", "thread_ts": "1772359200.000100"},
        {"type": "message", "bot_id": "B1", "subtype": "bot_message", "text": "A ticket was made",
         "ts": "1772445601.000100", "thread_ts": "1772359200.000100"},
    ]  # fmt: skip
    users = [{"id": "U1", "name": "ann"}, {"id": "U2", "real_name": "Dana"}]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("users.json", json.dumps(users))
        archive.writestr("channels.json", "[]")
        archive.writestr("help/2026-03-02.json", json.dumps(later))
        archive.writestr("help/2026-03-01.json", json.dumps(day))
    return str(path)


def test_a_thread_of_slack_is_a_chat(tmp_path):
    path = slack(tmp_path / "export.zip")
    chats, errors = chats_in(path)
    assert not errors
    thread = chats["help-1772359200.000100"]
    assert [(m.user_id, m.role, m.text) for m in thread.messages] == [
        ("U1", "customer", "@Dana my bill is wrong, see this"),
        ("U2", "agent", "Let me look & see"),
        ("B1", "bot", "A ticket was made"),
    ]
    assert thread.messages[0].sent_at == datetime(2026, 3, 1, 10, 0, 0, 100, tzinfo=UTC)
    assert thread.attributes == {"channel": "help", "source": "slack"}
    assert about(path) == "a Slack export"


@pytest.mark.slow
def test_one_command_reads_what_lies_in_a_folder(tmp_path, script, capsys):
    folder = tmp_path / "exports"
    folder.mkdir()
    (folder / "a.csv").write_text(TICKETS)
    slack(folder / "b.zip")
    (folder / "notes.txt").write_text("not chats")
    rule = {"task": "analysis", "answer": {"sentiment": 0, "summary": "A bill is wrong."}}
    options = Options(input=str(folder), output=f"{tmp_path}/out", model=script(rule))
    counts = execute(options, []).to_dict()
    assert counts["formats"] == {"csv": 2, "slack": 1}
    assert (counts["lost"], counts["analysed"]) == (0, 3)
    letters = read(f"{tmp_path}/out", "dead_letters")
    assert {(one["reason"], one["error"]) for one in letters} >= {
        ("bad_row", f"there is no Ticket ID ({folder}/a.csv, row 5)"),
        ("bad_row", f"4 cells under 6 columns ({folder}/a.csv, row 6)"),
    }


def test_a_day_of_slack_that_is_damaged_costs_no_other(tmp_path):
    path = slack(tmp_path / "export.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("help/2026-02-28.json", b"[broken")
    chats, (error,) = chats_in(path)
    assert len(chats) == 1
    assert "help/2026-02-28.json" in error


def test_an_archive_that_is_damaged_or_locked_is_said(tmp_path):
    path = tmp_path / "x.zip"
    path.write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(UsageError, match=r"--input: .*x\.zip .*zip"):
        check_input(str(path))
