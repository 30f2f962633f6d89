"""From candles and CoinGecko points to the rows that a model is trained on and decides by.

A row is the 1-minute candle that opens at ``timestamp``; the decision is taken when it closes. A value stands on the row only if
it was known then: candles of any width by their close, CoinGecko points by ``available_at``. Nothing is back-filled, and a row
with a value that was not known is dropped.

What is short is computed once for the whole span: holes and segments, the wider bars, CoinGecko's indicators. The minutes are
computed by calendar months, each with the warm-up before it, so that what is needed on the way does not grow with the span, and
that a month of a long run is the same month of another one to the bit, whatever the number of threads.

Expressions are evaluated eagerly and one after the other (``select_seq``): a live window is fifty small frames, for which planning
a lazy query, or waking polars' threads, costs several times the work; two months at once keep two cores busy as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl

from crpbot_lib import config
from crpbot_lib.config import TIMEFRAME_SECONDS, FeatureGroup
from crpbot_lib.features import base, candles, catalog, coingecko, multi_timeframe
from crpbot_lib.features.errors import FeatureError, NoRowError
from crpbot_lib.features.feature import CLOSES_AFTER, AsOf, row_of, with_stages

VALUE = pl.Float32()
"""What a feature is stored as; everything before is computed in Float64."""
MONTHS_AT_ONCE = 2
"""Each is computed on one core, in memory that grows with their number."""
_CARRIED = ("timestamp", "open", "high", "low", "close", "volume")


@dataclass(frozen=True)
class Engineered:
    """The rows, and what was filled and dropped on the way to them (all counts within the rows' interval)."""

    frame: pl.DataFrame
    """The columns of the file, no nulls; a chunk for each month that has rows."""
    holes: pl.DataFrame
    """``start``, ``minutes``, ``outage`` of every hole of the 1-minute candles, the warm-up's included."""
    bars: dict[str, dict[str, int]]
    """Per width, how many bars were compared with their 1-minute candles, and how many have another close."""
    minutes: int
    """Minutes of the interval that have a candle, served or filled."""
    cold: int
    """Minutes dropped because the candles before them begin, or begin anew after an outage, too shortly before."""
    unknown: Counter[str]
    """Of the warm minutes: how many lack which feature. A minute may lack several."""
    newest: list[str]
    """What the newest minute lacks; empty when it has all, or is not warm."""

    def lacking(self) -> str:
        """Why minutes are no rows, for messages."""
        return (
            f"of {self.minutes} minutes with a candle {self.cold} lie too soon after the beginning or an outage; minutes that "
            f"lack a feature: {worst(self.unknown)}"
        )


def engineer_features(symbol: str, candles: Mapping[str, pl.DataFrame], coingecko: Mapping[str, Any]) -> pl.DataFrame:
    """The rows of ``symbol``: timestamp (UTC open time), open … volume, session, volatility_regime, then exactly the symbol's
    features in catalog order, float32, no nulls.

    ``candles``: ``{"1m", "5m", "15m", "1h"}``, frames of timestamp (UTC open time), open, high, low, close, volume; the wider ones
    only where the symbol has multi-timeframe features. ``coingecko``: ``{"hourly", "daily"}``, frames of timestamp, available_at,
    price, market_cap, total_volume, and ``"all_time_high"``, None or one or several dated records ``(price, timestamp)``.

    FeatureError names the frame, the column and the row of bad input. Rows that are not warm or lack a value are dropped;
    NoRowError when none is left.
    """
    built = engineer(symbol, config.settings().symbol(symbol).feature_groups, candles, coingecko)
    if built.frame.is_empty():
        raise NoRowError(f"{symbol}: no row could be computed: {built.lacking()}")
    return built.frame


def engineer(
    symbol: str,
    groups: Sequence[FeatureGroup],
    candles_by_width: Mapping[str, pl.DataFrame],
    coingecko_points: Mapping[str, Any],
    start: datetime | None = None,
) -> Engineered:
    """``engineer_features`` for given ``groups``, with the account of what was filled and dropped. Rows before ``start`` serve as
    warm-up only."""
    served = candles.check_candles(f"{symbol} 1m candles", candles_by_width.get("1m"), TIMEFRAME_SECONDS["1m"])
    minutes, holes = candles.fill_no_trade_minutes(served)
    known: list[_Known] = []
    compared: dict[str, dict[str, int]] = {}
    for width in multi_timeframe.WIDTHS if "multi_timeframe" in groups else ():
        seconds = TIMEFRAME_SECONDS[width]
        wide = candles.check_candles(f"{symbol} {width} candles", candles_by_width.get(width), seconds)
        bars = multi_timeframe.bars(width, wide, served)
        try:
            compared[width] = multi_timeframe.compare_with_minutes(width, bars, served["timestamp"][0])
        except FeatureError as error:
            raise FeatureError(f"{symbol} {error}") from None
        names = [f"{width}_{column}" for column in multi_timeframe.OHLCV]
        # a bar stands until the next one closes, and not a minute longer
        known.append(_known(bars, names, timedelta(seconds=seconds) - CLOSES_AFTER, f"{width}_sign"))
    if "coingecko_hourly" in groups:
        hourly = candles.check_points(f"{symbol} CoinGecko hourly points", coingecko_points.get("hourly"))
        names = catalog.names(["coingecko_hourly"])
        known.append(_known(coingecko.hourly_indicators(hourly), names, coingecko.HOURLY_MAX_AGE))
    if "coingecko_daily" in groups:
        daily = candles.check_points(f"{symbol} CoinGecko daily points", coingecko_points.get("daily"))
        records = candles.check_all_time_highs(coingecko_points.get("all_time_high"))
        names = catalog.names(["coingecko_daily"])
        known.append(_known(coingecko.daily_indicators(daily, records), names, coingecko.DAILY_MAX_AGE))
    first, newest = row_of(minutes["timestamp"], start or minutes["timestamp"][0]), minutes["timestamp"][-1]
    months = _months(minutes, first, known, tuple(groups))
    count, warm = minutes.height - first, sum(rows.height for rows in months)
    unknown, lacks, frames = Counter[str](), list[str](), list[pl.DataFrame]()
    for rows in months:
        nulls = rows.null_count().row(0, named=True)
        lacking = {name: found for name, found in nulls.items() if found and name not in catalog.EXCLUDED}
        unknown.update(lacking)
        if rows["timestamp"][-1] == newest:
            lacks = [name for name in lacking if rows[name][-1] is None]
        frames.append(rows.drop_nulls() if lacking else rows)
    frame = pl.concat(frames) if frames else pl.DataFrame(schema=catalog.schema(groups))
    return Engineered(frame, holes, compared, count, count - warm, unknown, lacks)


def worst(unknown: Mapping[str, int]) -> str:
    """The five features that most minutes lack, for messages: ``rsi_1h 120, macd_1h 120``."""
    found = sorted(unknown.items(), key=lambda item: -item[1])[:5]
    return ", ".join(f"{name} {count}" for name, count in found) or "none"


@dataclass(frozen=True)
class _Known:
    """A series that the minutes see from ``known_at`` on, its features as the file has them, and how long a line of it stands."""

    known_at: pl.Series
    columns: list[pl.Series]
    max_age: timedelta


def _known(series: pl.DataFrame, features: Sequence[str], max_age: timedelta, *others: str) -> _Known:
    columns = [*(series[name].cast(VALUE) for name in features), *(series[name] for name in others)]
    return _Known(series["known_at"], columns, max_age)


def _months(minutes: pl.DataFrame, first: int, known: Sequence[_Known], groups: tuple[FeatureGroup, ...]) -> list[pl.DataFrame]:
    """The warm rows of ``minutes`` (no-trade minutes filled) from row ``first`` on, a frame a calendar month that has any."""
    times, height = minutes["timestamp"], minutes.height
    begins = (row_of(times, month) for month in _month_begins(times[0], times[-1]))
    edges = [first, *(row for row in begins if row > first), height]
    outages = (np.flatnonzero(np.diff(minutes["segment"].to_numpy())) + 1).tolist()
    segments = list(pairwise([0, *outages, height]))

    def month(span: tuple[int, int]) -> pl.DataFrame | None:
        begin, end = span
        # a warm row has its whole warm-up in its own segment: every piece is computed from there on, and from there only
        warm = ((max(begin, first_of + catalog.SEGMENT_WARM_UP), min(end, end_of)) for first_of, end_of in segments)
        pieces = [_base(minutes[keep - catalog.SEGMENT_WARM_UP : stop], groups) for keep, stop in warm if keep < stop]
        return _rows(pl.concat(pieces, rechunk=True), known, groups) if pieces else None

    spans = list(pairwise(edges))
    if len(spans) == 1:
        # a live window: a thread of its own would only cost time
        months = [month(spans[0])]
    else:
        with ThreadPoolExecutor(MONTHS_AT_ONCE) as pool:
            months = list(pool.map(month, spans))
    return [rows for rows in months if rows is not None]


def _base(piece: pl.DataFrame, groups: tuple[FeatureGroup, ...]) -> pl.DataFrame:
    """The warm rows of minutes without a hole, with the base features and what the joins and the multi-timeframe features need."""
    return with_stages(piece, base.STAGES).select_seq(_base_columns(groups, VALUE)).slice(catalog.SEGMENT_WARM_UP)


def _rows(base_rows: pl.DataFrame, known: Sequence[_Known], groups: tuple[FeatureGroup, ...]) -> pl.DataFrame:
    """The columns of the file; null where a value was not known."""
    rows = base_rows
    for one in known:
        stands = AsOf(base_rows["decided_at"], one.known_at, one.max_age)
        rows = rows.hstack([stands.take(column) for column in one.columns])
    if "multi_timeframe" in groups:
        rows = multi_timeframe.prepare(rows).with_columns_seq(_alignment_columns(VALUE))
    names = catalog.names(groups)
    # a division by zero is no knowledge
    infinite = [name for name in names if not np.isfinite(rows[name].to_numpy()).all()]
    if infinite:
        rows = rows.with_columns_seq(pl.when(pl.col(name).is_finite()).then(pl.col(name)) for name in infinite)
    return rows[[*catalog.EXCLUDED, *names]]


@lru_cache
def _base_columns(groups: tuple[FeatureGroup, ...], dtype: pl.DataType) -> list[pl.Expr]:
    widths = (pl.col("1m_sign"), base.ATR_PERCENTILE.cast(dtype)) if "multi_timeframe" in groups else ()
    return [
        *(pl.col(name) for name in _CARRIED),
        *widths,
        (pl.col("timestamp") + CLOSES_AFTER).alias("decided_at"),
        base.SESSION.alias("session"),
        base.VOLATILITY_REGIME.alias("volatility_regime"),
        *(f.expr.cast(dtype).alias(f.name) for f in base.FEATURES),
    ]


@lru_cache
def _alignment_columns(dtype: pl.DataType) -> list[pl.Expr]:
    return [f.expr.cast(dtype).alias(f.name) for f in multi_timeframe.ALIGNMENT]


def _month_begins(first: datetime, last: datetime) -> Iterator[datetime]:
    """The first moments of the UTC months that ``first`` to ``last`` touch."""
    month = first.replace(day=1, hour=0, minute=0)
    while month <= last:
        yield month
        month = (month + timedelta(days=32)).replace(day=1)
