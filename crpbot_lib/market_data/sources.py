"""Both sources behind one object, made from the settings."""

from __future__ import annotations

from datetime import datetime

import polars as pl

from crpbot_lib.config import Settings
from crpbot_lib.market_data.coinbase import CoinbaseClient
from crpbot_lib.market_data.coingecko import CoinGeckoClient
from crpbot_lib.market_data.frames import Clock, utc_now
from crpbot_lib.market_data.plans import PLANS


class MarketData:
    """Candles and fundamentals as the settings' endpoints serve them; the live ``data_fetcher`` of the runtime's features.

    ``now`` decides which candles are closed, and which point is "now" and none of the series.
    """

    def __init__(self, settings: Settings, *, now: Clock = utc_now, backoff: float = 1.0) -> None:
        plan = PLANS[settings.coingecko_plan]
        self.coinbase = CoinbaseClient(settings.coinbase_url, now=now, requests_per_second=settings.coinbase_requests_per_second)
        self.coingecko = CoinGeckoClient(
            settings.coingecko_url or plan.url,
            settings.coingecko_api_key,
            now=now,
            requests_per_second=settings.coingecko_requests_per_second or plan.requests_per_second,
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
