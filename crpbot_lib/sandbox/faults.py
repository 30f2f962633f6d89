"""Faults on demand for the market stand-ins: rate limits, server errors, cut answers, stalls; seeded, and counted."""

from __future__ import annotations

import random
import threading
from collections import Counter
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Target = Literal["exchange", "coingecko"]


class Fault(BaseModel):
    """One kind of fault. Exactly one of ``status``, ``truncate`` and ``stall`` says which."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    status: int | None = Field(default=None, ge=400, le=599)
    """Answer with this status."""
    truncate: bool = False
    """Announce the whole answer and send half of it."""
    stall: float | None = Field(default=None, gt=0)
    """Wait this many seconds before answering."""
    rate: float = Field(default=1.0, ge=0, le=1)
    """Share of the requests that are hit."""
    seed: int = 0
    times: int | None = Field(default=None, ge=1)
    """How many requests are hit at most."""
    retry_after: float = 1.0
    """Seconds in CoinGecko's 429."""

    @model_validator(mode="after")
    def _one_kind(self) -> Fault:
        if sum((self.status is not None, self.truncate, self.stall is not None)) != 1:
            raise ValueError("a fault needs exactly one of status, truncate, stall")
        return self

    @property
    def name(self) -> str:
        return str(self.status) if self.status else "truncate" if self.truncate else "stall"


class Faults:
    """What is injected where, and how often it was. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active: dict[Target, tuple[Fault, random.Random]] = {}
        self._hits: dict[Target, int] = {}
        self.injected: Counter[str] = Counter()

    def set(self, target: Target, fault: Fault | None) -> None:
        """Replaces what is injected at ``target``; None ends it. The count goes on."""
        with self._lock:
            self._hits[target] = 0
            if fault is None:
                self._active.pop(target, None)
            else:
                self._active[target] = (fault, random.Random(fault.seed))

    def draw(self, target: Target) -> Fault | None:
        """The fault that hits this request, if one does."""
        with self._lock:
            if target not in self._active:
                return None
            fault, rng = self._active[target]
            if rng.random() >= fault.rate or (fault.times is not None and self._hits[target] >= fault.times):
                return None
            self._hits[target] += 1
            self.injected[f"{target}:{fault.name}"] += 1
            return fault

    def describe(self) -> dict[str, object]:
        with self._lock:
            return {
                "active": {target: fault.model_dump(exclude_defaults=True) for target, (fault, _) in self._active.items()},
                "injected": dict(self.injected),
            }
