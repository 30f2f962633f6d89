"""Coverage, gaps, impossible rows, and timeframes that disagree."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from crpbot_lib.market_data.frames import POINT_SCHEMA
from crpbot_lib.market_data.progress import Progress
from crpbot_lib.market_data.quality import (
    Gap,
    QualityError,
    check_candles,
    check_points,
    compare,
    coverage,
    iso,
    resample,
    suspicious,
)

START = datetime(2025, 5, 5, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)


@pytest.fixture
def day(minutes: pl.DataFrame) -> pl.DataFrame:
    return minutes.head(1440)


def without(frame: pl.DataFrame, *rows: int) -> pl.DataFrame:
    return frame.with_row_index("n").filter(~pl.col("n").is_in(rows)).drop("n")


class TestCoverage:
    def test_a_whole_day(self, day: pl.DataFrame) -> None:
        found = coverage(day, MINUTE, START, START + DAY)
        assert (found.expected, found.rows, found.missing, found.gaps) == (1440, 1440, 0, ())

    def test_gaps_at_the_edges_and_inside(self, day: pl.DataFrame) -> None:
        found = coverage(without(day, 0, 1, 700, 1439), MINUTE, START, START + DAY)
        assert found.missing == 4
        assert found.gaps == (Gap(START, 2), Gap(START + 700 * MINUTE, 1), Gap(START + 1439 * MINUTE, 1))

    def test_nothing_is_one_gap(self, day: pl.DataFrame) -> None:
        found = coverage(day.clear(), MINUTE, START, START + DAY)
        assert (found.rows, found.gaps) == (0, (Gap(START, 1440),))

    def test_rows_outside_do_not_count(self, minutes: pl.DataFrame) -> None:
        assert coverage(minutes, MINUTE, START + DAY, START + 2 * DAY).rows == 1440

    def test_gaps_of_wider_candles_are_counted_in_minutes(self, timeframes: dict[str, pl.DataFrame]) -> None:
        found = coverage(without(timeframes["1h"].head(24), 5, 6), timedelta(hours=1), START, START + DAY)
        assert (found.missing, found.gaps) == (2, (Gap(START + timedelta(hours=5), 120),))


class TestCheckCandles:
    def check(self, frame: pl.DataFrame) -> None:
        check_candles(frame, "1m", START, START + DAY, "BTC-USD 1m")

    def test_real_candles_pass(self, day: pl.DataFrame) -> None:
        self.check(day)
        self.check(day.clear())

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda f: f.drop("low"), "column 'low' is missing"),
            (lambda f: f.cast({"volume": pl.Float32}), "column 'volume' is Float32, expected Float64"),
            (lambda f: f.with_columns(pl.col("timestamp").dt.replace_time_zone(None)), "column 'timestamp' is Datetime"),
            (lambda f: f.select("open", pl.exclude("open")), "the columns are open, timestamp"),
            (lambda f: f.reverse(), "column 'timestamp': .* is before the row above it"),
            (lambda f: pl.concat([f.head(3), f.tail(-2)]), "row 3 .* is there twice"),
            (lambda f: f.with_columns(pl.col("timestamp").dt.offset_by("1d")), r"is outside \[2025-05-05T00:00:00Z"),
            (
                lambda f: f.with_columns(pl.when(pl.col("timestamp") == START).then(None).otherwise("close").alias("close")),
                "'close': None",
            ),
            (lambda f: f.with_columns(low=pl.col("high") + 1), "column 'high': .* is below low|is below open"),
        ],
    )
    def test_the_first_impossible_row_is_named(self, day: pl.DataFrame, change: object, said: str) -> None:
        with pytest.raises(QualityError, match=f"BTC-USD 1m: .*{said}" if not said.startswith(("column", "the")) else said):
            self.check(change(day))  # type: ignore[operator]


def test_a_point_known_before_its_time_is_refused() -> None:
    frame = pl.DataFrame([(START, START, 1.0, None, 1.0)], schema=POINT_SCHEMA, orient="row")
    with pytest.raises(QualityError, match="column 'available_at': 2025-05-05T00:00:00Z is not after its timestamp"):
        check_points(frame, "daily", "bitcoin daily")


class TestSuspicious:
    """What can be true but seldom is: counted and shown, never refused."""

    def spiked(self, day: pl.DataFrame, row: int, **factors: float) -> pl.DataFrame:
        here = pl.int_range(pl.len()) == row
        return day.with_columns(pl.when(here).then(pl.col(c) * f).otherwise(c).alias(c) for c, f in factors.items())

    def test_an_ordinary_day_has_nothing(self, day: pl.DataFrame) -> None:
        assert suspicious(day, "1m") == []

    def test_nothing_has_nothing(self, day: pl.DataFrame) -> None:
        assert suspicious(day.clear(), "1m") == suspicious(day.head(1), "1m") == []

    @pytest.mark.parametrize(("side", "factor"), [("high", 1.03), ("low", 0.97)])
    def test_a_wick_that_is_back_at_once_is_a_spike(self, day: pl.DataFrame, side: str, factor: float) -> None:
        (found,) = suspicious(self.spiked(day, 700, **{side: factor}), "1m")
        assert (found.kind, found.start, found.rows) == ("spike", START + 700 * MINUTE, 1)
        assert found.value == pytest.approx(day[side][700] * factor)
        assert "% above both neighbours" in found.detail if side == "high" else "% below both neighbours" in found.detail

    def test_a_close_that_is_back_at_once_is_a_spike(self, day: pl.DataFrame) -> None:
        (found,) = suspicious(self.spiked(day, 700, high=1.03, close=1.03), "1m")
        assert (found.kind, found.start) == ("spike", START + 700 * MINUTE)

    def test_a_move_that_stays_is_none(self, day: pl.DataFrame) -> None:
        later = pl.int_range(pl.len()) >= 700
        prices = ("open", "high", "low", "close")
        assert suspicious(day.with_columns(pl.when(later).then(pl.col(c) * 0.9).otherwise(c).alias(c) for c in prices), "1m") == []

    @pytest.mark.parametrize("row", [0, 1439])
    def test_a_candle_with_one_neighbour_is_not_judged(self, day: pl.DataFrame, row: int) -> None:
        assert suspicious(self.spiked(day, row, high=1.03), "1m") == []

    def still(self, day: pl.DataFrame, rows: int, volume: float) -> pl.DataFrame:
        here, price = pl.int_range(pl.len()).is_between(700, 699 + rows), day["close"][699]
        values = {"open": price, "high": price, "low": price, "close": price, "volume": volume}
        return day.with_columns(pl.when(here).then(value).otherwise(c).alias(c) for c, value in values.items())

    @pytest.mark.parametrize(("rows", "volume", "found"), [(2, 0.0, 0), (3, 0.0, 1), (72, 0.0, 1), (3, 5.0, 0), (4, 5.0, 1)])
    def test_a_price_that_stands_still_is_frozen(self, day: pl.DataFrame, rows: int, volume: float, found: int) -> None:
        findings = suspicious(self.still(day, rows, volume), "1m")
        assert [(f.kind, f.start, f.rows) for f in findings] == [("frozen", START + 700 * MINUTE, rows)] * found

    def test_one_flat_hour_without_volume_is_frozen(self, timeframes: dict[str, pl.DataFrame]) -> None:
        hours = timeframes["1h"].with_columns(
            pl.when(pl.int_range(pl.len()) == 7).then(value).otherwise(c).alias(c)
            for c, value in {"open": 95e3, "high": 95e3, "low": 95e3, "close": 95e3, "volume": 0.0}.items()
        )
        assert [(f.start, f.rows) for f in suspicious(hours, "1h") if f.kind == "frozen"] == [(START + timedelta(hours=7), 1)]

    def test_the_very_same_candle_twice_is_a_copy(self, day: pl.DataFrame) -> None:
        values = [c for c in day.columns if c != "timestamp"]
        copied = day.with_columns(
            pl.when(pl.int_range(pl.len()) == 700).then(pl.col(c).shift(1)).otherwise(c).alias(c) for c in values
        )
        (found,) = suspicious(copied, "1m")
        assert (found.kind, found.start, found.rows) == ("frozen", START + 699 * MINUTE, 2)


class TestSuspiciousInRealMarkets:
    """Every candle of the folder is real: frozen stretches are those its README lists, large moves are no spikes."""

    FROZEN = (
        ("binance_spot_2023-03/BTC-USD", [("2023-03-24T11:28:00Z", 72)]),
        ("binance_spot_2023-03/ETH-USD", [("2023-03-24T11:28:00Z", 72)]),
        ("binance_spot_2023-03/SOL-USD", [("2023-03-24T11:28:00Z", 72)]),
        ("binance_perp_2025-01/ETH-USD", [("2025-01-29T01:23:00Z", 13), ("2025-01-29T02:41:00Z", 4)]),
        ("binance_perp_2025-01/SOL-USD", [("2025-01-29T01:23:00Z", 13), ("2025-01-29T02:41:00Z", 4)]),
        ("binanceus_spot_2023-03/BTC-USD", []),
        ("coinbase_derivatives_perp_2026-02/SOL-USD", []),
    )

    @pytest.fixture
    def folder(self, market_data_dir: Path | None) -> Path:
        if market_data_dir is None:
            pytest.skip("needs the real candles (CRPBOT_SANDBOX_DATA)")
        return market_data_dir

    @pytest.mark.parametrize(("name", "expected"), FROZEN)
    def test_frozen_stretches(self, folder: Path, name: str, expected: list[tuple[str, int]]) -> None:
        findings = suspicious(pl.read_parquet(folder / "candles_1m_windows" / f"{name}.parquet"), "1m")
        assert [(iso(f.start), f.rows) for f in findings if f.kind == "frozen"] == expected

    @pytest.mark.parametrize(
        "name",
        [
            "candles_1m/ETH-USD",  # 3.5 % in a minute, 2025-06-21 21:24
            "candles_1m/SOL-USD",
            "candles_1m_spot/BTC-USD",
            "candles_1m_windows/binanceus_spot_2023-03/BTC-USD",  # the USDC depeg of 2023-03-11
            "candles_1m_windows/binance_spot_2024-07/BTC-USD",  # the crash of 2024-08-05
            "candles_1m_windows/binance_spot_2024-07/ETH-USD",
            "candles_1m_windows/binance_spot_2025-01/ETH-USD",  # the crash of 2025-02-03
            "candles_1m_windows/binance_perp_2025-01/SOL-USD",
            "candles_1m_windows/coinbase_spot_2020-02/BTC-USD",
        ],
    )
    def test_large_moves_are_no_spikes(self, folder: Path, name: str) -> None:
        assert [f for f in suspicious(pl.read_parquet(folder / f"{name}.parquet"), "1m") if f.kind == "spike"] == []

    def test_of_planted_wicks_of_three_percent_nearly_all_are_found(self, folder: Path) -> None:
        real = pl.read_parquet(folder / "candles_1m" / "SOL-USD.parquet")
        planted = pl.int_range(pl.len()) % 500 == 250
        bad = real.with_columns(high=pl.when(planted).then(pl.col("high") * 1.03).otherwise("high"))
        found = {f.start for f in suspicious(bad, "1m")}
        wicks = set(bad.filter(planted)["timestamp"])
        assert found <= wicks
        assert len(found) > 0.9 * len(wicks)


class TestCompare:
    @pytest.mark.parametrize("timeframe", ["5m", "15m", "1h"])
    def test_the_same_market_agrees(self, minutes: pl.DataFrame, timeframes: dict[str, pl.DataFrame], timeframe: str) -> None:
        found = compare(minutes, timeframes[timeframe], timeframe)
        assert found == {
            "compared": timeframes[timeframe].height,
            "differing": 0,
            "only_fetched": 0,
            "only_resampled": 0,
            "columns": {},
        }

    def test_a_difference_has_its_size_and_place(self, day: pl.DataFrame, timeframes: dict[str, pl.DataFrame]) -> None:
        hours = timeframes["1h"].head(24)
        at = hours["timestamp"][7]
        other = hours.with_columns(
            pl.when(pl.col("timestamp") == at).then(pl.col("volume") * 2).otherwise("volume").alias("volume")
        )
        found = compare(day, other, "1h")
        assert found["differing"] == 1
        volume = pytest.approx(hours["volume"][7])
        assert found["columns"] == {
            "volume": {"rows": 1, "largest": pytest.approx(0.5), "at": "2025-05-05T07:00:00Z", "absolute": volume}
        }

    def test_candles_that_one_side_lacks_are_counted(self, day: pl.DataFrame, timeframes: dict[str, pl.DataFrame]) -> None:
        found = compare(day.tail(-60), without(timeframes["1h"].head(24), 23), "1h")
        assert (found["compared"], found["only_fetched"], found["only_resampled"]) == (22, 1, 1)

    def test_without_minutes_nothing_is_compared(self, day: pl.DataFrame, timeframes: dict[str, pl.DataFrame]) -> None:
        assert compare(day.clear(), timeframes["1h"].head(24), "1h")["only_fetched"] == 24


def test_resampling_takes_first_highest_lowest_last_and_sum(day: pl.DataFrame) -> None:
    part = day.slice(5, 5)
    expected = (part["open"][0], part["high"].max(), part["low"].min(), part["close"][4], pytest.approx(part["volume"].sum()))
    assert resample(day, "5m").row(1)[1:] == expected


def test_progress_is_logged_every_ten_seconds_only(caplog: pytest.LogCaptureFixture) -> None:
    seconds = iter([0.0, 4.0, 11.0, 15.0, 22.0, 30.0])
    progress = Progress(logging.getLogger("crpbot_lib"), "BTC-USD 1m", 100, "pages", clock=lambda: next(seconds))
    with caplog.at_level(logging.INFO, "crpbot_lib"):
        for done in (20, 50, 60, 80, 100):
            progress.done(done)
    assert caplog.messages == [
        "BTC-USD 1m: 50 of 100 pages in 11 s, about 11 s left",
        "BTC-USD 1m: 80 of 100 pages in 22 s, about 6 s left",
    ]
