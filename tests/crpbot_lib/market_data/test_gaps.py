"""Missing minutes told apart: what nobody traded and what was not served."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from crpbot_lib.market_data.gaps import EVIDENCE, GAP_SCHEMA, HOLE_SCHEMA, classify, holes
from crpbot_lib.market_data.quality import resample

START = datetime(2025, 5, 5, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)
NOON = 720


@pytest.fixture
def two_days(minutes: pl.DataFrame) -> pl.DataFrame:
    return minutes.head(2880)


def without(frame: pl.DataFrame, *runs: tuple[int, int]) -> pl.DataFrame:
    """``frame`` without ``length`` rows from row ``first`` on, of each (first, length)."""
    gone = [row for first, length in runs for row in range(first, first + length)]
    return frame.with_row_index("n").filter(~pl.col("n").is_in(gone)).drop("n")


def frozen(frame: pl.DataFrame, first: int, length: int) -> pl.DataFrame:
    """``frame`` with flat candles at the last close and volume 0 in the rows from ``first`` on."""
    still = pl.int_range(pl.len()).is_between(first, first + length, closed="left")
    price = frame["close"][first - 1]
    return frame.with_columns(
        *(pl.when(still).then(price).otherwise(c).alias(c) for c in ("open", "high", "low", "close")),
        volume=pl.when(still).then(0.0).otherwise("volume"),
    )


def gaps(
    frames: dict[str, pl.DataFrame], wider: dict[str, pl.DataFrame] | None = None, fetched: Iterable[date] | None = None
) -> list[tuple[str, datetime, int, str, list[str]]]:
    days = None if fetched is None else list(fetched)
    return classify({s: holes(f, wider or {}, START, START + 2 * DAY, fetched=days) for s, f in frames.items()}).rows()


class TestOneSymbol:
    def gaps(self, frame: pl.DataFrame, wider: dict[str, pl.DataFrame] | None = None) -> list[tuple[int, int, str, list[str]]]:
        """(first missing row, minutes, kind, evidence)"""
        found = gaps({"BTC-USD": frame}, wider)
        return [((start - START) // MINUTE, minutes, kind, evidence) for _, start, minutes, kind, evidence in found]

    def test_whole_days_have_none(self, two_days: pl.DataFrame) -> None:
        assert self.gaps(two_days) == []

    def test_up_to_fifteen_minutes_nobody_traded(self, two_days: pl.DataFrame) -> None:
        frame = without(two_days, (100, 1), (200, 15))
        assert self.gaps(frame) == [(100, 1, "no_trade", []), (200, 15, "no_trade", [])]

    def test_more_is_an_outage(self, two_days: pl.DataFrame) -> None:
        assert self.gaps(without(two_days, (200, 16))) == [(200, 16, "outage", ["long"])]

    def test_a_hole_over_midnight_is_one(self, two_days: pl.DataFrame) -> None:
        assert self.gaps(without(two_days, (1440 - 9, 18))) == [(1431, 18, "outage", ["long"])]

    def test_a_price_that_stood_still_before_the_hole_makes_it_an_outage(self, two_days: pl.DataFrame) -> None:
        frame = without(frozen(two_days, 300, 3), (303, 2))
        assert self.gaps(frame) == [(303, 2, "outage", ["frozen_before"])]

    @pytest.mark.parametrize("first", [299, 305], ids=["ends_before", "begins_after"])
    def test_only_if_it_stood_still_up_to_the_hole(self, two_days: pl.DataFrame, first: int) -> None:
        frame = without(frozen(two_days, first, 3), (303, 2))
        assert self.gaps(frame)[0][2:] == ("no_trade", [])

    def test_two_silent_minutes_before_it_are_a_thin_market(self, two_days: pl.DataFrame) -> None:
        assert self.gaps(without(frozen(two_days, 301, 2), (303, 2)))[0][2:] == ("no_trade", [])

    def test_a_wider_candle_inside_the_hole_that_has_volume_makes_it_an_outage(self, two_days: pl.DataFrame) -> None:
        frame = without(two_days, (298, 9))
        assert self.gaps(frame, {"5m": resample(two_days, "5m")}) == [(298, 9, "outage", ["traded"])]

    def test_one_minute_whose_volume_a_wider_candle_knows_was_traded(self, two_days: pl.DataFrame) -> None:
        assert self.gaps(without(two_days, (302, 1)), {"1h": resample(two_days, "1h")}) == [(302, 1, "outage", ["traded"])]

    def test_wider_candles_that_the_minutes_add_up_to_know_nothing_more(self, two_days: pl.DataFrame) -> None:
        frame = without(two_days, (302, 1), (600, 10))
        wider = {tf: resample(frame, tf) for tf in ("5m", "15m", "1h")}
        assert [found[2:] for found in self.gaps(frame, wider)] == [("no_trade", [])] * 2

    def test_of_two_holes_in_one_wider_candle_neither_is_told_by_it(self, two_days: pl.DataFrame) -> None:
        frame = without(two_days, (300, 1), (302, 1))
        assert [found[2:] for found in self.gaps(frame, {"5m": resample(two_days, "5m")})] == [("no_trade", [])] * 2

    def test_no_minute_at_all_is_one_outage(self, two_days: pl.DataFrame) -> None:
        assert self.gaps(two_days.clear()) == [(0, 2880, "outage", ["long", "edge"])]

    def test_a_short_hole_at_the_end_of_what_is_known_may_be_longer(self, two_days: pl.DataFrame) -> None:
        assert self.gaps(without(two_days, (0, 2), (2877, 3))) == [(0, 2, "no_trade", ["edge"]), (2877, 3, "no_trade", ["edge"])]


class TestBeyondTheInterval:
    """Days beside the interval are read so that its edges are like any other minute."""

    DAYS = tuple(START.date() + n * DAY for n in range(4))

    def record(self, frame: pl.DataFrame, first: int, last: int, fetched: Iterable[date] = DAYS) -> pl.DataFrame:
        """Of the days from ``first`` to before ``last``, with a day on either side."""
        start, end = START + first * DAY, START + last * DAY
        read = frame.filter(pl.col("timestamp").is_between(start - DAY, end + DAY, closed="left"))
        near = [day for day in fetched if start - DAY <= datetime(day.year, day.month, day.day, tzinfo=UTC) < end + DAY]
        return classify({"BTC-USD": holes(read, {}, start, end, fetched=near)})

    def test_a_hole_over_the_border_is_whole_in_the_record_of_either_side(self, minutes: pl.DataFrame) -> None:
        frame = without(minutes, (2 * 1440 - 9, 18))
        assert self.record(frame, 1, 2).rows() == self.record(frame, 2, 3).rows()
        assert self.record(frame, 1, 2)["minutes"].to_list() == [18]

    def test_a_hole_beside_the_interval_is_not_its_own(self, minutes: pl.DataFrame) -> None:
        assert self.record(without(minutes, (2 * 1440, 18)), 1, 2).is_empty()

    def test_a_day_that_was_not_fetched_is_no_hole(self, minutes: pl.DataFrame) -> None:
        frame = without(minutes, (1440, 1440), (2 * 1440, 3))
        record = self.record(frame, 0, 4, fetched=[day for day in self.DAYS if day != self.DAYS[1]])
        assert record.rows() == [("BTC-USD", START + 2 * DAY, 3, "no_trade", ["edge"])]

    def test_wider_candles_of_a_day_that_was_not_fetched_tell_nothing(self, minutes: pl.DataFrame) -> None:
        frame = without(minutes, (0, 1440), (2 * 1440, 3))
        wider = {tf: resample(minutes, tf) for tf in ("5m", "15m", "1h")}
        found = holes(frame, wider, START, START + 4 * DAY, fetched=self.DAYS[1:])
        assert found.select("start", "known", "traded").rows() == [
            (START - DAY, False, False),
            (START + 2 * DAY, True, True),
            (START + 4 * DAY, False, False),
        ]

    def test_a_fetched_day_without_a_candle_is_an_outage_of_a_day(self, minutes: pl.DataFrame) -> None:
        assert self.record(without(minutes, (1440, 1440)), 0, 4).rows() == [
            ("BTC-USD", START + DAY, 1440, "outage", ["long"]),
        ]


class TestAllSymbols:
    THREE = ("BTC-USD", "ETH-USD", "SOL-USD")

    def test_two_minutes_that_three_busy_symbols_miss_at_once_are_an_outage(self, two_days: pl.DataFrame) -> None:
        found = gaps(dict.fromkeys(self.THREE, without(two_days, (NOON, 2))))
        assert [(symbol, *rest) for symbol, _, *rest in found] == [(s, 2, "outage", ["all_symbols"]) for s in self.THREE]

    def test_a_hole_that_shares_such_minutes_is_part_of_the_outage(self, two_days: pl.DataFrame) -> None:
        frames = {"BTC-USD": without(two_days, (NOON, 2)), "ETH-USD": without(two_days, (NOON - 5, 9))}
        assert [evidence for *_, evidence in gaps(frames)] == [["all_symbols"]] * 2

    def test_if_one_symbol_was_served_it_is_none(self, two_days: pl.DataFrame) -> None:
        hole = without(two_days, (NOON, 2))
        found = gaps({"BTC-USD": hole, "ETH-USD": hole, "SOL-USD": two_days})
        assert {kind for *_, kind, _ in found} == {"no_trade"}

    def test_one_symbol_alone_is_not_all(self, two_days: pl.DataFrame) -> None:
        assert [kind for *_, kind, _ in gaps({"BTC-USD": without(two_days, (NOON, 2))})] == ["no_trade"]

    def test_in_thin_markets_the_same_minutes_are_chance(self, two_days: pl.DataFrame) -> None:
        silent = [(row, 1) for row in range(NOON - 300, NOON + 300, 3)]
        found = gaps(dict.fromkeys(self.THREE, without(two_days, *silent)))
        assert len(found) == 600
        assert {kind for *_, kind, _ in found} == {"no_trade"}

    def test_a_symbol_that_was_not_fetched_has_no_say(self, two_days: pl.DataFrame) -> None:
        hole = without(two_days, (NOON, 2))
        days = [START.date(), START.date() + DAY]
        start, end = START, START + 2 * DAY
        record = classify(
            {
                "BTC-USD": holes(hole, {}, start, end, fetched=days),
                "ETH-USD": holes(hole, {}, start, end, fetched=days),
                "NEW-USD": holes(two_days.filter(pl.col("timestamp") >= START + DAY), {}, start, end, fetched=days[1:]),
            }
        )
        assert record.select("symbol", "kind").rows() == [("BTC-USD", "outage"), ("ETH-USD", "outage")]


def test_the_record_has_its_schema_also_without_rows(two_days: pl.DataFrame) -> None:
    assert classify({}).schema == classify({"BTC-USD": holes(two_days, {}, START, START + DAY)}).schema == pl.Schema(GAP_SCHEMA)
    assert holes(two_days, {}, START, START + DAY, fetched=[]).schema == pl.Schema(HOLE_SCHEMA)


@pytest.fixture
def folder(market_data_dir: Path | None) -> Path:
    if market_data_dir is None:
        pytest.skip("needs the real candles (CRPBOT_SANDBOX_DATA)")
    return market_data_dir / "candles_1m_windows"


def real(folder: Path) -> dict[str, pl.DataFrame]:
    return {path.stem: pl.read_parquet(path) for path in sorted(folder.glob("*.parquet"))}


def whole(frames: dict[str, pl.DataFrame]) -> tuple[datetime, datetime]:
    """The time that all of them cover."""
    return max(f["timestamp"][0] for f in frames.values()), min(f["timestamp"][-1] for f in frames.values()) + MINUTE


def record(frames: dict[str, pl.DataFrame]) -> pl.DataFrame:
    start, end = whole(frames)
    return classify({symbol: holes(frame, {}, start, end) for symbol, frame in frames.items()})


class TestRealMarkets:
    def test_the_outage_of_2023_03_24_froze_first_and_hit_all_symbols(self, folder: Path) -> None:
        start = datetime(2023, 3, 24, 12, 40, tzinfo=UTC)
        evidence = ["long", "frozen_before", "all_symbols"]
        found = record(real(folder / "binance_spot_2023-03"))
        assert found.rows() == [(s, start, 80, "outage", evidence) for s in TestAllSymbols.THREE]

    def test_a_thin_market_has_its_two_breaks_and_hardly_any_other_outage(self, folder: Path) -> None:
        found = record(real(folder / "coinbase_derivatives_perp_2026-02"))
        outages = found.filter(pl.col("kind") == "outage")
        at_once = outages.filter(pl.col("evidence").list.contains("all_symbols"))
        assert at_once["symbol"].value_counts()["count"].to_list() == [2, 2, 2]
        assert at_once["minutes"].min() == 60
        assert found.height - outages.height == 5043
        assert outages.height - at_once.height == 6  # longer than 15 minutes, in one symbol, on a weekend

    def test_a_day_alone_says_what_the_whole_record_says(self, folder: Path) -> None:
        frames = real(folder / "coinbase_derivatives_perp_2026-02")
        everything = record(frames)
        day = datetime(2026, 2, 20, tzinfo=UTC)
        near = {
            symbol: holes(frame.filter(pl.col("timestamp").is_between(day - DAY, day + 2 * DAY, closed="left")), {}, day, day + DAY)
            for symbol, frame in frames.items()
        }
        ends = pl.col("start") + pl.col("minutes") * MINUTE
        assert classify(near).rows() == everything.filter(pl.col("start") < day + DAY, ends > day).rows()

    def test_minutes_left_out_on_purpose_are_found_by_the_wider_candles(self, market_data_dir: Path | None, folder: Path) -> None:
        fetched = pl.read_parquet(folder.parent / "candles_mtf" / "binance_spot_2025-05" / "BTC-USD_5m.parquet")
        minutes = pl.read_parquet(folder.parent / "candles_1m_spot" / "BTC-USD.parquet")
        lost = without(minutes, *((row, 1) for row in range(7, minutes.height - 100, 1001)))
        found = record({"BTC-USD": lost}), classify({"BTC-USD": holes(lost, {"5m": fetched}, *whole({"BTC-USD": minutes}))})
        assert [set(f["kind"]) for f in found] == [{"no_trade"}, {"outage"}]
        assert found[1].height == 131


def test_evidence_is_out_of_a_closed_set_in_one_order(two_days: pl.DataFrame) -> None:
    frame = without(frozen(two_days, 300, 10), (310, 40), (2870, 10))
    wider = {"5m": resample(two_days, "5m")}
    told = [evidence for *_, evidence in gaps({"BTC-USD": frame, "ETH-USD": frame}, wider)]
    assert told[:2] == [["long", "frozen_before", "traded", "all_symbols"], ["traded", "all_symbols", "edge"]]
    assert all(evidence == sorted(evidence, key=EVIDENCE.index) for evidence in told)
