import json
import random
import time

import pytest
from conftest import chat
from hypothesis import given
from hypothesis import strategies as st

from chatflow.errors import UsageError
from chatflow.evaluation.labels import near_copies, read_labels


def near(first, second):
    return near_copies([first], [second])


def test_a_chat_with_the_same_words_is_a_near_copy():
    one = chat("my blue kettle came with a broken switch today", "oh no", chat_id="1")
    two = chat("well, my blue kettle came with a broken lid", "hi", chat_id="2")
    # my blue kettle came with, … kettle came with a broken: 3 of the 5 runs of each
    assert near(one, two) == [("1", "2", 0.6)]


def test_case_and_punctuation_do_not_count():
    one = chat("I DON'T want this, at all, ever!", "why", chat_id="1")
    assert near(one, chat("i dont want this at all ever", chat_id="2"))[0].share == 1
    assert near(one, chat("i don’t want this - at all ever", chat_id="2"))[0].share == 1


def test_two_shared_runs_are_no_copy():
    assert near(chat("where is my order of last week"), chat("where is my order of last")) == []


def test_short_chats_that_say_the_same_are_copies():
    assert near_copies([chat("Thank you so much!", chat_id="1")], [chat("thank you so much")])
    assert near_copies([chat("谢谢你们的帮助")], [chat("谢谢你们的帮助。")])
    assert near_copies([chat("?!")], [chat("!!!")]) == []


def test_a_chat_may_have_one_label(lines):
    one = {**json.loads(chat("x", chat_id="7").to_json()), "sentiment": 0}
    with pytest.raises(UsageError, match=":2: the same chat and user as in line 1"):
        read_labels(lines(one, {**one, "sentiment": 1}))


def test_a_small_share_of_the_smaller_chat_is_no_copy():
    long = [" ".join(f"{side}{i}" for i in range(30)) for side in "ab"]
    same = " where is my order please tell "
    assert near(chat(long[0] + same), chat(long[1] + same)) == []


def test_an_equal_message_of_eight_words_is_enough():
    long = [" ".join(f"{side}{i}" for i in range(60)) for side in "ab"]
    same = "thank you very much for your kind help"
    (found,) = near(chat(long[0], same, chat_id="1"), chat(long[1], same, chat_id="2"))
    assert (found.chat_id, found.other_id, found.share) == ("1", "2", round(4 / 60, 4))
    short = "thank you very much for your help"
    assert near(chat(long[0], short), chat(long[1], short)) == []


def test_runs_do_not_go_over_the_ends_of_messages():
    assert near(chat("my order is", "late again and again"), chat("my order is late again")) == []


def test_the_closest_of_several_is_named():
    one = chat("the red lamp fell off the wall last night", chat_id="1")
    others = [
        chat("the red lamp fell off the table this morning", chat_id="2"),
        chat("the red lamp fell off the wall last week", chat_id="3"),
    ]
    assert [found.other_id for found in near_copies([one], others)] == ["3"]
    assert near_copies([one], []) == near_copies([], others) == []


@given(st.text(alphabet="ab ", min_size=0, max_size=60), st.text(alphabet="ab ", max_size=60))
def test_being_near_goes_both_ways(one, two):
    first, second = chat(one, chat_id="1"), chat(two, chat_id="2")
    assert [f.share for f in near(first, second)] == [f.share for f in near(second, first)]
    assert all(0 <= found.share <= 1 for found in near(first, second))


@pytest.mark.slow
def test_thousands_are_compared_in_seconds():
    choose = random.Random(0)
    words = [f"w{i}" for i in range(2000)]

    def many(count):
        greeting = "hello and welcome how may I help you today"  # a hot spot: all have it
        return [
            chat(" ".join(choose.choices(words, k=80)), greeting, chat_id=str(i))
            for i in range(count)
        ]

    chats, others = many(1000), many(1000)
    started = time.monotonic()
    found = near_copies(chats, others)
    assert len(found) == len(chats)  # the greeting is an equal message
    assert time.monotonic() - started < 5


def test_labels_of_a_table_are_a_column(tmp_path):
    path = tmp_path / "tickets.csv"
    path.write_text(
        "ticket_id,role,body,sentiment\n7,customer,It is late,-1\n8,customer,Thanks,Happy\n"
        "7,agent,Sorry,\n9,customer,Hm,\n"
    )
    labels = read_labels(str(path))
    assert {key: int(label.sentiment) for key, label in labels.items()} == {
        ("7", "customer"): -1, ("8", "customer"): 1,
    }  # fmt: skip
    assert [m.text for m in labels["7", "customer"].chat.messages] == ["It is late", "Sorry"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("7,customer,It is late,0.5\n", "tickets.csv, row 1: 0.5 is not a valid Sentiment"),
        ("7,customer,It is late,-1\n,agent,lost,\n", "tickets.csv, row 2: there is no ticket_id"),
        ("7,customer,It is late,\n", "in a table, the column sentiment"),
    ],
)
def test_what_is_wrong_with_a_label_of_a_table_is_named(tmp_path, rows, said):
    path = tmp_path / "tickets.csv"
    path.write_text(f"ticket_id,role,body,sentiment\n{rows}")
    with pytest.raises(UsageError, match=said):
        read_labels(str(path))


def test_other_formats_may_have_labels_beside_them(tmp_path):
    path = tmp_path / "openai.jsonl"
    one = {"id": "7", "messages": [{"role": "user", "content": "Late!"}], "sentiment": -1}
    ours = {"chat_id": "8", "messages": [{"role": "user", "text": "Fine."}], "sentiment": 0,
            "attributes": {"sentiment": "4.5"}}  # fmt: skip
    other = {**ours, "chat_id": "9", "sentiment": None}
    path.write_text("".join(json.dumps(line) + "\n" for line in (one, ours, other)))
    labels = read_labels(str(path))
    assert {key[0]: int(label.sentiment) for key, label in labels.items()} == {"7": -1, "8": 0}
