"""Where the daily history begins, and when it cannot say what the all-time high was."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import polars as pl
import pytest

from crpbot_lib.config import Settings, Symbol
from crpbot_lib.features import FeatureError
from crpbot_lib.features.history import check_history, first_daily_day

DAY = date(2025, 5, 28)
LEAD = timedelta(days=30 + 32)
"""``training.days``, 30 days of windows, 2 of age."""
OLD, NEW = (69_000.0, datetime(2021, 11, 10, 14, tzinfo=UTC)), (109_000.0, datetime(2025, 1, 20, 8, tzinfo=UTC))


def bitcoin(**changes: Any) -> Symbol:
    return Symbol(name="BTC-USD", coin="bitcoin", coin_listed=date(2013, 4, 28)).model_copy(update=changes)


LIMITED = Settings(coingecko_history_days=730)


@pytest.mark.parametrize(
    ("settings", "symbol", "first"),
    [
        (Settings(), bitcoin(), date(2013, 4, 28)),
        (Settings(), bitcoin(all_time_highs=(NEW,)), date(2013, 4, 28)),
        (LIMITED, bitcoin(), DAY - LEAD),
        (Settings(coingecko_plan="demo"), bitcoin(), DAY - LEAD),
        (LIMITED, bitcoin(all_time_highs=(OLD, NEW)), date(2025, 1, 20)),
        (LIMITED, bitcoin(all_time_highs=(NEW, OLD)), date(2025, 1, 20)),
        (LIMITED, bitcoin(all_time_highs=(OLD,)), date(2021, 11, 10)),
        (LIMITED, bitcoin(all_time_highs=(OLD,), all_time_highs_until=date(2023, 7, 1)), date(2023, 7, 1)),
        (LIMITED, bitcoin(all_time_highs=(OLD, NEW), all_time_highs_until=date(2025, 5, 20)), DAY - LEAD),
        (LIMITED, bitcoin(coin_listed=date(2025, 5, 1)), date(2025, 5, 1)),
    ],
    ids=[
        "whole",
        "whole, with a record",
        "no record",
        "demo",
        "from the last record on",
        "in any order",
        "one old record",
        "until a day",
        "what the windows need",
        "listed since",
    ],
)
def test_it_begins_where_it_must(settings: Settings, symbol: Symbol, first: date) -> None:
    assert first_daily_day(settings, symbol, DAY) == first


def test_a_record_counts_by_its_day_in_utc() -> None:
    late = (109_000.0, datetime(2025, 1, 20, 23, tzinfo=timezone(timedelta(hours=-5))))
    assert bitcoin(all_time_highs=(late,)).highs_known_until == date(2025, 1, 21)


def daily(first: date) -> pl.DataFrame:
    begin = datetime(first.year, first.month, first.day, tzinfo=UTC)
    times = pl.datetime_range(begin, datetime(2025, 5, 28, tzinfo=UTC), "1d", time_unit="us", eager=True)
    lag = timedelta(minutes=35)
    return pl.DataFrame({"timestamp": times}).with_columns(
        available_at=pl.col("timestamp") + lag, price=1.0, market_cap=1.0, total_volume=1.0
    )


START = datetime(2025, 5, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("symbol", "first"),
    [
        (bitcoin(), date(2013, 4, 29)),
        (bitcoin(all_time_highs=(NEW,)), date(2025, 1, 20)),
        (bitcoin(all_time_highs=(OLD,), all_time_highs_until=date(2023, 7, 1)), date(2023, 7, 1)),
        (bitcoin(all_time_highs=(OLD, NEW), all_time_highs_until=DAY), date(2025, 3, 1)),
    ],
    ids=["from the listing", "from the record", "from the day until which they are complete", "complete until later"],
)
def test_what_is_known_is_taken(symbol: Symbol, first: date) -> None:
    check_history(symbol, daily(first), START)


@pytest.mark.parametrize(
    ("symbol", "first", "said"),
    [
        (bitcoin(), date(2023, 6, 1), "begins on 2023-06-01, the coin was listed on 2013-04-28, so its all-time high before"),
        (bitcoin(all_time_highs_until=DAY), date(2023, 6, 1), "before is not known"),
        (bitcoin(all_time_highs=((1.0, START),)), date(2023, 6, 1), "before is not known"),
        (
            bitcoin(all_time_highs=(OLD,)),
            date(2023, 6, 1),
            "complete until 2021-11-10 only.*`all_time_highs_until` to 2023-06-01 or",
        ),
        (bitcoin(all_time_highs=(NEW,)), date(2025, 1, 22), "complete until 2025-01-20 only"),
    ],
    ids=["no record", "complete without a record", "none before the first row", "one old record", "a day between"],
)
def test_what_cannot_be_known_is_refused(symbol: Symbol, first: date, said: str) -> None:
    with pytest.raises(FeatureError, match=said):
        check_history(symbol, daily(first), START)
