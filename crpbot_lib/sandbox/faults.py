"""What goes wrong on demand at the market stand-ins: faults (seeded, counted) and a rate limit; and what was asked of them."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Target = Literal["exchange", "coingecko"]
TARGETS: tuple[Target, ...] = get_args(Target)


class Fault(BaseModel):
    """One kind of fault. Exactly one of ``status``, ``truncate``, ``stall``, ``empty``, ``error_body`` and ``html`` says which;
    only ``html`` may have a ``status`` beside it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    status: int | None = Field(default=None, ge=400, le=599)
    """Answer with this status."""
    truncate: bool = False
    """Announce the whole answer and send half of it."""
    stall: float | None = Field(default=None, gt=0)
    """Wait this many seconds before answering."""
    empty: bool = False
    """Answer 200 without a candle or a point."""
    error_body: bool | dict[str, Any] = False
    """Answer 200 with an error inside: the API's own words for an internal error, or this object."""
    html: bool = False
    """Answer with a proxy's HTML page, under ``status`` (502 without one)."""
    rate: float = Field(default=1.0, ge=0, le=1)
    """Share of the target's requests that are hit, whatever other faults there are."""
    seed: int = 0
    times: int | None = Field(default=None, ge=1)
    """How many requests are hit at most."""
    retry_after: float | None = Field(default=None, ge=0)
    """Seconds of the header ``retry-after`` beside a status; None: none, but 1 in CoinGecko's 429."""

    @model_validator(mode="after")
    def _one_kind(self) -> Fault:
        kinds = [self.status is not None and not self.html, self.truncate, self.stall is not None, self.empty]
        if sum((*kinds, bool(self.error_body), self.html)) != 1:
            raise ValueError("a fault needs exactly one of status, truncate, stall, empty, error_body, html")
        return self

    @property
    def name(self) -> str:
        """By which it is counted."""
        for name in ("html", "truncate", "stall", "empty", "error_body"):
            if getattr(self, name):
                return name
        return str(self.status)


class _Active:
    def __init__(self, fault: Fault, place: int) -> None:
        self.fault, self.hits = fault, 0
        # by its place too: faults of one seed must not draw the same numbers, or the rarer ones would never be the first to hit
        self.rng = random.Random(f"{fault.seed} {place}")

    @property
    def spent(self) -> bool:
        return self.fault.times is not None and self.hits >= self.fault.times


class Faults:
    """What is injected where, and how often it was. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active: dict[Target, list[_Active]] = {}
        self.injected: Counter[str] = Counter()

    def set(self, target: Target, faults: Fault | Sequence[Fault] | None) -> None:
        """Replaces what is injected at ``target``; None or nothing ends it. The count goes on."""
        listed = [] if faults is None else [faults] if isinstance(faults, Fault) else list(faults)
        with self._lock:
            self._active[target] = [_Active(fault, place) for place, fault in enumerate(listed)]

    def draw(self, target: Target) -> Fault | None:
        """The fault that hits this request, if one does; never two."""
        with self._lock:
            left = 1.0
            for active in self._active.get(target, []):
                if active.spent:
                    continue
                # of the share that the faults before it leave, so that each keeps its own share of all requests
                hit = active.rng.random() * left < active.fault.rate
                left -= active.fault.rate
                if hit:
                    active.hits += 1
                    self.injected[f"{target}:{active.fault.name}"] += 1
                    return active.fault
            return None

    def describe(self) -> dict[str, Any]:
        with self._lock:
            return {
                "active": {
                    target: [one.fault.model_dump(exclude_defaults=True) for one in active]
                    for target, active in self._active.items()
                    if active
                },
                "injected": dict(self.injected),
            }


class RateLimit(BaseModel):
    """A token bucket: full at first, one token a request, ``per_second`` new ones, never more than ``burst``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    per_second: float = Field(gt=0)
    burst: float = Field(ge=1)


class Traffic:
    """Admits requests by the target's rate limit and keeps count of them. Thread-safe.

    ``clock`` is in seconds; the record's times of day are the machine's.
    """

    def __init__(self, limits: Mapping[Target, RateLimit] | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._limits: dict[Target, RateLimit] = {}
        self._tokens: dict[Target, tuple[float, float]] = {}  # tokens, and when they were counted
        self._counts: dict[Target, _Count] = {target: _Count() for target in TARGETS}
        for target, limit in (limits or {}).items():
            self.limit(target, limit)

    def limit(self, target: Target, limit: RateLimit | None) -> None:
        """A new, full bucket for ``target``; None: no limit."""
        with self._lock:
            if limit is None:
                self._limits.pop(target, None)
            else:
                self._limits[target], self._tokens[target] = limit, (limit.burst, self._clock())

    def admit(self, target: Target) -> bool:
        """Counts one request; False when the bucket is empty."""
        with self._lock:
            now, limit, count = self._clock(), self._limits.get(target), self._counts[target]
            if limit is not None:
                tokens, at = self._tokens[target]
                tokens = min(limit.burst, tokens + (now - at) * limit.per_second)
                admitted = tokens >= 1
                self._tokens[target] = (tokens - admitted, now)
            else:
                admitted = True
            count.add(now, admitted)
            return admitted

    def restart(self) -> None:
        """Begins counting anew; the limits stay."""
        with self._lock:
            self._counts = {target: _Count() for target in TARGETS}

    def describe(self) -> dict[str, Any]:
        """Per target: ``requests``, ``limited`` (the 429s of the limit; injected ones are counted by ``Faults``), ``first`` and
        ``last`` (ISO, UTC), ``seconds`` between them, ``longest_idle`` (seconds between two requests), ``limit``."""
        with self._lock:
            return {
                target: {
                    **count.describe(),
                    "limit": limit.model_dump() if (limit := self._limits.get(target)) else None,
                }
                for target, count in self._counts.items()
            }


class _Count:
    def __init__(self) -> None:
        self.requests = self.limited = 0
        self.first = self.last = self.longest_idle = 0.0
        self.first_at: datetime | None = None
        self.last_at: datetime | None = None

    def add(self, now: float, admitted: bool) -> None:
        at = datetime.now(UTC)
        if self.requests == 0:
            self.first, self.last, self.first_at = now, now, at
        self.longest_idle = max(self.longest_idle, now - self.last)
        self.last, self.last_at = now, at
        self.requests += 1
        self.limited += not admitted

    def describe(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "limited": self.limited,
            "first": self.first_at and self.first_at.isoformat(),
            "last": self.last_at and self.last_at.isoformat(),
            "seconds": round(self.last - self.first, 6),
            "longest_idle": round(self.longest_idle, 6),
        }
