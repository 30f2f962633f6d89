"""Where the stand-ins for Coinbase and CoinGecko take their rows from: a folder of real market data, or a seeded generator.

Frames are those of the clients: candles (timestamp, open, high, low, close, volume) and CoinGecko points (timestamp, price,
market_cap, total_volume), timestamps Datetime("us", "UTC"), sorted. Nothing is filled, and nothing is served beyond what is there.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
import polars as pl

from crpbot_lib.config import DEFAULT_SYMBOLS, TIMEFRAME_SECONDS

Series = Literal["hourly", "daily"]
Kind = Literal["real", "synthetic", "mixed"]
COINS = {symbol.coin: symbol.name for symbol in DEFAULT_SYMBOLS}
UTC_MICROSECONDS = pl.Datetime("us", "UTC")
COLUMNS = ("timestamp", "open", "high", "low", "close", "volume")
WIDER = tuple(timeframe for timeframe in TIMEFRAME_SECONDS if timeframe != "1m")


class Source(Protocol):
    """Market data behind the stand-ins."""

    @property
    def kind(self) -> Kind:
        """What all of it is."""

    def kind_of(self, name: str) -> Kind:
        """What the candles of a symbol, or the points of a coin, are."""

    def candles(self, symbol: str, timeframe: str) -> pl.DataFrame | None:
        """All candles of one series; None for a product that does not exist here, no rows for a width that it does not have."""

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


def omit(minutes: pl.DataFrame, share: float, seed: int, symbol: str) -> pl.DataFrame:
    """``minutes`` without a seeded ``share`` of them; the first and the last stay, so that wider candles end where they did."""
    kept = np.random.default_rng([seed, *symbol.encode()]).random(minutes.height) >= share
    kept[[0, -1]] = True
    return minutes.filter(pl.Series(kept))


def span(frame: pl.DataFrame) -> dict[str, Any]:
    """First and last timestamp and the number of rows, in JSON."""
    return {"first": frame["timestamp"][0].isoformat(), "last": frame["timestamp"][-1].isoformat(), "rows": frame.height}


class FolderSource:
    """Real data from a folder laid out as ``market_data`` (its README says what each file is).

    ``venue`` is a folder in it, and its candles are the only ones served: ``{symbol}.parquet`` are the 1m candles,
    ``{symbol}_{width}.parquet`` and ``{symbol}_{width}_*.parquet`` recorded wider ones, there and in the folder of ``candles_mtf``
    that belongs to it. Wider candles are resampled from the 1m ones where there is no recording of them. Without 1m candles
    only what was recorded is there. CoinGecko's daily points are as exported; its hourly points are derived (``derive_hourly``)
    with the 1h candles of the Binance spot market.

    ``omitted`` is the share of 1m candles to leave out (``omit``). The recordings, which know the minutes left out, are then
    set aside, and every wider candle is made of what is left.

    FileNotFoundError for a folder that is none of market data or has no such venue.
    """

    kind: Kind = "real"
    DEFAULT_VENUE = "candles_1m"
    RECORDED_ELSEWHERE: Final = {"candles_1m": "binance_perp_2025-05", "candles_1m_spot": "binance_spot_2025-05"}
    """Where in ``candles_mtf`` the venue's wider candles are, if not under the venue's own name."""
    _NAME = re.compile(r"(?P<symbol>[A-Z0-9]+-[A-Z]+)(_(?P<width>[0-9]+[mh])(_.*)?)?")

    def __init__(self, folder: Path, venue: str | None = None, *, omitted: float = 0.0, seed: int = 1) -> None:
        if not (folder / self.DEFAULT_VENUE).is_dir() or not (folder / "daily").is_dir():
            raise FileNotFoundError(
                f"{folder} is no folder of market data: expected candles_1m/ and daily/ in it. "
                "Give another one, or none for generated data"
            )
        self.folder, self.venue = folder, (venue or self.DEFAULT_VENUE).strip("/")
        self._omitted, self._seed = omitted, seed
        own = folder / self.venue
        recorded = folder / "candles_mtf" / self.RECORDED_ELSEWHERE.get(self.venue, own.name)
        self._files: dict[tuple[str, str], list[Path]] = {}
        if own.resolve().is_relative_to(folder.resolve()):
            for file in sorted({*own.glob("*.parquet"), *recorded.glob("*.parquet")}):
                if name := self._NAME.fullmatch(file.stem):
                    self._files.setdefault((name["symbol"], name["width"] or "1m"), []).append(file)
        if not self._files:
            there = sorted({str(f.parent.relative_to(folder)) for f in folder.glob("candles*/**/*.parquet")})
            raise FileNotFoundError(f"{folder} has no candles of a venue {self.venue!r}; it has {', '.join(there)}")
        self.symbols = tuple(sorted({symbol for symbol, _ in self._files}))
        self._frames: dict[tuple[str, str], pl.DataFrame] = {}
        self._points: dict[tuple[str, str], pl.DataFrame | None] = {}
        self._lock = threading.RLock()  # a wider series is made of the 1m one

    def kind_of(self, name: str) -> Kind:  # noqa: ARG002  # everything here is real
        return self.kind

    def candles(self, symbol: str, timeframe: str) -> pl.DataFrame | None:
        return self._cached(symbol, timeframe) if symbol in self.symbols else None

    def points(self, coin: str, series: Series) -> pl.DataFrame | None:
        if coin not in COINS:
            return None
        with self._lock:
            if (coin, series) not in self._points:
                self._points[coin, series] = self._fundamentals(coin, series)
            return self._points[coin, series]

    def bounds(self) -> tuple[datetime, datetime]:
        """[start, end) of the venue: from the first candle's opening to the last one's close."""
        frames = [(TIMEFRAME_SECONDS[width], self._cached(symbol, width)["timestamp"]) for symbol, width in self._files]
        return min(stamps[0] for _, stamps in frames), max(stamps[-1] + timedelta(seconds=width) for width, stamps in frames)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "folder": str(self.folder),
            "candles": {
                "venue": f"{self.venue}, under the product names of Coinbase",
                **{width: self._origin(width) for width in TIMEFRAME_SECONDS},
                **(
                    {"omitted": f"{self._omitted:g} of the 1m candles, recordings of wider ones set aside"} if self._omitted else {}
                ),
                "spans": {symbol: self._spans(symbol) for symbol in self.symbols},
            },
            "coingecko": {
                "daily": "recorded",
                "hourly": "derived from Binance spot 1h: price = close, cap = daily cap x price ratio, volume = last 24 h x price",
                "spans": {c: span(f) for c in COINS if (f := self.points(c, "daily")) is not None},
            },
        }

    def _origin(self, width: str) -> dict[str, str]:
        """By symbol, where its candles of one width are from."""
        said = {}
        for symbol in self.symbols:
            files = [str(file.relative_to(self.folder)) for file in self._recorded(symbol, width)]
            origins = [f"recorded in {', '.join(files)}"] if files else []
            if width != "1m" and (symbol, "1m") in self._files:
                origins.append("resampled from 1m where there is no recording" if files else "resampled from 1m")
            said[symbol] = "; ".join(origins) or "none"
        return said

    def _spans(self, symbol: str) -> dict[str, Any]:
        frames = {width: self._cached(symbol, width) for width in TIMEFRAME_SECONDS}
        return {width: span(frame) for width, frame in frames.items() if not frame.is_empty()}

    def _recorded(self, symbol: str, width: str) -> list[Path]:
        if self._omitted and width != "1m" and (symbol, "1m") in self._files:
            return []
        return self._files.get((symbol, width), [])

    def _cached(self, symbol: str, width: str) -> pl.DataFrame:
        with self._lock:
            if (symbol, width) not in self._frames:
                self._frames[symbol, width] = self._load(symbol, width)
            return self._frames[symbol, width]

    def _load(self, symbol: str, width: str) -> pl.DataFrame:
        pieces = [_read(file).select(COLUMNS) for file in self._recorded(symbol, width)]
        if width == "1m":
            minutes = _join(pieces, f"{symbol} 1m of {self.venue}")
            return omit(minutes, self._omitted, self._seed, symbol) if self._omitted and pieces else minutes
        minutes = self._cached(symbol, "1m")
        if not minutes.is_empty():
            resampled = resample(minutes, width)
            for piece in pieces:
                inside = pl.col("timestamp").is_between(piece["timestamp"][0], piece["timestamp"][-1])
                resampled = resampled.filter(~inside)
            pieces.append(resampled)
        return _join(pieces, f"{symbol} {width} of {self.venue}")

    def _fundamentals(self, coin: str, series: str) -> pl.DataFrame | None:
        daily = self.folder / "daily" / f"{coin}.parquet"
        hours = self.folder / "candles_mtf" / "binance_spot_2023-2025" / f"{COINS[coin]}_1h.parquet"
        if not daily.is_file() or (series == "hourly" and not hours.is_file()):
            return None
        return _read(daily) if series == "daily" else derive_hourly(_read(hours), _read(daily))


def _read(file: Path) -> pl.DataFrame:
    return pl.read_parquet(file).with_columns(pl.col("timestamp").cast(UTC_MICROSECONDS)).sort("timestamp")


def _join(pieces: Sequence[pl.DataFrame], what: str) -> pl.DataFrame:
    """One series of several recordings; ValueError where they contradict each other."""
    none = pl.DataFrame(schema={name: UTC_MICROSECONDS if name == "timestamp" else pl.Float64 for name in COLUMNS})
    joined = pl.concat([none, *pieces]).unique().sort("timestamp")
    if joined["timestamp"].n_unique() != joined.height:
        first = joined.filter(pl.col("timestamp").is_duplicated())["timestamp"][0]
        raise ValueError(f"{what}: two recordings say different things of {first:%Y-%m-%d %H:%M}")
    return joined


class MixedSource:
    """Real data, and beside it the symbols and coins of ``names`` from another source, whose kind they are called by."""

    kind: Kind = "mixed"

    def __init__(self, real: FolderSource, generated: Source, names: Collection[str]) -> None:
        if both := sorted(set(names) & set(real.symbols)):
            raise ValueError(f"{', '.join(both)} of {real.venue} is real: it cannot be generated as well")
        self.real, self.generated = real, generated
        self._generated = frozenset(names)

    def _of(self, name: str) -> Source:
        return self.generated if name in self._generated else self.real

    def kind_of(self, name: str) -> Kind:
        return self._of(name).kind

    def candles(self, symbol: str, timeframe: str) -> pl.DataFrame | None:
        return self._of(symbol).candles(symbol, timeframe)

    def points(self, coin: str, series: Series) -> pl.DataFrame | None:
        return self._of(coin).points(coin, series)

    def describe(self) -> dict[str, Any]:
        return {**self.real.describe(), "kind": self.kind, "synthetic": self.generated.describe()}
