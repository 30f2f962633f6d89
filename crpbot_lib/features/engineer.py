"""From candles and CoinGecko points to the rows that a model is trained on and decides by.

A row is the 1-minute candle that opens at ``timestamp``; the decision is taken when it closes. A value stands on the row only if
it was known then: candles of any width by their close, CoinGecko points by ``available_at``. Nothing is back-filled, and a row
with a value that was not known is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import polars as pl

from crpbot_lib import config
from crpbot_lib.config import TIMEFRAME_SECONDS, FeatureGroup
from crpbot_lib.features import base, candles, catalog, coingecko, multi_timeframe
from crpbot_lib.features.errors import FeatureError
from crpbot_lib.features.feature import CLOSES_AFTER, Feature

VALUE = pl.Float32()
"""What a feature is stored as; everything before is computed in Float64."""
_CARRIED = ("timestamp", "open", "high", "low", "close", "volume")


@dataclass(frozen=True)
class Engineered:
    """The rows, and what was filled and dropped on the way to them (all counts within the rows' interval)."""

    frame: pl.DataFrame
    minutes: int
    """Minutes of the interval that have a candle, served or filled."""
    holes: pl.DataFrame
    """``start``, ``minutes``, ``outage`` of every hole of the 1-minute candles, the warm-up's included."""
    cold: int
    """Minutes dropped because the candles before them begin, or begin anew after an outage, too shortly before."""
    unknown: dict[str, int]
    """Of the warm minutes: how many lack which feature. A minute may lack several."""
    newest: list[str]
    """What the newest minute lacks; empty when it has all, or is not warm."""
    bars: dict[str, dict[str, int]]
    """Per width, how many bars were compared with their 1-minute candles, and how many have another close."""


def engineer_features(symbol: str, candles: Mapping[str, pl.DataFrame], coingecko: Mapping[str, Any]) -> pl.DataFrame:
    """The rows of ``symbol``: timestamp (UTC open time), open … volume, session, volatility_regime, then exactly the symbol's
    features in catalog order, float32, no nulls.

    ``candles``: ``{"1m", "5m", "15m", "1h"}``, frames of timestamp (UTC open time), open, high, low, close, volume; the wider ones
    only where the symbol has multi-timeframe features. ``coingecko``: ``{"hourly", "daily"}``, frames of timestamp, available_at,
    price, market_cap, total_volume, and ``"all_time_high"``, None or one or several dated records ``(price, timestamp)``.

    FeatureError names the frame, the column and the row of bad input. Rows that are not warm or lack a value are dropped.
    """
    return engineer(symbol, config.settings().symbol(symbol).feature_groups, candles, coingecko).frame


def engineer(
    symbol: str,
    groups: Sequence[FeatureGroup],
    candles_by_width: Mapping[str, pl.DataFrame],
    coingecko_points: Mapping[str, Any],
    start: datetime | None = None,
) -> Engineered:
    """``engineer_features`` for given ``groups``, with the account of what was filled and dropped. Rows before ``start`` serve as
    warm-up only."""
    minutes = candles.check_candles(f"{symbol} 1m candles", candles_by_width.get("1m"), TIMEFRAME_SECONDS["1m"])
    filled, holes = candles.fill_no_trade_minutes(minutes)
    segments = filled.partition_by("segment", include_key=False)
    start = start or filled["timestamp"][0]
    wanted = int(filled.select((pl.col("timestamp") >= start).sum()).item())

    rows = pl.concat([_rows(segment, groups) for segment in segments]).filter(pl.col("timestamp") >= start)
    compared: dict[str, dict[str, int]] = {}
    if "multi_timeframe" in groups:
        for width in multi_timeframe.WIDTHS:
            name = f"{symbol} {width} candles"
            served = candles.check_candles(name, candles_by_width.get(width), TIMEFRAME_SECONDS[width])
            try:
                compared[width] = multi_timeframe.compare_with_minutes(width, served, minutes)
            except FeatureError as error:
                raise FeatureError(f"{symbol} {error}") from None
            # a bar stands until the next one closes, and not a minute longer
            age = timedelta(seconds=TIMEFRAME_SECONDS[width]) - CLOSES_AFTER
            rows = _join_known(rows, multi_timeframe.bars(width, served, minutes), age)
        rows = multi_timeframe.prepare(rows)
    if "coingecko_hourly" in groups:
        hourly = candles.check_points(f"{symbol} CoinGecko hourly points", coingecko_points.get("hourly"))
        rows = _join_known(rows, coingecko.hourly_indicators(hourly), coingecko.HOURLY_MAX_AGE)
    if "coingecko_daily" in groups:
        daily = candles.check_points(f"{symbol} CoinGecko daily points", coingecko_points.get("daily"))
        records = candles.check_all_time_highs(coingecko_points.get("all_time_high"))
        rows = _join_known(rows, coingecko.daily_indicators(daily, records), coingecko.DAILY_MAX_AGE)

    known = rows.select(*_CARRIED, "session", "volatility_regime", *(_value(f) for f in catalog.features(groups))).collect()
    unknown = {c: known[c].null_count() for c in catalog.names(groups) if known[c].null_count()}
    warm = known.height and known["timestamp"][-1] == minutes["timestamp"][-1]
    newest = [c for c in unknown if warm and known[c][-1] is None]
    return Engineered(known.drop_nulls(), wanted, holes, wanted - known.height, unknown, newest, compared)


def worst(unknown: Mapping[str, int]) -> str:
    """The five features that most minutes lack, for messages: ``rsi_1h 120, macd_1h 120``."""
    found = sorted(unknown.items(), key=lambda item: -item[1])[:5]
    return ", ".join(f"{name} {count}" for name, count in found) or "none"


def _rows(segment: pl.DataFrame, groups: Sequence[FeatureGroup]) -> pl.LazyFrame:
    """The warm rows of one segment with the base features, and what the joins and the multi-timeframe features need."""
    needed = ("1m_sign", "atr_percentile") if "multi_timeframe" in groups else ()
    return (
        base.prepare(segment.lazy())
        .select(
            *_CARRIED,
            *needed,
            (pl.col("timestamp") + CLOSES_AFTER).alias("decided_at"),
            session=base.SESSION,
            volatility_regime=base.VOLATILITY_REGIME,
            **{f.name: f.expr.cast(VALUE) for f in base.FEATURES},
        )
        .slice(catalog.SEGMENT_WARM_UP)
    )


def _join_known(rows: pl.LazyFrame, known: pl.LazyFrame, max_age: timedelta) -> pl.LazyFrame:
    """``rows`` with the last line of ``known`` whose ``known_at`` is not after the decision; null when that is older than
    ``max_age``."""
    return rows.join_asof(known.rename({"known_at": "decided_at"}), on="decided_at", strategy="backward", tolerance=max_age)


def _value(feature: Feature) -> pl.Expr:
    """The column as the file has it: float32, and null for what is not a finite number (a division by zero is no knowledge)."""
    computed = feature.expr if feature.group == "multi_timeframe" else pl.col(feature.name)
    value = computed.cast(VALUE)
    return pl.when(value.is_finite()).then(value).alias(feature.name)
