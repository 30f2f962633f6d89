"""A seeded generator of market data, for machines without the folder of real data. It calls itself synthetic wherever it is served.

One random walk a symbol, minute by minute, from 75 days before the window to its end, and day by day back to the coin's listing.
Candles of every width, the daily and the hourly fundamentals are all taken from that one walk, so they agree with each other. There
is nothing in it to learn: a model that predicts it has a leak.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl

from crpbot_lib.config import DEFAULT_SYMBOLS, Symbol
from crpbot_lib.sandbox.data import UTC_MICROSECONDS, WIDER, Kind, Series, derive_hourly, omit, resample, span

DEFAULT_START = datetime(2025, 5, 4, tzinfo=UTC)
DEFAULT_END = datetime(2025, 6, 25, tzinfo=UTC)
DAYS_BEFORE = 75
"""Days of hourly fundamentals before the window (the features warm up on 17 of them)."""

_KNOWN = {symbol.name: symbol for symbol in DEFAULT_SYMBOLS}
# USD at the window's end, USD at the listing, coins in circulation: only the orders of magnitude matter
_ANCHORS: dict[str, tuple[float, float, float]] = {
    "BTC-USD": (105_000.0, 135.0, 19.8e6),
    "ETH-USD": (2_450.0, 2.8, 120.7e6),
    "SOL-USD": (145.0, 0.8, 525e6),
}
_UNKNOWN_ANCHOR = (10.0, 1.0, 1e9)
_UNKNOWN_LISTED = timedelta(days=1000)
"""How long before the window."""
_DAILY_TURNOVER = 0.03
"""Share of all coins that changes hands in a day."""
_MINUTE_VOLATILITY = 0.0006


class SyntheticSource:
    """Generated data of ``symbols`` (the three default ones) and their coins. Equal arguments give equal rows.

    ``start`` and ``end`` (UTC, [start, end)) bound the candles; ``prices`` (USD at the end, by symbol) moves the whole walk, so
    that fundamentals can stand beside candles of another source; ``omitted`` is the share of the minutes that are left out. The
    coin of a symbol that is no default one has the first half of its name: ``DOGE-USD`` has ``doge``.
    """

    kind: Kind = "synthetic"

    def __init__(
        self,
        seed: int = 1,
        start: datetime = DEFAULT_START,
        end: datetime = DEFAULT_END,
        prices: Mapping[str, float] | None = None,
        *,
        symbols: Sequence[str] = tuple(_KNOWN),
        omitted: float = 0.0,
    ) -> None:
        if start.tzinfo is None or end.tzinfo is None:
            raise ValueError(f"the synthetic window {start} to {end} has no timezone: give UTC, as in 2025-05-04T00:00:00Z")
        if end - start < timedelta(days=1):
            raise ValueError(f"the synthetic window {start} to {end} is shorter than a day")
        self.seed = seed
        self.start, self.end = (t.astimezone(UTC).replace(second=0, microsecond=0) for t in (start, end))
        self.prices, self._omitted = dict(prices or {}), omitted
        listed = (self.start - _UNKNOWN_LISTED).date()
        self._symbols = {
            name: _KNOWN.get(name) or Symbol(name=name, coin=name.split("-")[0].lower(), coin_listed=listed) for name in symbols
        }
        self._coins = {symbol.coin: symbol for symbol in self._symbols.values()}
        self.names = frozenset({*self._symbols, *self._coins})
        """Every symbol and coin there is."""
        self._frames: dict[tuple[str, str], pl.DataFrame] = {}
        self._lock = threading.Lock()

    def kind_of(self, name: str) -> Kind:  # noqa: ARG002  # nothing here is real
        return self.kind

    def candles(self, symbol: str, timeframe: str) -> pl.DataFrame | None:
        return self._cached(self._symbols[symbol], symbol, timeframe) if symbol in self._symbols else None

    def points(self, coin: str, series: Series) -> pl.DataFrame | None:
        return self._cached(self._coins[coin], coin, series) if coin in self._coins else None

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "seed": self.seed,
            "candles": {
                "venue": "none: a random walk",
                **({"omitted": f"{self._omitted:g} of the 1m candles"} if self._omitted else {}),
                "spans": {s: span(f) for s in self._symbols if (f := self.candles(s, "1m")) is not None},
            },
            "coingecko": {
                "daily": "synthetic",
                "hourly": "synthetic, derived: price from 1h closes, cap = daily cap x price ratio, volume = trailing 24 h x price",
                "spans": {c: span(f) for c in self._coins if (f := self.points(c, "daily")) is not None},
            },
        }

    def _cached(self, symbol: Symbol, name: str, series: str) -> pl.DataFrame:
        with self._lock:
            if (name, series) not in self._frames:
                self._frames.update(self._generate(symbol))
            return self._frames[name, series]

    def _generate(self, symbol: Symbol) -> dict[tuple[str, str], pl.DataFrame]:
        now_price, listing_price, supply = _ANCHORS.get(symbol.name, _UNKNOWN_ANCHOR)
        now_price = self.prices.get(symbol.name, now_price)
        rng = np.random.default_rng([self.seed, *symbol.name.encode()])
        begin = (self.start - timedelta(days=DAYS_BEFORE)).replace(hour=0, minute=0)
        minutes = self._walk(rng, begin, now_price, supply)
        window = minutes.filter(pl.col("timestamp") >= self.start)
        hours = resample(minutes, "1h")
        daily = self._daily(rng, symbol, hours, listing_price, supply)
        if self._omitted:
            window = omit(window, self._omitted, self.seed, symbol.name)
        frames = {(symbol.name, "1m"): window}
        for timeframe in WIDER:
            frames[symbol.name, timeframe] = resample(window, timeframe)
        frames[symbol.coin, "daily"] = daily
        frames[symbol.coin, "hourly"] = derive_hourly(hours, daily)
        return frames

    def _walk(self, rng: np.random.Generator, begin: datetime, end_price: float, supply: float) -> pl.DataFrame:
        """1-minute candles of [begin, end): a random walk whose volatility drifts from hour to hour."""
        count = int((self.end - begin) / timedelta(minutes=1))
        log_volatility = np.zeros(count // 60 + 1)
        shocks = rng.normal(0.0, 0.15, log_volatility.size)
        for hour in range(1, log_volatility.size):
            log_volatility[hour] = 0.95 * log_volatility[hour - 1] + shocks[hour]
        sigma = _MINUTE_VOLATILITY * np.exp(np.repeat(log_volatility, 60)[:count])
        path = np.cumsum(rng.normal(0.0, 1.0, count) * sigma)
        close = end_price * np.exp(path - path[-1])
        open_ = np.concatenate([close[:1], close[:-1]])
        reach = np.abs(rng.normal(0.0, 0.6, (2, count))) * sigma
        volume = supply * _DAILY_TURNOVER / 1440 * np.exp(rng.normal(0.0, 0.8, count) - 0.32) * (sigma / _MINUTE_VOLATILITY)
        cents = 2 if end_price >= 10 else 5
        frame = pl.DataFrame(
            {
                "timestamp": pl.datetime_range(begin, self.end, "1m", closed="left", time_zone="UTC", eager=True),
                "open": open_.round(cents),
                "high": (np.maximum(open_, close) * (1 + reach[0])).round(cents),
                "low": (np.minimum(open_, close) * (1 - reach[1])).round(cents),
                "close": close.round(cents),
                "volume": volume.round(6),
            }
        )
        return frame.with_columns(pl.col("timestamp").cast(UTC_MICROSECONDS))

    def _daily(
        self, rng: np.random.Generator, symbol: Symbol, hours: pl.DataFrame, listing_price: float, supply: float
    ) -> pl.DataFrame:
        """Daily points from the listing on: a random bridge from the listing price to the walk, then the walk itself."""
        walked = hours.select(
            (pl.col("timestamp") + timedelta(hours=1)).alias("timestamp"),
            pl.col("close").alias("price"),
            (pl.col("volume").rolling_sum(24, min_samples=24) * pl.col("close")).alias("total_volume"),
        ).filter((pl.col("timestamp").dt.hour() == 0) & pl.col("total_volume").is_not_null())
        listed = datetime.combine(symbol.coin_listed, datetime.min.time(), UTC)
        first = walked["timestamp"][0]
        days = pl.datetime_range(listed, first, "1d", closed="left", time_zone="UTC", eager=True).cast(UTC_MICROSECONDS)
        share = np.linspace(0.0, 1.0, days.len() + 1)
        steps = np.concatenate([[0.0], np.cumsum(rng.normal(0.0, 0.035, days.len()))])
        bridge = steps - share * steps[-1]
        price = np.exp(np.log(listing_price) + share * np.log(walked["price"][0] / listing_price) + bridge)[:-1]
        earlier = pl.DataFrame(
            {
                "timestamp": days,
                "price": price,
                "total_volume": price * supply * _DAILY_TURNOVER * np.exp(rng.normal(0.0, 0.4, days.len())),
            }
        )
        return pl.concat([earlier, walked.select("timestamp", "price", "total_volume")]).select(
            "timestamp", "price", (pl.col("price") * supply).alias("market_cap"), "total_volume"
        )
