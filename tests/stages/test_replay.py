"""Dead letters are opened; those in parts are joined first."""

import functools
import random

import pytest
from apache_beam.coders import registry
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing import test_pipeline, test_stream
from apache_beam.testing.util import assert_that
from conftest import DRAFT, KEPT, chat, keep, run_stage

from chatflow import dead_letters
from chatflow.dead_letters import fitted
from chatflow.records import Arrival, DeadLetter, now, parse_record
from chatflow.stages.replay import OpenDeadLetters

OUTPUTS = ("arrivals", "analysed", "analyses", "drafts", "dead_letters")
LIMIT = 1000


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Parts are of a few bytes."""
    monkeypatch.setattr(dead_letters, "PART_BYTES", 300)


def letter(number, **fields):
    text = random.Random(number).randbytes(1000).hex()
    payload = chat(text, chat_id=f"{number}").to_json()
    given = {"stage": "read", "reason": "x", "error": "x", "payload": payload, "failed_at": now()}
    return DeadLetter(**given | fields)


def opened(*letters):
    arrivals = [Arrival(one.to_json().encode()) for one in letters]
    return run_stage(OpenDeadLetters(), arrivals, OUTPUTS)


def lines(found):
    return sorted(arrival.line.decode() for arrival in found["arrivals"])


@pytest.mark.parametrize("seed", range(3))
def test_parts_in_any_order_and_repeated_are_one_letter(seed):
    letters = [letter(number, attributes={"n": f"{number}"}) for number in range(4)]
    parts = [part for one in letters for part in fitted(one, LIMIT)]
    assert len(parts) > 4 + len(letters)
    parts += random.Random(seed).choices(parts, k=6)
    random.Random(seed).shuffle(parts)
    found = opened(*parts)
    assert lines(found) == [one.payload for one in letters]
    assert {arrival.attributes["n"] for arrival in found["arrivals"]} == set("0123")
    assert found["dead_letters"] == []


def test_each_kind_of_letter_may_be_in_parts():
    draft = DRAFT.model_copy(update={"text": random.Random(1).randbytes(1000).hex()})
    whole = letter(1, stage="write", payload=draft.to_json())
    assert opened(*fitted(whole, LIMIT))["drafts"] == [draft]


def test_parts_without_their_others_are_kept_and_can_be_replayed_with_them():
    first, *others = fitted(letter(1), LIMIT)
    kept = opened(*others, letter(2))
    assert len(kept["arrivals"]) == 1
    waiting = kept["dead_letters"]
    assert {(one.stage, one.reason) for one in waiting} == {("replay", "part_missing")}
    assert f"{len(others)} of {first.parts} parts are there" in waiting[0].error
    assert {one.payload for one in waiting} == {one.payload for one in others}
    found = opened(first, *waiting)
    assert lines(found) == [letter(1).payload]
    assert found["dead_letters"] == []


def test_parts_that_do_not_fit_together_are_kept():
    first, second, *others = fitted(letter(1), LIMIT)
    changed = second.model_copy(update={"payload": first.payload})
    found = opened(first, changed, *others, letter(2))
    assert len(found["arrivals"]) == 1
    assert {one.reason for one in found["dead_letters"]} == {"bad_parts"}
    payloads = [first.payload, changed.payload, *(one.payload for one in others)]
    assert sorted(one.payload for one in found["dead_letters"]) == sorted(payloads)


@pytest.mark.parametrize("encoding", ["base64", "gzip"])
@pytest.mark.parametrize("stage", ["read", "draft_model", "write"])
def test_a_letter_with_a_broken_payload_stops_no_other(encoding, stage):
    broken = letter(1, payload="%", payload_encoding=encoding, stage=stage)
    found = opened(broken, letter(2))
    assert lines(found) == [letter(2).payload]
    (again,) = found["dead_letters"]
    assert (again.stage, again.reason) == ("replay", "bad_payload")
    assert parse_record(DeadLetter, again.payload_bytes()) == broken


def streamed(*letters):
    """Opens letters as they come, each in a separate bundle; then the stream is drained."""
    KEPT.clear()
    script = test_stream.TestStream(coder=registry.get_coder(Arrival))
    for one in letters:
        script.add_elements([Arrival(one.to_json().encode())])
    script.advance_watermark_to_infinity()
    options = PipelineOptions([], streaming=True)
    runner = "apache_beam.runners.direct.direct_runner.BundleBasedDirectRunner"
    with test_pipeline.TestPipeline(runner=runner, options=options) as pipeline:
        found = pipeline | script | OpenDeadLetters()
        for name in OUTPUTS:
            assert_that(getattr(found, name), functools.partial(keep, name), label=f"Keep{name}")
    return dict(KEPT)


def test_a_letter_that_fails_again_in_a_stream_is_joined_again():
    """Its parts are those of the first time; what comes twice is left out meanwhile."""
    first, again = fitted(letter(1), LIMIT), fitted(letter(1), LIMIT)
    assert [one.payload for one in first] == [one.payload for one in again]
    found = streamed(*first, *first[:2], *again, again[-1])
    assert lines(found) == [letter(1).payload] * 2
    assert found["dead_letters"] == []
