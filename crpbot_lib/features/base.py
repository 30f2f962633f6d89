"""The 31 features that every symbol has, from its 1-minute candles alone.

The frame is one segment (``candles.py``): minutes without a hole, sorted, so that a shift by one is a minute.
"""

from __future__ import annotations

import polars as pl

from crpbot_lib.features.feature import Feature, Stage, ema, population_std, rsi, share_at_most, slope, sma, wilder

HIGH, LOW, CLOSE, VOLUME = pl.col("high"), pl.col("low"), pl.col("close"), pl.col("volume")
SPREAD, ATR, VOLUME_MA, MACD, MACD_SIGNAL = (pl.col(c) for c in ("spread", "atr", "volume_ma", "macd", "macd_signal"))
BB_MEAN, BB_STD, ATR_PERCENTILE = (pl.col(c) for c in ("bb_mean", "bb_std", "atr_percentile"))
HOUR, WEEKDAY = pl.col("hour"), pl.col("weekday")

RECURSIVE = 500
"""Rows after which no smoothing of this module remembers its start: (1 - 1/14)^500 and (1 - 2/27)^500 are below 1e-16."""
REGIME = RECURSIVE + 100
"""The rank in the last 100 rows of something recursive."""
LOW_BELOW, HIGH_ABOVE = 0.33, 0.67


PREVIOUS_CLOSE = CLOSE.shift(1)
CHANGE = CLOSE.diff()

STAGES: tuple[Stage, ...] = (
    {
        "hour": pl.col("timestamp").dt.hour(),
        "weekday": pl.col("timestamp").dt.weekday() - 1,
        "spread": HIGH - LOW,
        # the horizontal maximum skips the null of the first row, whose true range is high - low
        "atr": wilder(pl.max_horizontal(HIGH, PREVIOUS_CLOSE) - pl.min_horizontal(LOW, PREVIOUS_CLOSE), 14),
        "average_gain": wilder(CHANGE.clip(lower_bound=0), 14),
        "average_loss": wilder((-CHANGE).clip(lower_bound=0), 14),
        "macd": ema(CLOSE, 12) - ema(CLOSE, 26),
        "volume_ma": sma("volume", 20),
        "volume_trend": slope("volume", 20),
        **{f"sma_{n}": sma("close", n) for n in (7, 14, 21, 50)},
        "bb_mean": sma("close", 20),
        "bb_std": population_std("close", 20),
        "1m_sign": (CLOSE - CLOSE.shift(5)).sign(),
    },
    {
        "macd_signal": ema(MACD, 9),
        "bb_low": BB_MEAN - 2 * BB_STD,
        "bb_high": BB_MEAN + 2 * BB_STD,
        "atr_percentile": share_at_most("atr", 100),
    },
)
"""What several formulas share, computed once, stage after stage."""

SESSION = pl.when(HOUR < 8).then(pl.lit("tokyo")).when(HOUR < 16).then(pl.lit("london")).otherwise(pl.lit("new_york"))
VOLATILITY_REGIME = (
    pl.when(ATR_PERCENTILE < LOW_BELOW)
    .then(pl.lit("low"))
    .when(ATR_PERCENTILE <= HIGH_ABOVE)
    .then(pl.lit("medium"))
    .when(ATR_PERCENTILE > HIGH_ABOVE)
    .then(pl.lit("high"))
)


def _feature(name: str, unit: str, formula: str, warm_up: int, expr: pl.Expr) -> Feature:
    return Feature(name, "base", unit, formula, warm_up, expr, may_be_constant=unit == "flag")


FEATURES: tuple[Feature, ...] = (
    _feature("session_tokyo", "flag", "1 if the candle opens in 00-08 UTC", 1, HOUR < 8),
    _feature("session_london", "flag", "1 if the candle opens in 08-16 UTC", 1, HOUR.is_between(8, 15)),
    _feature("session_new_york", "flag", "1 if the candle opens in 16-24 UTC", 1, HOUR >= 16),
    _feature("day_of_week", "day", "0 = Monday … 6 = Sunday, UTC", 1, WEEKDAY),
    _feature("is_weekend", "flag", "1 on Saturday and Sunday, UTC", 1, WEEKDAY >= 5),
    _feature("spread", "price", "high - low", 1, SPREAD),
    _feature("spread_pct", "%", "100 * spread / close", 1, 100 * SPREAD / CLOSE),
    _feature("atr", "price", "Wilder's average true range, 14 rows", RECURSIVE, ATR),
    _feature("spread_atr_ratio", "ratio", "spread / atr", RECURSIVE, SPREAD / ATR),
    _feature("volume_ma", "volume", "mean of volume over 20 rows", 20, VOLUME_MA),
    _feature("volume_ratio", "ratio", "volume / volume_ma", 20, VOLUME / VOLUME_MA),
    _feature("volume_trend", "volume/min", "least-squares slope of volume over 20 rows", 20, pl.col("volume_trend")),
    *(_feature(f"sma_{n}", "price", f"mean of close over {n} rows", n, pl.col(f"sma_{n}")) for n in (7, 14, 21, 50)),
    *(_feature(f"price_sma_{n}_ratio", "ratio", f"close / sma_{n}", n, CLOSE / pl.col(f"sma_{n}")) for n in (7, 14, 21, 50)),
    _feature(
        "rsi",
        "0-100",
        "Wilder's relative strength index of close, 14 rows",
        RECURSIVE,
        rsi(pl.col("average_gain"), pl.col("average_loss")),
    ),
    _feature("macd", "price", "ema(close, 12) - ema(close, 26)", RECURSIVE, MACD),
    _feature("macd_signal", "price", "ema(macd, 9)", RECURSIVE, MACD_SIGNAL),
    _feature("macd_diff", "price", "macd - macd_signal", RECURSIVE, MACD - MACD_SIGNAL),
    _feature("bb_high", "price", "mean + 2 * population standard deviation of close over 20 rows", 20, pl.col("bb_high")),
    _feature("bb_low", "price", "mean - 2 * population standard deviation of close over 20 rows", 20, pl.col("bb_low")),
    _feature("bb_width", "ratio", "(bb_high - bb_low) / close", 20, 4 * BB_STD / CLOSE),
    _feature(
        "bb_position",
        "ratio",
        "(close - bb_low) / (bb_high - bb_low); unknown when the bands coincide",
        20,
        # 0/0 is NaN and x/0 infinite: on a flat window the value is unknown, whatever rounding left in the numerator
        pl.when(BB_STD > 0).then((CLOSE - pl.col("bb_low")) / (4 * BB_STD)),
    ),
    _feature("volatility_low", "flag", f"atr_percentile < {LOW_BELOW}", REGIME, ATR_PERCENTILE < LOW_BELOW),
    _feature(
        "volatility_medium",
        "flag",
        f"{LOW_BELOW} <= atr_percentile <= {HIGH_ABOVE}",
        REGIME,
        ATR_PERCENTILE.is_between(LOW_BELOW, HIGH_ABOVE),
    ),
    _feature("volatility_high", "flag", f"atr_percentile > {HIGH_ABOVE}", REGIME, ATR_PERCENTILE > HIGH_ABOVE),
)
