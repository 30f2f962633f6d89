"""Markets to compute features on: generated ones (seeded), and slices of the real data where it is at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from crpbot_lib.config import ALL_GROUPS
from crpbot_lib.features.engineer import Engineered, engineer

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
WIDTHS = {"5m": 5 * MINUTE, "15m": 15 * MINUTE, "1h": HOUR}
HOURLY_LAG, DAILY_LAG = timedelta(minutes=5), timedelta(minutes=35)


@dataclass(frozen=True)
class Market:
    """All inputs of one symbol."""

    candles: dict[str, pl.DataFrame]
    hourly: pl.DataFrame
    daily: pl.DataFrame
    all_time_high: Any = None
    groups: tuple[Any, ...] = field(default=ALL_GROUPS)

    @property
    def minutes(self) -> pl.DataFrame:
        return self.candles["1m"]

    @property
    def points(self) -> dict[str, Any]:
        return {"hourly": self.hourly, "daily": self.daily, "all_time_high": self.all_time_high}

    def features(self, start: datetime | None = None) -> Engineered:
        return engineer("BTC-USD", self.groups, self.candles, self.points, start)

    def frame(self) -> pl.DataFrame:
        return self.features().frame

    def with_candles(self, **frames: pl.DataFrame) -> Market:
        """``m1``, ``m5``, ``m15``, ``h1`` replaced."""
        names = {"m1": "1m", "m5": "5m", "m15": "15m", "h1": "1h"}
        return replace(self, candles=self.candles | {names[k]: v for k, v in frames.items()})

    def known_at(self, cut: datetime) -> Market:
        """What had been published by ``cut``: closed candles, available points."""
        closed = {
            width: frame.filter(pl.col("timestamp") + WIDTHS.get(width, MINUTE) <= cut) for width, frame in self.candles.items()
        }
        hourly, daily = (frame.filter(pl.col("available_at") <= cut) for frame in (self.hourly, self.daily))
        return replace(self, candles=closed, hourly=hourly, daily=daily)

    def since(self, first: datetime, hourly_since: datetime | None = None) -> Market:
        """What a reader has who begins at ``first``."""
        candles = {width: frame.filter(pl.col("timestamp") >= first) for width, frame in self.candles.items()}
        return replace(self, candles=candles, hourly=self.hourly.filter(pl.col("timestamp") >= (hourly_since or first)))


def resampled(minutes: pl.DataFrame, width: str) -> pl.DataFrame:
    return minutes.group_by(pl.col("timestamp").dt.truncate(width), maintain_order=True).agg(
        pl.col("open").first(), pl.col("high").max(), pl.col("low").min(), pl.col("close").last(), pl.col("volume").sum()
    )


def with_bars(minutes: pl.DataFrame) -> dict[str, pl.DataFrame]:
    return {"1m": minutes, **{width: resampled(minutes, width) for width in WIDTHS}}


def points_from(prices: pl.DataFrame, lag: timedelta) -> pl.DataFrame:
    """CoinGecko points from ``timestamp, price``: cap and volume follow the price, as far as shapes matter."""
    return prices.select(
        "timestamp",
        available_at=pl.col("timestamp") + lag,
        price="price",
        market_cap=pl.col("price") * 1.9e7,
        total_volume=pl.col("price") * (1e5 + 1e4 * pl.col("price").pct_change().fill_null(0.0).abs() * 100),
    )


def _walk(minutes: int, seed: int, start: datetime, lead_days: int) -> Market:
    """A random walk of independent symmetric log returns, four a minute, with CoinGecko points that begin ``lead_days`` earlier."""
    rng = np.random.default_rng(seed)
    total = minutes + lead_days * 1440
    path = np.exp(np.concatenate([[0.0], rng.normal(0, 3e-4, 4 * total).cumsum()]) + np.log(60_000.0))
    inside = np.lib.stride_tricks.sliding_window_view(path, 5)[::4]
    begin = start - lead_days * DAY
    everything = pl.DataFrame(
        {
            "timestamp": pl.datetime_range(begin, begin + (total - 1) * MINUTE, "1m", time_unit="us", eager=True),
            "open": inside[:, 0],
            "high": inside.max(axis=1),
            "low": inside.min(axis=1),
            "close": inside[:, 4],
            "volume": rng.lognormal(1, 1, total),
        }
    )
    candles = everything.filter(pl.col("timestamp") >= start)
    # the price at a stamp is the close of the minute that ends there; CoinGecko stamps anywhere inside the hour
    at_close = everything.select(timestamp=pl.col("timestamp") + MINUTE, price="close")
    jitter = pl.Series(rng.integers(0, 40, total // 60 + 2))
    hours = at_close.filter(pl.col("timestamp").dt.minute() == 0).with_columns(
        timestamp=pl.col("timestamp") + pl.duration(minutes=jitter.head((at_close["timestamp"].dt.minute() == 0).sum()))
    )
    hourly = points_from(hours.drop("price").join(at_close, on="timestamp"), HOURLY_LAG)
    daily = points_from(at_close.filter(pl.col("timestamp").dt.hour() == 0, pl.col("timestamp").dt.minute() == 0), DAILY_LAG)
    return Market(with_bars(candles), hourly, daily)


@pytest.fixture(scope="session")
def random_market() -> Callable[..., Market]:
    """``random_market(minutes, seed=0, start=…, lead_days=40)``: a generated market without holes."""

    def make(minutes: int, seed: int = 0, start: datetime = datetime(2025, 5, 1, tzinfo=UTC), lead_days: int = 40) -> Market:
        return _walk(minutes, seed, start, lead_days)

    return make


@pytest.fixture(scope="session")
def small_market(random_market: Callable[..., Market]) -> Market:
    """Three generated days."""
    return random_market(3 * 1440)


def _cut(frame: pl.DataFrame, start: datetime, end: datetime) -> pl.DataFrame:
    return frame.filter(pl.col("timestamp") >= start, pl.col("timestamp") < end)


@pytest.fixture(scope="session")
def outage_market(market_data_dir: Path | None, random_market: Callable[..., Market]) -> Market:
    """Four days of BTC with a frozen market and an 80-minute outage on the third: real (Binance, 2023-03-24) where the data is at
    hand, else generated with the same holes."""
    frozen, gone, back = (datetime(2023, 3, 24, h, m, tzinfo=UTC) for h, m in ((11, 28), (12, 40), (14, 0)))
    start, end = datetime(2023, 3, 22, tzinfo=UTC), datetime(2023, 3, 26, tzinfo=UTC)
    if market_data_dir is None:
        whole = random_market(4 * 1440, start=start)
        flat = pl.col("timestamp").is_between(frozen, gone, closed="left")
        price = whole.minutes.filter(pl.col("timestamp") < frozen)["close"][-1]
        minutes = whole.minutes.filter(~pl.col("timestamp").is_between(gone, back, closed="left")).with_columns(
            *(pl.when(flat).then(price).otherwise(pl.col(c)).alias(c) for c in ("open", "high", "low", "close")),
            volume=pl.when(flat).then(0.0).otherwise(pl.col("volume")),
        )
        return replace(whole, candles=with_bars(minutes))
    minutes = _cut(pl.read_parquet(market_data_dir / "candles_1m_windows/binance_spot_2023-03/BTC-USD.parquet"), start, end)
    hours = pl.read_parquet(market_data_dir / "candles_mtf/binance_spot_2023-2025/BTC-USD_1h.parquet")
    # the real hour is missing in the candles; a close at its end stands for CoinGecko's point
    prices = hours.select(timestamp=pl.col("timestamp") + HOUR + 2 * MINUTE, price="close")
    hourly = points_from(
        _cut(prices.upsample("timestamp", every="1h").fill_null(strategy="forward"), start - 30 * DAY, end), HOURLY_LAG
    )
    daily = pl.read_parquet(market_data_dir / "daily/bitcoin.parquet").with_columns(available_at=pl.col("timestamp") + DAILY_LAG)
    return Market(with_bars(minutes), hourly, _cut(daily, datetime(2022, 1, 1, tzinfo=UTC), end))


@pytest.fixture(scope="session")
def thin_market(market_data_dir: Path | None, random_market: Callable[..., Market]) -> Market:
    """Four days of a market in which 28 % of the minutes have no trade: real (a Coinbase derivative) where the data is at hand,
    else generated. Without CoinGecko, whose features have nothing to do with it."""
    if market_data_dir is None:
        whole = random_market(4 * 1440, seed=3).minutes
        minutes = whole.filter(pl.Series(np.random.default_rng(3).random(whole.height) > 0.28))
    else:
        minutes = pl.read_parquet(market_data_dir / "candles_1m_windows/coinbase_derivatives_perp_2026-02/SOL-USD.parquet")
        minutes = _cut(minutes, datetime(2026, 2, 23, tzinfo=UTC), datetime(2026, 2, 27, tzinfo=UTC))
    market = random_market(1440)
    return replace(market, candles=with_bars(minutes), groups=("base", "multi_timeframe"))
