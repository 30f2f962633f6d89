"""The two shapes of market data, and the clock that decides what is closed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Literal

import polars as pl

from crpbot_lib.config import TIMEFRAME_SECONDS

TIMESTAMP = pl.Datetime("us", "UTC")

CANDLE_SCHEMA: dict[str, pl.DataType] = {
    "timestamp": TIMESTAMP,
    "open": pl.Float64(),
    "high": pl.Float64(),
    "low": pl.Float64(),
    "close": pl.Float64(),
    "volume": pl.Float64(),
}
"""``timestamp`` is the open time; prices in the quote currency, volume in the base currency."""

POINT_SCHEMA: dict[str, pl.DataType] = {
    "timestamp": TIMESTAMP,
    "available_at": TIMESTAMP,
    "price": pl.Float64(),
    "market_cap": pl.Float64(),
    "total_volume": pl.Float64(),
}
"""``timestamp`` is the point's hour or day, ``available_at`` the moment it could be known; values in USD, nulls as served."""

Series = Literal["hourly", "daily"]
SERIES_WIDTH: dict[str, timedelta] = {"hourly": timedelta(hours=1), "daily": timedelta(days=1)}

Clock = Callable[[], datetime]
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def utc_now() -> datetime:
    """The wall clock, in UTC."""
    return datetime.now(UTC)


def width(timeframe: str) -> timedelta:
    """The length of a candle; ValueError names the known timeframes."""
    if timeframe not in TIMEFRAME_SECONDS:
        raise ValueError(f"unknown timeframe {timeframe!r}: expected one of {', '.join(TIMEFRAME_SECONDS)}")
    return timedelta(seconds=TIMEFRAME_SECONDS[timeframe])


def floor(moment: datetime, step: timedelta) -> datetime:
    """The last multiple of ``step`` (counted from the epoch, so hours and days are UTC's) at or before ``moment``."""
    return EPOCH + (moment - EPOCH) // step * step


def ceil(moment: datetime, step: timedelta) -> datetime:
    """The first multiple of ``step`` at or after ``moment``."""
    return EPOCH - (EPOCH - moment) // step * step


def in_utc(moment: datetime, name: str) -> datetime:
    """``moment`` in UTC; ValueError for a naive one, whose zone nobody can know."""
    if moment.tzinfo is None:
        raise ValueError(f"{name}={moment.isoformat()} has no timezone; pass a timezone-aware datetime")
    return moment.astimezone(UTC)
