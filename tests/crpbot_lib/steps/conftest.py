"""A lake to write to, and settings whose sources are the loopback server with some days of one symbol."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from crpbot_lib.config import Settings, Symbol
from crpbot_lib.lake import Lake
from crpbot_lib.market_data import MarketData

LISTED = date(2025, 4, 10)


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(f"file://{tmp_path}/lake")


@pytest.fixture
def settings(wire: Any, timeframes: dict[str, pl.DataFrame], tmp_path: Path) -> Settings:
    """BTC-USD: candles of 2025-05-05 to 2025-05-08, CoinGecko points of 30 days from the listing on."""
    wire.candles = {("BTC-USD", timeframe): frame for timeframe, frame in timeframes.items()}
    first = datetime(LISTED.year, LISTED.month, LISTED.day, tzinfo=UTC)
    hours = [first + n * timedelta(hours=1) + timedelta(seconds=n * 31 % 200) for n in range(24 * 30)]
    wire.points["bitcoin", "hourly"] = [_point(hour, n) for n, hour in enumerate(hours)]
    wire.points["bitcoin", "daily"] = [_point(first + timedelta(days=n), n) for n in range(30)]
    return Settings(
        coinbase_url=wire.url,
        coingecko_url=wire.url + "/api/v3",
        coingecko_api_key="key",
        symbols=(Symbol(name="BTC-USD", coin="bitcoin", coin_listed=LISTED),),
        coinbase_requests_per_second=1e6,
        coingecko_requests_per_second=1e6,
        rate_limit_dir=str(tmp_path / "limits"),
    )


@pytest.fixture
def market(settings: Settings) -> MarketData:
    """The sources, asked again after milliseconds."""
    return MarketData(settings, backoff=0.001)


def _point(moment: datetime, n: int) -> tuple[int, float, float, float]:
    return int(moment.timestamp() * 1000), 95_000.0 + n, 1.9e12 + n, 3e10 + n
