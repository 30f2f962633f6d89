"""What can be said about candles and points by looking at them: is it possible, is it whole, do the timeframes agree.

Pure functions on frames. ``check_…`` raises on what cannot be true; ``coverage`` and ``compare`` only count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

import polars as pl

from crpbot_lib import candle_rules
from crpbot_lib.market_data.frames import CANDLE_SCHEMA, POINT_SCHEMA, SERIES_WIDTH, width
from crpbot_lib.market_data.http import MarketDataError

AGREES = 1e-9
"""Relative difference up to which two floats are the same number; a sum of 60 volumes differs by 1e-14 or so."""


class QualityError(MarketDataError):
    """A frame holds something that cannot be true; the message names row, column and value."""

    def __init__(self, message: str) -> None:
        super().__init__(message, permanent=True)


@dataclass(frozen=True)
class Gap:
    """A run of absent candles (or points): where it begins and how many minutes it lasts."""

    start: datetime
    minutes: int


@dataclass(frozen=True)
class Coverage:
    """How much of an interval is there."""

    expected: int
    rows: int
    gaps: tuple[Gap, ...]

    @property
    def missing(self) -> int:
        """Absent rows; on 1m candles, minutes."""
        return self.expected - self.rows


@dataclass(frozen=True)
class Finding:
    """Something that can be true but seldom is. ``start`` is its first row, ``value`` the price it stood at or leapt to."""

    kind: Literal["frozen", "spike"]
    start: datetime
    rows: int
    value: float
    detail: str


def suspicious(frame: pl.DataFrame, timeframe: str) -> list[Finding]:
    """What in candles (CANDLE_SCHEMA, sorted) a person should look at, in order of time; never an error.

    ``frozen``: flat candles at one price with volume 0, or the same candle again and again. ``spike``: a close or wick that leaves
    its surroundings and is back at once.
    """
    raise NotImplementedError


def check_candles(frame: pl.DataFrame, timeframe: str, start: datetime, end: datetime, what: str) -> None:
    """QualityError unless ``frame`` has the candle schema, no null, NaN or infinity, timestamps on the timeframe's grid within
    ``[start, end)`` that rise, prices above 0, volumes not below 0, highs and lows that enclose open and close. Empty is fine."""
    _check_schema(frame, CANDLE_SCHEMA, what)
    for column in CANDLE_SCHEMA:
        _check_known(frame, column, what)
    _check_timestamps(frame, width(timeframe), what)
    opens = pl.col("timestamp")
    _refuse(frame, ~opens.is_between(start, end, closed="left"), what, "timestamp", f"outside [{_iso(start)}, {_iso(end)})")
    for column, wrong, problem in candle_rules.IMPOSSIBLE:
        _refuse(frame, wrong, what, column, problem)


def check_points(frame: pl.DataFrame, series: str, what: str) -> None:
    """QualityError unless ``frame`` has the CoinGecko schema, timestamps on the series' grid that rise, an ``available_at`` after
    each, and values that are null or finite and not below 0. Empty is fine."""
    _check_schema(frame, POINT_SCHEMA, what)
    for column in ("timestamp", "available_at"):
        _check_known(frame, column, what)
    _check_timestamps(frame, SERIES_WIDTH[series], what)
    _refuse(frame, pl.col("available_at") <= pl.col("timestamp"), what, "available_at", "not after its timestamp")
    for column in ("price", "market_cap", "total_volume"):
        _refuse(frame, ~pl.col(column).is_finite(), what, column, "not a number")
        _refuse(frame, pl.col(column) < 0, what, column, "below 0")


def coverage(frame: pl.DataFrame, step: timedelta, start: datetime, end: datetime) -> Coverage:
    """How many of the rows that ``[start, end)`` should have on a grid of ``step`` are in ``frame`` (a column ``timestamp``), and
    where the absent ones are. ``start`` and ``end`` lie on the grid."""
    present = frame.select("timestamp").filter(pl.col("timestamp").is_between(start, end, closed="left")).get_column("timestamp")
    gaps: list[Gap] = []
    # gaps are where two neighbours are more than one step apart, with the interval's ends as neighbours too
    borders = pl.DataFrame({"timestamp": [start - step, end]}, schema={"timestamp": present.dtype}).get_column("timestamp")
    opens = pl.concat([borders.head(1), present, borders.tail(1)])
    wide = pl.DataFrame({"before": opens.head(-1), "after": opens.tail(-1)}).filter(pl.col("after") - pl.col("before") > step)
    for before, after in wide.iter_rows():
        gaps.append(Gap(before + step, (after - before - step) // timedelta(minutes=1)))
    return Coverage(expected=(end - start) // step, rows=present.len(), gaps=tuple(gaps))


def resample(minutes: pl.DataFrame, timeframe: str) -> pl.DataFrame:
    """The candles of ``timeframe`` that 1m candles add up to; a bucket without a minute has none."""
    return minutes.group_by_dynamic("timestamp", every=width(timeframe)).agg(
        pl.col("open").first(),
        pl.col("high").max(),
        pl.col("low").min(),
        pl.col("close").last(),
        pl.col("volume").sum(),
    )


def compare(minutes: pl.DataFrame, fetched: pl.DataFrame, timeframe: str) -> dict[str, Any]:
    """How the candles fetched at ``timeframe`` differ from the resampled 1m ones.

    ``compared``: candles in both; ``differing``: those with any value beyond rounding; ``columns``: of each differing column how
    many rows, the largest relative difference and where; ``only_fetched``/``only_resampled``: candles that the other side lacks.
    """
    added_up = resample(minutes, timeframe)
    both = fetched.join(added_up, on="timestamp", suffix="_1m")
    values = [c for c in CANDLE_SCHEMA if c != "timestamp"]
    scale = {c: pl.max_horizontal(pl.col(c).abs(), pl.col(f"{c}_1m").abs()) for c in values}
    relative = both.select(
        "timestamp",
        *(pl.when(scale[c] > 0).then((pl.col(c) - pl.col(f"{c}_1m")).abs() / scale[c]).otherwise(0.0).alias(c) for c in values),
    )
    columns: dict[str, Any] = {}
    for column in values:
        off = relative.filter(pl.col(column) > AGREES).sort(column, "timestamp", descending=[True, False])
        if off.height:
            columns[column] = {"rows": off.height, "largest": off[column][0], "at": _iso(off["timestamp"][0])}
    return {
        "compared": both.height,
        "differing": relative.filter(pl.any_horizontal(pl.col(c) > AGREES for c in values)).height,
        "only_fetched": fetched.height - both.height,
        "only_resampled": added_up.height - both.height,
        "columns": columns,
    }


def _check_schema(frame: pl.DataFrame, schema: Mapping[str, pl.DataType], what: str) -> None:
    for column, dtype in schema.items():
        if column not in frame.columns:
            raise QualityError(f"{what}: column {column!r} is missing; the frame has {', '.join(frame.columns)}")
        if frame.schema[column] != dtype:
            raise QualityError(f"{what}: column {column!r} is {frame.schema[column]}, expected {dtype}")
    if frame.columns != list(schema):
        raise QualityError(f"{what}: the columns are {', '.join(frame.columns)}, expected {', '.join(schema)}")


def _check_known(frame: pl.DataFrame, column: str, what: str) -> None:
    unknown = pl.col(column).is_null()
    if frame.schema[column].is_float():
        unknown |= ~pl.col(column).is_finite()
    _refuse(frame, unknown, what, column, "not a number")


def _check_timestamps(frame: pl.DataFrame, step: timedelta, what: str) -> None:
    opens = pl.col("timestamp")
    _refuse(frame, opens == opens.shift(1), what, "timestamp", "there twice")
    _refuse(frame, opens < opens.shift(1), what, "timestamp", "before the row above it")
    _refuse(frame, opens != opens.dt.truncate(step), what, "timestamp", f"off the grid of {step}")


def _refuse(frame: pl.DataFrame, wrong: pl.Expr, what: str, column: str, problem: str) -> None:
    bad = frame.with_row_index("row").filter(wrong)
    if bad.height:
        row = bad.row(0, named=True)
        value = _iso(row[column]) if isinstance(row[column], datetime) else row[column]
        at = _iso(row["timestamp"]) if isinstance(row["timestamp"], datetime) else "no timestamp"
        raise QualityError(
            f"{what}: row {row['row']} ({at}), column {column!r}: {value} is {problem} (so {bad.height} of {frame.height} rows)"
        )


def _iso(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
