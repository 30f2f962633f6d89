"""The pandas entry of the live runtime: fetches what the features need besides the 1-minute candles and calls the same code."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol

import polars as pl

from crpbot_lib import config
from crpbot_lib.config import TIMEFRAME_SECONDS, Settings, Symbol
from crpbot_lib.features import candles, catalog, multi_timeframe
from crpbot_lib.features.engineer import Engineered, engineer, worst
from crpbot_lib.features.errors import FeatureError, NoRowError
from crpbot_lib.features.feature import CLOSES_AFTER
from crpbot_lib.features.history import check_history, first_daily_day

if TYPE_CHECKING:
    import pandas as pd


class DataFetcher(Protocol):
    """Where the runtime's data comes from. All times are timezone-aware UTC, intervals are [start, end)."""

    def candles(self, symbol: str, timeframe: str, start: datetime, end: datetime) -> pl.DataFrame:
        """Closed candles: timestamp (UTC open time), open, high, low, close, volume."""

    def hourly(self, coin: str, start: datetime, end: datetime) -> pl.DataFrame:
        """CoinGecko's hourly points: timestamp, available_at, price, market_cap, total_volume."""

    def daily(self, coin: str, start: datetime, end: datetime) -> pl.DataFrame:
        """CoinGecko's daily points, the same columns."""


def check_flags(symbol: Symbol, include_multi_tf: bool | None, include_coingecko: bool | None) -> None:
    """Refuses flags that contradict the symbol's feature groups; None is no opinion."""
    asked = {
        "include_multi_tf": (include_multi_tf, "multi_timeframe" in symbol.feature_groups),
        "include_coingecko": (include_coingecko, {"coingecko_hourly", "coingecko_daily"} <= set(symbol.feature_groups)),
    }
    for flag, (given, has) in asked.items():
        if given is not None and given != has:
            raise FeatureError(
                f"{flag}={given} contradicts the catalog of {symbol.name}: its model has "
                f"{len(catalog.names(symbol.feature_groups))} features, of the groups {', '.join(symbol.feature_groups)}; "
                f"pass {flag}={has}, or change feature_groups in the configuration and train anew"
            )


def engineer_runtime_features(
    df: pd.DataFrame,
    symbol: str,
    data_fetcher: DataFetcher,
    include_multi_tf: bool,
    include_coingecko: bool,
    settings: Settings | None = None,
) -> pd.DataFrame:
    """The features of the 1-minute candles ``df``, as ``engineer_features`` computes them, as a pandas frame.

    ``df`` has ``timestamp`` (UTC open time) as a column or as its index, and open, high, low, close, volume; the last row is the
    candle that has just closed. Only rows from ``SEGMENT_WARM_UP`` minutes on come back; values equal the training file's from
    one day of candles on. ``settings`` None: the process's. FeatureError when the flags contradict the symbol's catalog, or the
    input is not usable (as in training); NoRowError, one of them, when the newest minute has no row.
    """
    settings = settings or config.settings()
    entry = settings.symbol(symbol)
    check_flags(entry, include_multi_tf, include_coingecko)
    frame = df if "timestamp" in df.columns else df.rename_axis("timestamp").reset_index()
    minutes = candles.check_candles(f"{symbol} 1m candles", pl.from_pandas(frame), TIMEFRAME_SECONDS["1m"])
    first, newest = minutes["timestamp"][0], minutes["timestamp"][-1]
    end = newest + CLOSES_AFTER

    by_width = {"1m": minutes}
    if "multi_timeframe" in entry.feature_groups:
        # from the hour that holds the first minute on: no warm row needs an earlier bar
        hour = first.replace(minute=0)
        by_width |= {w: data_fetcher.candles(symbol, w, hour, end) for w in multi_timeframe.WIDTHS}
    points: dict[str, Any] = {"all_time_high": list(entry.all_time_highs)}
    if "coingecko_hourly" in entry.feature_groups:
        points["hourly"] = data_fetcher.hourly(entry.coin, first - timedelta(days=catalog.HOURLY_LEAD_DAYS), end)
    if "coingecko_daily" in entry.feature_groups:
        points["daily"] = data_fetcher.daily(entry.coin, _midnight(first_daily_day(settings, entry, newest.date())), end)
        check_history(entry, points["daily"], first)
    built = engineer(symbol, entry.feature_groups, by_width, points)
    if built.frame.is_empty() or built.frame["timestamp"][-1] != newest:
        raise NoRowError(f"{symbol}: the newest minute, {newest:%Y-%m-%d %H:%M} UTC, has no row: {_why(built)}")
    return built.frame.to_pandas()


def _why(built: Engineered) -> str:
    """What the newest minute lacks, by source, and how far it goes back."""
    groups = Counter(catalog.find(name).group for name in built.newest)
    lacking = "; ".join(
        f"{count} of {len(catalog.names([group]))} {group} features are unknown "
        f"({', '.join([n for n in built.newest if catalog.find(n).group == group][:5])})"
        for group, count in groups.most_common()
    )
    cold = f"it lies less than {catalog.SEGMENT_WARM_UP} minutes after the beginning of the candles, or after an outage"
    return f"{lacking or cold}. Of {built.minutes} minutes {built.cold} are not warm; lacking a feature: {worst(built.unknown)}"


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)
