"""The market as it was known at one moment, over a source that is asked as seldom as possible."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

import polars as pl

from crpbot_lib.config import TIMEFRAME_SECONDS
from crpbot_lib.features import DataFetcher
from crpbot_lib.market_data.coingecko import LAG

_POINT_WIDTH = {"hourly": timedelta(hours=1), "daily": timedelta(days=1)}


class MarketAt:
    """A ``DataFetcher`` that gives only what was known at ``now``: candles that had closed, points that had appeared.

    ``until`` is the last moment that will be asked about where that is known (a replay): then each series is fetched once.
    Otherwise candles are fetched anew for each minute, and points once a new one can have appeared.
    """

    def __init__(self, source: DataFetcher, now: datetime, until: datetime | None = None) -> None:
        self._source, self._until = source, until
        self.now = now
        self._kept: dict[tuple[str, str], tuple[datetime, datetime, pl.DataFrame]] = {}

    def candles(self, symbol: str, timeframe: str, start: datetime, end: datetime) -> pl.DataFrame:
        """See ``DataFetcher.candles``; without candles that close after ``now``."""
        frame = self._fetch((timeframe, symbol), start, end, lambda a, b: self._source.candles(symbol, timeframe, a, b))
        closed = pl.col("timestamp") + timedelta(seconds=TIMEFRAME_SECONDS[timeframe]) <= self.now
        return frame.filter(pl.col("timestamp").is_between(start, end, closed="left") & closed)

    def hourly(self, coin: str, start: datetime, end: datetime) -> pl.DataFrame:
        """See ``DataFetcher.hourly``; without points that appear after ``now``."""
        return self._points("hourly", coin, start, end, self._source.hourly)

    def daily(self, coin: str, start: datetime, end: datetime) -> pl.DataFrame:
        """See ``DataFetcher.daily``; without points that appear after ``now``."""
        return self._points("daily", coin, start, end, self._source.daily)

    def _points(
        self, series: str, coin: str, start: datetime, end: datetime, fetch: Callable[[str, datetime, datetime], pl.DataFrame]
    ) -> pl.DataFrame:
        kept = self._kept.get((series, coin))
        if self._until is None and kept and kept[0] <= start and kept[2].height:
            # the beginning of its hour or day: however late its own stamp was, the next one may be stamped at once
            newest: datetime = kept[2]["timestamp"][-1]
            if self.now < newest + _POINT_WIDTH[series] + LAG[series]:
                # nothing new can have appeared since
                self._kept[(series, coin)] = (kept[0], max(kept[1], end), kept[2])
        frame = self._fetch((series, coin), start, end, lambda a, b: fetch(coin, a, b))
        return frame.filter(pl.col("timestamp").is_between(start, end, closed="left") & (pl.col("available_at") <= self.now))

    def _fetch(
        self, name: tuple[str, str], start: datetime, end: datetime, fetch: Callable[[datetime, datetime], pl.DataFrame]
    ) -> pl.DataFrame:
        kept = self._kept.get(name)
        if kept and kept[0] <= start and end <= kept[1]:
            return kept[2]
        stop = max(end, self._until) if self._until else end
        frame = fetch(start, stop)
        self._kept[name] = (start, stop, frame)
        return frame
