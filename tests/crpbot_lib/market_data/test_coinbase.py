"""Every closed candle that the exchange has, exactly once, whatever the interval's borders."""

from __future__ import annotations

import threading
from collections import deque
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from crpbot_lib.market_data import CoinbaseClient, MarketDataError, QualityError
from crpbot_lib.market_data.coinbase import EMPTY_CONFIRMATIONS, PARALLEL_PAGES
from crpbot_lib.market_data.frames import CANDLE_SCHEMA
from crpbot_lib.market_data.http import ATTEMPTS

START = datetime(2025, 5, 5, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


@pytest.fixture(autouse=True)
def served(wire: Any, timeframes: dict[str, pl.DataFrame]) -> None:
    wire.candles = {("BTC-USD", timeframe): frame for timeframe, frame in timeframes.items()}


@pytest.fixture
def client(wire: Any) -> CoinbaseClient:
    return make(wire)


def make(wire: Any, **options: Any) -> CoinbaseClient:
    return CoinbaseClient(wire.url, requests_per_second=1e6, backoff=0.001, **options)


def between(frame: pl.DataFrame, start: datetime, end: datetime) -> pl.DataFrame:
    return frame.filter(pl.col("timestamp").is_between(start, end, closed="left"))


@pytest.mark.parametrize("timeframe", ["1m", "5m", "15m", "1h"])
def test_what_is_served_is_returned(client: CoinbaseClient, timeframes: dict[str, pl.DataFrame], timeframe: str) -> None:
    got = client.candles("BTC-USD", timeframe, START, START + timedelta(days=4))
    assert_frame_equal(got, timeframes[timeframe], check_exact=True)


@pytest.mark.parametrize("inclusive", [True, False], ids=["end inclusive", "end exclusive"])
@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("count", [1, 299, 300, 301, 600, 601])
def test_page_borders_lose_and_double_nothing(
    wire: Any, client: CoinbaseClient, minutes: pl.DataFrame, count: int, offset: int, inclusive: bool
) -> None:
    wire.end_is_inclusive = inclusive
    start = START + timedelta(hours=6) + offset * MINUTE
    got = client.candles("BTC-USD", "1m", start, start + count * MINUTE)
    assert_frame_equal(got, between(minutes, start, start + count * MINUTE), check_exact=True)
    assert len(wire.requests) == -(-count // 300)


def test_a_request_asks_for_what_the_api_takes(wire: Any, client: CoinbaseClient) -> None:
    client.candles("BTC-USD", "5m", START, START + timedelta(days=2))
    first, second = sorted(wire.requests, key=lambda r: r.query["start"])
    assert first.path == "/api/v3/brokerage/market/products/BTC-USD/candles"
    assert {k: first.query[k] for k in ("granularity", "limit", "start")} == {
        "granularity": "FIVE_MINUTE",
        "limit": "300",
        "start": str(int(START.timestamp())),
    }
    assert int(second.query["start"]) == int(first.query["end"]) + 1
    assert "x-cg-pro-api-key" not in first.headers


@pytest.mark.parametrize("size", [1, 7, 350])
def test_the_size_of_a_page_is_a_choice(wire: Any, minutes: pl.DataFrame, size: int) -> None:
    got = make(wire, page_size=size).candles("BTC-USD", "1m", START, START + 50 * MINUTE)
    assert_frame_equal(got, minutes.head(50), check_exact=True)
    assert len(wire.requests) == -(-50 // size)
    assert {r.query["limit"] for r in wire.requests} == {str(size)}


def test_pages_are_of_equal_length(wire: Any, client: CoinbaseClient) -> None:
    """A last page of one minute would be empty, and asked for again, whenever nobody traded in it."""
    client.candles("BTC-USD", "1m", START, START + 601 * MINUTE)
    spans = [int(r.query["end"]) + 1 - int(r.query["start"]) for r in wire.requests]
    assert sorted(spans) == [200 * 60, 200 * 60, 201 * 60]


def test_pages_are_fetched_side_by_side_and_come_out_in_order(wire: Any, client: CoinbaseClient, minutes: pl.DataFrame) -> None:
    """No page is answered before PARALLEL_PAGES of them are asked for, and the first is answered last."""
    together, rest = threading.Barrier(PARALLEL_PAGES), threading.Event()
    answer = wire.answer

    def late(request: Any) -> Any:
        if len(wire.requests) <= PARALLEL_PAGES:
            together.wait(10)
        if request.query["start"] == str(int(START.timestamp())):
            rest.wait(10)
        elif len(wire.requests) == 16:
            rest.set()
        return answer(request)

    wire.answer = late
    got = client.candles("BTC-USD", "1m", START, START + 16 * 300 * MINUTE)
    assert_frame_equal(got, between(minutes, START, START + 16 * 300 * MINUTE), check_exact=True)


def test_the_first_error_ends_it(wire: Any, client: CoinbaseClient) -> None:
    wire.candles = {}
    with pytest.raises(MarketDataError, match="404: NOT_FOUND"):
        client.candles("BTC-USD", "1m", START, START + timedelta(days=365))
    assert len(wire.requests) < 3 * PARALLEL_PAGES


class TestAnEmptyPage:
    @pytest.mark.parametrize("times", range(1, EMPTY_CONFIRMATIONS + 1))
    def test_is_asked_for_again(self, wire: Any, client: CoinbaseClient, minutes: pl.DataFrame, times: int) -> None:
        for _ in range(times):
            wire.says(200, {"candles": []})
        assert_frame_equal(client.candles("BTC-USD", "1m", START, START + 300 * MINUTE), minutes.head(300), check_exact=True)
        assert len(wire.requests) == times + 1

    def test_is_believed_in_the_end(self, wire: Any, client: CoinbaseClient) -> None:
        wire.candles["BTC-USD", "1m"] = wire.candles["BTC-USD", "1m"].clear()
        assert client.candles("BTC-USD", "1m", START, START + 300 * MINUTE).height == 0
        assert len(wire.requests) == 1 + EMPTY_CONFIRMATIONS

    def test_of_another_time_is_an_error(self, wire: Any, client: CoinbaseClient) -> None:
        """A server that does not mind the interval: its candles are not this page's, and the page is not empty either."""
        wire.says(200, {"candles": [candle(start=str(1_700_000_000 + n * 60)) for n in range(9, 0, -1)]})
        with pytest.raises(
            MarketDataError, match=r"in \[2025-05-05 00:00, 2025-05-05 01:00\): the answer is of another time: 9 candles"
        ):
            client.candles("BTC-USD", "1m", START, START + timedelta(hours=1))


@pytest.mark.parametrize(
    "fault",
    [
        (200, {"error": "UNAVAILABLE", "message": "try again"}),
        (429, {"errors": [{"id": "rate_limit_exceeded", "message": "Too many requests"}]}),
        (502, "<html>Bad gateway</html>"),
        (200, '{"candles": [{"start": "17464'),
        (200, {"candles": []}),
    ],
    ids=["an error in a 200", "429", "HTML", "cut short", "empty"],
)
def test_a_fault_of_a_page_loses_nothing(wire: Any, client: CoinbaseClient, minutes: pl.DataFrame, fault: tuple[int, Any]) -> None:
    for _ in range(6):
        wire.says(*fault)
    got = client.candles("BTC-USD", "1m", START, START + timedelta(days=2))
    assert_frame_equal(got, between(minutes, START, START + timedelta(days=2)), check_exact=True)


def test_an_empty_page_is_not_the_end(wire: Any, client: CoinbaseClient, minutes: pl.DataFrame) -> None:
    hole = pl.col("timestamp").is_between(START + timedelta(hours=4), START + timedelta(hours=20), closed="left")
    wire.candles["BTC-USD", "1m"] = minutes.filter(~hole)
    got = client.candles("BTC-USD", "1m", START, START + timedelta(days=1))
    assert_frame_equal(got, between(minutes.filter(~hole), START, START + timedelta(days=1)), check_exact=True)
    assert got.height == 8 * 60


def test_an_interval_that_begins_between_candles_begins_with_the_next(client: CoinbaseClient) -> None:
    got = client.candles("BTC-USD", "5m", START + MINUTE, START + 11 * MINUTE)
    assert got["timestamp"].to_list() == [START + 5 * MINUTE, START + 10 * MINUTE]


@pytest.mark.parametrize(("seconds", "rows"), [(0, 10), (59, 10), (60, 11)])
def test_a_candle_is_closed_by_the_clock(wire: Any, seconds: int, rows: int) -> None:
    now = START + 10 * MINUTE + timedelta(seconds=seconds)
    got = make(wire, now=lambda: now).candles("BTC-USD", "1m", START, START + timedelta(hours=1))
    assert got.height == rows


def test_the_future_holds_no_candles_and_is_not_asked_for(wire: Any) -> None:
    future = make(wire, now=lambda: START)
    got = future.candles("BTC-USD", "1m", START, START + timedelta(days=1))
    assert (got.height, got.schema, wire.requests) == (0, CANDLE_SCHEMA, [])


def test_no_candles_at_all_is_an_empty_frame(wire: Any, client: CoinbaseClient) -> None:
    wire.candles["BTC-USD", "1m"] = wire.candles["BTC-USD", "1m"].clear()
    assert client.candles("BTC-USD", "1m", START, START + timedelta(hours=1)).schema == CANDLE_SCHEMA


def test_an_unknown_product_is_named(client: CoinbaseClient) -> None:
    with pytest.raises(MarketDataError, match=r"products/NOPE-USD/candles.*404: NOT_FOUND: Product NOPE-USD.*; check the symbol"):
        client.candles("NOPE-USD", "1m", START, START + MINUTE)


def candle(**changes: Any) -> dict[str, Any]:
    return {"start": str(int(START.timestamp())), "low": "1", "high": "4", "open": "2", "close": "3", "volume": "5"} | changes


@pytest.mark.parametrize(
    ("candles", "said"),
    [
        ([candle(high="0.5")], r"row 0 \(2025-05-05T00:00:00Z\), column 'high': 0.5 is below open"),
        ([candle(low="2.5")], "column 'low': 2.5 is above open"),
        ([candle(close="nan")], "column 'close': nan is not a number"),
        ([candle(open="-2", low="-3")], "column 'open': -2.0 is not above 0"),
        ([candle(volume="-1")], "column 'volume': -1.0 is below 0"),
        ([candle(start=str(int(START.timestamp()) + 10))], "column 'timestamp': 2025-05-05T00:00:10Z is off the grid of 0:01:00"),
        ([candle(), candle(close="2.5")], "2025-05-05 00:00: two candles in one answer"),
        ([candle(open="abc")], "has no number for each of start, open"),
        ([candle(start=float("inf"))], "has no number for each of start, open"),
        ([{"start": "1746403200"}], "has no number for each of start, open"),
        ([[1746403200, 1, 2, 3, 4, 5]], "has no number for each of start, open"),
    ],
)
def test_what_cannot_be_true_is_refused(wire: Any, client: CoinbaseClient, candles: list[Any], said: str) -> None:
    wire.says(200, {"candles": candles})
    with pytest.raises(MarketDataError, match=said):
        client.candles("BTC-USD", "1m", START, START + timedelta(hours=1))


@pytest.mark.parametrize("body", [{}, {"product_id": "BTC-USD"}, {"candles": None}, {"candles": {}}], ids=str)
class TestAnAnswerWithoutCandles:
    """No list of candles is not an empty list: a server that answers so is not well, or not the exchange."""

    def test_is_asked_for_again(self, wire: Any, client: CoinbaseClient, minutes: pl.DataFrame, body: Any) -> None:
        wire.says(200, body)
        assert_frame_equal(client.candles("BTC-USD", "1m", START, START + 300 * MINUTE), minutes.head(300), check_exact=True)

    def test_is_an_error_in_the_end(self, wire: Any, client: CoinbaseClient, body: Any) -> None:
        for _ in range(ATTEMPTS):
            wire.says(200, body)
        with pytest.raises(MarketDataError, match=r"answered 200: no list 'candles' in \{.*; check CRPBOT_COINBASE_URL") as error:
            client.candles("BTC-USD", "1m", START, START + timedelta(hours=1))
        assert not error.value.permanent
        assert wire.script == deque()


def test_the_same_candle_twice_in_an_answer_counts_once(wire: Any, client: CoinbaseClient) -> None:
    wire.says(200, {"candles": [candle(), candle()]})
    assert client.candles("BTC-USD", "1m", START, START + timedelta(hours=1)).height == 1


def test_candles_beyond_what_was_asked_for_are_not_taken(wire: Any, client: CoinbaseClient) -> None:
    opens = int(START.timestamp())
    wire.says(200, {"candles": [candle(start=str(opens + n)) for n in (3600, 60, 0, -60)]})
    got = client.candles("BTC-USD", "1m", START, START + timedelta(hours=1))
    assert got["timestamp"].to_list() == [START, START + MINUTE]


def test_a_naive_time_is_refused(client: CoinbaseClient) -> None:
    with pytest.raises(ValueError, match="start=2025-05-05T00:00:00 has no timezone"):
        client.candles("BTC-USD", "1m", datetime(2025, 5, 5), START)  # noqa: DTZ001


def test_an_unknown_timeframe_is_refused(client: CoinbaseClient) -> None:
    with pytest.raises(ValueError, match="unknown timeframe '2m': expected one of 1m, 5m, 15m, 1h"):
        client.candles("BTC-USD", "2m", START, START + MINUTE)


def test_a_quality_error_is_a_market_data_error() -> None:
    assert issubclass(QualityError, MarketDataError)


def test_a_real_outage_comes_back_as_it_was(
    wire: Any, client: CoinbaseClient, market_data_dir: Path | None, minutes: pl.DataFrame
) -> None:
    if market_data_dir is None:
        served, start = minutes.filter(pl.col("timestamp").dt.hour() != 3), START
    else:
        served = pl.read_parquet(market_data_dir / "candles_1m_windows/coinbase_derivatives_perp_2026-02/SOL-USD.parquet")
        start = datetime(2026, 2, 19, tzinfo=UTC)
    wire.candles["SOL-USD", "1m"] = served
    got = client.candles("SOL-USD", "1m", start, start + timedelta(days=3))
    assert_frame_equal(got, between(served, start, start + timedelta(days=3)), check_exact=True)
    assert 0 < got.height < 3 * 1440
