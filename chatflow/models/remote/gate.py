"""Limits concurrent calls to a service; lowers the limit while the service refuses calls."""

from __future__ import annotations

import asyncio
import collections
import math
from typing import NamedTuple

ROUND_SECONDS = 1.0
ROUND_CALLS = 20  # the fewest calls for a meaningful share of refusals
SUSTAINED = 0.2
TOLERATED = 0.03
GRANTED_ROUNDS = 30
FLOOR = 0.6  # of the last good limit, for mild cuts
UNLIKELY = 0.5  # a share of refusals that our load must have caused
OUTAGE = 0.9  # a share of refusals that does not show the service's normal capacity
DEEPEST_CUT = 0.3
FIRST_GROWTH, MOST_GROWTH = 0.01, 0.5
UNKNOWN_SECONDS = 1.0  # how long an answer takes, before the first one


class Pass(NamedTuple):
    """Permission to make one call; see `Gate.enter`."""

    round: int
    entered: float


class Trial(NamedTuple):
    """A deep cut, which the next round judges.

    It did not help if the share of refused calls is above `refused`, and fewer than `answered`
    calls a second are answered. `limit` is the one before the cut.
    """

    limit: float
    refused: float
    answered: float


class Gate:
    """Admits calls up to an adaptive limit of concurrent calls. For one event loop.

    The limit starts at `most`, its maximum. A round is the calls of a second (at least 20 if some
    are refused). When a round has ended, its share of refused calls decides:

    - Above 20 %, the limit is cut by that share, which leaves what the service accepted. If the
      next round shows no improvement, our load was not the cause: the limit is restored, and such a
      share is accepted for half a minute, so that scattered refusals do not slow us down.
    - Above 3 %, the limit is cut by half of the share, to no less than 60 % of the last good one.
    - Without refusals, it grows again: by 1 % at first, then faster in each such round.

    A refused call keeps its place for the time of an answer. Below `most`, calls are evenly spaced
    by (seconds of an answer / limit), as TCP paces packets; otherwise more calls would follow quick
    refusals at once. So the limit fits quotas per second, even below one, and concurrency limits.
    Calls are also spaced evenly to stay within `max_per_second` (0: any number).
    """

    def __init__(self, most: int, max_per_second: float = 0.0):
        self.most = most
        self.limit = float(most)
        self.in_flight = self.peak = 0
        self._least_gap = 1 / max_per_second if max_per_second else 0.0
        self._waiting: collections.deque[asyncio.Future[Pass]] = collections.deque()
        self._timer: asyncio.TimerHandle | None = None
        self._next = 0.0  # the earliest time of the next call
        self._answers = 0
        self._answer_seconds = 0.0  # moving average
        self._round = 0
        self._good = float(most)  # a limit with few refusals
        self._granted = 0.0  # share of refusals that does not depend on our load
        self._granted_rounds = 0  # rounds until `_granted` is dropped
        self._trial: Trial | None = None
        self._growth = FIRST_GROWTH
        self._new_round()

    def _time(self) -> float:
        return asyncio.get_running_loop().time()

    async def enter(self, first: bool = False) -> Pass:
        """Waits until a call may be made; `leave` must follow. Retries go `first` in the queue."""
        future = asyncio.get_running_loop().create_future()
        (self._waiting.appendleft if first else self._waiting.append)(future)
        self._admit()
        try:
            granted: Pass = await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.leave(future.result())
            raise
        return granted

    def turn_away(self, error: Exception) -> None:
        """Makes `enter` raise an error for all callers that wait now."""
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(error)

    def leave(self, granted: Pass, refused: bool = False, answered: bool = False) -> None:
        """Ends a call that was refused for load, was answered, or failed otherwise."""
        now = self._time()
        seconds = now - granted.entered
        if answered:
            # Averaged slowly, because it sets the pace of calls.
            self._answers += 1
            gain = max(0.02, 1 / self._answers)
            self._answer_seconds += gain * (seconds - self._answer_seconds)
        if granted.round == self._round:
            self._ended += 1
            self._refused += refused
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
        """The seconds between two calls."""
        paced = self._answer_seconds / self.limit if self.limit < self.most else 0.0
        return max(paced, self._least_gap)

    def _admit(self) -> None:
        while self._waiting:
            if self.in_flight >= math.ceil(self.limit):
                self._was_full = True
                return
            now = self._time()
            if now < self._next:
                self._was_full = True
                if self._timer is None:
                    loop = asyncio.get_running_loop()
                    self._timer = loop.call_later(self._next - now, self._on_timer)
                return
            future = self._waiting.popleft()
            if future.done():  # cancelled
                continue
            # A late timer does not lower the rate, but idle time is not made up for.
            gap = self.gap
            self._next = max(self._next, now - min(gap, 0.01)) + gap
            self.in_flight += 1
            self.peak = max(self.peak, self.in_flight)
            future.set_result(Pass(self._noted(now), now))

    def _on_timer(self) -> None:
        self._timer = None
        self._admit()

    def _new_round(self) -> None:
        self._round += 1
        self._calls = self._ended = self._refused = 0
        self._started = self._last = 0.0
        self._was_full = False

    def _noted(self, now: float) -> int:
        """Returns the round of a call; 0 if the round is full but has not ended."""
        if not self._calls:
            self._started = now
        if now - self._started >= ROUND_SECONDS and self._calls >= ROUND_CALLS:
            return 0
        self._calls += 1
        self._last = now
        return self._round

    def _set(self, limit: float) -> None:
        # At least one call a second or per answer's time, to notice when the service recovers.
        least = min(1.0, self._answer_seconds or UNKNOWN_SECONDS)
        self.limit = min(float(self.most), max(least, limit))

    def _look_back(self, now: float) -> None:
        """Adapts the limit if the round has ended."""
        mixed = 0 < self._refused < self._ended
        if (
            not self._calls
            or now - self._started < ROUND_SECONDS
            or self._ended < 0.9 * self._calls  # the rest may hang
            or (mixed and self._calls < ROUND_CALLS)
        ):
            return
        share = self._refused / self._ended
        self._granted_rounds -= 1
        if self._granted_rounds < 0:
            self._granted = 0.0
        trial, self._trial = self._trial, None
        if self._refused:
            self._growth = FIRST_GROWTH
        if share > self._granted + SUSTAINED:
            answered = (self._ended - self._refused) / max(
                self._last - self._started, ROUND_SECONDS
            )
            if trial is not None and trial.refused < share < UNLIKELY and answered < trial.answered:
                self._granted, self._granted_rounds = share, GRANTED_ROUNDS
                self._good = trial.limit
                self._set(trial.limit)
            else:
                kept = max(DEEPEST_CUT, 1 - share)
                # The next share if the service's capacity is what it just accepted.
                expected = max(0.0, 1 - (1 - share) / kept)
                self._trial = Trial(self.limit, (share + expected) / 2, answered * (1 + kept) / 2)
                self._set(self.limit * kept)
                if share < OUTAGE:
                    self._good = self.limit
        elif share > TOLERATED and not self._granted:
            if FLOOR * self._good < self.limit < self.most:
                self._set(max(FLOOR * self._good, self.limit * (1 - share / 2)))
        elif not self._refused:
            self._granted = 0.0
            if self._was_full and self.limit < self.most:
                far = self.limit < self._good / 2
                self._good = max(self._good, self.limit)
                self._set(self.limit * (1 + (MOST_GROWTH if far else self._growth)))
                self._growth = min(2 * self._growth, MOST_GROWTH)
        self._new_round()
