"""Messages to chats: each rule as a timeline, in a stream and in files alike."""

import dataclasses
import functools
import random
from datetime import UTC, datetime, timedelta

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import StandardOptions
from apache_beam.testing import test_pipeline as testing
from apache_beam.testing import test_stream
from apache_beam.testing.util import assert_that
from conftest import KEPT, keep, run_stage
from hypothesis import given, settings
from hypothesis import strategies as st

from chatflow.options import Rules
from chatflow.records import Chat, Event, Message
from chatflow.stages import assemble
from chatflow.stages.assemble import AssembleChats
from chatflow.stages.revisions import Conversation, Kept, advance

T0 = datetime(2026, 3, 1, 10, tzinfo=UTC)
START = int(T0.timestamp())
QUIET = Rules(quiet_seconds=60, every_messages=0)


def said(second, text=None, chat_id="7", user="c", role="customer", **fields):
    """Somebody writes; the text and the id of a message are made of its second."""
    at = T0 + timedelta(seconds=second)
    message = Message.model_validate(
        {"user_id": user, "role": role, "text": text or f"at {second}",
         "message_id": f"{chat_id}-{second}", "sent_at": at, **fields}
    )  # fmt: skip
    return Event(chat_id=chat_id, at=at, message=message)


def closed(second, chat_id="7"):
    return Event(chat_id=chat_id, at=T0 + timedelta(seconds=second))


class Until(int):
    """Event time passes: the watermark of a timeline."""


def stream(rules, *timeline):
    """(texts of its messages) of each revision, and the reasons of dead letters, in order."""
    script = test_stream.TestStream(coder=beam.coders.registry.get_coder(Event))
    script.advance_watermark_to(START)
    for step in timeline:
        if isinstance(step, Until):
            script.advance_watermark_to(START + step)
        else:
            events = step if isinstance(step, list) else [step]
            script.add_elements([beam.window.TimestampedValue(e, START) for e in events])
    script.advance_watermark_to_infinity()
    options = beam.options.pipeline_options.PipelineOptions([])
    options.view_as(StandardOptions).streaming = True
    runner = "apache_beam.runners.direct.direct_runner.BundleBasedDirectRunner"
    with testing.TestPipeline(runner=runner, options=options) as pipeline:
        out = pipeline | script | AssembleChats(rules)
        both = (out.ok, out.dead_letters) | beam.Flatten()
        assert_that(both, functools.partial(keep, "found"))
    return [texts(one) if isinstance(one, Chat) else one.reason for one in KEPT["found"]]


def texts(chat):
    return [int(m.text.removeprefix("at ")) for m in chat.messages]


def files(rules, events):
    """The chats that the same events in a file give."""
    found = run_stage(AssembleChats(rules), events, ["ok", "dead_letters"])
    return found["ok"], found["dead_letters"]


# When a chat is analysed.


def test_a_chat_is_analysed_when_it_was_quiet():
    assert stream(QUIET, said(0), said(50), Until(100), Until(109), said(109), Until(300)) == [
        [0, 50, 109]
    ]


def test_quiet_is_counted_from_the_last_message_and_each_silence_makes_a_revision():
    found = stream(QUIET, said(0), Until(61), said(70), Until(131), Until(1000))
    assert found == [[0], [0, 70]]


def test_a_close_event_needs_no_silence():
    assert stream(QUIET, said(0), said(5), closed(6), Until(7)) == [[0, 5]]
    # The watermark goes no further than the end of the chat before the test looks.
    waits = stream(QUIET, said(0), closed(6), Until(7), said(200), Until(261))
    assert waits == [[0], [0, 200]]


def test_a_close_event_with_nothing_new_makes_no_revision():
    assert stream(QUIET, said(0), Until(61), closed(70), Until(200)) == [[0]]


def test_a_chat_that_goes_on_is_analysed_every_so_many_messages():
    rules = dataclasses.replace(QUIET, every_messages=2)
    talk = [said(second) for second in range(0, 50, 10)]
    assert stream(rules, *talk, Until(41), Until(500)) == [
        [0, 10], [0, 10, 20, 30], [0, 10, 20, 30, 40],
    ]  # fmt: skip


def test_every_messages_counts_from_the_last_revision():
    rules = dataclasses.replace(QUIET, every_messages=3)
    found = stream(rules, said(0), Until(61), said(70), said(80), said(90), Until(91))
    assert found == [[0], [0, 70, 80, 90]]


# Out of order, twice, late.


def test_messages_are_sorted_by_event_time():
    assert stream(QUIET, said(20), said(0), closed(30), said(10), Until(31)) == [[0, 10, 20]]


def test_messages_of_the_same_time_stay_as_they_arrived():
    one, two = said(0, "1", message_id="b"), said(0, "2", message_id="a")
    assert stream(QUIET, one, two, Until(100)) == [[1, 2]]


def test_duplicates_are_dropped_also_after_a_revision():
    found = stream(QUIET, said(0), said(0), Until(100), said(0), Until(500))
    assert found == [[0]]


def test_messages_without_ids_are_not_duplicates_of_each_other():
    again = [said(0, message_id=None), said(0, message_id=None)]
    assert stream(QUIET, *again, Until(100)) == [[0, 0]]


def test_a_late_message_makes_a_revision_with_the_whole_history():
    found = stream(QUIET, said(0), said(20), Until(100), said(10), Until(101))
    assert found == [[0, 20], [0, 10, 20]]


def test_a_late_message_in_a_chat_that_goes_on_waits_for_its_next_revision():
    talk = [said(0), said(20), Until(90), said(100), said(50), Until(111), Until(159)]
    assert stream(QUIET, *talk, Until(161)) == [[0, 20], [0, 20, 50, 100]]


def test_a_close_event_that_overtakes_its_chat_waits_for_it():
    assert stream(QUIET, closed(30), said(0), said(20), Until(31), Until(500)) == [[0, 20]]


def test_an_end_of_an_unknown_chat_is_a_dead_letter():
    assert stream(QUIET, closed(0), Until(59), Until(61)) == ["unknown_chat"]


def test_an_end_that_comes_long_before_its_chat_is_a_dead_letter_and_the_chat_is_analysed():
    found = stream(QUIET, closed(0), Until(61), said(100), Until(200))
    assert found == ["unknown_chat", [100]]


def test_chats_do_not_mix():
    found = stream(QUIET, said(0), said(1, chat_id="8"), said(2), said(3, chat_id="8"), Until(99))
    assert sorted(found) == [[0, 2], [1, 3]]


# What is kept.


def test_state_is_bounded_and_the_oldest_messages_are_dropped():
    rules = dataclasses.replace(QUIET, max_messages=3)
    talk = [said(second) for second in range(5)]
    assert stream(rules, *talk, Until(100), said(100), Until(200)) == [[2, 3, 4], [3, 4, 100]]


def test_a_chat_without_a_pause_is_bounded_too():
    rules = Rules(quiet_seconds=60, every_messages=0, max_messages=10)
    kept, conversation = [], Conversation()
    for number in range(100):
        kept.append(Kept(number * 1_000_000, number, said(number).message))
        done = advance("7", conversation, kept, number * 1_000_000, rules)
        conversation, kept = done.conversation, done.events
        assert len(kept) <= 10
        assert done.revisions == []
    assert (conversation.dropped, conversation.counted) == (90, 100)


def test_a_message_older_than_all_that_is_kept_makes_no_revision():
    rules = dataclasses.replace(QUIET, max_messages=2)
    talk = [said(second) for second in (10, 20, 30)]
    assert stream(rules, *talk, Until(100), said(5), Until(500)) == [[20, 30]]


def test_a_chat_is_forgotten_and_may_begin_anew():
    rules = dataclasses.replace(QUIET, retention_hours=1)
    found = stream(rules, said(0), Until(3601), said(4000), Until(4061), said(4050), Until(4200))
    assert found == [[0], [4000], [4000, 4050]]


def test_a_chat_is_kept_while_it_goes_on():
    rules = dataclasses.replace(QUIET, retention_hours=100 / 3600)
    found = stream(rules, said(0), Until(90), said(90), Until(180), said(170), Until(270))
    assert found == [[0], [0, 90], [0, 90, 170]]


def test_revisions_grow_also_when_a_message_is_late_or_the_chat_was_forgotten():
    events = [said(0), said(20), said(10), said(90_000), said(90_100)]
    found, _ = files(QUIET, events)
    numbers = [chat.revision for chat in sorted(found, key=lambda chat: chat.messages[-1].sent_at)]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == (START + 20) * 1000 + 3


# Whom it is about.


@pytest.mark.slow
def test_a_chat_of_agents_alone_waits_for_a_customer_or_is_a_dead_letter():
    hello = said(0, role="agent", user="a")
    assert stream(QUIET, hello, Until(100), said(110), Until(171)) == [[0, 110]]
    assert stream(QUIET, hello, Until(100), Until(100_000)) == ["no_customer"]


def test_attributes_of_messages_are_those_of_the_chat():
    one = said(0, attributes={"tenant": "a", "language": "en"})
    two = said(1, attributes={"language": "es"})
    (chat,), _ = files(QUIET, [one, two])
    assert chat.attributes == {"tenant": "a", "language": "es"}


def test_messages_without_any_time_stay_in_the_order_of_the_file():
    events = [
        Event(chat_id="7", message=Message(user_id="c", text=f"at {n}")) for n in (3, 1, 2)
    ] + [Event(chat_id="7")]
    (chat,), letters = files(QUIET, events)
    assert texts(chat) == [3, 1, 2]
    assert (chat.revision, letters) == (3, [])


# Files and streams.

SECONDS = st.lists(st.integers(0, 400), min_size=1, max_size=12)


@settings(max_examples=12, deadline=None)
@given(SECONDS, st.integers(0, 4), st.booleans(), st.randoms(use_true_random=False))
@pytest.mark.slow
def test_a_stream_in_order_and_a_shuffled_file_give_the_same_chats(seconds, every, ends, chance):
    """All revisions, not only the last; so that a backfill writes what the stream wrote."""
    rules = Rules(quiet_seconds=60, every_messages=every, retention_hours=300 / 3600)
    events = [said(second) for second in sorted(seconds)]
    if ends:
        events.append(closed(max(seconds)))
    in_order = replay(rules, events)
    shuffled = events + chance.sample(events[:-1], len(events) // 2)
    chance.shuffle(shuffled)
    found, letters = files(rules, shuffled)
    assert letters == []
    by_revision = {chat.revision: chat for chat in found}
    assert [by_revision[r] for r in sorted(by_revision)] == in_order


def replay(rules, events):
    """What `advance` returns when it is called after each event, as in a stream in order."""
    kept, conversation, revisions = [], Conversation(), []
    times = [int(event.at.timestamp()) * 1_000_000 for event in events]
    for number, (event, at) in enumerate(zip(events, times, strict=True)):
        kept.append(Kept(at, number, event.message))
        if at in times[number + 1 :]:
            continue  # others of the same time are on their way
        done = advance("7", conversation, kept, at, rules)
        revisions += done.revisions
        conversation, kept = done.conversation, done.events
    wake = 0
    while wake is not None:
        done = advance("7", conversation, kept, wake, rules)
        revisions += done.revisions
        conversation, kept, wake = done.conversation, done.events, done.wake
    return revisions


@pytest.mark.slow
def test_batch_and_stream_agree_on_the_real_runners():
    rules = dataclasses.replace(QUIET, every_messages=3)
    events = [said(second) for second in (0, 10, 20, 30, 100, 101, 300)] + [closed(301)]
    streamed = stream(rules, *[step for e in events for step in (e, Until(at(e) + 1))], Until(999))
    shuffled = events * 2
    random.Random(1).shuffle(shuffled)
    found, _ = files(rules, shuffled)
    assert [texts(chat) for chat in sorted(found, key=lambda chat: chat.revision)] == streamed
    assert streamed[-1] == [0, 10, 20, 30, 100, 101, 300]


def at(event):
    return int(event.at.timestamp()) - START


@pytest.mark.slow
@pytest.mark.parametrize("every", [0, 20])
def test_a_chat_of_100_000_messages_costs_no_more_for_each(every):
    """In a stream, where each message comes alone and is followed by the next."""
    rules = Rules(quiet_seconds=60, every_messages=every, max_messages=50)
    kept, conversation, revisions, size = [], Conversation(), 0, 0
    for number in range(100_000):
        kept.append(Kept(number * 1000, number, MESSAGE))
        size = max(size, len(kept))
        if number % (every or 50) == (every or 50) - 1:
            done = advance("7", conversation, kept, number * 1000, rules)
            conversation, kept = done.conversation, done.events
            revisions += len(done.revisions)
    assert size <= 100
    assert conversation.counted == 100_000
    assert revisions == (100_000 // every if every else 0)


MESSAGE = Message(user_id="c", text="again")


# What breaks.


def pieces(found):
    return [(letter.stage, letter.reason, letter.payload) for letter in found["dead_letters"]]


@pytest.mark.parametrize(
    "broken",
    [
        said(1, chat_id="bad").model_copy(update={"at": "yesterday"}),
        closed(1, "bad").model_copy(update={"at": "yesterday"}),
        said(1, "half an emoji: \ud83d", chat_id="bad"),
    ],
)
def test_an_event_that_cannot_be_kept_stops_no_other(broken):
    others = [said(0), said(0, chat_id="bad"), said(2, chat_id="bad")]
    found = run_stage(AssembleChats(QUIET), [*others[:2], broken, others[2]], OUTPUTS)
    assert sorted((one.chat_id, texts_of(one)) for one in found["ok"]) == [
        ("7", ["at 0"]), ("bad", ["at 0", "at 2"]),
    ]  # fmt: skip
    ((stage, reason, payload),) = pieces(found)
    assert (stage, reason) == ("assemble", "cannot_assemble")
    assert ("half an emoji: \\ud83d" in payload) or payload == broken.to_line()


OUTPUTS = ("ok", "dead_letters")


def texts_of(one):
    return [message.text for message in one.messages]


def test_a_chat_that_breaks_stops_no_other_and_its_events_are_kept(monkeypatch):
    def advance_or_fail(chat_id, *others):
        if chat_id == "bad":
            raise RecursionError("too deep")
        return advance(chat_id, *others)

    monkeypatch.setattr(assemble, "advance", advance_or_fail)
    events = [said(0), said(0, chat_id="bad"), said(1, chat_id="bad"), closed(2, "bad")]
    found = run_stage(AssembleChats(QUIET), events, OUTPUTS)
    assert [one.chat_id for one in found["ok"]] == ["7"]
    expected = [("assemble", "cannot_assemble", event.to_line()) for event in events[1:]]
    assert sorted(pieces(found)) == sorted(expected)


def test_a_message_in_the_state_that_cannot_be_read_is_kept_as_it_is(monkeypatch):
    """As after an update of a running job, where the old version wrote the state."""
    encode = Kept.encode
    monkeypatch.setattr(
        Kept, "encode", lambda kept: encode(kept).replace(b'"at 1"', b'{"old": "at 1"}')
    )
    events = [said(0), said(0, chat_id="bad"), said(1, chat_id="bad")]
    found = run_stage(AssembleChats(QUIET), events, OUTPUTS)
    assert [one.chat_id for one in found["ok"]] == ["7"]
    payloads = sorted(payload for _, _, payload in pieces(found))
    assert payloads[0] == events[1].to_line()
    assert '"text":{"old": "at 1"}' in payloads[1]
