"""What a frame of features is, what it knows and when, and how holes are treated."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from crpbot_lib.config import ALL_GROUPS
from crpbot_lib.features import catalog, engineer_features

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
COLD = catalog.SEGMENT_WARM_UP


@pytest.mark.parametrize(("symbol", "count"), [("BTC-USD", 73), ("ETH-USD", 54), ("SOL-USD", 73)])
def test_the_frame_is_what_the_catalog_says(small_market: Any, symbol: str, count: int) -> None:
    candles = small_market.candles if count == 73 else {"1m": small_market.minutes}
    frame = engineer_features(symbol, candles, small_market.points)
    assert frame.columns == [*catalog.EXCLUDED, *catalog.feature_names(symbol)]
    assert len(frame.columns) - len(catalog.EXCLUDED) == count
    assert {frame.schema[n] for n in catalog.feature_names(symbol)} == {pl.Float32()}
    assert frame.null_count().sum_horizontal().item() == 0
    assert all(frame[n].is_finite().all() for n in catalog.feature_names(symbol))


def test_rows_that_are_not_warm_are_dropped_and_no_other(small_market: Any) -> None:
    built = small_market.features()
    assert built.frame["timestamp"].to_list() == small_market.minutes["timestamp"].to_list()[COLD:]
    assert (built.minutes, built.cold, built.unknown) == (3 * 1440, COLD, {})


def test_candles_travel_unchanged(small_market: Any) -> None:
    columns = list(catalog.EXCLUDED[:6])
    assert_frame_equal(small_market.frame().select(columns), small_market.minutes.slice(COLD))


def test_a_coingecko_point_is_used_from_the_minute_on_whose_decision_it_was_available(small_market: Any) -> None:
    frame = small_market.frame()
    stamped = small_market.hourly.with_columns(expected=100 * (pl.col("price") / pl.col("price").shift(1) - 1))
    for point in stamped.tail(20).iter_rows(named=True):
        first = frame.filter(pl.col("timestamp") + MINUTE >= point["available_at"])["price_1h_change_pct"][0]
        before = frame.filter(pl.col("timestamp") + MINUTE < point["available_at"])["price_1h_change_pct"][-1]
        assert first == pytest.approx(point["expected"], rel=1e-5)
        assert before != pytest.approx(point["expected"], rel=1e-5)


class TestAllTimeHigh:
    def test_it_is_the_one_known_at_the_time(self, small_market: Any) -> None:
        """Today's record, dated after most rows, changes none of the rows before it."""
        at = small_market.minutes["timestamp"][0] + 2 * DAY - HOUR
        price = small_market.daily["price"].max() * 2
        before, after = small_market.frame(), replace(small_market, all_time_high=(price, at)).frame()
        known = small_market.daily.filter(pl.col("timestamp") >= at)["available_at"][0]
        early = pl.col("timestamp") + MINUTE < known
        assert_frame_equal(before.filter(early), after.filter(early))
        late = after.filter(~early)
        assert late.height
        point = small_market.daily.filter(pl.col("available_at") == known)
        assert late["ath_distance_pct"][0] == pytest.approx(100 * (point["price"][0] / price - 1), rel=1e-5)
        assert late["days_since_ath"][0] == pytest.approx((point["timestamp"][0] - at) / DAY, rel=1e-5)

    def test_several_records_count_each_from_its_date(self, small_market: Any) -> None:
        top, first = small_market.daily["price"].max(), small_market.minutes["timestamp"][0]
        records = [(top * 3, first + DAY + HOUR), (top * 2, first - 30 * DAY)]
        frame = replace(small_market, all_time_high=records).frame()
        ratio = frame.group_by(pl.col("timestamp").dt.date(), maintain_order=True).agg(pl.col("ath_distance_pct").last())
        prices = small_market.daily.filter(pl.col("timestamp") >= first)["price"].to_list()
        expected = [100 * (prices[0] / top / 2 - 1), 100 * (prices[1] / top / 2 - 1), 100 * (prices[2] / top / 3 - 1)]
        assert ratio["ath_distance_pct"].to_list() == pytest.approx(expected, rel=1e-5)


class TestHoles:
    def test_minutes_without_a_trade_are_flat_candles_and_are_reported(self, small_market: Any) -> None:
        hole = small_market.minutes["timestamp"][2000]
        minutes = small_market.minutes.filter(~pl.col("timestamp").is_between(hole, hole + 2 * MINUTE))
        built = replace(small_market, candles=small_market.candles | {"1m": minutes}).features()
        filled = built.frame.filter(pl.col("timestamp").is_between(hole, hole + 2 * MINUTE))
        last = small_market.minutes["close"][1999]
        assert filled.select("open", "high", "low", "close", "volume").rows() == [(last, last, last, last, 0.0)] * 3
        assert built.holes.rows() == [(hole, 3, False)]

    def test_a_frozen_market_has_no_bb_position_and_so_no_rows(self, outage_market: Any) -> None:
        built = outage_market.features()
        frozen = pl.col("timestamp").is_between(
            datetime(2023, 3, 24, 11, 50, tzinfo=UTC), datetime(2023, 3, 24, 12, 39, tzinfo=UTC)
        )
        assert built.frame.filter(frozen).is_empty()
        assert built.unknown["bb_position"] >= 50
        assert built.unknown["volume_ratio"] >= 50

    def test_a_bar_in_which_nobody_traded_is_flat_and_one_not_served_is_unknown(self, small_market: Any) -> None:
        bar = small_market.minutes["timestamp"][2000].replace(minute=0)
        inside = pl.col("timestamp").is_between(bar, bar + 4 * MINUTE)
        bars = small_market.candles["5m"].filter(pl.col("timestamp") != bar)
        decided = (pl.col("timestamp") >= bar + 4 * MINUTE) & (pl.col("timestamp") < bar + 9 * MINUTE)

        silent = small_market.with_candles(m1=small_market.minutes.filter(~inside), m5=bars).frame().filter(decided)
        last = small_market.minutes.filter(pl.col("timestamp") == bar - MINUTE)["close"][0]
        assert silent["5m_close"].to_list() == pytest.approx([last] * 5)
        assert silent["5m_volume"].to_list() == [0.0] * 5

        built = small_market.with_candles(m5=bars).features()
        assert built.frame.filter(decided).is_empty()
        assert built.unknown["5m_close"] == 5
        assert built.unknown["tf_alignment_score"] == 10, "the bar itself, and five bars later the change against it"

    def test_a_silent_bar_after_an_unserved_one_is_not_flat_at_an_older_close(self, small_market: Any) -> None:
        bar = small_market.minutes["timestamp"][2000].replace(minute=0)
        silent = pl.col("timestamp").is_between(bar + 5 * MINUTE, bar + 9 * MINUTE)
        bars = small_market.candles["5m"].filter(~pl.col("timestamp").is_in([bar, bar + 5 * MINUTE]))
        built = small_market.with_candles(m1=small_market.minutes.filter(~silent), m5=bars).features()
        assert built.unknown["5m_close"] == 10

    @pytest.mark.parametrize("column", ["price", "market_cap", "total_volume"])
    def test_a_null_of_coingecko_stays_unknown(self, small_market: Any, column: str) -> None:
        at = small_market.minutes["timestamp"][0] + DAY
        hourly = small_market.hourly.with_columns(
            pl.when(pl.col("timestamp").is_between(at, at + HOUR, closed="left")).then(None).otherwise(pl.col(column)).alias(column)
        )
        built = replace(small_market, hourly=hourly).features()
        if column == "market_cap":
            assert built.unknown == {}, "no hourly feature uses it"
        else:
            assert max(built.unknown.values()) > 18 * 60, "a window of 20 or 24 hours"
            assert built.frame.filter(pl.col("timestamp").is_between(at + HOUR + 6 * MINUTE, at + 2 * HOUR)).is_empty()

    def test_a_missing_hour_of_coingecko_is_not_bridged_by_windows(self, small_market: Any) -> None:
        at = small_market.minutes["timestamp"][0] + DAY
        hourly = small_market.hourly.filter(~pl.col("timestamp").is_between(at, at + HOUR, closed="left"))
        built = replace(small_market, hourly=hourly).features()
        assert built.unknown["price_1h_change_pct"] <= 2 * 60
        assert 20 * 60 < built.unknown["volume_1h_ma"] < 26 * 60
        assert max(built.unknown[n] for n in ("rsi_1h", "macd_1h")) < 2 * 60, "the recursive ones step over a short hole"

    def test_fundamentals_that_ended_are_not_carried_on(self, small_market: Any) -> None:
        """The last daily point counts for two days after it became available, the last hourly one for two hours."""
        first = small_market.minutes["timestamp"][0]
        frame = replace(small_market, hourly=small_market.hourly.filter(pl.col("timestamp") < first + DAY)).frame()
        last = small_market.hourly.filter(pl.col("timestamp") < first + DAY)["available_at"][-1]
        assert frame["timestamp"][-1] + MINUTE <= last + 2 * HOUR
        frame = replace(small_market, daily=small_market.daily.filter(pl.col("timestamp") <= first)).frame()
        assert frame["timestamp"][-1] == first + 2 * DAY + 34 * MINUTE


def test_groups_decide_what_is_needed(small_market: Any) -> None:
    base = replace(small_market, candles={"1m": small_market.minutes}, groups=("base",)).frame()
    assert base.columns == [*catalog.EXCLUDED, *catalog.names(["base"])]
    assert_frame_equal(base, small_market.frame().select(base.columns))
    assert len(catalog.names(ALL_GROUPS)) == 73
