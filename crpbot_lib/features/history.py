"""The daily history that says what the all-time high was: where it begins, and whether it is long enough."""

from __future__ import annotations

from datetime import date, datetime, timedelta

import polars as pl

from crpbot_lib.config import Settings, Symbol
from crpbot_lib.features import catalog
from crpbot_lib.features.candles import check_points
from crpbot_lib.features.errors import FeatureError

DAY = timedelta(days=1)


def first_daily_day(settings: Settings, symbol: Symbol, day: date) -> date:
    """The UTC day with which CoinGecko's daily history known on ``day`` begins, in the lake and live: the coin's listing.

    On a plan of limited reach: what a retraining of ``training.days`` needs with the catalog's warm-up, and no later than the day
    until which the symbol's records of the all-time high are complete. By the day and not by the clock, so that a partition is the
    same whenever it is fetched; that the plan reaches the day is checked where it is asked for.
    """
    if settings.coingecko_reach_days is None:
        return symbol.coin_listed
    needed = day - (settings.training.days + catalog.DAILY_LEAD_DAYS) * DAY
    return max(symbol.coin_listed, min(needed, symbol.highs_known_until or needed))


def check_history(symbol: Symbol, daily: pl.DataFrame, start: datetime) -> None:
    """Refuses a daily history that begins after the coin's listing, unless dated records say what the high was before it: one that
    is older than ``start``, and all until the history begins.

    ``daily``: CoinGecko's daily points; ``start``: UTC time of the first row that is computed from them. FeatureError says what
    to do.
    """
    first: date = check_points(f"{symbol.name} CoinGecko daily points", daily)["timestamp"][0].date()
    if first <= symbol.coin_listed + DAY:
        return
    late = f"{symbol.name}: the daily history of {symbol.coin} begins on {first}, the coin was listed on {symbol.coin_listed}"
    known = symbol.highs_known_until
    if known is None or not any(at < start for _, at in symbol.all_time_highs):
        raise FeatureError(
            f"{late}, so its all-time high before is not known; fetch the history from the listing on, or, where the plan does not "
            "reach that far, set dated records in the symbol's `all_time_highs`"
        )
    if first > known + DAY:
        raise FeatureError(
            f"{late}, and its `all_time_highs` are complete until {known} only, so its all-time high between is not known; fetch "
            f"the history from {known} on (`crpbot fetch coingecko` replaces what is stored), or add the highs since, if any, "
            f"and set `all_time_highs_until` to {first} or later (docs/market_data.md)"
        )
