"""Messages of Pub/Sub as they are pulled, on the real emulator."""

import random

import pytest
from conftest import ANGRY, APOLOGY, chat

from chatflow.sources import puller
from chatflow.sources.puller import open_puller

LARGE = 9_600_000
"""Bytes; gRPC's own limit is 4 MB, Pub/Sub's is 10 MB."""


@pytest.mark.slow
def test_large_messages_are_read_among_small_ones(pubsub, script):
    photo = random.Random(1).randbytes(LARGE // 2 - 500).hex()
    chats = [chat("late!", chat_id=f"small-{n}") for n in range(6)]
    chats[3:3] = [chat("It is late: " + photo, chat_id="large")]
    options = pubsub.options(model=script(ANGRY, APOLOGY))
    with pubsub.inbox() as inbox, pubsub.pipeline(options) as run:
        pubsub.send(*chats)
        inbox.wait(lambda inbox: len(inbox.drafts) == 7)
    assert {found["chat_id"] for found in inbox.analyses} == {one.chat_id for one in chats}
    assert inbox.dead_letters == []
    assert run.summary.lost == 0


def test_few_large_messages_are_taken_at_once(pubsub, monkeypatch):
    monkeypatch.setattr(puller, "WAITING_BYTES", 10_000)
    pubsub.send(*(f"{n}" * 6_000 for n in range(9)), "x")
    pulled = open_puller(pubsub.subscription("events")).start()
    try:
        sizes = []
        while len(sizes) < 10:
            taken = pulled.take(100, 30)
            assert sum(len(found.message.data) for found in taken[:-1]) < 10_000
            sizes += [len(found.message.data) for found in taken]
            pulled.acknowledge(taken)
    finally:
        pulled.close()
    assert sorted(sizes) == [1] + [6_000] * 9
