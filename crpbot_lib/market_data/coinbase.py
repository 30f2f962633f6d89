"""Closed candles from Coinbase's public Advanced Trade API, which needs no key.

The API: ``GET /api/v3/brokerage/market/products/{id}/candles?start&end&granularity&limit``. ``start`` and ``end`` are UNIX seconds,
both inclusive; an answer holds 350 candles at most, newest first, every value a string. A minute without a trade has no candle,
so an empty page says nothing about the pages beside it.
"""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from math import ceil as ceil_number
from typing import Any
from urllib.parse import quote

import polars as pl

from crpbot_lib.market_data.frames import CANDLE_SCHEMA, EPOCH, TIMESTAMP, Clock, ceil, floor, in_utc, utc_now, width
from crpbot_lib.market_data.http import HttpClient, MarketDataError, shared_limiter
from crpbot_lib.market_data.progress import Progress
from crpbot_lib.market_data.quality import check_candles

log = logging.getLogger(__name__)

GRANULARITY = {"1m": "ONE_MINUTE", "5m": "FIVE_MINUTE", "15m": "FIFTEEN_MINUTE", "1h": "ONE_HOUR"}
PAGE = 300
"""Candles a request; the documented 350 is refused for some accounts."""
REQUESTS_PER_SECOND = 10.0

Row = tuple[float, float, float, float, float]


class CoinbaseClient:
    """Candles of one Coinbase host. ``now`` decides which candles are closed."""

    def __init__(
        self, url: str, *, now: Clock = utc_now, requests_per_second: float = REQUESTS_PER_SECOND, http: HttpClient | None = None
    ) -> None:
        self._now = now
        self._http = http or HttpClient("Coinbase", url, limiter=shared_limiter(url, requests_per_second), hint=_hint)

    def candles(self, symbol: str, timeframe: str, start: datetime, end: datetime) -> pl.DataFrame:
        """The closed candles of ``symbol`` that open in ``[start, end)`` (timezone-aware), sorted, each once (CANDLE_SCHEMA).

        A candle is closed when its whole width has passed by the clock; the open one is never returned. Minutes that were not
        served are absent, never filled. Pages follow from the interval alone. MarketDataError when the exchange refuses or
        serves something that cannot be true; ValueError for a naive datetime or an unknown timeframe.
        """
        step = width(timeframe)
        first = ceil(in_utc(start, "start"), step)
        last = min(ceil(in_utc(end, "end"), step), floor(self._now(), step))
        pages = ceil_number(max(last - first, timedelta(0)) / (PAGE * step))
        progress = Progress(log, f"{symbol} {timeframe}", pages, "pages")
        rows: dict[int, Row] = {}
        for page in range(pages):
            opens = first + page * PAGE * step
            rows.update(self._page(symbol, timeframe, opens, min(opens + PAGE * step, last)))
            progress.done(page + 1)
        frame = _frame(rows)
        check_candles(frame, timeframe, first, max(first, last), f"{symbol} {timeframe} as served")
        return frame

    def _page(self, symbol: str, timeframe: str, start: datetime, end: datetime) -> dict[int, Row]:
        begin, stop = _seconds(start), _seconds(end)
        body = self._http.get(
            f"/api/v3/brokerage/market/products/{quote(symbol, safe='')}/candles",
            # one second before the next page's first candle: right whether the API counts its end in or out
            {"start": begin, "end": stop - 1, "granularity": GRANULARITY[timeframe], "limit": PAGE},
        )
        items = body.get("candles")
        if not isinstance(items, list):
            where = f"Coinbase: {symbol} {timeframe} at {start:%Y-%m-%d %H:%M}"
            raise MarketDataError(f"{where}: no list 'candles' in the answer, which has {sorted(body)}")
        rows: dict[int, Row] = {}
        for item in items:
            opens, row = _row(item, symbol, timeframe)
            if not begin <= opens < stop:
                continue
            if rows.setdefault(opens, row) != row:
                at = EPOCH + timedelta(seconds=opens)
                raise MarketDataError(
                    f"Coinbase: {symbol} {timeframe} at {at:%Y-%m-%d %H:%M}: two candles in one answer: {rows[opens]} and {row}"
                )
        return rows


def _row(item: Any, symbol: str, timeframe: str) -> tuple[int, Row]:
    try:
        return int(item["start"]), (
            float(item["open"]),
            float(item["high"]),
            float(item["low"]),
            float(item["close"]),
            float(item["volume"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise MarketDataError(
            f"Coinbase: {symbol} {timeframe}: a candle has no number for each of start, open, high, low, close, volume: "
            f"{str(item)[:200]} ({error!r})"
        ) from error


def _frame(rows: dict[int, Row]) -> pl.DataFrame:
    opens = sorted(rows)
    columns = {name: [rows[t][i] for t in opens] for i, name in enumerate(("open", "high", "low", "close", "volume"))}
    timestamps = pl.Series("timestamp", [t * 1_000_000 for t in opens], dtype=pl.Int64).cast(TIMESTAMP)
    return pl.DataFrame({"timestamp": timestamps, **columns}, schema=CANDLE_SCHEMA)


def _seconds(moment: datetime) -> int:
    return (moment - EPOCH) // timedelta(seconds=1)


def _hint(status: int, _code: int | None) -> str:
    return {
        400: "the request itself is wrong: check symbol, timeframe and interval",
        401: "the public candles need no key: check CRPBOT_COINBASE_URL",
        403: "access is blocked, perhaps for this address or region",
        404: "check the symbol and CRPBOT_COINBASE_URL",
        429: "too many requests: lower CRPBOT_COINBASE_REQUESTS_PER_SECOND when this goes on",
    }.get(status, "check CRPBOT_COINBASE_URL" if 300 <= status < 400 else "")
