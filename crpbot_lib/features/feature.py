"""What one feature is, and the few numerical building blocks that every formula is written with.

A group module (``base``, ``multi_timeframe``, ``coingecko_hourly``, ``coingecko_daily``) lists its features: what is known
about each and the expression that computes it stand side by side, so that a formula has one place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import polars as pl

from crpbot_lib.config import FeatureGroup

TIMESTAMP = pl.Datetime("us", "UTC")
CLOSES_AFTER = timedelta(minutes=1)
"""A row is the 1-minute candle that opens at ``timestamp``; its decision is taken when that candle closes."""


@dataclass(frozen=True)
class Feature:
    """One column that a model sees.

    ``warm_up`` counts the rows of the group's own series (minutes, hours, days) after which the value no longer depends on where
    the series began. ``expr`` is evaluated on the frame that the group's module prepares.
    """

    name: str
    group: FeatureGroup
    unit: str
    formula: str
    warm_up: int
    expr: pl.Expr = field(compare=False, repr=False)
    dtype: str = "Float32"
    may_be_constant: bool = False
    """Whether days without any change are ordinary: flags, signs, the all-time high in a rally."""


def wilder(values: pl.Expr, length: int) -> pl.Expr:
    """Wilder's smoothing: an exponential mean with weight 1/length on the newest value, begun at the first value.

    The textbook seed (mean of the first ``length``) and this one differ by a term that shrinks by (1 - 1/length) a row; the
    warm-up is what makes both the same number. Nulls are stepped over.
    """
    return values.ewm_mean(alpha=1 / length, adjust=False, ignore_nulls=True)


def ema(values: pl.Expr, span: int) -> pl.Expr:
    """Exponential mean with weight 2/(span + 1) on the newest value, begun at the first value. Nulls are stepped over."""
    return values.ewm_mean(span=span, adjust=False, ignore_nulls=True)


def sma(values: pl.Expr, length: int) -> pl.Expr:
    """Mean of the last ``length`` values; null where one of them is missing."""
    return values.rolling_mean(length)


def population_std(values: pl.Expr, length: int) -> pl.Expr:
    """Population standard deviation of the last ``length`` values; exactly 0 where they are equal."""
    return values.rolling_std(length, ddof=0)


def rsi(average_gain: pl.Expr, average_loss: pl.Expr) -> pl.Expr:
    """Wilder's relative strength index, 0-100; NaN where nothing has moved since the series began."""
    return 100 * average_gain / (average_gain + average_loss)


def percent_change(values: pl.Expr, steps: int) -> pl.Expr:
    """Change against the value ``steps`` rows before, in %."""
    return 100 * (values / values.shift(steps) - 1)
