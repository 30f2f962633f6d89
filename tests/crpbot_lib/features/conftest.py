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
from crpbot_lib.features import engineer as engine
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

    def with_minutes(self, minutes: pl.DataFrame) -> Market:
        """Other 1-minute candles, and the bars that they add up to."""
        return replace(self, candles=with_bars(minutes))

    def known_at(self, cut: datetime) -> Market:
        """What had been published by ``cut``: closed candles, available points."""
        closed = {
            width: frame.filter(pl.col("timestamp") + WIDTHS.get(width, MINUTE) <= cut) for width, frame in self.candles.items()
        }
        hourly, daily = (frame.filter(pl.col("available_at") <= cut) for frame in (self.hourly, self.daily))
        records = [record for record in self.all_time_high or [] if record[1] <= cut]
        return replace(self, candles=closed, hourly=hourly, daily=daily, all_time_high=records)

    def moved(self, by: timedelta) -> Market:
        """The same at another time."""

        def move(frame: pl.DataFrame) -> pl.DataFrame:
            return frame.with_columns(pl.col(pl.Datetime("us", "UTC")) + by)

        records = [(price, at + by) for price, at in self.all_time_high or []]
        candles = {width: move(frame) for width, frame in self.candles.items()}
        return replace(self, candles=candles, hourly=move(self.hourly), daily=move(self.daily), all_time_high=records)

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


@dataclass(frozen=True)
class Span:
    """Some days of one market of the real data, or of a generated one with the same holes where that is not at hand."""

    name: str
    folder: str
    symbol: str
    start: datetime
    hours: int
    frozen: tuple[datetime, int] | None = None
    """From when for how many minutes the price stood still, volume 0."""
    outage: tuple[datetime, int] | None = None
    empty: float = 0.0
    """The share of minutes without a trade."""
    moved: int = 0
    """By how many days CoinGecko's series are moved, where the real ones do not reach: no feature mixes them with candles."""

    @property
    def end(self) -> datetime:
        return self.start + self.hours * HOUR

    def market(self, data: Path | None, record: bool = True) -> Market:
        """``record``: with an all-time high that a dated record sets in the middle of the span."""
        market = self._generated() if data is None else self._real(data)
        return replace(market, all_time_high=[(1e6, self.start + self.hours / 2 * HOUR)] if record else None)

    def _real(self, data: Path) -> Market:
        minutes = _cut(pl.read_parquet(data / self.folder / f"{self.symbol}.parquet"), self.start, self.end)
        shift = self.moved * DAY
        hours = pl.read_parquet(data / f"candles_mtf/binance_spot_2023-2025/{self.symbol}_1h.parquet")
        # Binance's outage is none of CoinGecko's; the last price of an hour is stamped anywhere inside the next one
        hours = hours.upsample("timestamp", every="1h").fill_null(strategy="forward")
        stamp = pl.Series(np.random.default_rng(1).integers(0, 3540, hours.height))
        hourly = hours.select(
            timestamp=pl.col("timestamp") + HOUR + shift + pl.duration(seconds=stamp),
            price="close",
            market_cap=pl.col("close") * 1.9e7,
            total_volume=(pl.col("close") * pl.col("volume")).rolling_sum(24),
        ).drop_nulls()
        hourly = _cut(hourly, self.start - 20 * DAY, self.end)
        coin = {"BTC-USD": "bitcoin", "ETH-USD": "ethereum", "SOL-USD": "solana"}[self.symbol]
        daily = pl.read_parquet(data / f"daily/{coin}.parquet").with_columns(pl.col("timestamp") + shift)
        published = {"hourly": HOURLY_LAG, "daily": DAILY_LAG}
        points = {
            name: frame.with_columns(available_at=pl.col("timestamp") + published[name])
            for name, frame in (("hourly", hourly), ("daily", daily.filter(pl.col("timestamp") < self.end)))
        }
        return Market(with_bars(minutes), **points)

    def _generated(self) -> Market:
        whole = _walk(self.hours * 60, len(self.name), self.start, 40)
        minutes, at = whole.minutes, pl.col("timestamp")
        if self.frozen:
            since, count = self.frozen
            still = at.is_between(since, since + count * MINUTE, closed="left")
            price = minutes.filter(at < since)["close"][-1]
            minutes = minutes.with_columns(
                *(pl.when(still).then(price).otherwise(pl.col(c)).alias(c) for c in ("open", "high", "low", "close")),
                volume=pl.when(still).then(0.0).otherwise("volume"),
            )
        if self.outage:
            since, count = self.outage
            minutes = minutes.filter(~at.is_between(since, since + count * MINUTE, closed="left"))
        if self.empty:
            minutes = minutes.filter(pl.Series(np.random.default_rng(3).random(minutes.height) > self.empty))
        return replace(whole, candles=with_bars(minutes))


def _at(year: int, month: int, day: int, hour: int = 0, minute: int = 0) -> datetime:
    return datetime(year, month, day, hour, minute, tzinfo=UTC)


def _spans() -> list[Span]:
    windows, spans = "candles_1m_windows/", []
    frozen, gone = (_at(2023, 3, 24, 11, 28), 72), (_at(2023, 3, 24, 12, 40), 80)
    for coin, empty, thin_since in (
        ("BTC", 0.05, _at(2026, 2, 20, 8)),
        ("ETH", 0.12, _at(2026, 2, 24)),
        ("SOL", 0.28, _at(2026, 2, 24)),
    ):
        symbol = f"{coin}-USD"
        march, september = windows + "binance_spot_2023-03", windows + "binance_spot_2021-09"
        spans += [
            Span(f"{coin} 2023-03", march, symbol, _at(2023, 3, 23, 22), 36, frozen, gone),
            Span(f"{coin} 2021-09", september, symbol, _at(2021, 9, 28, 16), 36, None, (_at(2021, 9, 29, 7), 120), moved=-730),
            Span(
                f"{coin} thin",
                windows + "coinbase_derivatives_perp_2026-02",
                symbol,
                thin_since,
                36,
                outage=(_at(2026, 2, 20, 22), 60),
                empty=empty,
                moved=365,
            ),
            Span(f"{coin} 2025-05", "candles_1m", symbol, _at(2025, 5, 31, 6), 24),
        ]
    return spans


SPANS = _spans()
"""Outages after a frozen market, outages, markets with 5, 12 and 28 % of their minutes empty and a break, and
undisturbed ones over the end of a month."""


@pytest.fixture(scope="session")
def spans() -> dict[str, Span]:
    return {span.name: span for span in SPANS}


@pytest.fixture(params=SPANS, ids=lambda span: span.name)
def span(request: pytest.FixtureRequest) -> Span:
    return request.param


@pytest.fixture
def real(span: Span, market_data_dir: Path | None) -> Market:
    """Each of ``SPANS``."""
    return span.market(market_data_dir)


@pytest.fixture
def before_the_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features come in Float64, as they are computed."""
    monkeypatch.setattr(engine, "VALUE", pl.Float64())


@pytest.fixture(scope="session")
def outage_market(market_data_dir: Path | None) -> Market:
    """Four days of BTC with a frozen market and an 80-minute outage on the third."""
    return replace(SPANS[0], start=_at(2023, 3, 22), hours=96).market(market_data_dir, record=False)


@pytest.fixture(scope="session")
def thin_market(market_data_dir: Path | None) -> Market:
    """Four days of SOL in which 28 % of the minutes have no trade, without CoinGecko, whose features have nothing to do with it."""
    thin = next(s for s in SPANS if s.name == "SOL thin")
    market = replace(thin, start=_at(2026, 2, 23), hours=96, outage=None).market(market_data_dir, record=False)
    return replace(market, groups=("base", "multi_timeframe"))
