"""A line now and then from work that takes longer than an operator likes to see silence."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

EVERY_SECONDS = 10.0


class Progress:
    """Logs how far ``what`` is, at most every ten seconds; work that is done sooner says nothing."""

    def __init__(
        self, log: logging.Logger, what: str, total: int, unit: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log, self._what, self._total, self._unit, self._clock = log, what, total, unit, clock
        self._started = self._last = clock()

    def done(self, count: int) -> None:
        """``count`` of the total are done."""
        now = self._clock()
        if count >= self._total or now - self._last < EVERY_SECONDS:
            return
        self._last = now
        elapsed = now - self._started
        left = elapsed / count * (self._total - count) if count else float("nan")
        self._log.info("%s: %d of %d %s in %.0f s, about %.0f s left", self._what, count, self._total, self._unit, elapsed, left)


class Meter(Protocol):
    """Is told by a step that fetches many partitions how far it is. Requests, not partitions, are what takes the time: a day of
    1m candles is five of them, a day of 1h candles a twelfth of one."""

    def start(self, what: str, partitions: int, requests: float) -> None:
        """``what`` begins, and will fetch so much."""

    def advance(self, partitions: int, requests: float, doing: str) -> None:
        """So much more of it is stored (``partitions``) or asked for (``requests``)."""


class LogMeter:
    """A ``Meter`` for logs: a line every ten seconds."""

    def __init__(self, log: logging.Logger, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = log, clock
        self.start("", 0, 0)

    def start(self, what: str, partitions: int, requests: float) -> None:
        self._what, self._partitions, self._requests = what, partitions, requests
        self._stored, self._asked = 0, 0.0
        self._started = self._last = self._clock()

    def advance(self, partitions: int, requests: float, doing: str) -> None:
        self._stored += partitions
        self._asked += requests
        now = self._clock()
        if now - self._last < EVERY_SECONDS or self._stored >= self._partitions or not self._asked:
            return
        self._last = now
        elapsed = now - self._started
        left = elapsed / self._asked * (self._requests - self._asked)
        self._log.info(
            "%s: %d of %d partitions in %.0f s, about %.0f s left; now %s",
            *(self._what, self._stored, self._partitions, elapsed, left, doing),
        )
