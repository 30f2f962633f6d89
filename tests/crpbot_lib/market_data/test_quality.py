"""Coverage, gaps, impossible rows, and timeframes that disagree."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest

from crpbot_lib.market_data.frames import POINT_SCHEMA
from crpbot_lib.market_data.progress import Progress
from crpbot_lib.market_data.quality import Gap, QualityError, check_candles, check_points, compare, coverage, resample

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
