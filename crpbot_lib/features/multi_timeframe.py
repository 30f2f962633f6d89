"""The 19 features from candles of several widths: the last closed 5m, 15m and 1h candle and whether the widths agree."""

from __future__ import annotations

import functools
import operator
from datetime import datetime, timedelta

import polars as pl

from crpbot_lib.config import TIMEFRAME_SECONDS, Timeframe
from crpbot_lib.features.errors import FeatureError
from crpbot_lib.features.feature import CLOSES_AFTER, Feature

WIDTHS: tuple[Timeframe, ...] = ("5m", "15m", "1h")
OHLCV = ("open", "high", "low", "close", "volume")
BARS_BACK = 5
MAX_DISAGREEING_SHARE, MAX_DISAGREEING_BARS = 0.05, 3
"""More bars than both of these with another close than their own minutes: the frames are not of one market, or are shifted."""

_SIGNS = tuple(pl.col(f"{width}_sign") for width in ("1m", *WIDTHS))


def _votes(sign: int) -> pl.Expr:
    """How many of the four widths moved this way; null where one is unknown (a horizontal sum would take it for 0)."""
    return functools.reduce(operator.add, ((s == sign).cast(pl.Int8) for s in _SIGNS))


UP, DOWN, FLAT, SCORE = pl.col("up"), pl.col("down"), pl.col("flat"), pl.col("tf_alignment_score")
DIRECTION = pl.when((UP > DOWN) & (UP > FLAT)).then(1).when((DOWN > UP) & (DOWN > FLAT)).then(-1).when(UP.is_not_null()).then(0)

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
    Feature(
        "atr_percentile",
        "multi_timeframe",
        "0-1",
        "share of the last 100 atr values that are at most the current one",
        600,
        pl.col("atr_percentile"),
    ),
)


def prepare(rows: pl.LazyFrame) -> pl.LazyFrame:
    """``rows``, joined with the bars of every width, with the columns that the formulas of this module share."""
    return rows.with_columns(up=_votes(1), down=_votes(-1), flat=_votes(0)).with_columns(
        tf_alignment_score=pl.max_horizontal(UP, DOWN, FLAT) / 4
    )


def on_grid(width: Timeframe, served: pl.DataFrame, minutes: pl.DataFrame) -> pl.DataFrame:
    """The candles of one width as served, null where one is not, on their own full grid, and ``own``, the close of the last of
    ``minutes`` (the 1-minute candles as served) inside each; null where no minute traded."""
    every = timedelta(seconds=TIMEFRAME_SECONDS[width])
    # the grid ends with the last bar closed by the last decision: a later one can never be used
    decided = minutes["timestamp"][-1] + CLOSES_AFTER
    last = decided - timedelta(seconds=decided.timestamp() % every.total_seconds()) - every
    grid = pl.datetime_range(served["timestamp"][0], last, every, time_unit="us", eager=True).alias("timestamp").to_frame()
    before_last = every - CLOSES_AFTER
    own = minutes.select(pl.col("timestamp").alias("last_minute"), pl.col("close").alias("own"))
    return (
        grid.join(served, on="timestamp", how="left", maintain_order="left")
        .with_columns(last_minute=pl.col("timestamp") + pl.duration(seconds=before_last.seconds))
        .join_asof(own, on="last_minute", tolerance=before_last)
    )


def bars(width: Timeframe, grid: pl.DataFrame) -> pl.DataFrame:
    """From ``on_grid``: ``known_at`` (the candle's close), OHLCV and the sign of the 5-bar change.

    A bar that is not served and in which no minute traded is flat at the last close, volume 0; one that is not served although
    minutes traded is unknown: null, and so is every value that needs it.
    """
    missing, traded = pl.col("close").is_null(), pl.col("own").is_not_null()
    silent, last_close = pl.col("silent"), pl.col("last_close")
    return (
        grid.with_columns(
            silent=missing & ~traded,
            # NaN stands for a close that was not served: it must not be bridged by the close before it
            last_close=pl.when(missing & traded).then(float("nan")).otherwise("close").forward_fill().fill_nan(None),
        )
        .with_columns(
            *(pl.when(silent).then(last_close).otherwise(c).alias(c) for c in ("open", "high", "low", "close")),
            volume=pl.when(silent & last_close.is_not_null()).then(0.0).otherwise("volume"),
        )
        .select(
            (pl.col("timestamp") + pl.duration(seconds=TIMEFRAME_SECONDS[width])).alias("known_at"),
            *(pl.col(column).alias(f"{width}_{column}") for column in OHLCV),
            (pl.col("close") - pl.col("close").shift(BARS_BACK)).sign().alias(f"{width}_sign"),
        )
    )


def compare_with_minutes(width: Timeframe, grid: pl.DataFrame, first: datetime) -> dict[str, int]:
    """Of ``on_grid``: how many served bars from ``first`` (of the 1-minute candles) on were compared with the 1-minute candles
    inside them, and how many have another close.

    Raises FeatureError when so many differ that the two series are not of one market, or one is shifted.
    """
    both = (pl.col("timestamp") >= first) & pl.col("close").is_not_null() & pl.col("own").is_not_null()
    differing = (pl.col("close") - pl.col("own")).abs() > 1e-9 * pl.col("own")
    found = (
        grid.filter(both)
        .select(compared=pl.len(), differing=differing.sum(), first=pl.col("timestamp").filter(differing).min())
        .row(0, named=True)
    )
    compared, differs = int(found["compared"]), int(found["differing"])
    if differs > max(MAX_DISAGREEING_SHARE * compared, MAX_DISAGREEING_BARS):
        raise FeatureError(
            f"{width} candles: the close of {differs} of {compared} bars is not that of the last 1m candle inside them, first at "
            f"{found['first']:%Y-%m-%d %H:%M} UTC; fetch both from the same product again, and check that timestamps are open times"
        )
    return {"compared": compared, "differing": differs}
