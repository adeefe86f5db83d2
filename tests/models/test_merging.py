"""Callers in several threads and processes share batches."""

import concurrent.futures
import multiprocessing
import threading

import pytest
from apache_beam.utils.multi_process_shared import MultiProcessShared

from chatflow.models.base import LanguageModel
from chatflow.models.merging import Merger
from chatflow.models.requests import Answer, Part, Request


class Gate:
    """Batches as they are run; each waits until it is let through."""

    def __init__(self, opened=False):
        self.batches, self.began, self.free = [], threading.Semaphore(0), threading.Semaphore(0)
        self.opened = opened

    def run(self, items):
        self.batches.append(list(items))
        self.began.release()
        if not self.opened:
            assert self.free.acquire(timeout=30)
        if "bad" in items:
            raise ValueError("bad")
        return [item * 2 for item in items]


def test_what_arrives_while_a_batch_runs_is_the_next_batch():
    gate = Gate()
    merged = Merger(gate.run, most=8, seconds=0)
    with concurrent.futures.ThreadPoolExecutor(4) as callers:
        first = callers.submit(merged, ["a"])
        assert gate.began.acquire(timeout=30)
        others = [callers.submit(merged, items) for items in (["b", "c"], ["d"], ["e"])]
        while len(merged._waiting) < 4:
            concurrent.futures.wait([first], timeout=0.01)
        gate.free.release(2)
        assert first.result(30) == ["aa"]
        assert [other.result(30) for other in others] == [["bb", "cc"], ["dd"], ["ee"]]
    assert [sorted(batch) for batch in gate.batches] == [["a"], ["b", "c", "d", "e"]]


def test_a_batch_holds_no_more_than_it_may():
    gate = Gate(opened=True)
    assert Merger(gate.run, most=3, seconds=0)(list("abcdefg")) == [c * 2 for c in "abcdefg"]
    assert [len(batch) for batch in gate.batches] == [3, 3, 1]


def test_a_full_batch_waits_for_nobody_and_one_that_is_not_full_for_a_bounded_time():
    gate = Gate(opened=True)
    assert Merger(gate.run, most=2, seconds=1e6)(["a", "b"]) == ["aa", "bb"]
    assert Merger(gate.run, most=2, seconds=0.05)(["a"]) == ["aa"]


def test_an_error_reaches_the_callers_of_its_batch_alone():
    gate = Gate(opened=True)
    merged = Merger(gate.run, most=2, seconds=0)
    with pytest.raises(ValueError, match="bad"):
        merged(["bad", "a"])
    assert merged(["b"]) == ["bb"]


class Counting(LanguageModel):
    """Counts its batches; the first waits until all callers have come."""

    def __init__(self, callers):
        self.sizes, self.callers, self.come = [], callers, 0
        self.lock, self.all_here = threading.Lock(), threading.Event()
        self.merged = Merger(self.run, most=64, seconds=0.5)

    def answer(self, requests):
        with self.lock:
            self.come += 1
            if self.come == self.callers:
                self.all_here.set()
        return self.merged(requests)

    def run(self, requests):
        assert self.all_here.wait(120)
        self.sizes.append(len(requests))
        return [Answer(request.id, "m") for request in requests]

    def batches(self):
        return self.sizes


def refuse():
    raise AssertionError("the model is loaded already")


def call_from_another_process(tag, number):
    model = MultiProcessShared(refuse, tag=tag, always_proxy=True).acquire()
    part = Part(field=None, prompt="p")
    requests = [Request(f"{number}-{i}", "analysis", "1", "c", (part,)) for i in range(3)]
    return [answer.text for answer in model.answer(requests)]


@pytest.mark.slow
def test_processes_of_a_worker_share_batches():
    """As Beam shares a model: the process that loaded it serves the others."""
    tag = "chatflow-test-merging"
    model = MultiProcessShared(lambda: Counting(4), tag=tag, always_proxy=True).acquire()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(4, mp_context=context) as processes:
        answers = list(processes.map(call_from_another_process, [tag] * 4, range(4)))
    assert answers == [[f"{number}-{i}" for i in range(3)] for number in range(4)]
    assert sum(model.batches()) == 12
    assert len(model.batches()) < 4
