"""Chats of a batch that share an id: the same once, and different ones told apart."""

import random

from conftest import chat, run_stage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatflow.stages.identity import TellApart, check, compare


def apart(*chats):
    found = run_stage(TellApart(), chats, ["ok", "dead_letters"])
    return found["ok"], found["dead_letters"]


def test_the_same_chat_passes_once():
    passed, letters = apart(chat("late"), chat("late"), chat("late", chat_id="8"))
    assert sorted(one.chat_id for one in passed) == ["7", "8"]
    assert letters == []


def test_a_chat_that_grew_passes_in_each_revision():
    passed, letters = apart(chat("late", revision=1), chat("late", "sorry", revision=2))
    assert sorted(one.revision for one in passed) == [1, 2]
    assert letters == []


def test_different_chats_of_one_id_and_revision_are_refused_whole():
    where, angry = chat("Where is it?"), chat("I am furious!")
    passed, letters = apart(where, angry, angry, chat("thanks", chat_id="8"))
    assert [one.chat_id for one in passed] == ["8"]
    assert sorted(letter.payload for letter in letters) == sorted(
        (where.to_json(), angry.to_json())
    )
    assert {(letter.stage, letter.reason, letter.chat_id) for letter in letters} == {
        ("identity", "shared_id", "7")
    }
    assert "2 different chats have the id 7" in letters[0].error


def test_one_chat_may_be_asked_about_for_several_users():
    one, other = (chat("late", "sorry", user_id=user) for user in "ca")
    passed, letters = apart(one, other)
    assert sorted(passed, key=str) == sorted((one, other), key=str)
    assert letters == []


@settings(suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from("78"), st.integers(0, 1), st.sampled_from("xyz"))))
def test_each_content_comes_out_once_in_any_order(drawn):
    groups = {}
    for chat_id, revision, text in drawn:
        groups.setdefault((chat_id, revision), []).append(
            chat(text, chat_id=chat_id, revision=revision)
        )
    for key, chats in groups.items():
        found = [*compare((key, chats))]
        shuffled = random.Random(0).sample(chats, len(chats))
        assert found == [*compare((key, shuffled))]
        texts = {one.messages[0].text for one in chats}
        assert {one.messages[0].text for one, _ in found} == texts
        assert [count for _, count in found] == [len(texts)] * len(texts)
        if len(texts) == 1:
            assert [*check(found[0])] == [chats[0]]
