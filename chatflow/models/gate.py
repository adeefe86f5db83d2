"""How many calls to a service are under way at once: fewer while it refuses them."""

from __future__ import annotations

import asyncio
import collections
import math
from collections.abc import Callable
from typing import NamedTuple

ROUND_SECONDS = 1.0
ROUND_CALLS = 50  # from so many, a share of refused calls is more than chance
SUSTAINED = 0.2
TOLERATED = 0.03
DEEPEST_CUT = 0.3
FIRST_GROWTH, MOST_GROWTH = 0.01, 0.5
UNKNOWN_SECONDS = 1.0  # of an answer, before there was one


class Pass(NamedTuple):
    """Leave to make one call; see `Gate.enter`."""

    round: int
    entered: float


class Gate:
    """Lets calls through, at most so many at once. For one event loop.

    The limit adapts. While a service refuses no calls it is `most`. After each round (a
    second or an answer's time, and 50 calls if some were refused) the share of refused calls is
    looked at:

    - Above 20 %, the limit is cut by that share, which leaves what the service took. If the
      next round has no fewer, it was not our load that did it: the limit is restored, and
      such a share is taken for granted, so that scattered refusals do not slow us down.
    - Above 3 %, it is cut by half of the share, but not far below the last cut.
    - Without refusals, it grows again, by 1 % at first, and faster in each such round.

    A refused call keeps its place for as long as an answer takes, and below `most` calls are
    spread evenly, one each (seconds of an answer / limit), as TCP paces its packets: quick
    refusals would otherwise be followed at once by more calls. So the limit holds for quotas
    a second, even where it is below one, as for a capacity of calls at once.

    Args:
      most: calls at once, never exceeded.
      max_per_second: calls a second, never exceeded, evenly spread; 0: any number.
      clock: seconds, of the loop that calls are made on.
    """

    def __init__(
        self, most: int, max_per_second: float = 0.0, clock: Callable[[], float] | None = None
    ):
        self.most = most
        self.limit = float(most)
        self.in_flight = self.peak = 0
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        self._least_gap = 1 / max_per_second if max_per_second else 0.0
        self._waiting: collections.deque[asyncio.Future[Pass]] = collections.deque()
        self._timer: asyncio.TimerHandle | None = None
        self._next = 0.0  # no call before
        self._answer_seconds = 0.0  # moving average
        self._round = 0
        self._least = float(most)  # mild cuts do not go below it
        self._granted = 0.0  # share of refusals that does not depend on our load
        self._before: tuple[float, float] | None = None  # limit and share before a deep cut
        self._growth = FIRST_GROWTH
        self._new_round()

    async def enter(self, first: bool = False) -> Pass:
        """Waits for leave to make a call; `leave` must follow.

        Args:
          first: before those that wait already; for calls that are made again.
        """
        future = asyncio.get_running_loop().create_future()
        (self._waiting.appendleft if first else self._waiting.append)(future)
        self._admit()
        try:
            leave: Pass = await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.leave(future.result())
            raise
        return leave

    def leave(self, leave: Pass, refused: bool = False, answered: bool = False) -> None:
        """A call is over: it was refused for load, or answered, or failed otherwise."""
        now = self._clock()
        seconds = now - leave.entered
        if answered:
            known = self._answer_seconds or seconds
            self._answer_seconds = known + 0.1 * (seconds - known)
        self._refused += refused and leave.round == self._round
        self._look_back(now)
        held = (self._answer_seconds or UNKNOWN_SECONDS) - seconds
        if refused and held > 0:
            asyncio.get_running_loop().call_later(held, self._free)
        else:
            self._free()

    def _free(self) -> None:
        self.in_flight -= 1
        self._admit()

    @property
    def gap(self) -> float:
        """Seconds between two calls."""
        paced = self._answer_seconds / self.limit if self.limit < self.most else 0.0
        return max(paced, self._least_gap)

    def _admit(self) -> None:
        while self._waiting:
            if self.in_flight >= math.ceil(self.limit):
                self._was_full = True
                return
            now = self._clock()
            if now < self._next:
                self._was_full = True
                if self._timer is None:
                    loop = asyncio.get_running_loop()
                    self._timer = loop.call_later(self._next - now, self._on_timer)
                return
            future = self._waiting.popleft()
            if future.done():  # cancelled
                continue
            # A timer that is late does not lower the rate, but nothing is made up for idleness.
            gap = self.gap
            self._next = max(self._next, now - min(gap, 0.01)) + gap
            self.in_flight += 1
            self.peak = max(self.peak, self.in_flight)
            if not self._calls:
                self._started = now
            self._calls += 1
            future.set_result(Pass(self._round, now))

    def _on_timer(self) -> None:
        self._timer = None
        self._admit()

    def _new_round(self) -> None:
        self._round += 1
        self._calls = self._refused = 0  # of those let through in this round
        self._started = 0.0
        self._was_full = False

    def _set(self, limit: float) -> None:
        # At least a call a second, to see when the service is well again.
        least = min(1.0, self._answer_seconds or UNKNOWN_SECONDS)
        self.limit = min(float(self.most), max(least, limit))

    def _look_back(self, now: float) -> None:
        """At the end of a round, adapts the limit to what became of its calls."""
        if not self._calls or now - self._started < max(ROUND_SECONDS, self._answer_seconds):
            return
        if self._refused > 0 and self._calls < ROUND_CALLS:
            return
        share = self._refused / self._calls
        before, self._before = self._before, None
        if self._refused:
            self._growth = FIRST_GROWTH
        if share > self._granted + SUSTAINED:
            if before is not None and before[1] / 2 < share < 0.5:
                self._granted = share
                self._set(before[0])
            else:
                self._before = (self.limit, share)
                self._set(self.limit * max(DEEPEST_CUT, 1 - share))
                self._least = 0.9 * self.limit
        elif share > self._granted + TOLERATED:
            if self.limit > self._least:
                self._set(max(self._least, self.limit * (1 - share / 2)))
        elif not self._refused:
            self._granted = 0.0
            if self._was_full and self.limit < self.most:
                self._set(self.limit * (1 + self._growth))
                self._growth = min(2 * self._growth, MOST_GROWTH)
        self._new_round()
