"""A value on a row depends neither on what came later nor on where the computation began."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from crpbot_lib import config
from crpbot_lib.config import ALL_GROUPS, Symbol
from crpbot_lib.features import FeatureError, NoRowError, catalog, engineer, engineer_runtime_features

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


def _differences(left: pl.DataFrame, right: pl.DataFrame) -> dict[str, float]:
    """Per feature the largest difference, in standard deviations of its column."""
    return {
        name: float((left[name] - right[name]).abs().max() or 0) / (float(left[name].std() or 0) or 1.0)
        for name in left.columns
        if name not in catalog.EXCLUDED
    }


@pytest.mark.parametrize("name", ["outage_market", "thin_market"])
def test_where_the_computation_begins_changes_no_row(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engineer, "VALUE", pl.Float64())
    market = request.getfixturevalue(name)
    whole = market.frame()
    first = market.minutes["timestamp"][0]
    for begin in (first + 333 * MINUTE, first + 797 * MINUTE, first + DAY + 61 * MINUTE):
        later = market.since(begin, market.hourly["timestamp"][0] + 97 * HOUR).frame()
        same = whole.filter(pl.col("timestamp") >= later["timestamp"][0])
        assert same["timestamp"].equals(later["timestamp"])
        worst = {n: d for n, d in _differences(same, later).items() if d > 1e-9}
        assert worst == {}


@pytest.fixture
def listed(small_market: Any, monkeypatch: pytest.MonkeyPatch) -> Symbol:
    """BTC-USD, as configured had the coin been listed when the generated daily history begins."""
    day = small_market.daily["timestamp"][0].date()
    symbol = config.settings().symbol("BTC-USD").model_copy(update={"coin_listed": day})
    monkeypatch.setattr(config, "settings", lambda: config.Settings(symbols=(symbol,)))
    return symbol


class Feed:
    """A data fetcher over a generated market that refuses to serve what is not closed or not available yet."""

    def __init__(self, market: Any) -> None:
        self.market = market

    def candles(self, symbol: str, timeframe: str, start: datetime, end: datetime) -> pl.DataFrame:
        assert symbol == "BTC-USD"
        known = self.market.known_at(end).candles[timeframe]
        return known.filter(pl.col("timestamp") >= start, pl.col("timestamp") < end)

    def hourly(self, coin: str, start: datetime, end: datetime) -> pl.DataFrame:
        assert coin == "bitcoin"
        return self.market.known_at(end).hourly.filter(pl.col("timestamp") >= start)

    def daily(self, coin: str, start: datetime, end: datetime) -> pl.DataFrame:
        assert coin == "bitcoin"
        return self.market.known_at(end).daily.filter(pl.col("timestamp") >= start)


def test_a_day_alone_is_the_same_day_of_the_full_run_and_of_the_live_window(
    small_market: Any, listed: Symbol, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engineer, "VALUE", pl.Float64())
    day = small_market.minutes["timestamp"][0] + 2 * DAY
    whole = small_market.frame().filter(pl.col("timestamp") >= day)
    alone = small_market.since(day - catalog.CANDLE_LEAD_DAYS * DAY, day - catalog.HOURLY_LEAD_DAYS * DAY).features(day).frame
    assert alone["timestamp"].equals(whole["timestamp"])
    assert max(_differences(whole, alone).values()) < 1e-9

    now = day + 700 * MINUTE
    window = small_market.minutes.filter(pl.col("timestamp").is_between(now - 1500 * MINUTE, now, closed="left"))
    live = engineer_runtime_features(window.to_pandas(), "BTC-USD", Feed(small_market), True, True)
    assert list(live.columns) == whole.columns
    newest = pl.from_pandas(live).cast(dict(whole.schema)).tail(60)
    trained = whole.filter(pl.col("timestamp").is_between(now - 60 * MINUTE, now, closed="left"))
    assert newest["timestamp"].equals(trained["timestamp"])
    assert max(_differences(trained, newest).values()) < 1e-9


@pytest.mark.usefixtures("listed")
def test_live_and_training_values_are_equal_as_stored(small_market: Any) -> None:
    now = small_market.minutes["timestamp"][0] + 2 * DAY + 700 * MINUTE
    window = small_market.minutes.filter(pl.col("timestamp").is_between(now - 1500 * MINUTE, now, closed="left"))
    live = engineer_runtime_features(window.to_pandas().set_index("timestamp"), "BTC-USD", Feed(small_market), True, True)
    trained = small_market.frame().filter(pl.col("timestamp").is_between(now - 60 * MINUTE, now, closed="left"))
    names = catalog.names(ALL_GROUPS)
    assert {str(t) for t in live[names].dtypes} == {"float32"}
    assert_frame_equal(pl.from_pandas(live.tail(60)).select(names), trained.select(names), rel_tol=1e-6, abs_tol=0)


class TestTheNewestMinute:
    """Without its row there is no decision, and the error says why."""

    def live(self, market: Any, minutes: int) -> Any:
        now = market.minutes["timestamp"][0] + 2 * DAY + 700 * MINUTE
        window = market.minutes.filter(pl.col("timestamp").is_between(now - minutes * MINUTE, now, closed="left"))
        return engineer_runtime_features(window.to_pandas(), "BTC-USD", Feed(market), True, True)

    def test_a_source_that_ended_is_named_with_its_features(self, small_market: Any, listed: Symbol) -> None:
        end = small_market.minutes["timestamp"][0] + 2 * DAY
        stale = replace(small_market, hourly=small_market.hourly.filter(pl.col("timestamp") < end))
        with pytest.raises(NoRowError) as caught:
            self.live(stale, 1500)
        assert "BTC-USD: the newest minute, 2025-05-03 11:39 UTC, has no row: 12 of 12 coingecko_hourly features" in str(
            caught.value
        )
        assert "(rsi_1h, macd_1h, " in str(caught.value)
        assert "lacking a feature: rsi_1h " in str(caught.value)

    def test_a_window_that_is_too_short_is_not_warm(self, small_market: Any, listed: Symbol) -> None:
        with pytest.raises(NoRowError, match=f"it lies less than {catalog.SEGMENT_WARM_UP} minutes after the beginning"):
            self.live(small_market, 300)


def test_a_truncated_daily_history_is_refused_live_as_in_training(small_market: Any, listed: Symbol) -> None:
    """Its all-time high would be that of the weeks it has: a distance of 0."""
    first = small_market.daily["timestamp"][0]
    cut = replace(small_market, daily=small_market.daily.filter(pl.col("timestamp") >= first + 10 * DAY))
    with pytest.raises(FeatureError, match=r"the daily history of bitcoin begins on .*, the coin was listed on"):
        engineer_runtime_features(cut.minutes.to_pandas(), "BTC-USD", Feed(cut), True, True)


@pytest.mark.parametrize(
    ("symbol", "multi", "coingecko", "message"),
    [
        ("BTC-USD", False, True, "include_multi_tf=False contradicts the catalog of BTC-USD: its model has 73 features"),
        ("ETH-USD", True, True, "include_multi_tf=True contradicts the catalog of ETH-USD: its model has 54 features"),
        ("BTC-USD", True, False, "include_coingecko=False contradicts"),
    ],
)
def test_flags_that_contradict_the_catalog_are_refused(
    small_market: Any, symbol: str, multi: bool, coingecko: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engineer_runtime_features(small_market.minutes.to_pandas(), symbol, Feed(small_market), multi, coingecko)


def test_the_outage_market_can_be_told_apart(outage_market: Any) -> None:
    """Guards the tests above: they would be empty without rows on both sides of the outage."""
    times = outage_market.frame()["timestamp"]
    assert (times < datetime(2023, 3, 24, 12, 40, tzinfo=UTC)).sum() > 1000
    assert (times > datetime(2023, 3, 24, 14, 0, tzinfo=UTC)).sum() > 1000
    assert replace(outage_market, groups=("base",)).frame().height > 2000
