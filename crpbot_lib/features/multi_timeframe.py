"""The 19 features from candles of several widths: the last closed 5m, 15m and 1h candle and whether the widths agree."""

from __future__ import annotations

import functools
import operator
from datetime import datetime, timedelta

import numpy as np
import polars as pl

from crpbot_lib.config import TIMEFRAME_SECONDS, Timeframe
from crpbot_lib.features.errors import FeatureError
from crpbot_lib.features.feature import CLOSES_AFTER, AsOf, Feature, row_of, steps

WIDTHS: tuple[Timeframe, ...] = ("5m", "15m", "1h")
OHLCV = ("open", "high", "low", "close", "volume")
BARS_BACK = 5
MAX_APART = 1e-9
"""Two closes that differ by a larger share are not the same."""
MAX_DISAGREEING_SHARE, MAX_DISAGREEING_BARS = 0.05, 3
"""More bars than both of these with another close than their own minutes: the frames are not of one market, or are shifted."""

_SIGNS = tuple(pl.col(f"{width}_sign") for width in ("1m", *WIDTHS))


def _votes(sign: int) -> pl.Expr:
    """How many of the four widths moved this way; null where one is unknown (a horizontal sum would take it for 0)."""
    return functools.reduce(operator.add, ((s == sign).cast(pl.Int8) for s in _SIGNS))


UP, DOWN, FLAT, SCORE = pl.col("up"), pl.col("down"), pl.col("flat"), pl.col("tf_alignment_score")
DIRECTION = pl.when((UP > DOWN) & (UP > FLAT)).then(1).when((DOWN > UP) & (DOWN > FLAT)).then(-1).when(UP.is_not_null()).then(0)

ALIGNMENT: tuple[Feature, ...] = (
    Feature(
        "tf_alignment_score",
        "multi_timeframe",
        "share",
        f"of 1m, 5m, 15m, 1h: share whose {BARS_BACK}-bar change of close, on their own bars, has the majority sign",
        (BARS_BACK + 2) * 60,
        SCORE,
    ),
    Feature(
        "tf_alignment_direction",
        "multi_timeframe",
        "sign",
        "the majority sign: 1, -1, or 0 when most are unchanged or no sign has a majority",
        (BARS_BACK + 2) * 60,
        DIRECTION,
        may_be_constant=True,
    ),
    Feature(
        "tf_alignment_strength",
        "multi_timeframe",
        "0-1",
        "2 * abs(tf_alignment_score - 0.5)",
        (BARS_BACK + 2) * 60,
        2 * (SCORE - 0.5).abs(),
    ),
)

FEATURES: tuple[Feature, ...] = (
    *(
        Feature(
            f"{width}_{column}",
            "multi_timeframe",
            "volume" if column == "volume" else "price",
            f"{column} of the last {width} candle closed by timestamp + 1 min",
            # the bar before the one that the first minute of the series falls into is not known
            2 * TIMEFRAME_SECONDS[width] // 60,
            pl.col(f"{width}_{column}"),
        )
        for width in WIDTHS
        for column in OHLCV
    ),
    *ALIGNMENT,
    Feature(
        "atr_percentile",
        "multi_timeframe",
        "0-1",
        "share of the last 100 atr values that are at most the current one",
        600,
        pl.col("atr_percentile"),
    ),
)


_VOTES = (_votes(1).alias("up"), _votes(-1).alias("down"), _votes(0).alias("flat"))
_SCORE = (pl.max_horizontal(UP, DOWN, FLAT) / 4).alias("tf_alignment_score")


def prepare(rows: pl.DataFrame) -> pl.DataFrame:
    """``rows``, joined with the bars of every width, with the columns that the formulas of this module share."""
    return rows.with_columns_seq(_VOTES).with_columns_seq(_SCORE)


CLOSE, OWN, SILENT, LAST_CLOSE = (pl.col(c) for c in ("close", "own", "silent", "last_close"))
_MISSING, _TRADED = CLOSE.is_null(), OWN.is_not_null()
_SILENCE = (
    (_MISSING & ~_TRADED).alias("silent"),
    # NaN stands for a close that was not served: it must not be bridged by the close before it
    pl.when(_MISSING & _TRADED).then(float("nan")).otherwise(CLOSE).forward_fill().fill_nan(None).alias("last_close"),
)
_FILLED = (
    *(pl.when(SILENT).then(LAST_CLOSE).otherwise(c).alias(c) for c in ("open", "high", "low", "close")),
    pl.when(SILENT & LAST_CLOSE.is_not_null()).then(0.0).otherwise("volume").alias("volume"),
)


@functools.cache
def _width(width: Timeframe) -> timedelta:
    return timedelta(seconds=TIMEFRAME_SECONDS[width])


@functools.cache
def _bar_columns(width: Timeframe) -> tuple[pl.Expr, ...]:
    return (
        (pl.col("timestamp") + _width(width)).alias("known_at"),
        *(pl.col(column).alias(f"{width}_{column}") for column in OHLCV),
        (CLOSE - CLOSE.shift(BARS_BACK)).sign().alias(f"{width}_sign"),
        # a bar that was filled has no minute of its own, so nothing is compared
        ((CLOSE - OWN).abs() / OWN).alias("apart"),
    )


def bars(width: Timeframe, served: pl.DataFrame, minutes: pl.DataFrame) -> pl.DataFrame:
    """The candles of one width on their own full grid: ``known_at`` (the candle's close), OHLCV, the sign of the 5-bar change, and
    ``apart``, by which share the close is not that of the last minute inside; null where no bar is served, or no minute traded.

    ``served`` and ``minutes``: the candles of this width and the 1-minute ones, both as the exchange served them. A bar that is
    not served and in which no minute traded is flat at the last close, volume 0; one that is not served although minutes traded
    is unknown: null, and so is every value that needs it.
    """
    every = _width(width)
    before_last = every - CLOSES_AFTER
    # the grid ends with the last bar closed by the last decision: a later one can never be used
    decided = minutes["timestamp"][-1] + CLOSES_AFTER
    last = decided - timedelta(seconds=decided.timestamp() % every.total_seconds()) - every
    first = served["timestamp"][0]
    grid = steps(first, last, every)
    whole = len(grid) == served.height and served["timestamp"][-1] == last
    on = served if whole else grid.to_frame().join(served, on="timestamp", how="left", maintain_order="left")
    last_minutes = steps(first + before_last, last + before_last, every)
    own = AsOf(last_minutes, minutes["timestamp"], before_last).take(minutes["close"]).alias("own")
    on = on.hstack([own])
    if on["close"].null_count():
        on = on.with_columns_seq(_SILENCE).with_columns_seq(_FILLED)
    return on.select_seq(_bar_columns(width))


def compare_with_minutes(width: Timeframe, bars: pl.DataFrame, first: datetime) -> dict[str, int]:
    """How many of ``bars`` that open at or after ``first`` (of the 1-minute candles) were compared with the 1-minute candles
    inside them, and how many have another close.

    Raises FeatureError when so many differ that the two series are not of one market, or one is shifted.
    """
    since = row_of(bars["known_at"], first + _width(width))
    # what was not compared is NaN, and no comparison with NaN holds
    shares = bars["apart"].to_numpy()[since:]
    wrong = shares > MAX_APART
    compared, differs = int(np.isfinite(shares).sum()), int(wrong.sum())
    if differs > max(MAX_DISAGREEING_SHARE * compared, MAX_DISAGREEING_BARS):
        at = bars["known_at"][since + int(wrong.argmax())] - _width(width)
        raise FeatureError(
            f"{width} candles: the close of {differs} of {compared} bars is not that of the last 1m candle inside them, first at "
            f"{at:%Y-%m-%d %H:%M} UTC; fetch both from the same product again, and check that timestamps are open times"
        )
    return {"compared": compared, "differing": differs}
