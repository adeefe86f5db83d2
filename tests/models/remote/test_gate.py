"""The gate to a service, against services of a few lines on a loop whose time is not real."""

import asyncio
import collections
import heapq
import itertools
import random
import statistics

import pytest

from chatflow.models.remote.gate import Gate

ANSWER = 0.2  # seconds


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes only where all wait for it, and then at once."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def time(self):
        return self.now

    def _run_once(self):
        if not self._ready:
            while self._scheduled and self._scheduled[0].cancelled():
                heapq.heappop(self._scheduled)
            if self._scheduled:
                self.now = max(self.now, self._scheduled[0].when())
        super()._run_once()


class Service:
    """Answers after a while, or refuses at once. Subclasses say which."""

    def __init__(self, seconds=ANSWER, spread=0.3, seed=1, refusal=0.002):
        self.refusal = refusal
        self.seconds, self.spread, self.random = seconds, spread, random.Random(seed)
        self.calls, self.in_flight, self.peak = [], 0, 0

    def refuses(self, now):
        return False

    async def call(self):
        now = asyncio.get_running_loop().time()
        refused = self.refuses(now)
        self.calls.append((now, refused))
        if refused:
            await asyncio.sleep(self.refusal)
            return False
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        await asyncio.sleep(self.seconds * self.random.lognormvariate(0, self.spread))
        self.in_flight -= 1
        return True

    def between(self, start, end):
        """(answered a second, share refused) in that time."""
        found = [refused for at, refused in self.calls if start <= at < end]
        return found.count(False) / (end - start), statistics.mean(found)


class Quota(Service):
    """So many calls in any second."""

    def __init__(self, quota, **options):
        super().__init__(**options)
        self.quota, self.accepted = quota, collections.deque()

    def refuses(self, now):
        while self.accepted and self.accepted[0] <= now - 1:
            self.accepted.popleft()
        if len(self.accepted) >= self.quota:
            return True
        self.accepted.append(now)
        return False


class Capacity(Service):
    """So many calls at once."""

    def __init__(self, capacity, **options):
        super().__init__(**options)
        self.capacity = capacity

    def refuses(self, now):
        return self.in_flight >= self.capacity


class Scattered(Service):
    """Refuses now and then, whatever the load."""

    def __init__(self, share, **options):
        super().__init__(**options)
        self.share = share

    def refuses(self, now):
        return self.random.random() < self.share


class Outage(Service):
    """Refuses everything until it is over."""

    def __init__(self, until, **options):
        super().__init__(**options)
        self.until = until

    def refuses(self, now):
        return now < self.until


def load(service, requests, seconds, gate=None):
    """Sends requests through a gate, each again until it is answered; returns the gate."""
    gate = gate or Gate(64)
    pauses = random.Random(7)

    async def one():
        tries = 0
        while True:
            leave = await gate.enter(first=tries > 0)
            answered = await service.call()
            gate.leave(leave, refused=not answered, answered=answered)
            if answered:
                return
            tries += 1
            await asyncio.sleep(1 + pauses.random() * min(0.5 * 2**tries, 30))

    async def main():
        tasks = [asyncio.ensure_future(one()) for _ in range(requests)]
        _, waiting = await asyncio.wait(tasks, timeout=seconds)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    loop = VirtualLoop()
    loop.run_until_complete(main())
    loop.close()
    return gate


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("seconds", [ANSWER, 0.01, 2.0])
def test_a_quota_of_40_a_second_is_used_and_hardly_overrun(seconds, seed):
    service = Quota(40, seconds=seconds, seed=seed)
    load(service, 5_000, 110, Gate(128))
    rate, refused = service.between(30, 110)
    assert rate >= 0.9 * 40
    assert refused <= 0.05


@pytest.mark.parametrize("refusal", [0.5, 2.0])
def test_refusals_that_take_longer_than_answers_are_noticed(refusal):
    """They hold their places, so less of the quota is used."""
    service = Quota(40, refusal=refusal)
    gate = load(service, 5_000, 110)
    rate, refused = service.between(30, 110)
    assert gate.limit <= 32
    assert rate >= 0.25 * 40
    assert refused <= 0.3


@pytest.mark.parametrize("seed", range(2))
def test_a_capacity_of_16_at_once_is_used(seed):
    service = Capacity(16, seed=seed)
    load(service, 5_000, 60)
    rate, refused = service.between(20, 60)
    assert rate >= 0.8 * 16 / ANSWER
    assert refused <= 0.08


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("share", "least"), [(0.1, 0.9), (0.25, 0.5)])
def test_scattered_refusals_do_not_slow_the_others_down(share, least, seed):
    """By Little's law, 64 at once that are answered or refused in 0.21 s make 305 a second."""
    service = Scattered(share, seed=seed)
    load(service, 12_000, 40)
    rate, refused = service.between(20, 40)
    assert rate >= least * (1 - share) * 305
    assert refused == pytest.approx(share, abs=0.03)


def test_in_an_outage_calls_become_few_and_after_it_all_that_are_allowed():
    service = Outage(20)
    gate = load(service, 8_000, 50)
    rate, refused = service.between(10, 20)
    assert (rate, refused) == (0, 1)
    assert len([at for at, _ in service.calls if 10 <= at < 20]) <= 60
    assert service.between(40, 50)[0] >= 0.9 * 305
    assert gate.limit == 64


def test_a_quota_that_is_lifted_is_noticed():
    class Lifted(Quota):
        def refuses(self, now):
            return now < 40 and super().refuses(now)

    service = Lifted(40)
    gate = load(service, 8_000, 65)
    assert service.between(20, 40)[0] <= 40
    assert service.between(55, 65)[0] >= 0.9 * 305
    assert gate.limit == 64


@pytest.mark.parametrize("most", [1, 7, 64])
def test_never_more_calls_at_once_than_allowed_and_all_of_them_where_none_is_refused(most):
    service = Service()
    gate = load(service, 500, 600, Gate(most))
    assert (service.peak, gate.peak, gate.in_flight) == (most, most, 0)
    assert len(service.calls) == 500


def test_calls_a_second_are_limited_and_spread():
    service = Service()
    load(service, 100, 60, Gate(64, max_per_second=10))
    times = [at for at, _ in service.calls]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert min(gaps) >= 0.1 - 0.011
    assert times[-1] == pytest.approx(9.9, abs=0.1)


def test_a_call_that_is_made_again_goes_before_those_that_wait():
    order = []

    async def main():
        gate = Gate(1)
        leave = await gate.enter()

        async def enter(name, first):
            order.append((name, await gate.enter(first)))
            gate.leave(order[-1][1])

        waiting = [asyncio.ensure_future(enter(*who)) for who in (("new", False), ("again", True))]
        await asyncio.sleep(0)
        gate.leave(leave)
        await asyncio.gather(*waiting)

    VirtualLoop().run_until_complete(main())
    assert [name for name, _ in order] == ["again", "new"]


def test_a_caller_that_gives_up_leaves_no_gap():
    async def main():
        gate = Gate(1)
        leave = await gate.enter()
        waiting = asyncio.ensure_future(gate.enter())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.sleep(0)
        gate.leave(leave)
        gate.leave(await gate.enter())
        assert gate.in_flight == 0

        leave = await gate.enter()
        admitted = asyncio.ensure_future(gate.enter())
        await asyncio.sleep(0)
        gate.leave(leave)
        admitted.cancel()  # at the moment when it was let through
        await asyncio.gather(admitted, return_exceptions=True)
        assert gate.in_flight == 0

    VirtualLoop().run_until_complete(main())
