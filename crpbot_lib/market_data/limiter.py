"""One rate limit for all threads and processes of a machine that talk to one API."""

from __future__ import annotations

import fcntl
import logging
import math
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

LONGEST_PAUSE = 300.0
"""Seconds. What a state file says beyond it (a reboot, damage) is not believed."""
LOCK_PATIENCE = 2.0
"""Seconds that the lock is waited for; it is held for microseconds, so whoever holds it longer is stopped or frozen."""
RECORD = 24
"""Bytes of a state file: seconds of the monotonic clock as text of a fixed width, so that one write replaces all of it."""


class RateLimiter:
    """Turns that are evenly spaced at ``per_second``, shared by everybody on this machine with the same ``directory`` and ``name``.

    The state is one small file: the time of the next free turn on the clock that all processes share (CLOCK_MONOTONIC). It is
    opened anew and locked for every look, never while waiting, and nothing is reserved ahead: whoever is killed, stopped or forked
    at any moment leaves neither a lock nor a place in a queue behind. ``directory`` None is a private one of this user.
    """

    def __init__(
        self,
        per_second: float,
        *,
        name: str,
        directory: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not (math.isfinite(per_second) and per_second > 0):
            raise ValueError(f"a rate of {per_second} requests a second for {name}: expected a number above 0")
        self._spacing = 1.0 / per_second
        # A turn that is taken late is made up for within this time, or every late thread would lower the rate. With the spacing
        # it stays well within the second of burst that a server's token bucket allows.
        self._slack = max(0.0, (1.0 - self._spacing) / 4)
        self._clock, self._sleep = clock, sleep
        self._name = name
        self._path = _ready(directory) / re.sub(r"[^A-Za-z0-9.-]+", "_", name)

    def wait(self) -> None:
        """Returns when it is this caller's turn."""
        told = False
        while (seconds := self._take()) > 0:
            if seconds > 20 and not told:
                log.info("%s: waiting %.0f s, its limit is used up or it asked for a pause", self._name, seconds)
                told = True
            self._sleep(seconds)

    def pause(self, seconds: float) -> None:
        """Nobody gets a turn within ``seconds`` from now (at most LONGEST_PAUSE): what one caller was told, all of them keep."""
        with self._locked() as file:
            now = self._clock()
            self._write(file, max(self._read(file, now), now + min(max(seconds, 0.0), LONGEST_PAUSE)))

    def _take(self) -> float:
        """Takes the next turn where it has come, and gives 0; else the seconds until it comes."""
        with self._locked() as file:
            now = self._clock()
            turn = self._read(file, now)
            if turn > now:
                return turn - now
            self._write(file, max(turn, now - self._slack) + self._spacing)
            return 0.0

    @contextmanager
    def _locked(self) -> Iterator[int]:
        # a descriptor of its own for every look: one that threads or forked processes share would not exclude them
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            deadline = time.monotonic() + LOCK_PATIENCE
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        log.warning(
                            "%s: the lock of %s has not been free for %.0f s; going on without it",
                            self._name,
                            self._path,
                            LOCK_PATIENCE,
                        )
                        break
                    time.sleep(0.001)
            yield file
        finally:
            os.close(file)

    def _read(self, file: int, now: float) -> float:
        try:
            turn = float(os.pread(file, RECORD, 0))
        except ValueError:
            return now
        # also false for a NaN
        return turn if turn <= now + max(LONGEST_PAUSE, self._spacing) else now

    @staticmethod
    def _write(file: int, turn: float) -> None:
        os.pwrite(file, f"{turn:0{RECORD}.9f}".encode(), 0)


def _ready(directory: Path | None) -> Path:
    """``directory``, made if need be; for None this user's own, which nobody else may have put there."""
    own = directory or Path(tempfile.gettempdir()) / f"crpbot-rate-limits-{os.getuid()}"
    try:
        own.mkdir(mode=0o700 if directory is None else 0o777, parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{own} cannot hold the rate limits ({error}): set CRPBOT_RATE_LIMIT_DIR to a directory to write"
        ) from error
    found = own.lstat()
    if directory is None and (not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022):
        raise ValueError(f"{own} is not a directory that only this user writes: remove it, or set CRPBOT_RATE_LIMIT_DIR to another")
    return own
