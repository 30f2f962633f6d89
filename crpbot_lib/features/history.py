"""Whether the daily history is long enough to say what the all-time high was."""

from __future__ import annotations

from datetime import datetime, timedelta

import polars as pl

from crpbot_lib.config import Symbol
from crpbot_lib.features.candles import check_points
from crpbot_lib.features.errors import FeatureError


def check_history(symbol: Symbol, daily: pl.DataFrame, start: datetime) -> None:
    """Refuses a daily history that begins after the coin's listing, unless a dated record says what the high was before it.

    ``daily``: CoinGecko's daily points; ``start``: UTC time of the first row that is computed from them.
    """
    first: datetime = check_points(f"{symbol.name} CoinGecko daily points", daily)["timestamp"][0]
    late = first.date() > symbol.coin_listed + timedelta(days=1)
    if late and not any(at < start for _, at in symbol.all_time_highs):
        raise FeatureError(
            f"{symbol.name}: the daily history of {symbol.coin} begins on {first.date()}, the coin was listed on "
            f"{symbol.coin_listed}, so its all-time high before is not known; fetch the history from the listing on, or, where the "
            "plan does not reach that far, set dated records in the symbol's `all_time_highs`"
        )
