"""A line now and then from work that takes longer than an operator likes to see silence."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

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
