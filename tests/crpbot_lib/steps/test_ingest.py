"""Days of market data in the lake: what was served, byte for byte the same however it was fetched, and judged honestly."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from crpbot_lib.config import TIMEFRAMES, Settings, Symbol, TrainingSettings
from crpbot_lib.lake import Lake, keys
from crpbot_lib.market_data import MarketData, MarketDataError
from crpbot_lib.market_data.quality import resample
from crpbot_lib.steps import ingest, partitions, quality

DAY = date(2025, 5, 7)
LISTED = date(2025, 4, 10)
MIDNIGHT = datetime(2025, 5, 7, tzinfo=UTC)
ONE = timedelta(days=1)
HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)


def contents(lake: Lake) -> dict[str, bytes]:
    return {key: lake.read(key) for key in lake.keys("raw/")}


def without(wire: Any, timeframe: str, start: datetime, end: datetime) -> None:
    gone = pl.col("timestamp").is_between(start, end, closed="left")
    wire.candles["BTC-USD", timeframe] = wire.candles["BTC-USD", timeframe].filter(~gone)


class TestFetchCandles:
    @pytest.mark.parametrize("timeframe", TIMEFRAMES)
    def test_a_partition_is_the_day_as_served(
        self, settings: Settings, lake: Lake, timeframes: dict[str, pl.DataFrame], timeframe: str
    ) -> None:
        got = ingest.fetch_candles(settings, lake, "BTC-USD", timeframe, DAY)
        served = timeframes[timeframe].filter(pl.col("timestamp").dt.date() == DAY)
        key = f"raw/candles/{timeframe}/symbol=BTC-USD/date=2025-05-07/candles.parquet"
        assert_frame_equal(lake.read_frame(key), served, check_exact=True)
        assert got == {"key": key, "rows": served.height, "expected": served.height, "missing": 0, "gaps": 0}
        assert lake.keys("") == [key]

    def test_absent_minutes_are_counted_and_not_filled(self, settings: Settings, lake: Lake, wire: Any) -> None:
        without(wire, "1m", MIDNIGHT + HOUR, MIDNIGHT + HOUR + 20 * MINUTE)
        without(wire, "1m", MIDNIGHT + 5 * HOUR, MIDNIGHT + 5 * HOUR + MINUTE)
        got = ingest.fetch_candles(settings, lake, "BTC-USD", "1m", DAY)
        assert (got["rows"], got["missing"], got["gaps"]) == (1419, 21, 2)
        assert lake.read_frame(got["key"]).height == 1419

    def test_a_day_without_a_candle_is_a_partition_without_rows(
        self, settings: Settings, lake: Lake, market: MarketData, caplog: pytest.LogCaptureFixture
    ) -> None:
        got = ingest.fetch_candles(settings, lake, "BTC-USD", "1m", date(2025, 4, 30), market=market)
        assert (got["rows"], got["missing"]) == (0, 1440)
        assert lake.read_frame(got["key"]).is_empty()
        assert "1 of 1 days were served without a row" in caplog.text

    def test_a_day_that_is_not_over_is_refused(self, settings: Settings, lake: Lake, wire: Any) -> None:
        """For five minutes after its end: its last minute may not be served yet."""
        with pytest.raises(
            MarketDataError,
            match="2025-05-07 is not over yet: it can be fetched from 2025-05-08 00:05 UTC on and it is 2025-05-08 00:04 UTC",
        ):
            ingest.fetch_candles(settings, lake, "BTC-USD", "1m", DAY, now=lambda: MIDNIGHT + ONE + 4 * MINUTE)
        assert (lake.keys(""), wire.requests) == ([], [])
        got = ingest.fetch_candles(settings, lake, "BTC-USD", "1m", DAY, now=lambda: MIDNIGHT + ONE + 5 * MINUTE)
        assert got["rows"] == 1440

    def test_a_day_run_again_loses_nothing_unless_it_is_to_replace_what_is_there(
        self, settings: Settings, lake: Lake, wire: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        ingest.fetch_candles(settings, lake, "BTC-USD", "1m", DAY)
        before = contents(lake)
        without(wire, "1m", MIDNIGHT, MIDNIGHT + HOUR)
        assert ingest.fetch_candles(settings, lake, "BTC-USD", "1m", DAY)["missing"] == 0
        assert contents(lake) == before
        assert "BTC-USD 1m 2025-05-07: kept as it is stored: the answer lacks 60 of its rows" in caplog.text
        assert ingest.fetch_candle_days(settings, lake, "BTC-USD", "1m", DAY, DAY + ONE, replace=True)["missing"] == 60
        assert lake.read_frame(keys.candles("1m", "BTC-USD", DAY)).height == 1380

    @pytest.mark.parametrize("wrong", ["another day", "impossible"])
    def test_what_is_stored_and_cannot_be_true_is_not_kept(
        self, settings: Settings, lake: Lake, wire: Any, timeframes: dict[str, pl.DataFrame], wrong: str
    ) -> None:
        key, served = keys.candles("1h", "BTC-USD", DAY), timeframes["1h"].filter(pl.col("timestamp").dt.date() == DAY)
        if wrong == "another day":
            lake.write_frame(key, timeframes["1h"].filter(pl.col("timestamp").dt.date() == DAY - ONE))
        else:
            lake.write_frame(key, served.with_columns(high=pl.lit(1.0)))
            wire.candles["BTC-USD", "1h"] = timeframes["1h"].filter(pl.col("timestamp") != MIDNIGHT)
        ingest.fetch_candles(settings, lake, "BTC-USD", "1h", DAY)
        assert_frame_equal(lake.read_frame(key), served.tail(24 if wrong == "another day" else 23), check_exact=True)

    def test_a_failed_fetch_writes_nothing(self, settings: Settings, lake: Lake, wire: Any) -> None:
        wire.says(401, "Unauthorized")
        with pytest.raises(MarketDataError, match="401: Unauthorized"):
            ingest.fetch_candles(settings, lake, "BTC-USD", "1m", DAY)
        assert lake.keys("") == []

    def test_unknown_names_are_refused(self, settings: Settings, lake: Lake) -> None:
        with pytest.raises(ValueError, match="unknown symbol 'DOGE-USD'"):
            ingest.fetch_candles(settings, lake, "DOGE-USD", "1m", DAY)
        with pytest.raises(ValueError, match="unknown timeframe '2m'"):
            ingest.fetch_candles(settings, lake, "BTC-USD", "2m", DAY)

    def test_an_operator_sees_one_line(self, settings: Settings, lake: Lake, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "crpbot_lib"):
            ingest.fetch_candles(settings, lake, "BTC-USD", "1m", DAY)
        [line] = caplog.messages
        assert line.startswith("BTC-USD 1m 2025-05-07: 1440 rows, 0 absent in 0 gaps, ")


class TestFetchCoinGecko:
    def test_writes_the_hours_of_the_day_and_the_history_up_to_it(self, settings: Settings, lake: Lake) -> None:
        got = ingest.fetch_coingecko(settings, lake, "BTC-USD", DAY)
        hourly = lake.read_frame(keys.coingecko("hourly", "bitcoin", DAY))
        daily = lake.read_frame(keys.coingecko("daily", "bitcoin", DAY))
        assert hourly["timestamp"].to_list() == [MIDNIGHT + n * HOUR for n in range(24)]
        assert (daily["timestamp"][0].date(), daily["timestamp"][-1]) == (LISTED, MIDNIGHT)
        assert (daily["available_at"] - daily["timestamp"]).unique().to_list() == [35 * MINUTE]
        assert (got["coin"], got["hourly"]["rows"], got["daily"]["rows"], got["daily"]["missing"]) == ("bitcoin", 24, 28, 0)

    def test_takes_one_request_each(self, settings: Settings, lake: Lake, wire: Any) -> None:
        ingest.fetch_coingecko(settings, lake, "BTC-USD", DAY)
        assert len(wire.requests) == 2

    def test_before_the_listing_is_refused(self, settings: Settings, lake: Lake) -> None:
        with pytest.raises(MarketDataError, match="2025-04-09 lies before the listing of bitcoin on 2025-04-10"):
            ingest.fetch_coingecko(settings, lake, "BTC-USD", LISTED - ONE)
        assert lake.keys("") == []

    def test_no_history_is_an_error_and_not_an_empty_partition(self, settings: Settings, lake: Lake, wire: Any) -> None:
        wire.points["bitcoin", "daily"] = []
        with pytest.raises(MarketDataError, match="no bitcoin daily history from 2025-04-10 to 2025-05-07: check the coin's id"):
            ingest.fetch_coingecko(settings, lake, "BTC-USD", DAY)
        assert lake.keys("") == []

    def test_where_the_plan_is_short_the_history_of_a_day_is_the_same_whenever_it_is_fetched(
        self, settings: Settings, lake: Lake, wire: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        short = settings.model_copy(update={"coingecko_history_days": 365, "training": TrainingSettings(days=1)})
        last = date(2025, 5, 9)
        stamps = [int((MIDNIGHT + n * ONE).timestamp() * 1000) for n in range(-60, 3)]
        wire.points["bitcoin", "daily"] = [(stamp, 1.0, 2.0, 3.0) for stamp in stamps]
        short = short.model_copy(update={"symbols": (Symbol(name="BTC-USD", coin="bitcoin", coin_listed=date(2025, 1, 1)),)})
        contents = []
        for wait in (1, 200):
            ingest.fetch_coingecko(short, lake, "BTC-USD", last, now=lambda wait=wait: MIDNIGHT + (3 + wait) * ONE)  # type: ignore[misc]
            contents.append(lake.read(keys.coingecko("daily", "bitcoin", last)))
        history = lake.read_frame(keys.coingecko("daily", "bitcoin", last))["timestamp"]
        assert contents[0] == contents[1]
        assert (history[0].date(), history[-1].date()) == (last - 33 * ONE, last), "training.days, 30 days of windows, 2 of age"
        assert "its features cannot be built without dated records in `all_time_highs` of BTC-USD" in caplog.text

    def test_a_day_that_is_not_over_is_refused(self, settings: Settings, lake: Lake) -> None:
        with pytest.raises(MarketDataError, match="2025-05-07 is not over yet"):
            ingest.fetch_coingecko(settings, lake, "BTC-USD", DAY, now=lambda: MIDNIGHT + 12 * HOUR)


class TestBytes:
    def test_running_again_changes_nothing(self, settings: Settings, lake: Lake) -> None:
        ingest.fetch_candles(settings, lake, "BTC-USD", "1m", DAY)
        ingest.fetch_coingecko(settings, lake, "BTC-USD", DAY)
        first = contents(lake)
        ingest.fetch_candles(settings, lake, "BTC-USD", "1m", DAY, now=lambda: MIDNIGHT + 40 * ONE)
        ingest.fetch_coingecko(settings, lake, "BTC-USD", DAY)
        assert contents(lake) == first

    def test_a_range_gives_the_bytes_of_its_days(
        self, settings: Settings, lake: Lake, wire: Any, market: MarketData, tmp_path: Path
    ) -> None:
        without(wire, "1m", MIDNIGHT - ONE, MIDNIGHT)
        ingest.load(settings, lake, "BTC-USD", DAY - ONE, DAY + 2 * ONE, market=market)
        alone = Lake(f"file://{tmp_path}/alone")
        for n in (0, -1, 1):
            for timeframe in TIMEFRAMES:
                ingest.fetch_candles(settings, alone, "BTC-USD", timeframe, DAY + n * ONE, market=market)
            ingest.fetch_coingecko(settings, alone, "BTC-USD", DAY + n * ONE)
        assert len(contents(lake)) == 3 * (4 + 2)
        assert contents(lake) == contents(alone)


class TestEnsureCoverage:
    def test_fetches_the_days_and_the_warm_up_before_them(self, settings: Settings, lake: Lake) -> None:
        got = ingest.ensure_coverage(settings, lake, "BTC-USD", DAY, DAY + 2 * ONE)
        wanted = [keys.candles(tf, "BTC-USD", DAY + n * ONE) for tf in TIMEFRAMES for n in (-1, 0, 1)]
        wanted += [keys.coingecko("hourly", "bitcoin", DAY + n * ONE) for n in range(-17, 2)]
        wanted += [keys.coingecko("daily", "bitcoin", DAY + ONE)]
        assert lake.keys("") == sorted(wanted)
        assert (got["present"], got["fetched"], got["missing"]) == (0, len(wanted), 0)
        assert got["rows"] == 3 * (1440 + 288 + 96 + 24) + 19 * 24 + 29

    def test_fetches_only_what_is_missing(self, settings: Settings, lake: Lake, wire: Any) -> None:
        ingest.fetch_candles(settings, lake, "BTC-USD", "1m", DAY)
        ingest.ensure_coverage(settings, lake, "BTC-USD", DAY, DAY + ONE)
        wire.requests.clear()
        before = contents(lake)
        got = ingest.ensure_coverage(settings, lake, "BTC-USD", DAY, DAY + ONE)
        assert (got["present"], got["fetched"], got["rows"], wire.requests) == (27, 0, 0, [])
        assert contents(lake) == before
        (Path(lake.root.removeprefix("file://")) / keys.candles("5m", "BTC-USD", DAY)).unlink()
        again = ingest.ensure_coverage(settings, lake, "BTC-USD", DAY, DAY + ONE)
        assert (again["fetched"], again["rows"], len(wire.requests)) == (1, 288, 1)
        assert contents(lake) == before

    def test_rows_missing_in_a_partition_that_is_there_are_reported(self, settings: Settings, lake: Lake, wire: Any) -> None:
        """As one fetched in the second after midnight may lack its last minute."""
        whole = wire.candles["BTC-USD", "1m"]
        without(wire, "1m", MIDNIGHT + ONE - MINUTE, MIDNIGHT + ONE)
        ingest.fetch_candles(settings, lake, "BTC-USD", "1m", DAY)
        ingest.fetch_coingecko(settings, lake, "BTC-USD", DAY)
        wire.candles["BTC-USD", "1m"] = whole
        got = ingest.ensure_coverage(settings, lake, "BTC-USD", DAY, DAY + ONE)
        assert (got["present"], got["missing"], got["missing_present"]) == (3, 1, 1)
        again = ingest.ensure_coverage(settings, lake, "BTC-USD", DAY, DAY + ONE)
        assert (again["fetched"], again["missing"], again["missing_present"]) == (0, 1, 1), "reported, and left alone"

    def test_takes_few_requests(self, settings: Settings, lake: Lake, wire: Any) -> None:
        ingest.ensure_coverage(settings, lake, "BTC-USD", DAY, DAY + 2 * ONE)
        by_kind = [r.query.get("granularity", "points") for r in wire.requests]
        assert {kind: by_kind.count(kind) for kind in by_kind} == {
            "ONE_MINUTE": 15,
            "FIVE_MINUTE": 3,
            "FIFTEEN_MINUTE": 1,
            "ONE_HOUR": 1,
            "points": 2,
        }

    def test_a_day_without_points_in_the_middle_is_fetched_and_empty(
        self, settings: Settings, lake: Lake, wire: Any, market: MarketData
    ) -> None:
        hole = MIDNIGHT - 3 * ONE
        kept = [p for p in wire.points["bitcoin", "hourly"] if not hole <= datetime.fromtimestamp(p[0] / 1000, UTC) < hole + ONE]
        wire.points["bitcoin", "hourly"] = kept
        without(wire, "1m", MIDNIGHT - ONE, MIDNIGHT)
        got = ingest.ensure_coverage(settings, lake, "BTC-USD", DAY, DAY + ONE, market=market)
        assert lake.read_frame(keys.coingecko("hourly", "bitcoin", hole.date())).is_empty()
        assert lake.read_frame(keys.candles("1m", "BTC-USD", DAY - ONE)).is_empty()
        assert got["missing"] == 24 + 1440
        assert ingest.ensure_coverage(settings, lake, "BTC-USD", DAY, DAY + ONE)["fetched"] == 0

    def test_the_warm_up_begins_no_earlier_than_the_listing(self, settings: Settings, lake: Lake, market: MarketData) -> None:
        ingest.ensure_coverage(settings, lake, "BTC-USD", LISTED + ONE, LISTED + 2 * ONE, market=market)
        assert len(lake.keys("raw/coingecko/hourly/")) == 2

    def test_the_future_and_an_empty_interval_are_refused(self, settings: Settings, lake: Lake) -> None:
        with pytest.raises(MarketDataError, match="2025-05-08 is not over yet"):
            ingest.ensure_coverage(settings, lake, "BTC-USD", DAY, DAY + 2 * ONE, now=lambda: MIDNIGHT + ONE)
        with pytest.raises(ValueError, match=r"the interval \[2025-05-07, 2025-05-07\) holds no day"):
            ingest.ensure_coverage(settings, lake, "BTC-USD", DAY, DAY)


class Watched(MarketData):
    """The sources, with a word before each fetch."""

    def __init__(self, settings: Settings, before: Callable[[str], None]) -> None:
        super().__init__(settings, backoff=0.001)
        self._before = before

    def candles(self, symbol: str, timeframe: str, start: datetime, end: datetime) -> pl.DataFrame:
        self._before(f"{timeframe} {start:%m-%d} {end:%m-%d}")
        return super().candles(symbol, timeframe, start, end)


class Told:
    """A meter that remembers."""

    def __init__(self) -> None:
        self.started: list[tuple[str, int, float]] = []
        self.partitions = 0
        self.requests = 0.0

    def start(self, what: str, partitions: int, requests: float) -> None:
        self.started.append((what, partitions, requests))

    def advance(self, partitions: int, requests: float, doing: str) -> None:
        self.partitions += partitions
        self.requests += requests


class TestLoad:
    def test_brings_every_partition_of_the_days(self, settings: Settings, lake: Lake, market: MarketData) -> None:
        got = ingest.load(settings, lake, "BTC-USD", DAY - ONE, DAY + ONE, market=market)
        wanted = [keys.candles(tf, "BTC-USD", day) for tf in TIMEFRAMES for day in (DAY - ONE, DAY)]
        wanted += [keys.coingecko(series, "bitcoin", day) for series in ("hourly", "daily") for day in (DAY - ONE, DAY)]
        assert lake.keys("") == sorted(wanted)
        # of the daily history, which each day's partition holds whole, the longest counts
        rows = 2 * (1440 + 288 + 96 + 24 + 24) + 28
        assert got == {
            "symbol": "BTC-USD",
            "start": "2025-05-06",
            "end": "2025-05-08",
            "present": 0,
            "fetched": 12,
            "rows": rows,
            "missing": 0,
            "outcomes": {"fetched": 12},
        }

    def test_timeframes_and_sources_can_be_chosen(self, settings: Settings, lake: Lake, market: MarketData) -> None:
        ingest.load(settings, lake, "BTC-USD", DAY, DAY + ONE, timeframes=["5m"], coingecko=False, market=market)
        assert lake.keys("") == [keys.candles("5m", "BTC-USD", DAY)]

    def test_fetches_pieces_of_a_span_and_writes_one_while_it_fetches_the_next(
        self, settings: Settings, lake: Lake, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(partitions, "ROWS_AT_ONCE", 1440)
        asked: list[tuple[str, int]] = []
        watched = Watched(settings, lambda what: asked.append((what, len(lake.keys("raw/")))))
        ingest.load(settings, lake, "BTC-USD", DAY - 2 * ONE, DAY + ONE, timeframes=["1m"], coingecko=False, market=watched)
        assert [what for what, _ in asked] == ["1m 05-05 05-06", "1m 05-06 05-07", "1m 05-07 05-08"]
        assert asked[0][1] == 0
        assert asked[2][1] >= 1, "the first piece is written by the time the third is fetched"
        assert len(lake.keys("raw/")) == 3

    def test_a_broken_off_load_goes_on_where_it_was(
        self, settings: Settings, lake: Lake, market: MarketData, tmp_path: Path
    ) -> None:
        def break_off(what: str) -> None:
            if what.startswith("15m"):
                raise KeyboardInterrupt

        days = ("BTC-USD", DAY - ONE, DAY + ONE)
        with pytest.raises(KeyboardInterrupt):
            ingest.load(settings, lake, *days, market=Watched(settings, break_off))
        there = len(lake.keys("raw/"))
        assert there == 2 * 4, "what was fetched is written: points, 1m, 5m"
        got = ingest.load(settings, lake, *days, market=market)
        assert (got["present"], got["fetched"]) == (there, 12 - there)
        whole = Lake(f"file://{tmp_path}/whole")
        ingest.load(settings, whole, *days, market=market)
        assert contents(lake) == contents(whole)

    def test_a_second_load_asks_for_nothing(self, settings: Settings, lake: Lake, market: MarketData, wire: Any) -> None:
        ingest.load(settings, lake, "BTC-USD", DAY, DAY + ONE, market=market)
        wire.requests.clear()
        got = ingest.load(settings, lake, "BTC-USD", DAY, DAY + ONE, market=market)
        assert (got["present"], got["fetched"], wire.requests) == (6, 0, [])

    def test_incomplete_fetches_what_lacks_rows_or_cannot_be_read(
        self, settings: Settings, lake: Lake, market: MarketData, wire: Any
    ) -> None:
        whole = wire.candles["BTC-USD", "1m"]
        without(wire, "1m", MIDNIGHT, MIDNIGHT + HOUR)
        ingest.load(settings, lake, "BTC-USD", DAY, DAY + ONE, market=market)
        lake.write(keys.candles("1h", "BTC-USD", DAY), b"PAR1")
        wire.candles["BTC-USD", "1m"] = whole
        got = ingest.load(settings, lake, "BTC-USD", DAY, DAY + ONE, refetch="incomplete", market=market)
        assert (got["present"], got["outcomes"], got["missing"]) == (4, {"filled": 1, "fetched": 1}, 0)
        assert lake.read_frame(keys.candles("1h", "BTC-USD", DAY)).height == 24

    def test_all_fetched_again_loses_nothing(
        self, settings: Settings, lake: Lake, market: MarketData, wire: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        ingest.load(settings, lake, "BTC-USD", DAY, DAY + ONE, market=market)
        before = contents(lake)
        without(wire, "1m", MIDNIGHT, MIDNIGHT + HOUR)
        wire.candles["BTC-USD", "5m"] = wire.candles["BTC-USD", "5m"].clear()
        wire.points["bitcoin", "hourly"] = [
            (stamp, None, cap, volume) for stamp, _, cap, volume in wire.points["bitcoin", "hourly"]
        ]
        got = ingest.load(settings, lake, "BTC-USD", DAY, DAY + ONE, refetch="all", market=market)
        assert got["outcomes"] == {"kept": 3, "unchanged": 3}
        assert contents(lake) == before
        assert "BTC-USD 1m 2025-05-07: kept as it is stored: the answer lacks 60 of its rows" in caplog.text
        assert "BTC-USD 5m 2025-05-07: kept as it is stored: the answer lacks 288 of its rows" in caplog.text
        assert "bitcoin hourly 2025-05-07: kept as it is stored: the answer lacks 24 of its rows" in caplog.text

    @pytest.mark.parametrize(
        ("start", "end", "options", "said"),
        [
            (DAY, DAY, {}, "holds no day"),
            (DAY, date(2999, 1, 1), {}, "2998-12-31 is not over yet"),
            (
                date(2015, 1, 1),
                DAY,
                {"coingecko": False},
                "2015-01-01 lies before the listing of BTC-USD on 2015-07-20: begin there",
            ),
            (date(2025, 4, 1), DAY, {}, "2025-04-01 lies before the listing of bitcoin on 2025-04-10"),
            (DAY, DAY + ONE, {"refetch": "some"}, "refetch='some': expected one of absent, incomplete, all"),
            (DAY, DAY + ONE, {"timeframes": ["2m"]}, "unknown timeframe '2m'"),
        ],
    )
    def test_what_cannot_be_is_refused_before_any_request(
        self, settings: Settings, lake: Lake, market: MarketData, wire: Any, start: date, end: date, options: Any, said: str
    ) -> None:
        listed = settings.symbols[0].model_copy(update={"exchange_listed": date(2015, 7, 20)})
        settings = settings.model_copy(update={"symbols": (listed,)})
        with pytest.raises((MarketDataError, ValueError), match=said):
            ingest.load(settings, lake, "BTC-USD", start, end, market=market, **options)
        assert (wire.requests, lake.keys("")) == ([], [])

    @pytest.mark.parametrize("wrong", ["key", "product"])
    def test_what_a_source_refuses_leaves_nothing_behind(
        self, settings: Settings, lake: Lake, market: MarketData, wire: Any, wrong: str
    ) -> None:
        if wrong == "key":
            wire.says(401, {"status": {"error_code": 10002, "error_message": "API Key Missing"}})
        else:
            wire.candles = {}
        with pytest.raises(MarketDataError, match=r"401|404"):
            ingest.load(settings, lake, "BTC-USD", DAY - ONE, DAY + ONE, market=market)
        assert lake.keys("") == []

    def test_a_meter_hears_of_every_partition_and_request(self, settings: Settings, lake: Lake, market: MarketData) -> None:
        told = Told()
        plan = ingest.plan_load(settings, lake, ["BTC-USD"], DAY - ONE, DAY + ONE)
        ingest.load(settings, lake, "BTC-USD", DAY - ONE, DAY + ONE, market=market, progress=told)
        assert told.started == [("BTC-USD", plan["partitions"], plan["requests"])]
        assert (told.partitions, told.requests) == (plan["partitions"], plan["requests"])


class TestPlan:
    def test_says_what_would_be_asked_and_asks_nothing(self, settings: Settings, lake: Lake, market: MarketData, wire: Any) -> None:
        ingest.load(settings, lake, "BTC-USD", DAY, DAY + ONE, timeframes=["1m"], coingecko=False, market=market)
        wire.requests.clear()
        slow = settings.model_copy(update={"coinbase_requests_per_second": 10.0, "coingecko_requests_per_second": 0.5})
        got = ingest.plan_load(slow, lake, ["BTC-USD"], DAY - ONE, DAY + ONE)
        assert wire.requests == []
        assert (got["present"], got["partitions"], got["requests"], got["seconds"]) == (1, 11, 5 + 2 + 1 + 1 + 2, 0.9 + 4.0)
        assert got["series"][2] == {"series": "BTC-USD 1m", "present": 1, "partitions": 1, "requests": 5}

    def test_of_years_is_what_their_pages_are(self, settings: Settings, lake: Lake) -> None:
        entry = settings.symbols[0].model_copy(update={"coin_listed": date(2013, 4, 28)})
        settings = settings.model_copy(update={"symbols": (entry,)})
        got = ingest.plan_load(settings, lake, ["BTC-USD"], date(2022, 1, 1), date(2025, 1, 1))
        by_series = {one["series"]: one["requests"] for one in got["series"]}
        minutes = 1096 * 1440 / 300
        assert minutes <= by_series["BTC-USD 1m"] <= minutes + 1
        assert by_series["BTC-USD 1h"] == 88
        assert by_series["bitcoin daily history"] == 1


class TestTheReachOfThePlan:
    """The wire has bitcoin's points from 2025-04-10 on; on 2026-05-01 a plan of 365 days reaches back to 2025-05-02."""

    NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)

    @pytest.fixture
    def short(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"coingecko_history_days": 365})

    def test_is_checked_before_anything_is_fetched(self, short: Settings, lake: Lake, market: MarketData, wire: Any) -> None:
        asked: dict[str, Any] = {"now": lambda: self.NOW}
        steps: list[Any] = [ingest.plan_load, ingest.load, ingest.ensure_coverage, ingest.fetch_coingecko_days]
        for step in steps:
            names = ["BTC-USD"] if step is ingest.plan_load else "BTC-USD"
            with pytest.raises(MarketDataError) as error:
                step(short, lake, names, date(2025, 5, 5), date(2025, 5, 7), **asked)
            said = str(error.value)
            assert "the bitcoin daily history for 2025-05-0" in said
            assert "begins on 2025-04-10, and the plan 'pro' reaches back 365 days, to 2025-05-02; begin on 2025-0" in said
            assert "`crpbot fetch all --candles-only`" in said
            assert "CRPBOT_COINGECKO_PLAN" in said
            assert error.value.permanent
        assert (wire.requests, lake.keys("")) == ([], [])

    def test_hourly_points_are_named_too_with_the_day_that_can_be_had(self, short: Settings, lake: Lake) -> None:
        record = {"all_time_highs": ((1e6, MIDNIGHT - 9 * ONE),), "all_time_highs_until": date(2025, 6, 1)}
        entry = short.symbols[0].model_copy(update={"coin_listed": date(2013, 4, 28), **record})
        known = short.model_copy(update={"symbols": (entry,), "training": TrainingSettings(days=1)})
        ends = date(2025, 8, 1)
        with pytest.raises(
            MarketDataError, match=r"bitcoin daily history for 2025-05-03 begins on 2025-03-31.*; begin on 2025-06-04, "
        ):
            ingest.plan_load(known, lake, ["BTC-USD"], date(2025, 5, 3), ends, now=lambda: self.NOW)
        assert ingest.plan_load(known, lake, ["BTC-USD"], date(2025, 6, 4), ends, now=lambda: self.NOW)["partitions"] == 58 * 6
        [_, hourly] = partitions.points(known, MarketData(known, now=lambda: self.NOW), entry)
        with pytest.raises(MarketDataError, match=r"bitcoin hourly for 2025-05-01 begins on 2025-05-01, .* begin on 2025-05-02, "):
            partitions.check_reach([partitions.Work(hourly, [date(2025, 5, 1)])])

    def test_candles_need_no_plan(self, short: Settings, lake: Lake) -> None:
        planned = ingest.plan_load(short, lake, ["BTC-USD"], DAY, DAY + ONE, coingecko=False, now=lambda: self.NOW)
        assert [one["series"] for one in planned["series"]] == [f"BTC-USD {timeframe}" for timeframe in TIMEFRAMES]

    def test_days_that_are_stored_need_no_plan(self, settings: Settings, short: Settings, lake: Lake, market: MarketData) -> None:
        ingest.load(settings, lake, "BTC-USD", DAY, DAY + ONE, market=market)
        assert ingest.plan_load(short, lake, ["BTC-USD"], DAY, DAY + ONE, now=lambda: self.NOW)["partitions"] == 0


class TestHeal:
    @pytest.fixture
    def whole(self, settings: Settings, lake: Lake, wire: Any, market: MarketData) -> dict[str, pl.DataFrame]:
        """What the exchange really has; the lake has two days of it, an hour of the first one missing."""
        served = dict(wire.candles)
        for timeframe in TIMEFRAMES:
            without(wire, timeframe, MIDNIGHT + HOUR, MIDNIGHT + 2 * HOUR)
        ingest.load(settings, lake, "BTC-USD", DAY, DAY + 2 * ONE, coingecko=False, market=market)
        return {timeframe: frame for (_, timeframe), frame in served.items()}

    @staticmethod
    def serve(wire: Any, frames: dict[str, pl.DataFrame]) -> None:
        wire.candles = {("BTC-USD", timeframe): frame for timeframe, frame in frames.items()}
        wire.requests.clear()

    def test_fills_incomplete_and_absent_days_and_leaves_the_others_alone(
        self, settings: Settings, lake: Lake, wire: Any, market: MarketData, whole: dict[str, pl.DataFrame]
    ) -> None:
        self.serve(wire, whole)
        (Path(lake.root.removeprefix("file://")) / keys.candles("1h", "BTC-USD", DAY + ONE)).unlink()
        got = ingest.heal(settings, lake, ["BTC-USD"], DAY, DAY + 2 * ONE, market=market)
        assert [(d["timeframe"], d["day"], d["outcome"], d["added"]) for d in got["days"]] == [
            ("1m", "2025-05-07", "filled", 60),
            ("5m", "2025-05-07", "filled", 12),
            ("15m", "2025-05-07", "filled", 4),
            ("1h", "2025-05-07", "filled", 1),
            ("1h", "2025-05-08", "fetched", 0),
        ]
        assert (got["looked_at"], got["missing"], got["outcomes"]) == (8, 0, {"filled": 4, "fetched": 1})
        for timeframe in TIMEFRAMES:
            served = whole[timeframe].filter(pl.col("timestamp").dt.date() == DAY)
            assert_frame_equal(lake.read_frame(keys.candles(timeframe, "BTC-USD", DAY)), served, check_exact=True)

    def test_minutes_without_a_trade_are_not_asked_for_again(
        self, settings: Settings, lake: Lake, wire: Any, market: MarketData
    ) -> None:
        """Nobody had to run `gaps` first: what the lake holds says it."""
        for timeframe in ("1m", "5m"):
            without(wire, timeframe, MIDNIGHT + HOUR, MIDNIGHT + HOUR + 5 * MINUTE)
        for timeframe in ("15m", "1h"):
            wire.candles["BTC-USD", timeframe] = resample(wire.candles["BTC-USD", "1m"], timeframe)
        days = (settings, lake, ["BTC-USD"], DAY, DAY + 2 * ONE)
        ingest.load(settings, lake, "BTC-USD", *days[3:], coingecko=False, market=market)
        wire.requests.clear()
        assert ingest.plan_heal(*days)["partitions"] == 0
        assert ingest.heal(*days, market=market)["days"] == []
        assert wire.requests == []
        again = ingest.heal(*days, every=True, market=market)["days"]
        assert [(d["timeframe"], d["day"]) for d in again] == [("1m", "2025-05-07"), ("5m", "2025-05-07")]

    def test_a_wider_candle_of_minutes_that_were_traded_is_asked_for_again(
        self, settings: Settings, lake: Lake, wire: Any, market: MarketData
    ) -> None:
        without(wire, "5m", MIDNIGHT + HOUR, MIDNIGHT + HOUR + 5 * MINUTE)
        ingest.load(settings, lake, "BTC-USD", DAY, DAY + ONE, coingecko=False, market=market)
        plan = ingest.plan_heal(settings, lake, ["BTC-USD"], DAY, DAY + ONE)
        assert [one["series"] for one in plan["series"] if one["partitions"]] == ["BTC-USD 5m"]

    def test_a_partition_that_cannot_be_read_is_asked_for_again(
        self, settings: Settings, lake: Lake, wire: Any, market: MarketData, whole: dict[str, pl.DataFrame]
    ) -> None:
        self.serve(wire, whole)
        lake.write(keys.candles("1m", "BTC-USD", DAY + ONE), b"PAR1")
        ingest.heal(settings, lake, ["BTC-USD"], DAY, DAY + 2 * ONE, market=market)
        assert lake.read_frame(keys.candles("1m", "BTC-USD", DAY + ONE)).height == 1440

    def test_an_answer_that_lacks_stored_candles_changes_nothing(
        self,
        settings: Settings,
        lake: Lake,
        wire: Any,
        market: MarketData,
        whole: dict[str, pl.DataFrame],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Not even where it has others that are not stored."""
        fewer = {tf: frame.filter(pl.col("timestamp") != MIDNIGHT) for tf, frame in whole.items()}
        self.serve(wire, fewer)
        before = contents(lake)
        got = ingest.heal(settings, lake, ["BTC-USD"], DAY, DAY + 2 * ONE, market=market)
        assert {d["outcome"] for d in got["days"]} == {"kept"}
        assert (got["days"][0]["lost"], got["days"][0]["missing"]) == (1, 60)
        assert contents(lake) == before
        assert "BTC-USD 1m 2025-05-07: kept as it is stored: the answer lacks 1 of its rows" in caplog.text

    def test_values_that_differ_from_the_stored_ones_are_counted(
        self, settings: Settings, lake: Lake, wire: Any, market: MarketData, whole: dict[str, pl.DataFrame]
    ) -> None:
        first = pl.col("timestamp").is_in([MIDNIGHT, MIDNIGHT + MINUTE])
        other = whole["1m"].with_columns(volume=pl.when(first).then(pl.col("volume") + 1).otherwise("volume"))
        self.serve(wire, {**whole, "1m": other})
        got = ingest.heal(settings, lake, ["BTC-USD"], DAY, DAY + ONE, market=market)
        assert (got["days"][0]["changed"], got["days"][0]["added"], got["changed"]) == (2, 60, 2)
        assert lake.read_frame(keys.candles("1m", "BTC-USD", DAY))["volume"][0] == other.filter(first)["volume"][0]

    def test_a_second_time_finds_the_same_and_writes_nothing(
        self, settings: Settings, lake: Lake, market: MarketData, whole: dict[str, pl.DataFrame]
    ) -> None:
        before = contents(lake)
        got = ingest.heal(settings, lake, ["BTC-USD"], DAY, DAY + 2 * ONE, market=market)
        assert (got["outcomes"], got["missing"]) == ({"unchanged": 4}, 60 + 12 + 4 + 1)
        assert contents(lake) == before


def test_summaries_fit_into_xcom(settings: Settings, lake: Lake) -> None:
    made = [
        ingest.fetch_candles(settings, lake, "BTC-USD", "1m", DAY),
        ingest.fetch_coingecko(settings, lake, "BTC-USD", DAY),
        ingest.ensure_coverage(settings, lake, "BTC-USD", DAY, DAY + ONE),
        quality.check_quality(settings, lake, ["BTC-USD"], DAY),
    ]
    assert all(len(json.dumps(summary)) < 2000 for summary in made)
