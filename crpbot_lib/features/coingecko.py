"""The 12 hourly and 11 daily features of a coin, each computed on CoinGecko's own series before it meets the minutes.

CoinGecko stamps its hourly points anywhere inside their hour, one an hour; the slot of a point is its hour (day). A slot without
a point, or with a null in it, is unknown: every window that holds it is null. Nothing is interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import polars as pl

from crpbot_lib.features.feature import (
    TIMESTAMP,
    Feature,
    Stage,
    ema,
    microseconds,
    percent_change,
    population_std,
    rsi,
    sma,
    wilder,
    with_stages,
)

PRICE, MARKET_CAP, VOLUME = pl.col("price"), pl.col("market_cap"), pl.col("total_volume")
BB_MEAN, BB_STD, VOLUME_24H = pl.col("bb_mean"), pl.col("bb_std"), pl.col("volume_24h")
CAP_7D = pl.col("cap_7d")
MACD, MACD_SIGNAL = pl.col("macd"), pl.col("macd_signal")

PUBLICATION_LAG = {"hourly": timedelta(minutes=5), "daily": timedelta(minutes=35)}
"""How long after its stamp a point can be read from the API. The clients of the API make ``available_at`` with it; it stands here
because it decides which point a row sees, and so belongs to what the catalog's hash covers."""
HOURLY_WARM_UP = 400
"""Hours after which RSI and MACD have forgotten their start to 1e-12: (1 - 1/14)^400 and (1 - 2/27)^400 are below 1e-12."""
MAX_HOURLY_HOLE = timedelta(hours=6)
"""RSI and MACD step over a shorter hole of the hourly series; after a longer one they begin anew and warm up again."""
HOURLY_MAX_AGE, DAILY_MAX_AGE = timedelta(hours=2), timedelta(days=2)
"""Longer after it became available a point is no longer the present: the row's value is unknown. The points of two neighbouring
hours, stamped anywhere inside them, lie up to two hours apart."""


def _hourly(name: str, unit: str, formula: str, warm_up: int, expr: pl.Expr) -> Feature:
    return Feature(name, "coingecko_hourly", unit, formula, warm_up, expr)


CHANGE = PRICE.diff()
HOURLY_STAGES: tuple[Stage, ...] = (
    {
        "average_gain": wilder(CHANGE.clip(lower_bound=0), 14),
        "average_loss": wilder((-CHANGE).clip(lower_bound=0), 14),
        "macd": ema(PRICE, 12) - ema(PRICE, 26),
        "bb_mean": sma("price", 20),
        "bb_std": population_std("price", 20),
        "volume_24h": sma("total_volume", 24),
    },
    {"macd_signal": ema(MACD, 9)},
)
DAILY_STAGES: tuple[Stage, ...] = (
    {"cap_7d": sma("market_cap", 7), "cap_30d": sma("market_cap", 30), "volume_7d": sma("total_volume", 7)},
)
"""What several formulas share, or what a formula takes from a window."""

HOURLY_FEATURES: tuple[Feature, ...] = (
    _hourly(
        "rsi_1h",
        "0-100",
        "Wilder's relative strength index of the hourly price, 14 hours",
        HOURLY_WARM_UP,
        rsi(pl.col("average_gain"), pl.col("average_loss")),
    ),
    _hourly("macd_1h", "USD", "ema(price, 12 h) - ema(price, 26 h)", HOURLY_WARM_UP, MACD),
    _hourly("macd_signal_1h", "USD", "ema(macd_1h, 9 h)", HOURLY_WARM_UP, MACD_SIGNAL),
    _hourly("macd_hist_1h", "USD", "macd_1h - macd_signal_1h", HOURLY_WARM_UP, MACD - MACD_SIGNAL),
    _hourly("bb_upper_1h", "USD", "mean + 2 * population standard deviation of price, 20 h", 20, BB_MEAN + 2 * BB_STD),
    _hourly("bb_lower_1h", "USD", "mean - 2 * population standard deviation of price, 20 h", 20, BB_MEAN - 2 * BB_STD),
    _hourly(
        "bb_position_1h",
        "ratio",
        "(price - bb_lower_1h) / (bb_upper_1h - bb_lower_1h); unknown when the bands coincide",
        20,
        pl.when(BB_STD > 0).then((PRICE - BB_MEAN + 2 * BB_STD) / (4 * BB_STD)),
    ),
    _hourly("volume_1h_ma", "USD", "mean of total_volume (trailing 24 h) over 24 hours", 24, VOLUME_24H),
    _hourly("volume_1h_ratio", "ratio", "total_volume / volume_1h_ma", 24, VOLUME / VOLUME_24H),
    *(
        _hourly(f"price_{n}h_change_pct", "%", f"change of price against {n} h before", n + 1, percent_change(PRICE, n))
        for n in (1, 4, 24)
    ),
)


def _daily(name: str, unit: str, formula: str, warm_up: int, expr: pl.Expr, may_be_constant: bool = False) -> Feature:
    return Feature(name, "coingecko_daily", unit, formula, warm_up, expr, may_be_constant=may_be_constant)


DAILY_FEATURES: tuple[Feature, ...] = (
    _daily("market_cap_change_pct", "%", "change of market_cap against the day before", 2, percent_change(MARKET_CAP, 1)),
    _daily("volume_change_pct", "%", "change of total_volume against the day before", 2, percent_change(VOLUME, 1)),
    _daily("price_change_pct", "%", "change of price against the day before", 2, percent_change(PRICE, 1)),
    _daily("market_cap_7d_ma", "USD", "mean of market_cap over 7 days", 7, CAP_7D),
    _daily("market_cap_30d_ma", "USD", "mean of market_cap over 30 days", 30, pl.col("cap_30d")),
    _daily("market_cap_change_7d_pct", "%", "change of market_cap against 7 days before", 8, percent_change(MARKET_CAP, 7)),
    _daily(
        "market_cap_trend",
        "sign",
        "1 if market_cap is above market_cap_7d_ma, else -1",
        7,
        pl.when(CAP_7D < MARKET_CAP).then(1).when(CAP_7D >= MARKET_CAP).then(-1),
        may_be_constant=True,
    ),
    _daily("volume_7d_ma", "USD", "mean of total_volume over 7 days", 7, pl.col("volume_7d")),
    _daily("volume_change_7d_pct", "%", "change of total_volume against 7 days before", 8, percent_change(VOLUME, 7)),
    _daily(
        "ath_distance_pct",
        "%",
        "100 * (price / all-time high known at the point's stamp - 1)",
        1,
        100 * (PRICE / pl.col("ath") - 1),
        may_be_constant=True,
    ),
    _daily(
        "days_since_ath",
        "day",
        "days from that all-time high to the point's stamp",
        1,
        (pl.col("timestamp") - pl.col("ath_at")).dt.total_microseconds() / timedelta(days=1).total_seconds() / 1e6,
        may_be_constant=True,
    ),
)


_KNOWN_AT, _IS_POINT = pl.col("available_at").alias("known_at"), pl.col("known_at").is_not_null()
_HOURLY_COLUMNS = (_KNOWN_AT, *(f.expr.alias(f.name) for f in HOURLY_FEATURES))
_DAILY_COLUMNS = (_KNOWN_AT, *(f.expr.alias(f.name) for f in DAILY_FEATURES))
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def _slots(points: pl.DataFrame, every: timedelta) -> npt.NDArray[np.int64]:
    """The number of each point's slot, counted from 1970."""
    return microseconds(points["timestamp"]) // (every // timedelta(microseconds=1))


def _on_grid(points: pl.DataFrame, every: timedelta) -> pl.DataFrame:
    """One row a slot, from the first to the last, null where CoinGecko has no point. Of two points in a slot the first counts:
    it was the slot's point when it appeared."""
    slots = _slots(points, every)
    if (np.diff(slots) == 1).all():
        return points
    numbered = points.with_columns_seq(slot=pl.Series(slots)).unique("slot", keep="first", maintain_order=True)
    grid = pl.DataFrame({"slot": np.arange(slots[0], slots[-1] + 1)})
    return grid.join(numbered, on="slot", how="left", maintain_order="left")


def _features(on_grid: pl.DataFrame, stages: Sequence[Stage], columns: Sequence[pl.Expr]) -> pl.DataFrame:
    return with_stages(on_grid, stages).select_seq(columns)


def hourly_indicators(points: pl.DataFrame) -> pl.DataFrame:
    """``known_at`` and the hourly features, one row for each point of ``points`` (validated, sorted)."""
    begins_anew = np.flatnonzero(np.diff(_slots(points, HOUR)) > MAX_HOURLY_HOLE // HOUR) + 1
    series = [
        _features(_on_grid(points[begin:end], HOUR), HOURLY_STAGES, _HOURLY_COLUMNS).slice(HOURLY_WARM_UP)
        for begin, end in pairwise([0, *begins_anew.tolist(), points.height])
    ]
    return pl.concat(series).filter(_IS_POINT)


_NO_RECORD, _NOT_RECORD = pl.lit(None, pl.Float64).alias("record"), pl.col("record").is_null()
_HIGHEST = pl.coalesce("price", "record")
_BEFORE = pl.col("ath").shift(1)
_ATH = _HIGHEST.cum_max().forward_fill().alias("ath")
_ATH_AT = pl.when((_HIGHEST > _BEFORE) | _BEFORE.is_null()).then("timestamp").forward_fill().alias("ath_at")


def daily_indicators(points: pl.DataFrame, records: Sequence[tuple[float, datetime]]) -> pl.DataFrame:
    """``known_at`` and the daily features, one row for each point of ``points`` (validated, sorted).

    ``records`` are dated all-time highs from elsewhere; each counts from the first daily point that is stamped no earlier than it.
    The running maximum is that of the daily prices and the records, not of the hourly prices: those begin where the interval
    does, and a day computed alone would not equal the same day of a longer run.
    """
    if not records:
        known = points.with_columns_seq(_NO_RECORD).with_columns_seq(_ATH).with_columns_seq(_ATH_AT)
    else:
        dated = pl.DataFrame(
            {"timestamp": [at for _, at in records], "record": [float(price) for price, _ in records]},
            schema={"timestamp": TIMESTAMP, "record": pl.Float64},
        )
        # on equal stamps the record comes first, and so counts for the point
        merged = pl.concat([dated, points], how="diagonal").sort("timestamp", maintain_order=True)
        known = merged.with_columns_seq(_ATH).with_columns_seq(_ATH_AT).filter(_NOT_RECORD)
    return _features(_on_grid(known, DAY), DAILY_STAGES, _DAILY_COLUMNS).filter(_IS_POINT)
