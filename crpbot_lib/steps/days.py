"""UTC days, the unit of the lake's partitions, and when one is over."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta

from crpbot_lib.market_data import Clock, MarketDataError

DAY = timedelta(days=1)
SETTLES = timedelta(minutes=5)
"""How long after its end a day is not over yet: at midnight sharp its last minute may not be served."""


def midnight(day: date) -> datetime:
    """The beginning of a UTC day."""
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


def days_of(start: date, end: date) -> Iterator[date]:
    """Each day of ``[start, end)``."""
    return (start + n * DAY for n in range((end - start) // DAY))


def check_interval(start: date, end: date) -> None:
    """ValueError unless ``[start, end)`` holds a day."""
    if end <= start:
        raise ValueError(f"the interval [{start}, {end}) holds no day: the end is exclusive and lies after the start")


def closed_days(start: date, end: date, now: Clock) -> list[date]:
    """The days of ``[start, end)``; ValueError where there is none, MarketDataError unless all of them are over."""
    check_interval(start, end)
    at, over = now(), midnight(end) + SETTLES
    if at < over:
        raise MarketDataError(
            f"{end - DAY} is not over yet: it can be fetched from {over:%Y-%m-%d %H:%M} UTC on and it is {at:%Y-%m-%d %H:%M} UTC; "
            "partitions hold whole days",
            permanent=True,
        )
    return list(days_of(start, end))
