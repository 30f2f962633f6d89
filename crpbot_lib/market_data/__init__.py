"""Candles from Coinbase and fundamentals from CoinGecko, and what can be said about their quality.

Nothing here knows where the rows go. ``MarketData`` is both sources behind one object; every failure is a ``MarketDataError``.
"""

from crpbot_lib.market_data.coinbase import CoinbaseClient
from crpbot_lib.market_data.coingecko import CoinGeckoClient
from crpbot_lib.market_data.frames import Clock, utc_now
from crpbot_lib.market_data.http import MarketDataError
from crpbot_lib.market_data.quality import QualityError
from crpbot_lib.market_data.sources import MarketData

__all__ = ["Clock", "CoinGeckoClient", "CoinbaseClient", "MarketData", "MarketDataError", "QualityError", "utc_now"]
