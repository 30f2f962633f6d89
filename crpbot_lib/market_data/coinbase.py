"""Closed candles from Coinbase's public Advanced Trade API, which needs no key.

The API: ``GET /api/v3/brokerage/market/products/{id}/candles?start&end&granularity&limit``. ``start`` and ``end`` are UNIX seconds,
both inclusive; an answer holds 350 candles at most, newest first, every value a string. A minute without a trade has no candle,
so an empty page says nothing about the pages beside it. An exchange under load answers empty too: an empty page is asked for again
before it is believed.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from itertools import pairwise
from math import ceil as ceil_number
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import polars as pl

from crpbot_lib.market_data.frames import CANDLE_SCHEMA, EPOCH, TIMESTAMP, Clock, ceil, floor, in_utc, utc_now, width
from crpbot_lib.market_data.http import READ_TIMEOUT, HttpClient, MarketDataError, checked_url, limiter_name
from crpbot_lib.market_data.limiter import RateLimiter
from crpbot_lib.market_data.progress import Progress
from crpbot_lib.market_data.quality import check_candles

log = logging.getLogger(__name__)

GRANULARITY = {"1m": "ONE_MINUTE", "5m": "FIVE_MINUTE", "15m": "FIFTEEN_MINUTE", "1h": "ONE_HOUR"}
PAGE_SIZE = 300
"""Candles a request; the documented 350 is refused for some accounts."""
REQUESTS_PER_SECOND = 10.0
PARALLEL_PAGES = 8
"""Pages that are waited for at once, so that an answer of half a second does not lower the rate."""
EMPTY_CONFIRMATIONS = 3
"""How often an empty page is asked for again before it is believed: hours lost silently are worse than three requests."""

Row = tuple[float, float, float, float, float]
Page = tuple[datetime, datetime]
Item = TypeVar("Item")
Result = TypeVar("Result")


class CoinbaseClient:
    """Candles of one Coinbase host. ``now`` decides which candles are closed.

    ``requests_per_second`` is shared with all processes of the machine that use the same ``rate_limit_dir``; ``timeout`` and
    ``backoff`` are ``HttpClient``'s.
    """

    def __init__(
        self,
        url: str,
        *,
        now: Clock = utc_now,
        requests_per_second: float = REQUESTS_PER_SECOND,
        page_size: int = PAGE_SIZE,
        rate_limit_dir: Path | None = None,
        timeout: float = READ_TIMEOUT,
        backoff: float = 1.0,
        http: HttpClient | None = None,
    ) -> None:
        self._now, self._page_size = now, page_size
        self._http = http or HttpClient(
            "Coinbase",
            checked_url("Coinbase", url, "CRPBOT_COINBASE_URL"),
            limiter=RateLimiter(requests_per_second, name=limiter_name("Coinbase", url), directory=rate_limit_dir),
            hint=_hint,
            timeout=timeout,
            backoff=backoff,
        )

    def candles(self, symbol: str, timeframe: str, start: datetime, end: datetime) -> pl.DataFrame:
        """The closed candles of ``symbol`` that open in ``[start, end)`` (timezone-aware), sorted, each once (CANDLE_SCHEMA).

        A candle is closed when its whole width has passed by the clock; the open one is never returned. Minutes that were not
        served are absent, never filled. Pages follow from the interval alone and are fetched side by side. MarketDataError when the
        exchange refuses or serves something that cannot be true; ValueError for a naive datetime or an unknown timeframe.
        """
        step = width(timeframe)
        first = ceil(in_utc(start, "start"), step)
        last = min(ceil(in_utc(end, "end"), step), floor(self._now(), step))
        pages = _pages(first, last, step, self._page_size)
        progress = Progress(log, f"{symbol} {timeframe}", len(pages), "pages")
        frames = {-1: _frame({})}
        for page, frame in _side_by_side(lambda page: self._page(symbol, timeframe, *page), pages):
            frames[page] = frame
            progress.done(len(frames) - 1)
        frame = pl.concat([frames[page] for page in sorted(frames)], rechunk=True)
        check_candles(frame, timeframe, first, max(first, last), f"{symbol} {timeframe} as served")
        return frame

    def _page(self, symbol: str, timeframe: str, start: datetime, end: datetime) -> pl.DataFrame:
        rows = self._ask(symbol, timeframe, start, end)
        for confirmation in range(1, EMPTY_CONFIRMATIONS + 1):
            if rows:
                break
            log.debug("%s %s: no candles in [%s, %s), asking again", symbol, timeframe, start, end)
            self._http.rest(confirmation)
            rows = self._ask(symbol, timeframe, start, end)
        return _frame(rows)

    def _ask(self, symbol: str, timeframe: str, start: datetime, end: datetime) -> dict[int, Row]:
        begin, stop = _seconds(start), _seconds(end)
        body = self._http.get(
            f"/api/v3/brokerage/market/products/{quote(symbol, safe='')}/candles",
            # one second before the next page's first candle: right whether the API counts its end in or out
            {"start": begin, "end": stop - 1, "granularity": GRANULARITY[timeframe], "limit": self._page_size},
            holds={"candles": list},
        )
        items = body["candles"]
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
        # one candle beyond either end may be a matter of how the ends are counted
        if not rows and len(items) > 2:
            asked = f"[{start:%Y-%m-%d %H:%M}, {end:%Y-%m-%d %H:%M})"
            raise MarketDataError(
                f"Coinbase: {symbol} {timeframe} in {asked}: the answer is of another time: {len(items)} candles, the newest "
                f"{items[0]!r:.100}; check CRPBOT_COINBASE_URL"
            )
        return rows


def _pages(first: datetime, last: datetime, step: timedelta, size: int) -> list[Page]:
    """``[first, last)`` in as few pages of at most ``size`` candles as there can be, of equal length to a candle: a last page of a
    minute or two would be empty, and asked for again, whenever nobody traded in it."""
    candles = max(0, (last - first) // step)
    count = ceil_number(candles / size)
    borders = [first + candles * n // count * step for n in range(count + 1)] if count else []
    return list(pairwise(borders))


def _side_by_side(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
    """(index, ``work(item)``) of all items in the order they get done, PARALLEL_PAGES at a time. The first error ends it: what is
    under way then is let go and not waited for. Daemon threads, so that an interrupted command does not hang at its end either."""
    left = iter(enumerate(items))
    lock = threading.Lock()
    over = threading.Event()
    done: queue.SimpleQueue[tuple[int, Result | BaseException]] = queue.SimpleQueue()

    def worker() -> None:
        while not over.is_set():
            with lock:
                index, item = next(left, (-1, None))
            if item is None:
                return
            try:
                done.put((index, work(item)))
            except BaseException as error:  # handed to the caller
                done.put((index, error))
                return

    if len(items) == 1:
        yield 0, work(items[0])
        return
    for _ in range(min(PARALLEL_PAGES, len(items))):
        threading.Thread(target=worker, daemon=True).start()
    try:
        for _ in items:
            while True:
                # with a time limit: one without may keep Ctrl-C waiting for as long as the server is silent
                with suppress(queue.Empty):
                    index, result = done.get(timeout=0.5)
                    break
            if isinstance(result, BaseException):
                raise result
            yield index, result
    finally:
        over.set()


def _row(item: Any, symbol: str, timeframe: str) -> tuple[int, Row]:
    try:
        return int(item["start"]), (
            float(item["open"]),
            float(item["high"]),
            float(item["low"]),
            float(item["close"]),
            float(item["volume"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise MarketDataError(
            f"Coinbase: {symbol} {timeframe}: a candle has no number for each of start, open, high, low, close, volume: "
            f"{item!r:.200} ({error!r:.100}); check CRPBOT_COINBASE_URL"
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
        200: "check CRPBOT_COINBASE_URL when this goes on",
        400: "the request itself is wrong: check symbol, timeframe and interval",
        401: "the public candles need no key: check CRPBOT_COINBASE_URL",
        403: "access is blocked, perhaps for this address or region",
        404: "check the symbol and CRPBOT_COINBASE_URL",
        429: "too many requests: lower CRPBOT_COINBASE_REQUESTS_PER_SECOND when this goes on",
    }.get(status, "check CRPBOT_COINBASE_URL" if 300 <= status < 400 else "")
