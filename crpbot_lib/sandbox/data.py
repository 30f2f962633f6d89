"""Where the stand-ins for Coinbase and CoinGecko take their rows from: a folder of real market data, or a seeded generator.

Frames are those of the clients: candles (timestamp, open, high, low, close, volume) and CoinGecko points (timestamp, price,
market_cap, total_volume), timestamps Datetime("us", "UTC"), sorted. Nothing is filled, and nothing is served beyond what is there.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol

import polars as pl

from crpbot_lib.config import DEFAULT_SYMBOLS, TIMEFRAME_SECONDS

Series = Literal["hourly", "daily"]
COINS = {symbol.coin: symbol.name for symbol in DEFAULT_SYMBOLS}
UTC_MICROSECONDS = pl.Datetime("us", "UTC")


class Source(Protocol):
    """Market data behind the stand-ins."""

    kind: Literal["real", "synthetic"]

    def candles(self, symbol: str, timeframe: str) -> pl.DataFrame | None:
        """All candles of one series; None for a product that does not exist here."""

    def points(self, coin: str, series: Series) -> pl.DataFrame | None:
        """All CoinGecko points of one series; None for a coin that does not exist here."""

    def describe(self) -> dict[str, Any]:
        """What the data is, in JSON: kind, where from, and what is derived from what."""


def resample(minutes: pl.DataFrame, timeframe: str) -> pl.DataFrame:
    """Wider candles from 1-minute ones.

    A bucket at either end of the stream is given only when the stream covers it whole. Inside the stream a bucket is made of the
    minutes that exist, as an exchange does it; a bucket without any is missing.
    """
    width = timedelta(seconds=TIMEFRAME_SECONDS[timeframe])
    first, last = minutes["timestamp"][0], minutes["timestamp"][-1] + timedelta(minutes=1)
    return (
        minutes.group_by_dynamic("timestamp", every=timeframe, closed="left", label="left")
        .agg(
            pl.col("open").first(),
            pl.col("high").max(),
            pl.col("low").min(),
            pl.col("close").last(),
            pl.col("volume").sum(),
        )
        .filter((pl.col("timestamp") >= first) & (pl.col("timestamp") + width <= last))
    )


def derive_hourly(hours: pl.DataFrame, daily: pl.DataFrame) -> pl.DataFrame:
    """An hourly CoinGecko series where only daily points and 1h candles exist. Derived, and called so wherever it is served.

    Stamped on the hour: price is the close of the hour that has just ended, market_cap the day's cap times the price's change since
    the day's point, total_volume the coins traded in the 24 h before, times the price. A stamp is given only where the day has its
    own daily point and all 24 hours are there: beyond the end of either, nothing is invented.
    """
    days = daily.filter(pl.col("market_cap").is_not_null()).select(
        pl.col("timestamp").alias("day"), pl.col("price").alias("day_price"), pl.col("market_cap").alias("day_cap")
    )
    return (
        hours.select(
            (pl.col("timestamp") + timedelta(hours=1)).alias("timestamp"),
            pl.col("close").alias("price"),
            pl.col("volume").rolling_sum(24, min_samples=24).alias("coins"),
            (pl.col("timestamp") - pl.col("timestamp").shift(23) == timedelta(hours=23)).alias("whole_day"),
        )
        .filter(pl.col("whole_day"))
        .with_columns(pl.col("timestamp").dt.truncate("1d").alias("day"))
        .join(days, on="day", how="inner", maintain_order="left")
        .select(
            "timestamp",
            "price",
            (pl.col("day_cap") * pl.col("price") / pl.col("day_price")).alias("market_cap"),
            (pl.col("coins") * pl.col("price")).alias("total_volume"),
        )
    )


def span(frame: pl.DataFrame) -> dict[str, Any]:
    """First and last timestamp and the number of rows, in JSON."""
    return {"first": frame["timestamp"][0].isoformat(), "last": frame["timestamp"][-1].isoformat(), "rows": frame.height}


class FolderSource:
    """Real data from a folder laid out as ``market_data`` (its README says what each file is).

    Candles are one venue's, the Binance USDT perpetual: 1m as recorded, 5m as recorded where they were and resampled from the 1m
    before and after, 15m and 1h resampled. CoinGecko's daily points are as exported; its hourly points are derived
    (``derive_hourly``) with the 1h candles of the Binance spot market.
    """

    kind: Literal["real", "synthetic"] = "real"

    def __init__(self, folder: Path) -> None:
        if not (folder / "candles_1m").is_dir() or not (folder / "daily").is_dir():
            raise FileNotFoundError(
                f"{folder} is no folder of market data: expected candles_1m/ and daily/ in it. "
                "Give another one, or none for generated data"
            )
        self.folder = folder
        self._frames: dict[tuple[str, str], pl.DataFrame | None] = {}
        self._lock = threading.Lock()

    def candles(self, symbol: str, timeframe: str) -> pl.DataFrame | None:
        return self._cached(symbol, timeframe)

    def points(self, coin: str, series: Series) -> pl.DataFrame | None:
        return self._cached(coin, series)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "folder": str(self.folder),
            "candles": {
                "venue": "Binance USDT perpetual, under the product names of Coinbase",
                "1m": "recorded",
                "5m": "recorded where there is a recording, resampled from 1m before and after it",
                "15m": "resampled from 1m",
                "1h": "resampled from 1m",
                "spans": {s: span(f) for s in COINS.values() if (f := self.candles(s, "1m")) is not None},
            },
            "coingecko": {
                "daily": "recorded",
                "hourly": "derived from Binance spot 1h: price = close, cap = daily cap x price ratio, volume = last 24 h x price",
                "spans": {c: span(f) for c in COINS if (f := self.points(c, "daily")) is not None},
            },
        }

    def _cached(self, name: str, series: str) -> pl.DataFrame | None:
        with self._lock:
            if (name, series) not in self._frames:
                self._frames[name, series] = self._load(name, series)
            return self._frames[name, series]

    def _load(self, name: str, series: str) -> pl.DataFrame | None:
        if series == "daily":
            return self._read(f"daily/{name}.parquet") if name in COINS else None
        if series == "hourly":
            if name not in COINS:
                return None
            daily = self._read(f"daily/{name}.parquet")
            hours = self._read(f"candles_mtf/binance_spot_2023-2025/{COINS[name]}_1h.parquet")
            return None if daily is None or hours is None else derive_hourly(hours, daily)
        minutes = self._read(f"candles_1m/{name}.parquet") if name in COINS.values() else None
        if minutes is None or series == "1m":
            return minutes
        wider = resample(minutes, series)
        recorded = self._read(f"candles_mtf/binance_perp_2025-05/{name}_5m.parquet") if series == "5m" else None
        if recorded is None:
            return wider
        first, last = recorded["timestamp"][0], recorded["timestamp"][-1]
        stamp = pl.col("timestamp")
        return pl.concat([wider.filter(stamp < first), recorded, wider.filter(stamp > last)])

    def _read(self, path: str) -> pl.DataFrame | None:
        file = self.folder / path
        if not file.is_file():
            return None
        return pl.read_parquet(file).with_columns(pl.col("timestamp").cast(UTC_MICROSECONDS)).sort("timestamp")
