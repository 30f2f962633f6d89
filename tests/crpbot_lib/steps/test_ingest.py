"""Days of market data in the lake: what was served, byte for byte the same however it was fetched, and judged honestly."""

from __future__ import annotations

import json
import logging
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from crpbot_lib.config import TIMEFRAMES, Settings, Symbol
from crpbot_lib.lake import Lake, LakeError, keys
from crpbot_lib.market_data import MarketDataError, QualityError
from crpbot_lib.steps import ingest

DAY = date(2025, 5, 7)
LISTED = date(2025, 4, 10)
MIDNIGHT = datetime(2025, 5, 7, tzinfo=UTC)
ONE = timedelta(days=1)
HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(f"file://{tmp_path}/lake")


@pytest.fixture
def settings(wire: Any, timeframes: dict[str, pl.DataFrame]) -> Settings:
    wire.candles = {("BTC-USD", timeframe): frame for timeframe, frame in timeframes.items()}
    first = datetime(2025, 4, 10, tzinfo=UTC)
    wire.points["bitcoin", "hourly"] = [point(first + n * HOUR + timedelta(seconds=n * 31 % 200), n) for n in range(24 * 30)]
    wire.points["bitcoin", "daily"] = [point(first + n * ONE, n) for n in range(30)]
    return Settings(
        coinbase_url=wire.url,
        coingecko_url=wire.url + "/api/v3",
        coingecko_api_key="key",
        symbols=(Symbol(name="BTC-USD", coin="bitcoin", coin_listed=LISTED),),
        coinbase_requests_per_second=1e6,
        coingecko_requests_per_second=1e6,
    )


def point(moment: datetime, n: int) -> tuple[int, float, float, float]:
    return int(moment.timestamp() * 1000), 95_000.0 + n, 1.9e12 + n, 3e10 + n


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
        self, settings: Settings, lake: Lake, caplog: pytest.LogCaptureFixture
    ) -> None:
        got = ingest.fetch_candles(settings, lake, "BTC-USD", "1m", date(2025, 4, 30))
        assert (got["rows"], got["missing"]) == (0, 1440)
        assert lake.read_frame(got["key"]).is_empty()
        assert "1 of 1 days were served without a row" in caplog.text

    def test_a_day_that_is_not_over_is_refused(self, settings: Settings, lake: Lake, wire: Any) -> None:
        a_minute_to_midnight = MIDNIGHT + ONE - MINUTE
        with pytest.raises(
            MarketDataError, match="2025-05-07 is not over yet: it ends at 2025-05-08 00:00 UTC and it is 2025-05-07 23:59"
        ):
            ingest.fetch_candles(settings, lake, "BTC-USD", "1m", DAY, now=lambda: a_minute_to_midnight)
        assert (lake.keys(""), wire.requests) == ([], [])
        got = ingest.fetch_candles(settings, lake, "BTC-USD", "1m", DAY, now=lambda: MIDNIGHT + ONE)
        assert got["rows"] == 1440

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
        assert [r.query["interval"] for r in wire.requests] == ["hourly", "daily"]

    def test_before_the_listing_is_refused(self, settings: Settings, lake: Lake) -> None:
        with pytest.raises(MarketDataError, match="2025-04-09 lies before the listing of bitcoin on 2025-04-10"):
            ingest.fetch_coingecko(settings, lake, "BTC-USD", LISTED - ONE)
        assert lake.keys("") == []

    def test_no_history_is_an_error_and_not_an_empty_partition(self, settings: Settings, lake: Lake, wire: Any) -> None:
        wire.points["bitcoin", "daily"] = []
        with pytest.raises(MarketDataError, match="no daily history of bitcoin from 2025-04-10 to 2025-05-07: check the coin's id"):
            ingest.fetch_coingecko(settings, lake, "BTC-USD", DAY)
        assert not lake.exists(keys.coingecko("daily", "bitcoin", DAY))

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

    def test_a_range_gives_the_bytes_of_its_days(self, settings: Settings, lake: Lake, wire: Any, tmp_path: Path) -> None:
        without(wire, "1m", MIDNIGHT - ONE, MIDNIGHT)
        ingest.ensure_coverage(settings, lake, "BTC-USD", DAY, DAY + 2 * ONE)
        alone = Lake(f"file://{tmp_path}/alone")
        for n in (2, 0, -1, 1):
            for timeframe in TIMEFRAMES:
                ingest.fetch_candles(settings, alone, "BTC-USD", timeframe, DAY + n * ONE)
            ingest.fetch_coingecko(settings, alone, "BTC-USD", DAY + n * ONE)
        ranged, daywise = contents(lake), contents(alone)
        common = ranged.keys() & daywise.keys()
        assert len(common) == 4 * 3 + 3 + 1
        assert {key: ranged[key] for key in common} == {key: daywise[key] for key in common}


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
        by_kind = [r.query.get("granularity", r.query.get("interval")) for r in wire.requests]
        assert {kind: by_kind.count(kind) for kind in by_kind} == {
            "ONE_MINUTE": 15,
            "FIVE_MINUTE": 3,
            "FIFTEEN_MINUTE": 1,
            "ONE_HOUR": 1,
            "hourly": 1,
            "daily": 1,
        }

    def test_a_day_without_points_in_the_middle_is_fetched_and_empty(self, settings: Settings, lake: Lake, wire: Any) -> None:
        hole = MIDNIGHT - 3 * ONE
        kept = [p for p in wire.points["bitcoin", "hourly"] if not hole <= datetime.fromtimestamp(p[0] / 1000, UTC) < hole + ONE]
        wire.points["bitcoin", "hourly"] = kept
        without(wire, "1m", MIDNIGHT - ONE, MIDNIGHT)
        got = ingest.ensure_coverage(settings, lake, "BTC-USD", DAY, DAY + ONE)
        assert lake.read_frame(keys.coingecko("hourly", "bitcoin", hole.date())).is_empty()
        assert lake.read_frame(keys.candles("1m", "BTC-USD", DAY - ONE)).is_empty()
        assert got["missing"] == 24 + 1440
        assert ingest.ensure_coverage(settings, lake, "BTC-USD", DAY, DAY + ONE)["fetched"] == 0

    def test_an_interrupted_run_is_resumed(self, settings: Settings, lake: Lake, wire: Any) -> None:
        wire.script.extend([_pass_through(wire)] * 20)
        wire.says(401, "Unauthorized")
        with pytest.raises(MarketDataError):
            ingest.ensure_coverage(settings, lake, "BTC-USD", DAY, DAY + 2 * ONE)
        stored = len(lake.keys("raw/"))
        assert stored == 12
        assert ingest.ensure_coverage(settings, lake, "BTC-USD", DAY, DAY + 2 * ONE)["present"] == stored

    def test_the_warm_up_begins_no_earlier_than_the_listing(self, settings: Settings, lake: Lake) -> None:
        ingest.ensure_coverage(settings, lake, "BTC-USD", LISTED + ONE, LISTED + 2 * ONE)
        assert len(lake.keys("raw/coingecko/hourly/")) == 2

    def test_the_future_and_an_empty_interval_are_refused(self, settings: Settings, lake: Lake) -> None:
        with pytest.raises(MarketDataError, match="2025-05-08 is not over yet"):
            ingest.ensure_coverage(settings, lake, "BTC-USD", DAY, DAY + 2 * ONE, now=lambda: MIDNIGHT + ONE)
        with pytest.raises(ValueError, match=r"the interval \[2025-05-07, 2025-05-07\) holds no day"):
            ingest.ensure_coverage(settings, lake, "BTC-USD", DAY, DAY)


def _pass_through(wire: Any) -> Any:
    """An answer of the script that is the real one."""

    def answer(handler: Any) -> None:
        _, body = wire.answer(wire.requests[-1])
        data = json.dumps(body).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return answer


class TestCoverage:
    def test_tells_absent_from_empty_partial_and_complete(self, settings: Settings, lake: Lake, wire: Any) -> None:
        without(wire, "1m", MIDNIGHT + 3 * HOUR, MIDNIGHT + 4 * HOUR)
        for day in (DAY - ONE, DAY, date(2025, 5, 10)):
            ingest.fetch_candles(settings, lake, "BTC-USD", "1m", day)
        got = ingest.coverage(settings, lake, "BTC-USD", "1m", DAY - ONE, DAY + 4 * ONE)
        assert [(d["day"], d["state"], d["rows"], d["missing"]) for d in got["days"]] == [
            ("2025-05-06", "complete", 1440, 0),
            ("2025-05-07", "partial", 1380, 60),
            ("2025-05-08", "absent", 0, 1440),
            ("2025-05-09", "absent", 0, 1440),
            ("2025-05-10", "empty", 0, 1440),
        ]
        assert got["days"][1]["gaps"] == [{"start": "2025-05-07T03:00:00Z", "minutes": 60}]
        assert (got["rows"], got["missing"], got["absent"]) == (2820, 60 + 3 * 1440, 2)


class TestCheckQuality:
    @pytest.fixture
    def filled(self, settings: Settings, lake: Lake) -> Lake:
        ingest.ensure_coverage(settings, lake, "BTC-USD", DAY, DAY + ONE)
        return lake

    def test_a_good_day(self, settings: Settings, filled: Lake, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "crpbot_lib"):
            got = ingest.check_quality(settings, filled, ["BTC-USD"], DAY)
        assert got["symbols"] == {"BTC-USD": {"rows": 1440, "missing": 0, "gaps": 0, "differing": 0}}
        report = filled.read_json(keys.quality(DAY))
        assert (report["passed"], report["problems"], got["key"]) == (True, [], keys.quality(DAY))
        judged = report["symbols"]["BTC-USD"]
        assert judged["candles"]["15m"]["against_1m"]["compared"] == 96
        assert judged["coingecko"]["hourly"] == {"rows": 24, "expected": 24, "missing": 0, "gaps": []}
        assert judged["coingecko"]["daily"]["days_behind"] == 0
        assert caplog.messages == [
            "BTC-USD 2025-05-07: 1440 minutes, 0 absent in 0 gaps; 0 candles of 5m, 15m, 1h disagree with the 1m"
        ]

    def test_gaps_and_differences_are_reported_and_do_not_fail(
        self, settings: Settings, lake: Lake, wire: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        without(wire, "1m", MIDNIGHT + HOUR, MIDNIGHT + HOUR + 10 * MINUTE)
        ingest.ensure_coverage(settings, lake, "BTC-USD", DAY, DAY + ONE)
        with caplog.at_level(logging.INFO, "crpbot_lib"):
            got = ingest.check_quality(settings, lake, ["BTC-USD"], DAY)
        summary = got["symbols"]["BTC-USD"]
        assert (summary["rows"], summary["missing"], summary["gaps"]) == (1430, 10, 1)
        assert summary["differing"] >= 3
        report = lake.read_json(keys.quality(DAY))["symbols"]["BTC-USD"]["candles"]
        assert report["1m"]["gaps"] == [{"start": "2025-05-07T01:00:00Z", "minutes": 10}]
        assert report["5m"]["against_1m"]["only_fetched"] == 2
        assert report["1h"]["against_1m"]["columns"]["volume"]["at"] == "2025-05-07T01:00:00Z"
        assert "(largest: " in caplog.messages[-1]

    def test_every_absent_partition_is_named(self, settings: Settings, lake: Lake) -> None:
        ingest.fetch_candles(settings, lake, "BTC-USD", "1m", DAY)
        with pytest.raises(QualityError, match=r"2025-05-07: 5 partitions are absent or broken: .* does not exist") as error:
            ingest.check_quality(settings, lake, ["BTC-USD"], DAY)
        for key in (keys.candles("1h", "BTC-USD", DAY), keys.coingecko("daily", "bitcoin", DAY)):
            assert lake.url(key) in str(error.value)
        report = lake.read_json(keys.quality(DAY))
        assert (report["passed"], len(report["problems"])) == (False, 5)

    def test_a_broken_partition_fails(self, settings: Settings, filled: Lake) -> None:
        key = keys.candles("5m", "BTC-USD", DAY)
        frame = filled.read_frame(key)
        filled.write_frame(key, frame.with_columns(high=pl.when(pl.col("timestamp") == MIDNIGHT).then(1.0).otherwise("high")))
        with pytest.raises(QualityError, match=r"candles/5m/.*row 0 \(2025-05-07T00:00:00Z\), column 'high': 1.0 is below open"):
            ingest.check_quality(settings, filled, ["BTC-USD"], DAY)

    def test_a_partition_of_another_day_fails(self, settings: Settings, filled: Lake) -> None:
        for key in (keys.candles("1h", "BTC-USD", DAY), keys.coingecko("hourly", "bitcoin", DAY)):
            filled.write(key, filled.read(key.replace("2025-05-07", "2025-05-06")))
        with pytest.raises(
            QualityError, match=r"2 partitions.*2025-05-06T00:00:00Z is outside \[2025-05-07.*24 of 24 rows lie outside"
        ):
            ingest.check_quality(settings, filled, ["BTC-USD"], DAY)

    def test_an_unreadable_partition_fails(self, settings: Settings, filled: Lake) -> None:
        filled.write(keys.candles("15m", "BTC-USD", DAY), b"PAR1")
        with pytest.raises(QualityError, match="is not a readable parquet file"):
            ingest.check_quality(settings, filled, ["BTC-USD"], DAY)

    def test_a_lake_that_does_not_answer_says_nothing_about_the_data(
        self, settings: Settings, filled: Lake, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is no QualityError, which would be permanent: the next try may find the lake there."""

        def down(key: str) -> bytes:
            raise LakeError(f"s3://bucket/{key}: connect timeout; check CRPBOT_LAKE")

        monkeypatch.setattr(filled, "read", down)
        with pytest.raises(LakeError, match="connect timeout"):
            ingest.check_quality(settings, filled, ["BTC-USD"], DAY)
        assert not filled.exists(keys.quality(DAY))

    def test_a_daily_history_that_ends_early_is_told(
        self, settings: Settings, lake: Lake, wire: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        wire.points["bitcoin", "daily"] = wire.points["bitcoin", "daily"][:-4]
        ingest.ensure_coverage(settings, lake, "BTC-USD", DAY, DAY + ONE)
        ingest.check_quality(settings, lake, ["BTC-USD"], DAY)
        assert "bitcoin 2025-05-07: the daily history ends on 2025-05-05, 2 days before" in caplog.text
        assert lake.read_json(keys.quality(DAY))["symbols"]["BTC-USD"]["coingecko"]["daily"]["days_behind"] == 2

    def test_the_record_is_the_same_every_time(self, settings: Settings, filled: Lake) -> None:
        ingest.check_quality(settings, filled, ["BTC-USD"], DAY)
        first = filled.read(keys.quality(DAY))
        ingest.check_quality(settings, filled, ["BTC-USD"], DAY)
        assert filled.read(keys.quality(DAY)) == first


def test_summaries_fit_into_xcom(settings: Settings, lake: Lake) -> None:
    made = [
        ingest.fetch_candles(settings, lake, "BTC-USD", "1m", DAY),
        ingest.fetch_coingecko(settings, lake, "BTC-USD", DAY),
        ingest.ensure_coverage(settings, lake, "BTC-USD", DAY, DAY + ONE),
        ingest.check_quality(settings, lake, ["BTC-USD"], DAY),
    ]
    assert all(len(json.dumps(summary)) < 2000 for summary in made)
