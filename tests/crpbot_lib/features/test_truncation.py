"""For any cut T, features of what was known at T equal, at every row up to T, those of everything: no value knows what came later.

Equal is to the last bit, before the cast to float32. The cuts are drawn to the second from all of a span, its outages included, and
a third of them around the moments at which something becomes known. The same proof must find mistakes that are planted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest

from crpbot_lib.features import multi_timeframe

MINUTE = timedelta(minutes=1)
WIDTHS = {"5m": 5 * MINUTE, "15m": 15 * MINUTE, "1h": 60 * MINUTE}
CUTS = 20
"""For each of the twelve spans: 240."""

Pipeline = Callable[[Any], pl.DataFrame]


@dataclass
class Tally:
    spans: int = 0
    cuts: int = 0
    values: int = 0
    violations: int = 0


@pytest.fixture(scope="module")
def tally(proof: list[str], market_data_dir: object) -> Iterator[Tally]:
    """What was compared, for the end of pytest's output."""
    tally = Tally()
    yield tally
    data = "real and ragged" if market_data_dir else "generated"
    proof.append(
        f"truncation: {tally.cuts} random cuts of {tally.spans} spans of {data} data, {tally.values:,} values before the cast to "
        f"float32, {tally.violations} that differ"
    )


def _cuts(market: Any, first: datetime, count: int, seed: str) -> list[datetime]:
    draw = random.Random(seed)
    end = market.minutes["timestamp"][-1] + 2 * MINUTE
    seconds = int((end - first).total_seconds())
    moments = [t for t in market.hourly["available_at"].to_list() + market.daily["available_at"].to_list() if first < t < end]
    moments += [t + WIDTHS["1h"] for t in market.candles["1h"]["timestamp"].to_list() if first < t + WIDTHS["1h"] < end]
    holes = market.features().holes.filter(pl.col("start") > first)
    moments += [t for start, minutes, _ in holes.iter_rows() for t in (start, start + minutes * MINUTE)]
    near = [draw.choice(moments) + timedelta(seconds=draw.randint(-90, 90)) for _ in range(count // 3)]
    return near + [first + timedelta(seconds=draw.randrange(seconds)) for _ in range(count - len(near))]


def _compare(pipeline: Pipeline, market: Any, cuts: list[datetime]) -> tuple[int, dict[str, int]]:
    """How many values were compared, and how many differ in which column; a row that one of the two lacks differs in all."""
    whole = pipeline(market)
    names = [name for name, dtype in whole.schema.items() if dtype.is_float()]
    compared, differing = 0, np.zeros(len(names), int)
    for cut in cuts:
        known = market.known_at(cut)
        then = pipeline(known)
        # the minutes since the last candle are no rows yet: whether nobody traded or the exchange is down, the next one tells
        later = whole.filter(pl.col("timestamp") <= known.minutes["timestamp"][-1])
        both = later.join(then, on="timestamp", how="full", coalesce=True, suffix=" then")
        # a row of one side alone is NaN on the other, and so differs
        equal = both.select(names).to_numpy() == both.select(f"{name} then" for name in names).to_numpy()
        compared += equal.size
        differing += np.count_nonzero(~equal, axis=0)
    return compared, {name: int(count) for name, count in zip(names, differing, strict=True) if count}


@pytest.mark.usefixtures("before_the_cast")
def test_what_comes_later_changes_no_value(span: Any, real: Any, tally: Tally) -> None:
    cuts = _cuts(real, real.frame()["timestamp"][0], CUTS, span.name)
    compared, differing = _compare(lambda market: market.frame(), real, cuts)
    tally.spans, tally.cuts, tally.values = tally.spans + 1, tally.cuts + CUTS, tally.values + compared
    tally.violations += sum(differing.values())
    assert compared > 78 * 100 * CUTS
    assert differing == {}


@pytest.mark.usefixtures("before_the_cast")
@pytest.mark.parametrize("seed", range(12))
def test_nor_in_series_with_holes_nulls_and_bars_that_were_not_served(random_market: Any, seed: int, tally: Tally) -> None:
    """Generated, over the end of a month, each series with faults of its own that are allowed."""
    draw, border = np.random.default_rng(seed), datetime(2025, 6, 1, tzinfo=UTC)
    market = random_market(2 * 1440 + 720, seed=seed, start=border - timedelta(hours=36 + seed))

    def thinned(frame: pl.DataFrame, share: float, runs: int = 1) -> pl.DataFrame:
        gone = np.convolve(draw.random(frame.height) < share, np.ones(runs), "same") > 0
        return frame.filter(pl.Series(~gone))

    def nulled(frame: pl.DataFrame) -> pl.DataFrame:
        return frame.with_columns(
            pl.when(pl.Series(draw.random(frame.height) > 0.004)).then(column).alias(column)
            for column in ("price", "market_cap", "total_volume")
        )

    market = market.with_minutes(thinned(thinned(market.minutes, 0.05), 0.0005, 18))
    bars = {width: thinned(market.candles[width], 0.01) for width in WIDTHS}
    hourly = nulled(thinned(market.hourly, 0.002, draw.choice([1, 4, 8])))
    ragged = replace(market, candles=market.candles | bars, hourly=hourly, daily=nulled(thinned(market.daily, 0.02)))
    cuts = _cuts(ragged, ragged.minutes["timestamp"][700], 6, f"ragged {seed}")
    compared, differing = _compare(lambda market: market.frame(), ragged, cuts)
    tally.spans, tally.cuts, tally.values = tally.spans + 1, tally.cuts + 6, tally.values + compared
    tally.violations += sum(differing.values())
    assert differing == {}


class TestThatTheProofFindsWhatIsPlanted:
    """Classic mistakes of systems of this kind."""

    @pytest.fixture
    def found(self, outage_market: Any) -> Callable[[Pipeline], dict[str, int]]:
        first = datetime(2023, 3, 23, 12, tzinfo=UTC)
        market = replace(outage_market, all_time_high=[(1e6, datetime(2023, 3, 25, 12, tzinfo=UTC))])
        return lambda pipeline: _compare(pipeline, market, _cuts(market, first, 6, "planted"))[1]

    @pytest.mark.parametrize("width", WIDTHS)
    def test_bars_joined_at_their_open_time(
        self, found: Callable[[Pipeline], dict[str, int]], width: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(multi_timeframe, "MAX_DISAGREEING_SHARE", 2.0)

        def early(market: Any) -> pl.DataFrame:
            bars = market.candles[width].with_columns(pl.col("timestamp") - WIDTHS[width])
            return replace(market, candles=market.candles | {width: bars}).frame()

        assert found(early)[f"{width}_close"] > 0

    def test_bars_filled_backwards(self, found: Callable[[Pipeline], dict[str, int]]) -> None:
        def bfill(market: Any) -> pl.DataFrame:
            closing = pl.col("timestamp").dt.minute() == 59
            return market.frame().with_columns(pl.when(closing).then("1h_close").backward_fill().alias("1h_close"))

        assert set(found(bfill)) == {"1h_close"}

    def test_todays_all_time_high_over_all_of_history(self, found: Callable[[Pipeline], dict[str, int]]) -> None:
        def today(market: Any) -> pl.DataFrame:
            highest = max([market.daily["price"].max(), *(price for price, _ in market.all_time_high)])
            return replace(market, all_time_high=(highest, datetime(2013, 1, 1, tzinfo=UTC))).frame()

        assert "ath_distance_pct" in found(today)

    def test_a_scale_fitted_on_everything(self, found: Callable[[Pipeline], dict[str, int]]) -> None:
        assert set(found(lambda market: market.frame().with_columns(pl.col("atr") / pl.col("atr").std()))) == {"atr"}


def test_a_minute_without_a_trade_follows_from_the_past_alone(thin_market: Any) -> None:
    """Rows that stand for minutes without a trade exist in the truncation as soon as the next candle has arrived."""
    whole = thin_market.frame()
    filled = whole.filter(~pl.col("timestamp").is_in(thin_market.minutes["timestamp"].implode()))
    assert filled.height > 500
    last = filled["timestamp"][-1]
    following = thin_market.minutes.filter(pl.col("timestamp") > last)["timestamp"][0]
    assert last in thin_market.known_at(following + MINUTE).frame()["timestamp"]
