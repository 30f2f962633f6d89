"""What the lake holds, judged: how much is there, whether it can be true, and what its gaps are."""

from __future__ import annotations

import logging
from datetime import UTC, date, datetime, timedelta
from typing import Any

import polars as pl
import pytest

from crpbot_lib.config import TIMEFRAMES, Settings, Symbol
from crpbot_lib.lake import Lake, LakeError, keys
from crpbot_lib.market_data import MarketData, QualityError
from crpbot_lib.market_data.quality import resample
from crpbot_lib.steps import ingest, quality

DAY = date(2025, 5, 7)
MIDNIGHT = datetime(2025, 5, 7, tzinfo=UTC)
ONE = timedelta(days=1)
HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)
PRICES = ("open", "high", "low", "close", "volume")


def without(wire: Any, timeframe: str, start: datetime, end: datetime) -> None:
    gone = pl.col("timestamp").is_between(start, end, closed="left")
    wire.candles["BTC-USD", timeframe] = wire.candles["BTC-USD", timeframe].filter(~gone)


class TestCoverage:
    def test_tells_absent_from_empty_partial_and_complete(
        self, settings: Settings, lake: Lake, wire: Any, market: MarketData
    ) -> None:
        without(wire, "1m", MIDNIGHT + 3 * HOUR, MIDNIGHT + 4 * HOUR)
        for day in (DAY - ONE, DAY, date(2025, 5, 10)):
            ingest.fetch_candles(settings, lake, "BTC-USD", "1m", day, market=market)
        got = quality.coverage(settings, lake, "BTC-USD", "1m", DAY - ONE, DAY + 4 * ONE)
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
            got = quality.check_quality(settings, filled, ["BTC-USD"], DAY)
        assert got["symbols"] == {"BTC-USD": {"rows": 1440, "missing": 0, "gaps": 0, "differing": 0, "frozen": 0, "spikes": 0}}
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
            got = quality.check_quality(settings, lake, ["BTC-USD"], DAY)
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
            quality.check_quality(settings, lake, ["BTC-USD"], DAY)
        for key in (keys.candles("1h", "BTC-USD", DAY), keys.coingecko("daily", "bitcoin", DAY)):
            assert lake.url(key) in str(error.value)
        report = lake.read_json(keys.quality(DAY))
        assert (report["passed"], len(report["problems"])) == (False, 5)

    def test_a_broken_partition_fails(self, settings: Settings, filled: Lake) -> None:
        key = keys.candles("5m", "BTC-USD", DAY)
        frame = filled.read_frame(key)
        filled.write_frame(key, frame.with_columns(high=pl.when(pl.col("timestamp") == MIDNIGHT).then(1.0).otherwise("high")))
        with pytest.raises(QualityError, match=r"candles/5m/.*row 0 \(2025-05-07T00:00:00Z\), column 'high': 1.0 is below open"):
            quality.check_quality(settings, filled, ["BTC-USD"], DAY)

    def test_a_partition_of_another_day_fails(self, settings: Settings, filled: Lake) -> None:
        for key in (keys.candles("1h", "BTC-USD", DAY), keys.coingecko("hourly", "bitcoin", DAY)):
            filled.write(key, filled.read(key.replace("2025-05-07", "2025-05-06")))
        with pytest.raises(
            QualityError, match=r"2 partitions.*2025-05-06T00:00:00Z is outside \[2025-05-07.*24 of 24 rows lie outside"
        ):
            quality.check_quality(settings, filled, ["BTC-USD"], DAY)

    def test_an_unreadable_partition_fails(self, settings: Settings, filled: Lake) -> None:
        filled.write(keys.candles("15m", "BTC-USD", DAY), b"PAR1")
        with pytest.raises(QualityError, match="is not a readable parquet file"):
            quality.check_quality(settings, filled, ["BTC-USD"], DAY)

    def test_a_lake_that_does_not_answer_says_nothing_about_the_data(
        self, settings: Settings, filled: Lake, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is no QualityError, which would be permanent: the next try may find the lake there."""

        def down(key: str) -> bytes:
            raise LakeError(f"s3://bucket/{key}: connect timeout; check CRPBOT_LAKE")

        monkeypatch.setattr(filled, "read", down)
        with pytest.raises(LakeError, match="connect timeout"):
            quality.check_quality(settings, filled, ["BTC-USD"], DAY)
        assert not filled.exists(keys.quality(DAY))

    def test_a_daily_history_that_ends_early_is_told(
        self, settings: Settings, lake: Lake, wire: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        wire.points["bitcoin", "daily"] = wire.points["bitcoin", "daily"][:-4]
        ingest.ensure_coverage(settings, lake, "BTC-USD", DAY, DAY + ONE)
        quality.check_quality(settings, lake, ["BTC-USD"], DAY)
        assert "bitcoin 2025-05-07: the daily history ends on 2025-05-05, 2 days before" in caplog.text
        assert lake.read_json(keys.quality(DAY))["symbols"]["BTC-USD"]["coingecko"]["daily"]["days_behind"] == 2

    def test_the_record_is_the_same_every_time(self, settings: Settings, filled: Lake) -> None:
        quality.check_quality(settings, filled, ["BTC-USD"], DAY)
        first = filled.read(keys.quality(DAY))
        quality.check_quality(settings, filled, ["BTC-USD"], DAY)
        assert filled.read(keys.quality(DAY)) == first

    def test_a_day_of_which_the_exchange_served_nothing_fails(
        self, settings: Settings, lake: Lake, wire: Any, market: MarketData
    ) -> None:
        wire.candles["BTC-USD", "1m"] = wire.candles["BTC-USD", "1m"].clear()
        ingest.load(settings, lake, "BTC-USD", DAY, DAY + ONE, market=market)
        with pytest.raises(QualityError, match=r"candles/1m/.*: the exchange served not one candle of the day"):
            quality.check_quality(settings, lake, ["BTC-USD"], DAY)

    def test_a_frozen_stretch_is_told_and_does_not_fail(
        self, settings: Settings, lake: Lake, wire: Any, market: MarketData, caplog: pytest.LogCaptureFixture
    ) -> None:
        frozen = pl.col("timestamp").is_between(MIDNIGHT + HOUR, MIDNIGHT + 2 * HOUR, closed="left")
        flat = {name: pl.when(frozen).then(0.0 if name == "volume" else 95_000.0).otherwise(name) for name in PRICES}
        wire.candles["BTC-USD", "1m"] = wire.candles["BTC-USD", "1m"].with_columns(**flat)
        ingest.load(settings, lake, "BTC-USD", DAY, DAY + ONE, market=market)
        got = quality.check_quality(settings, lake, ["BTC-USD"], DAY)
        assert got["symbols"]["BTC-USD"]["frozen"] == 1
        kept = lake.read_json(keys.quality(DAY))["symbols"]["BTC-USD"]["candles"]["1m"]["suspicious"]["findings"]
        assert ("frozen", "2025-05-07T01:00:00Z", 60) in [(f["kind"], f["start"], f["rows"]) for f in kept]
        assert "BTC-USD 2025-05-07: 1 frozen stretches" in caplog.text


class TestGaps:
    """Judged by crpbot_lib.market_data.gaps; here is what it is given, and what is kept."""

    def load(self, settings: Settings, lake: Lake, market: MarketData, start: date, end: date) -> None:
        ingest.load(settings, lake, "BTC-USD", start, end, coingecko=False, market=market)

    def test_short_silence_is_no_trade_and_a_long_one_an_outage(
        self, settings: Settings, lake: Lake, wire: Any, market: MarketData, caplog: pytest.LogCaptureFixture
    ) -> None:
        without(wire, "1m", MIDNIGHT + HOUR, MIDNIGHT + HOUR + 2 * MINUTE)
        # the wider candles add up to the minutes: nothing was traded
        for timeframe in TIMEFRAMES[1:]:
            wire.candles["BTC-USD", timeframe] = resample(wire.candles["BTC-USD", "1m"], timeframe)
        without(wire, "1m", MIDNIGHT + 3 * HOUR, MIDNIGHT + 4 * HOUR)
        self.load(settings, lake, market, DAY, DAY + ONE)
        with caplog.at_level(logging.INFO, "crpbot_lib"):
            got = quality.gaps(settings, lake, ["BTC-USD"], DAY, DAY + ONE)
        assert got["symbols"]["BTC-USD"] == {
            "outages": 1,
            "outage_minutes": 60,
            "longest": {"start": "2025-05-07T03:00:00Z", "minutes": 60},
            "no_trade": 1,
            "no_trade_minutes": 2,
            "not_fetched": 0,
        }
        kinds = [(row["start"], row["minutes"], row["kind"]) for row in quality.read_gaps(lake, DAY, DAY + ONE)]
        assert kinds == [("2025-05-07T01:00:00Z", 2, "no_trade"), ("2025-05-07T03:00:00Z", 60, "outage")]
        assert (
            "1 outages, 60 minutes, the longest 60 min from 2025-05-07T03:00:00Z; 1 gaps without a trade, 2 minutes" in caplog.text
        )

    def test_a_gap_over_midnight_is_one_gap_of_either_day(
        self, settings: Settings, lake: Lake, wire: Any, market: MarketData
    ) -> None:
        without(wire, "1m", MIDNIGHT - 10 * MINUTE, MIDNIGHT + 10 * MINUTE)
        self.load(settings, lake, market, DAY - ONE, DAY + ONE)
        whole = {"start": "2025-05-06T23:50:00Z", "minutes": 20}
        for first in (DAY - ONE, DAY):
            quality.gaps(settings, lake, ["BTC-USD"], first, first + ONE)
            [row] = quality.read_gaps(lake, first, first + ONE)
            assert {name: row[name] for name in whole} == whole

    def test_a_day_that_is_not_stored_is_no_gap(
        self, settings: Settings, lake: Lake, market: MarketData, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.load(settings, lake, market, DAY, DAY + ONE)
        got = quality.gaps(settings, lake, ["BTC-USD"], DAY - ONE, DAY + ONE)
        told = got["symbols"]["BTC-USD"]
        assert (told["outages"], told["no_trade"], told["not_fetched"]) == (0, 0, 1)
        assert "1 days not fetched" in caplog.text

    def test_a_record_is_of_all_symbols_whoever_asks(
        self, settings: Settings, lake: Lake, wire: Any, market: MarketData, timeframes: dict[str, pl.DataFrame]
    ) -> None:
        """Its key says only the days; and what one symbol was fetched for is evidence for the others."""
        wire.candles |= {("ETH-USD", timeframe): frame for timeframe, frame in timeframes.items()}
        eth = Symbol(name="ETH-USD", coin="ethereum", coin_listed=date(2025, 4, 10))
        settings = settings.model_copy(update={"symbols": (*settings.symbols, eth)})
        for symbol in ("BTC-USD", "ETH-USD"):
            gone = pl.col("timestamp").is_between(MIDNIGHT + HOUR, MIDNIGHT + 2 * HOUR, closed="left")
            wire.candles[symbol, "1m"] = wire.candles[symbol, "1m"].filter(~gone)
            ingest.load(settings, lake, symbol, DAY, DAY + ONE, coingecko=False, market=market)
        got = quality.gaps(settings, lake, ["ETH-USD"], DAY, DAY + ONE)
        assert list(got["symbols"]) == ["ETH-USD"]
        record = quality.read_gaps(lake, DAY, DAY + ONE)
        assert [row["symbol"] for row in record] == ["BTC-USD", "ETH-USD"]
        assert all("all_symbols" in row["evidence"] for row in record)

    def test_what_cannot_be_asked_is_refused_and_nothing_written(self, settings: Settings, lake: Lake) -> None:
        with pytest.raises(ValueError, match="unknown symbol 'DOGE-USD'"):
            quality.gaps(settings, lake, ["DOGE-USD"], DAY, DAY + ONE)
        with pytest.raises(ValueError, match="holds no day"):
            quality.gaps(settings, lake, ["BTC-USD"], DAY, DAY)
        with pytest.raises(ValueError, match="the lake has no 1m candles of BTC-USD from 2025-05-07 to 2025-05-07: fetch them"):
            quality.gaps(settings, lake, ["BTC-USD"], DAY, DAY + ONE)
        assert lake.keys("") == []


def test_a_report_counts_days_by_state(settings: Settings, lake: Lake, wire: Any, market: MarketData) -> None:
    without(wire, "1m", MIDNIGHT, MIDNIGHT + HOUR)
    ingest.load(settings, lake, "BTC-USD", DAY - ONE, DAY + ONE, coingecko=False, market=market)
    got = quality.report(settings, lake, "BTC-USD", DAY - ONE, DAY + 2 * ONE)["timeframes"]
    minutes = {name: got["1m"][name] for name in ("complete", "partial", "empty", "absent", "rows", "missing")}
    assert minutes == {"complete": 1, "partial": 1, "empty": 0, "absent": 1, "rows": 2820, "missing": 60 + 1440}
    assert got["1h"]["complete"] == 2


def test_a_report_says_how_far_the_wider_candles_are_from_the_minutes(
    settings: Settings, lake: Lake, wire: Any, market: MarketData
) -> None:
    wide = wire.candles["BTC-USD", "15m"]
    noon = pl.col("timestamp") == MIDNIGHT + 12 * HOUR
    doubled = pl.when(noon).then(pl.col("volume") * 2).otherwise("volume")
    wire.candles["BTC-USD", "15m"] = wide.with_columns(volume=doubled).filter(pl.col("timestamp") != MIDNIGHT + 13 * HOUR)
    ingest.load(settings, lake, "BTC-USD", DAY - ONE, DAY + ONE, coingecko=False, market=market)
    got = quality.report(settings, lake, "BTC-USD", DAY - ONE, DAY + ONE)["timeframes"]
    assert (got["5m"]["differing"], got["15m"]["differing"], got["1h"]["differing"]) == (0, 2, 0)
    assert got["15m"]["columns"]["volume"]["largest"] == pytest.approx(0.5)
    assert got["15m"]["columns"]["volume"]["at"] == "2025-05-07T12:00:00Z"


def test_a_report_fails_on_a_partition_that_cannot_be_true_and_names_it(settings: Settings, lake: Lake, market: MarketData) -> None:
    ingest.load(settings, lake, "BTC-USD", DAY, DAY + ONE, coingecko=False, market=market)
    key = keys.candles("5m", "BTC-USD", DAY)
    lake.write_frame(key, lake.read_frame(key).with_columns(high=pl.col("low") - 1))
    with pytest.raises(QualityError, match=r"1 partitions are absent or broken: .*candles/5m/symbol=BTC-USD/date=2025-05-07"):
        quality.report(settings, lake, "BTC-USD", DAY, DAY + ONE)
