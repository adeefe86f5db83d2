"""A stage of your own: how long the customers of each chat waited for an answer.

    python examples/own_stage.py [FOLDER]

Reads samples/chats.jsonl and writes FOLDER/waits and FOLDER/dead_letters; no model is needed.
"""

import itertools
import sys
from collections.abc import Iterable
from pathlib import Path

import apache_beam as beam

from chatflow import (
    BadInputError,
    Chat,
    DeadLettered,
    Options,
    ParseArrivals,
    ReadArrivals,
    Record,
    WriteRecords,
    launch,
    new_pipeline,
)

CHATS = Path(__file__).parent.parent / "samples" / "chats.jsonl"


# First, what comes out: a record. It is immutable, checks its fields, and knows its JSON.
class Wait(Record):
    """The longest time that a customer of a chat waited for an answer."""

    chat_id: str
    seconds: float


# Then the work: a plain function, which you can test without Beam. It returns any number of
# results. What it raises concerns this chat alone, and becomes a dead letter with the reason.
def longest_wait(chat: Chat) -> Iterable[Wait]:
    """Yields the longest wait of a chat, if a customer's message was answered."""
    if any(message.sent_at is None for message in chat.said):
        raise BadInputError("no_time", "a message has no sent_at, so no wait can be measured")
    waits = [
        (answer.sent_at - asked.sent_at).total_seconds()
        for asked, answer in itertools.pairwise(chat.said)
        if asked.role == "customer" and answer.role != "customer"
    ]
    if waits:
        yield Wait(chat_id=chat.chat_id, seconds=max(waits))


# At last the pipeline: chatflow's stages with yours among them. `DeadLettered` makes a stage of
# the function; its name, "wait", is the `stage` of its dead letters.
folder = sys.argv[1] if len(sys.argv) > 1 else "out/own_stage"
options = Options(input=str(CHATS))

pipeline = new_pipeline()
arrivals = pipeline | "ReadArrivals" >> ReadArrivals([options.input])
read = arrivals | "ParseArrivals" >> ParseArrivals(options.max_line_bytes)
measured = read.chats | "MeasureWaits" >> DeadLettered("wait", longest_wait, Wait)
measured.ok | "WriteWaits" >> WriteRecords([f"{folder}/waits"])
dead_letters = (read.dead_letters, measured.dead_letters) | beam.Flatten()
dead_letters | "WriteDeadLetters" >> WriteRecords([f"{folder}/dead_letters"])

# `launch` checks inputs and folders before anything runs, and puts results in place at the end.
launch(pipeline)
