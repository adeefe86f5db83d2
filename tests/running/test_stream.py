"""The event-driven pipeline on the real Pub/Sub emulator: events in, records out."""

import base64
import collections
import contextlib
import json
import os
import random
import re
import signal
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import apache_beam as beam
import pytest
from conftest import (
    ANGRY,
    APOLOGY,
    PubSub,
    chat,
    job_service,
    mistake,
    read,
    scripted,
    start_emulator,
)
from consoles import Visitor
from fakes.hook import Answer, Hook
from google.api_core.exceptions import DeadlineExceeded

from chatflow import dead_letters
from chatflow.cli import main
from chatflow.dead_letters import fitted, join
from chatflow.errors import ModelError
from chatflow.records import Chat, DeadLetter, now
from chatflow.running.emulator import HOST_VARIABLE
from chatflow.running.launch import execute
from chatflow.running.publishing import Line, send
from chatflow.running.runner import beam_options
from chatflow.sources.read import ReadArrivals, ReadMessages

CODE = re.compile(r"\bm\d+x\d+\b")


def echo(request):
    """A model whose summary names the messages that it was shown."""
    if request.task == "apology":
        return "We are sorry about all of that."
    codes = sorted(set(CODE.findall(request.parts[0].prompt)))
    return json.dumps({"sentiment": -1, "summary": " ".join(codes)})


def last_revisions(inbox):
    """By chat, the summary of the analysis with the greatest revision."""
    newest = {}
    for analysis in inbox.analyses:
        known = newest.get(analysis["chat_id"])
        if known is None or analysis["revision"] > known["revision"]:
            newest[analysis["chat_id"]] = analysis
    return {chat_id: analysis["summary"] for chat_id, analysis in newest.items()}


def message(text, chat_id="7", **fields):
    return {"chat_id": chat_id, "user_id": "c", "role": "customer", "text": text, **fields}


def closed(chat_id="7"):
    return {"chat_id": chat_id, "event": "closed"}


MALFORMED = (
    "no JSON {number}",
    '["{number}"]',
    '{{"chat_id": "x{number}"}}',
    '{{"chat_id": "x{number}", "event": "exploded"}}',
    '{{"chat_id": "", "user_id": "u", "text": "{number}"}}',
)


@pytest.mark.slow
def test_300_chats_shuffled_repeated_late_and_malformed(pubsub):
    """Each chat's last revision holds exactly its messages; what is malformed is a letter."""
    chance = random.Random(4)
    began = now() - timedelta(minutes=10)
    events, expected = [], {}
    for number in range(300):
        codes = [f"m{number}x{n}" for n in range(chance.randint(2, 8))]
        expected[str(number)] = " ".join(sorted(codes))
        for n, code in enumerate(codes):
            sent = (began + timedelta(seconds=10 * n)).isoformat()
            events.append(message(code, str(number), message_id=code, sent_at=sent))
        events.append(closed(str(number)))
    total = len(events)
    late = chance.sample([e for e in events if "text" in e], total // 20)
    on_time = [event for event in events if event not in late]
    bad = [chance.choice(MALFORMED).format(number=n) for n in range(total // 50)]
    repeated = chance.sample(on_time, total // 7)
    first = on_time + repeated + bad
    chance.shuffle(first)

    with pubsub.inbox() as inbox:
        with pubsub.pipeline(pubsub.options(model="scripted:/dev/null"), scripted(echo)) as run:
            pubsub.send(*first)
            on_time_chats = {event["chat_id"] for event in on_time if "text" in event}
            inbox.wait(lambda inbox: on_time_chats <= {a["chat_id"] for a in inbox.analyses})
            pubsub.send(*late)
            inbox.wait(lambda inbox: last_revisions(inbox) == expected)
        inbox.wait(lambda inbox: len(inbox.dead_letters) >= len(bad))
        unknown = [x for x in inbox.dead_letters if x["reason"] == "unknown_chat"]
        letters = [x for x in inbox.dead_letters if x["reason"] != "unknown_chat"]
        assert sorted(letter["payload"] for letter in letters) == sorted(bad)
        # A chat all of whose messages were late was closed before one of them was known.
        assert {x["chat_id"] for x in unknown} == set(expected) - on_time_chats
        assert last_revisions(inbox) == expected
        assert len(inbox.drafts) == len(inbox.analyses)
    counts = run.summary.to_dict()
    assert counts["lost"] == 0
    assert counts["lines_read"] >= len(first) + len(late)
    again = sum("text" in event for event in repeated)
    assert counts["reduced"]["duplicate_messages"] >= again > 200


@pytest.mark.slow
def test_results_can_be_filtered_and_come_in_order(pubsub):
    with pubsub.inbox() as inbox:
        with pubsub.pipeline(pubsub.options(model="scripted:/dev/null"), scripted(echo)):
            pubsub.send(message("m1x1"), closed())
            inbox.wait(lambda inbox: len(inbox.drafts) == 1)
            pubsub.send(message("m1x2"), b"rubbish", closed())
            inbox.wait(lambda inbox: len(inbox.drafts) == 2 and len(inbox.dead_letters) == 1)
        kinds = {}
        for found in inbox.messages:
            kinds.setdefault(found.attributes["kind"], []).append(found)
    one, two = kinds["Analysis"]
    assert dict(one.attributes) == {
        "kind": "Analysis", "id": json.loads(one.data)["analysis_id"], "chat_id": "7",
        "user_id": "c", "sentiment": "-1", "revision": str(json.loads(one.data)["revision"]),
    }  # fmt: skip
    assert int(one.attributes["revision"]) < int(two.attributes["revision"])
    assert {found.ordering_key for found in kinds["Analysis"] + kinds["Draft"]} == {"7"}
    assert kinds["Draft"][0].attributes["id"] == json.loads(kinds["Draft"][0].data)["draft_id"]
    (dead,) = kinds["DeadLetter"]
    assert (dead.attributes["stage"], dead.attributes["reason"]) == ("read", "not_json")


@pytest.mark.slow
def test_attributes_and_publish_time_stand_in_for_fields(pubsub):
    days_ahead = (now() + timedelta(days=3)).isoformat()
    options = pubsub.options(model="scripted:/dev/null")
    with pubsub.inbox() as inbox, pubsub.pipeline(options, scripted(echo)) as run:
        pubsub.send({"text": "m1x1"}, chat_id="by attribute", user_id="c", tenant="a")
        pubsub.send(message("m2x1", "skewed", sent_at=days_ahead))
        pubsub.send(closed("by attribute"), closed("skewed"))
        inbox.wait(lambda inbox: len(inbox.drafts) == 2)
    revisions = {a["chat_id"]: a["revision"] for a in inbox.analyses}
    assert set(revisions) == {"by attribute", "skewed"}
    assert all(abs(r / 1000 - time.time()) < 60 for r in revisions.values())
    assert run.summary.get("clock_skewed_messages") == 1


@pytest.mark.slow
def test_whole_chats_come_over_pubsub_too(pubsub, script):
    with pubsub.inbox() as inbox, pubsub.pipeline(pubsub.options(model=script(ANGRY, APOLOGY))):
        pubsub.send(chat("late!", chat_id="whole"))
        inbox.wait(lambda inbox: len(inbox.drafts) == 1)
    assert inbox.analyses[0]["chat_id"] == "whole"


@pytest.mark.slow
def test_a_topic_is_read_from_now_on(pubsub, script):
    options = pubsub.options(input=pubsub.topic("events"), model=script(ANGRY, APOLOGY))
    with pubsub.inbox() as inbox, pubsub.pipeline(options):

        def say_it_until_heard():
            while not inbox.analyses:
                pubsub.send(chat("late!", chat_id="now"))
                threading.Event().wait(0.2)

        threading.Thread(target=say_it_until_heard, daemon=True).start()
        inbox.wait(lambda inbox: len(inbox.drafts) == 1)


@pytest.mark.slow
def test_draining_finishes_chats_that_are_open_and_writes_files(pubsub, script, tmp_path):
    topics_and_files = {
        kind: f"{pubsub.topic(kind)},{tmp_path}/{kind}"
        for kind in ("analyses", "drafts", "dead_letters")
    }
    options = pubsub.options(model=script(ANGRY, APOLOGY), **topics_and_files)
    with pubsub.inbox() as inbox:
        with pubsub.pipeline(options) as run:
            pubsub.send(*(message("late!", str(number)) for number in range(30)), b"rubbish")
            inbox.wait(lambda inbox: inbox.dead_letters)
        inbox.wait(lambda inbox: len(inbox.drafts) == 30)
    analyses, drafts = read(tmp_path, "analyses"), read(tmp_path, "drafts")
    assert len({a["chat_id"] for a in analyses}) == len(analyses) == len(drafts) == 30
    assert [letter["payload"] for letter in read(tmp_path, "dead_letters")] == ["rubbish"]
    assert not list(tmp_path.glob("*.part"))
    assert run.summary.to_dict()["lost"] == 0


@pytest.mark.slow
def test_the_model_failing_for_a_while_loses_nothing(pubsub):
    """What fails meanwhile is in the dead-letter topic, and is replayed from there."""
    HEALTHY.clear()
    options = pubsub.options(model="scripted:/dev/null")
    with pubsub.inbox() as inbox:
        with pubsub.pipeline(options, scripted(failing_model)):
            pubsub.send(*(message(f"m{n}x1", str(n)) for n in range(20)))
            pubsub.send(*(closed(str(n)) for n in range(20)))
            inbox.wait(lambda inbox: len(inbox.dead_letters) == 20)
        assert inbox.analyses == []
        HEALTHY.set()
        again = pubsub.options(
            input=pubsub.subscription("dead_letters"), model="scripted:/dev/null"
        )
        with pubsub.pipeline(again, scripted(failing_model), replay=True):
            inbox.wait(lambda inbox: len(inbox.drafts) == 20)
    assert last_revisions(inbox) == {str(n): f"m{n}x1" for n in range(20)}


@pytest.mark.slow
def test_a_letter_of_9_mb_is_replayed_whole(pubsub):
    """It is too large for a message: the topic has its parts, and they wait for each other."""
    noise = base64.b64encode(random.Random(3).randbytes(7_200_000)).decode()
    photo = " ".join(noise[at : at + 100] for at in range(0, len(noise), 100))  # not taken for data
    large = chat("m1x1 " + photo, chat_id="photo").to_json()
    options = pubsub.options(model="scripted:/dev/null")
    HEALTHY.clear()
    with pubsub.inbox() as inbox:
        with pubsub.pipeline(options, scripted(failing_model)):
            pubsub.send(large)
            inbox.wait(lambda inbox: len(inbox.dead_letters) == 2)
        parts = [DeadLetter(**part) for part in inbox.dead_letters]
        assert join(parts).payload_bytes() == chat_asked(large)
        HEALTHY.set()
        again = pubsub.options(
            input=pubsub.subscription("dead_letters"), model="scripted:/dev/null"
        )
        with pubsub.pipeline(again, scripted(echo_start), replay=True):
            inbox.wait(lambda inbox: len(inbox.analyses) == 1)
    assert inbox.analyses[0]["chat_id"] == "photo"
    assert len(inbox.dead_letters) == 2


def chat_asked(line):
    """A chat of one customer, as its dead letter holds it."""
    return Chat.model_validate_json(line).model_copy(update={"user_id": "c"}).to_json().encode()


def echo_start(request):
    if request.task == "apology":
        return "We are sorry about all of that."
    return json.dumps({"sentiment": 0, "summary": "It is a photo."})


POISON = (
    random.Random(5).randbytes(9_900_000),
    b'{"chat_id": ' + b"[" * 100_000,
    b'{"chat_id": ' + b"1" * 10_000 + b', "messages": []}',
    b'{"chat_id": "half", "messages": [{"user_id": "c", "text": "\\ud83d"}]}',
    b'{"chat_id": "zero", "messages": [{"user_id": "c", "text": "\0"}]}',
    b'{"chat_id": "same", "chat_id": 1e999, "messages": []}',
    chat("late!", chat_id="a\0\x1b\u202e").to_json().encode(),
    json.dumps({"chat_id": "x" * 1_000_000, "user_id": "c", "text": "late!"}).encode(),
    json.dumps({"chat_id": "7", "user_id": "c", "text": "!", "sent_at": "0001-01-01"}).encode(),
    json.dumps(message("!", "8", sent_at="9999-12-31T23:59:59-12:00")).encode(),
)


@pytest.mark.slow
def test_no_message_stops_a_stream(pubsub):
    """Each is analysed, or a dead letter that holds it whole; all are acknowledged."""
    options = pubsub.options(model="scripted:/dev/null")
    with pubsub.inbox() as inbox:
        with pubsub.pipeline(options, scripted(echo_start)) as run:
            pubsub.send(*POISON, **{"tenant": "\0\n", "x" * 256: "y" * 1024, "z": ""})
            pubsub.send(chat("late!", chat_id="good"))
            inbox.wait(lambda inbox: "good" in {found["chat_id"] for found in inbox.analyses})
        inbox.wait(lambda inbox: len(inbox.analyses) + len(letters_of(inbox)) == len(POISON) + 1)
    held = {whole.payload_bytes() for whole in letters_of(inbox)}
    assert held <= set(POISON)
    assert set(POISON[:3]) <= held
    assert run.summary.lost == 0
    assert unacknowledged(pubsub) == []


def unacknowledged(pubsub):
    with contextlib.suppress(DeadlineExceeded):
        found = pubsub.subscriber.pull(
            subscription=pubsub.subscription("events"), max_messages=1, timeout=2, retry=None
        )
        return [received.message.data for received in found.received_messages]
    return []


def letters_of(inbox):
    """The dead letters that are there whole."""
    letters = [DeadLetter(**letter) for letter in inbox.dead_letters]
    whole = [letter for letter in letters if letter.part is None]
    parts = collections.defaultdict(dict)
    for letter in letters:
        if letter.part is not None:
            parts[letter.whole_id, letter.parts][letter.part] = letter
    return whole + [
        join(found.values()) for (_, number), found in parts.items() if len(found) == number
    ]


@pytest.mark.slow
def test_parts_that_wait_when_a_stream_is_drained_are_dead_letters_again(pubsub, monkeypatch):
    monkeypatch.setattr(dead_letters, "PART_BYTES", 300)
    noise = random.Random(1).randbytes(1000).hex()
    whole = DeadLetter(stage="read", reason="x", error="x", payload=noise, failed_at=now())
    first, *others = fitted(whole, 1000)
    with pubsub.inbox() as inbox:
        options = pubsub.options(model="scripted:/dev/null")
        with pubsub.pipeline(options, scripted(echo), replay=True):
            pubsub.send(*(part.to_json() for part in others), "no letter")
            inbox.wait(lambda inbox: len(inbox.dead_letters) == 1)
        inbox.wait(lambda inbox: len(inbox.dead_letters) == 1 + len(others))
    waited = [DeadLetter(**part) for part in inbox.dead_letters[1:]]
    assert {part.reason for part in waited} == {"part_missing"}
    assert join([first, *waited]).payload == noise


@pytest.mark.slow
def test_a_webhook_takes_drafts_as_they_come(pubsub, monkeypatch):
    """What it refuses is in the dead-letter topic, and is replayed from there."""
    monkeypatch.setenv("HOOK_SECRET", "whsec_" + "b" * 40)
    given = {"model": "scripted:/dev/null", "webhook_secret": "env:HOOK_SECRET"}
    with Hook() as hook, pubsub.inbox() as inbox:
        hook.behave = lambda got, _: Answer(404 if got.record["chat_id"] == "1" else 200)
        with pubsub.pipeline(pubsub.options(drafts=hook.address, **given), scripted(echo)):
            pubsub.send(*(message(f"m{n}x1", str(n)) for n in range(4)))
            pubsub.send(*(closed(str(n)) for n in range(4)))
            inbox.wait(lambda inbox: inbox.dead_letters and len(hook.received) == 4)
        (letter,) = inbox.dead_letters
        assert (letter["stage"], letter["chat_id"]) == ("write", "1")
        hook.behave = lambda *_: Answer()
        again = pubsub.options(
            input=pubsub.subscription("dead_letters"), drafts=hook.address, **given
        )
        with pubsub.pipeline(again, scripted(must_not_be_asked), replay=True):
            assert hook.wait(lambda received: len(received) == 5)
    assert hook.received[-1].body.decode() == letter["payload"]
    assert len(inbox.analyses) == 4


def must_not_be_asked(request):
    raise AssertionError


HEALTHY = threading.Event()


def failing_model(request):
    if not HEALTHY.is_set():
        raise ModelError("overloaded", "the model is away")
    return echo(request)


@pytest.mark.slow
def test_the_emulator_restarted_in_the_middle(monkeypatch):
    """It forgets its topics. The pipeline goes on as soon as they are there again."""
    own = start_emulator()
    port = int(own.host.split(":")[1])
    monkeypatch.setenv(HOST_VARIABLE, own.host)
    try:
        before = PubSub(own.host)
        options = before.options(model="scripted:/dev/null", quiet_seconds=1)
        with before.pipeline(options, scripted(echo)) as run:
            with before.inbox() as inbox:
                before.send(*(message(f"m{n}x1", str(n)) for n in range(10)))
                inbox.wait(lambda inbox: len(inbox.drafts) == 10)
            own.stop()
            own = start_emulator(port)
            after = PubSub(own.host, before.project)
            with after.inbox() as inbox:
                after.send(*(message(f"m{n}x2", str(n)) for n in range(10)))
                inbox.wait(lambda inbox: len(inbox.drafts) >= 10, 90)
        # The second messages follow the first ones, which the pipeline still knows.
        assert last_revisions(inbox) == {str(n): f"m{n}x1 m{n}x2" for n in range(10)}
        assert run.summary.to_dict()["lost"] == 0
    finally:
        own.stop()


# Batches, and the local runner.


@pytest.mark.slow
def test_requests_of_small_bundles_are_batched_together(pubsub, script):
    """One chat after the other, each in a separate bundle: the model is asked in batches."""
    model = script(ANGRY, APOLOGY)
    sizes = {}
    for wait in (0.0, 4.0):
        options = pubsub.options(model=model, max_batch_duration_secs=wait)
        with pubsub.inbox() as inbox, pubsub.pipeline(options) as run:
            chats = (chat("late!", chat_id=f"{wait}-{number}") for number in range(8))
            lines = (Line(one.to_json().encode(), one.chat_id) for one in chats)
            send(lines, pubsub.topic("events"), rate=4)
            inbox.wait(lambda inbox: len(inbox.drafts) == 8)
        sizes[wait] = run.summary.to_dict()["batch_size"]["mean"]
    # How many chats a bundle holds without waiting depends on how busy the machine is.
    assert sizes[0.0] < sizes[4.0]
    assert sizes[4.0] > 5


@pytest.mark.slow
def test_requests_of_different_lengths_are_batched_apart(pubsub, script):
    options = pubsub.options(
        model=script(ANGRY, APOLOGY), max_batch_duration_secs=0.5, batch_buckets="300"
    )
    with pubsub.inbox() as inbox, pubsub.pipeline(options) as run:
        for number in range(4):
            pubsub.send(chat("late!", chat_id=f"short-{number}"))
            pubsub.send(chat("late! " * 300, chat_id=f"long-{number}"))
        inbox.wait(lambda inbox: len(inbox.drafts) == 8)
    assert run.summary.to_dict()["batch_size"]["max"] == 4


class Fragile(beam.DoFn):
    """Fails at its first bundle, after it has seen an element."""

    failed: ClassVar[list[int]] = []

    def process(self, element):
        yield element
        if not Fragile.failed:
            Fragile.failed.append(1)
            raise OSError("the disk is full")


def test_a_bundle_that_fails_is_done_again_and_nothing_twice(pubsub):
    Fragile.failed.clear()
    SEEN.clear()
    options = beam_options([], streaming=True)
    pipeline = beam.Pipeline(options=options)
    read = pipeline | ReadMessages(pubsub.subscription("events"))
    _ = read | beam.ParDo(Fragile()) | beam.Map(see)
    result = pipeline.run()
    pubsub.send(b"1", b"2", b"3")
    assert all(SAW.acquire(timeout=60) for _ in range(3))
    result.drain()
    assert result.wait_until_finish() == "DONE"
    assert sorted(SEEN) == [b"1", b"2", b"3"]
    assert Fragile.failed == [1]


SEEN: list[bytes] = []
SAW = threading.Semaphore(0)


def see(element):
    SEEN.append(element.line)
    SAW.release()


def test_messages_are_acknowledged_after_they_were_handled(pubsub):
    """What a pipeline had read when it was killed comes again, also from a batch that waits."""
    HOLD.clear()
    HOLDING.clear()
    pipeline = beam.Pipeline(options=beam_options([], streaming=True))
    arrivals = pipeline | ReadMessages(pubsub.subscription("events"))
    batches = arrivals | beam.BatchElements(2, 2, max_batch_duration_secs=1)
    _ = batches | beam.Map(hold)
    result = pipeline.run()
    pubsub.send(b"precious")
    assert HOLDING.wait(30)
    result._readers.by_path[pubsub.subscription("events")]._puller.close()  # as if it were gone
    again = pubsub.subscriber.pull(
        subscription=pubsub.subscription("events"), max_messages=1, timeout=30
    )
    assert [m.message.data for m in again.received_messages] == [b"precious"]
    HOLD.set()
    result.drain()
    result.wait_until_finish()


HOLD, HOLDING = threading.Event(), threading.Event()


def hold(element):
    HOLDING.set()
    HOLD.wait(30)
    return element


@pytest.mark.slow
def test_a_publisher_of_other_processes(pubsub, script, lines, warm):
    """Files in, topics out, on workers of the job service."""
    source = lines(*(chat("late!", chat_id=str(n)) for n in range(5)))
    options = pubsub.options(input=source, model=script(ANGRY, APOLOGY))
    with pubsub.inbox() as inbox:
        assert execute(options, job_service(warm.folder / "python")).lost == 0
        inbox.wait(lambda inbox: len(inbox.drafts) == 5)


# The commands.


@pytest.mark.slow
def test_run_publish_and_tail_from_the_command_line(pubsub, script, lines, tmp_path, capsys, warm):
    source = lines(chat("late again!", "sorry", chat_id="a<b"), chat("thanks", chat_id="2"), "bad")
    topics = [f"--{kind}={pubsub.topic(kind)}" for kind in ("analyses", "drafts", "dead_letters")]
    model = script(ANGRY, APOLOGY)
    with warm.start(
        "-m", "chatflow", "run", f"--input={pubsub.subscription('events')}", *topics,
        "--model", model, "--summary=json",
    ) as run, warm.start(
        "-m", "chatflow", "tail", "--json", "--count=5",
        *map(pubsub.subscription, ("analyses", "drafts", "dead_letters")),
    ) as tail:  # fmt: skip
        assert main(["publish", source, "--topic", pubsub.topic("events"), "--as_messages",
                     "--rate=50", "--summary=json"]) == 0  # fmt: skip
        assert json.loads(capsys.readouterr().out)["published"] == 6
        records = [json.loads(line) for line in tail.stdout]
        assert tail.wait(60) == 0
        run.send_signal(signal.SIGINT)
        counts = json.loads(run.stdout.read().splitlines()[-1])
        assert run.wait(60) == 0
    assert sorted(r["chat_id"] for r in records if "summary" in r) == ["2", "a<b"]
    assert sum("draft_id" in r for r in records) == 2
    assert [r["reason"] for r in records if "failed_at" in r] == ["not_json"]
    assert (counts["messages_read"], counts["chats_assembled"], counts["lost"]) == (3, 2, 0)


@pytest.mark.slow
def test_tail_prints_lines_for_people(pubsub, script, capsys):
    with pubsub.pipeline(pubsub.options(model=script(ANGRY, APOLOGY))):
        pubsub.send(chat("late!", chat_id="\x1b[1mx"), b"rubbish")
        paths = [pubsub.subscription(k) for k in ("analyses", "drafts", "dead_letters")]
        assert main(["tail", "--count=3", *paths]) == 0
    printed = capsys.readouterr().out
    assert "angry   [1mx c: The parcel is late." in printed
    assert "draft   [1mx c: We are sorry" in printed
    assert "dead    - read/not_json" in printed
    assert "\x1b" not in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--input=SUBSCRIPTIONS/none", "--output=OUT", "--model=SCRIPT"],
         "--input: projects/PROJECT/subscriptions/none cannot be read: 404"),
        (["run", "--input=SUBSCRIPTIONS/events", "--output=OUT", "--model=SCRIPT",
          "--analyses=TOPICS/none"], "topics/none cannot be published to: 404"),
        (["tail", "TOPICS/none"], "topics/none cannot be read: 404"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_a_clear_line_at_launch(
    pubsub, script, tmp_path, capsys, arguments, says
):
    places = {
        "SUBSCRIPTIONS": f"projects/{pubsub.project}/subscriptions",
        "TOPICS": f"projects/{pubsub.project}/topics",
        "SCRIPT": script(ANGRY),
        "OUT": str(tmp_path),
    }
    assert says.replace("PROJECT", pubsub.project) in mistake(arguments, places, capsys)


def test_the_id_label_goes_to_the_runner():
    """Dataflow leaves out repeated ones by it; here, the message ids do."""
    pipeline = beam.Pipeline(options=beam_options([], streaming=True))
    _ = pipeline | ReadArrivals(["projects/my-project/topics/x"], id_label="event_id")
    labels = []

    class Visitor(beam.pipeline.PipelineVisitor):
        def enter_composite_transform(self, node):
            if isinstance(node.transform, beam.io.ReadFromPubSub):
                labels.append(node.transform._source.id_label)

    pipeline.visit(Visitor())
    assert labels == ["event_id"]


def test_publish_sends_lines_as_they_are(pubsub, lines):
    source = lines(chat("x", chat_id="c"), "rubbish", message("hi", "m"))
    assert main(["publish", source, "--topic", pubsub.topic("events")]) == 0
    pulled = pubsub.subscriber.pull(
        subscription=pubsub.subscription("events"), max_messages=10, timeout=30
    )
    found = {m.message.data: m.message.ordering_key for m in pulled.received_messages}
    assert found == dict(zip(Path(source).read_bytes().splitlines(), ["c", "", "m"], strict=True))


@pytest.mark.slow
def test_stream_runs_the_whole_system_and_leaves_nothing_behind(
    emulator_host, script, lines, tmp_path, warm
):
    """With its own emulator, as a newcomer runs it; a draft is approved; then Ctrl-C."""
    source = lines(*(chat("late!", "sorry", chat_id=str(n)) for n in range(10)))
    environment = {k: v for k, v in os.environ.items() if k != HOST_VARIABLE}
    with warm.start(
        "-m", "chatflow", "stream", "--chats", source, "--rate=100",
        "--model", script(ANGRY, APOLOGY), "--summary=json", f"--output={tmp_path}/out",
        "--console_port=0", env=environment,
    ) as process:  # fmt: skip
        host = page = approved = None
        for line in process.stderr:
            host = host or re.search(r"PUBSUB_EMULATOR_HOST=([\d.]+):(\d+)", line)
            page = page or re.search(r"http://([\d.]+):(\d+)\S*", line)
            if "drafts: 10" in line and not approved:
                approved = Visitor(page[0]).approve_one()
            if "1 approved and sent" in line:
                break
        else:
            pytest.fail(process.stderr.read())
        process.send_signal(signal.SIGINT)
        counts = json.loads(process.stdout.read().splitlines()[-1])
        assert process.wait(60) == 0
    assert (counts["messages_read"], counts["chats_assembled"]) == (20, 10)
    assert counts["lost"] == 0
    assert len(read(tmp_path / "out", "drafts")) == 10
    for place in (host, page):
        with socket.socket() as client:
            assert client.connect_ex((place[1], int(place[2]))) != 0, f"{place[0]} still runs"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--input=projects/p/subscription/x", "--output=x"], "no file matches"),
        (["run", "--input=pubsub://x", "--output=x"], "is not a Pub/Sub path"),
        (["run", "--input=projects/p/topics/", "--output=x"], "is not a Pub/Sub path"),
        (["run", "--input=projects/proj/topics/x,a.jsonl", "--output=x"],
         "use a separate run for each"),
        (["run", "--input=IN", "--model=SCRIPT", "--analyses=redis://x", "--output=x"],
         "nothing writes to 'redis://x'"),
        (["run", "--input=IN", "--model=SCRIPT", "--analyses=projects/p/topic/x",
          "--drafts=y", "--dead_letters=projects/p/topics"], "is not a topic"),
        (["run", "--input=IN", "--model=SCRIPT", "--analyses=x"], "--drafts"),
        (["run", "--input=IN", "--quiet_seconds=7200", "--retention_hours=1"], "less than"),
        (["run", "--input=IN", "--quiet_seconds=0"], "--quiet_seconds=0.0: must be at least"),
        (["run", "--input=IN", "--batch_buckets=a,b"], "--batch_buckets=a,b"),
        (["publish", "/none", "--topic=projects/p/topics/x"], "no file matches '/none'"),
        (["publish", "IN", "--topic=x"], "--topic=x: must be projects/PROJECT/topics/NAME"),
        (["publish", "IN"], "--topic"),
        (["publish", "IN", "--topic=projects/p/topics/x", "--rate=-1"], "--rate=-1"),
        (["publish", "IN", "--topic=projects/p/topics/x", "--speed=1"], "unknown flag --speed=1"),
        (["tail", "x"], "'x': must be projects/PROJECT/topics/NAME"),
        (["stream", "--chats=/none"], "no file matches '/none'"),
        (["stream", "--rate=0"], "--rate=0.0: must be more than 0"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_clear_line(lines, script, capsys, arguments, says):
    places = {"IN": lines(chat("x")), "SCRIPT": script(ANGRY)}
    assert says in mistake(arguments, places, capsys)
