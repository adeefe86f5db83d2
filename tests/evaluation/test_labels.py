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
