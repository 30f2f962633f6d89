"""Both sources behind one object, made from the settings."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import polars as pl

from crpbot_lib.config import Settings
from crpbot_lib.market_data.coinbase import CoinbaseClient
from crpbot_lib.market_data.coingecko import CoinGeckoClient
from crpbot_lib.market_data.frames import Clock, utc_now
from crpbot_lib.market_data.plans import PLANS, reaching


class MarketData:
    """Candles and fundamentals as the settings' endpoints serve them; the live ``data_fetcher`` of the runtime's features.

    ``now`` decides which candles are closed, and which point is "now" and none of the series. ``backoff`` scales the pauses
    between tries, in seconds; tests pass small ones.
    """

    def __init__(self, settings: Settings, *, now: Clock = utc_now, backoff: float = 1.0) -> None:
        plan = replace(PLANS[settings.coingecko_plan], history=reaching(settings.coingecko_reach_days))
        directory = None if settings.rate_limit_dir is None else Path(settings.rate_limit_dir)
        self.coinbase = CoinbaseClient(
            settings.coinbase_url,
            now=now,
            requests_per_second=settings.coinbase_requests_per_second,
            page_size=settings.coinbase_page_size,
            rate_limit_dir=directory,
            timeout=settings.http_timeout_seconds,
            backoff=backoff,
        )
        self.coingecko = CoinGeckoClient(
            settings.coingecko_url,
            settings.coingecko_api_key,
            plan=plan,
            now=now,
            requests_per_second=settings.coingecko_requests_per_second,
            rate_limit_dir=directory,
            timeout=settings.http_timeout_seconds,
            backoff=backoff,
        )

    def candles(self, symbol: str, timeframe: str, start: datetime, end: datetime) -> pl.DataFrame:
        """See ``CoinbaseClient.candles``."""
        return self.coinbase.candles(symbol, timeframe, start, end)

    def hourly(self, coin: str, start: datetime, end: datetime) -> pl.DataFrame:
        """See ``CoinGeckoClient.hourly``."""
        return self.coingecko.hourly(coin, start, end)

    def daily(self, coin: str, start: datetime, end: datetime) -> pl.DataFrame:
        """See ``CoinGeckoClient.daily``."""
        return self.coingecko.daily(coin, start, end)

    def all_time_high(self, coin: str) -> tuple[float, datetime]:
        """See ``CoinGeckoClient.all_time_high``."""
        return self.coingecko.all_time_high(coin)
