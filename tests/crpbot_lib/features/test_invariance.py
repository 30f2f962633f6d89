"""A value on a row depends neither on what came later nor on where the computation began."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from crpbot_lib import config
from crpbot_lib.config import ALL_GROUPS
from crpbot_lib.features import FeatureError, NoRowError, catalog, engineer_runtime_features

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
COLD = catalog.SEGMENT_WARM_UP


SAME = 1e-9
"""Of a column's standard deviation, before the cast to float32."""


def _apart(left: pl.DataFrame, right: pl.DataFrame, scale: pl.DataFrame) -> np.ndarray:
    """Per feature the largest difference, in standard deviations of its column in ``scale``; the rows must be the same."""
    assert left["timestamp"].equals(right["timestamp"])
    assert left.height
    names = [name for name in left.columns if name not in catalog.EXCLUDED]
    unit = np.array([scale[name].std() or 1.0 for name in names])
    return np.abs(left.select(names).to_numpy() - right.select(names).to_numpy()).max(axis=0) / unit


@pytest.fixture(scope="module")
def tally(proof: list[str]) -> Iterator[dict[str, list[float]]]:
    """What was compared, and the largest difference, for the end of pytest's output."""
    tally: dict[str, list[float]] = defaultdict(list)
    yield tally
    proof += [f"{what}: {len(d)} compared, at most {max(d):.1e} standard deviations apart" for what, d in tally.items()]


@pytest.mark.usefixtures("before_the_cast")
def test_where_the_computation_begins_changes_no_value(span: Any, real: Any, tally: dict[str, list[float]]) -> None:
    whole, draw = real.frame(), random.Random(span.name)
    first, hourly = real.minutes["timestamp"][0], real.hourly["timestamp"][0]
    for _ in range(4):
        begin = first + draw.randrange(int((whole["timestamp"][-60] - first) / MINUTE) - COLD) * MINUTE
        later = real.since(begin, hourly + draw.randrange(60) * HOUR).frame()
        same = whole.filter(pl.col("timestamp") >= later["timestamp"][0])
        tally["start of the computation"].append(_apart(same, later, whole).max())
        assert tally["start of the computation"][-1] <= SAME


@pytest.mark.usefixtures("before_the_cast")
def test_a_day_alone_beside_an_outage(span: Any, market_data_dir: Path | None, tally: dict[str, list[float]]) -> None:
    """Each day of a span with what the catalog reads before it: the same rows, where the outage lies in the warm-up too."""
    start = span.start.replace(hour=0) - 2 * DAY
    market = replace(span, start=start, hours=5 * 24).market(market_data_dir)
    whole = market.frame()
    for day in (start + i * DAY for i in range(1, 5)):
        read = market.since(day - catalog.CANDLE_LEAD_DAYS * DAY, day - catalog.HOURLY_LEAD_DAYS * DAY)
        alone = read.features(day).frame.filter(pl.col("timestamp") < day + DAY)
        same = whole.filter(pl.col("timestamp").is_between(day, day + DAY, closed="left"))
        assert alone.height == same.height
        if same.height:
            tally["a day alone"].append(_apart(same, alone, whole).max())
            assert tally["a day alone"][-1] <= SAME


class TestTheEndOfAMonth:
    """Minutes are computed by months; the same market moved by weeks, so that months end elsewhere in it, has the same rows."""

    @pytest.mark.parametrize("weeks", [-4, -13])
    def test_beside_an_outage(self, weeks: int, spans: Any, market_data_dir: Path | None, before_the_cast: None) -> None:
        """2021-09-29 moved to the first, and to the last, of a month."""
        span = spans["SOL 2021-09"]
        self.same(replace(span, start=span.start - DAY, hours=72).market(market_data_dir), 7 * weeks * DAY)

    @pytest.mark.parametrize("weeks", [1, 23])
    def test_beside_a_frozen_market(self, weeks: int, spans: Any, market_data_dir: Path | None, before_the_cast: None) -> None:
        """2023-03-24 moved to the last, and to the first, of a month; on the 31st rows stand again at midnight."""
        span = spans["BTC 2023-03"]
        self.same(replace(span, start=span.start - DAY, hours=72).market(market_data_dir), 7 * weeks * DAY)

    @pytest.mark.parametrize("seed", range(12))
    def test_among_random_holes(self, seed: int, random_market: Any, before_the_cast: None) -> None:
        draw, border = random.Random(seed), datetime(2025, 6, 1, tzinfo=UTC)
        market = random_market(3 * 1440, seed=seed, start=border - 2 * DAY)
        keep = pl.lit(True)
        for _ in range(draw.randint(1, 4)):
            hole = border + draw.randint(-1300, 500) * MINUTE
            keep &= ~pl.col("timestamp").is_between(hole, hole + draw.choice([3, 14, 15, 16, 90]) * MINUTE)
        holed = market.with_minutes(market.minutes.filter(keep))
        self.same(replace(holed, groups=("base", "multi_timeframe")), 14 * DAY)

    def same(self, market: Any, by: timedelta) -> None:
        here, there = market.frame(), market.moved(by).frame()
        there = there.with_columns(pl.col("timestamp") - by)
        assert _apart(here, there, here).max() <= SAME


@pytest.fixture
def listed(small_market: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _listed(small_market, monkeypatch)


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


@pytest.fixture(scope="module")
def weeks(spans: Any, market_data_dir: Path | None) -> Any:
    """Three weeks of BTC, over the end of a month."""
    return replace(spans["BTC 2025-05"], start=datetime(2025, 5, 20, 12, tzinfo=UTC), hours=21 * 24).market(
        market_data_dir, record=False
    )


def _listed(market: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """BTC-USD as configured had the coin been listed when the daily history begins."""
    symbol = config.settings().symbol("BTC-USD").model_copy(update={"coin_listed": market.daily["timestamp"][0].date()})
    monkeypatch.setattr(config, "settings", lambda: config.Settings(symbols=(symbol,)))


def test_a_day_alone_and_the_live_window_are_the_full_run(
    weeks: Any, monkeypatch: pytest.MonkeyPatch, before_the_cast: None, tally: dict[str, list[float]]
) -> None:
    _listed(weeks, monkeypatch)
    whole, at = weeks.frame(), pl.col("timestamp")
    for day in (datetime(2025, 5, 25, tzinfo=UTC), datetime(2025, 5, 31, tzinfo=UTC), datetime(2025, 6, 1, tzinfo=UTC)):
        read = weeks.known_at(day + DAY).since(day - catalog.CANDLE_LEAD_DAYS * DAY, day - catalog.HOURLY_LEAD_DAYS * DAY)
        alone = read.features(day).frame
        trained = whole.filter(at >= day, at < day + DAY)
        assert trained.height == 1440
        tally["a day alone"].append(_apart(trained, alone, whole).max())

    draw = random.Random(5)
    for _ in range(12):
        now = datetime(2025, 5, 23, tzinfo=UTC) + draw.randrange(17 * 1440) * MINUTE
        window = weeks.minutes.filter(at >= now - 1500 * MINUTE, at < now)
        live = engineer_runtime_features(window.to_pandas(), "BTC-USD", Feed(weeks), True, True)
        assert list(live.columns) == whole.columns
        mine = pl.from_pandas(live).cast(dict(whole.schema))
        tally["the live window of 1,500 rows"].append(_apart(whole.filter(at >= mine["timestamp"][0], at < now), mine, whole).max())
    assert max(max(tally[what]) for what in ("a day alone", "the live window of 1,500 rows")) <= SAME


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

    def test_a_source_that_ended_is_named_with_its_features(self, small_market: Any, listed: None) -> None:
        end = small_market.minutes["timestamp"][0] + 2 * DAY
        stale = replace(small_market, hourly=small_market.hourly.filter(pl.col("timestamp") < end))
        with pytest.raises(NoRowError) as caught:
            self.live(stale, 1500)
        assert "BTC-USD: the newest minute, 2025-05-03 11:39 UTC, has no row: 12 of 12 coingecko_hourly features" in str(
            caught.value
        )
        assert "(rsi_1h, macd_1h, " in str(caught.value)
        assert "lacking a feature: rsi_1h " in str(caught.value)

    def test_a_window_that_is_too_short_is_not_warm(self, small_market: Any, listed: None) -> None:
        with pytest.raises(NoRowError, match=f"it lies less than {catalog.SEGMENT_WARM_UP} minutes after the beginning"):
            self.live(small_market, 300)


def test_a_truncated_daily_history_is_refused_live_as_in_training(small_market: Any, listed: None) -> None:
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
