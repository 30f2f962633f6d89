"""Checking what comes in, and telling minutes without a trade from outages.

An exchange serves no candle for a minute in which nobody traded, and none while it is down. Which of the two a hole is, only its
length tells: up to ``candle_rules.MAX_NO_TRADE_MINUTES`` missing minutes are minutes without a trade and get the exchange's own
convention, a flat candle at the last close with volume 0; a longer hole is an outage. An outage ends a segment: whatever looks back
starts anew after it, and rows stand again only when the segment is warm, so that no window, bar or value spans an outage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import lru_cache

import polars as pl

from crpbot_lib import candle_rules
from crpbot_lib.features.errors import FeatureError
from crpbot_lib.features.feature import TIMESTAMP

CANDLE_COLUMNS = ("timestamp", "open", "high", "low", "close", "volume")
POINT_COLUMNS = ("timestamp", "available_at", "price", "market_cap", "total_volume")
CANDLE_SCHEMA = {column: TIMESTAMP if column == "timestamp" else pl.Float64() for column in CANDLE_COLUMNS}
POINT_SCHEMA = {column: TIMESTAMP if column in ("timestamp", "available_at") else pl.Float64() for column in POINT_COLUMNS}


Check = tuple[str, pl.Expr, str]
"""A column, where it is wrong (null is nowhere), and what was expected."""


class Checks:
    """What is looked for in a frame."""

    def __init__(self, *checks: Check) -> None:
        self._checks = checks
        self._found = [wrong.any().alias(str(number)) for number, (_, wrong, _) in enumerate(checks)]

    def refuse(self, name: str, frame: pl.DataFrame) -> None:
        """Raises for the first check that finds a row."""
        for found, (column, wrong, expected) in zip(frame.select_seq(self._found).row(0), self._checks, strict=True):
            if found:
                row = frame.select_seq(wrong.fill_null(False).arg_true().first()).item()
                raise FeatureError(f"{name}, column {column}, row {row}: the value is {frame[column][row]}; {expected}")


def check_candles(name: str, frame: pl.DataFrame | None, seconds: int) -> pl.DataFrame:
    """``frame`` with exactly the candle columns, typed; FeatureError names what is wrong, in which column and row (from 0): no
    finite number, no rising time on the grid of ``seconds``, or a candle that cannot be (``candle_rules``)."""
    frame = _typed(name, frame, CANDLE_COLUMNS, CANDLE_COLUMNS[:1])
    _candle_checks(seconds).refuse(name, frame)
    return frame


@lru_cache
def _candle_checks(seconds: int) -> Checks:
    off_grid = pl.col("timestamp").dt.epoch("us") % (seconds * 1_000_000) != 0
    return Checks(
        *((column, ~pl.col(column).is_finite().fill_null(False), "expected a finite number") for column in CANDLE_COLUMNS[1:]),
        *_order("timestamp", strictly=True),
        ("timestamp", off_grid, f"expected a candle's open time, a multiple of {seconds} s"),
        *((column, wrong, f"this is {problem}: no candle") for column, wrong, problem in candle_rules.IMPOSSIBLE),
    )


def check_points(name: str, frame: pl.DataFrame | None) -> pl.DataFrame:
    """CoinGecko points with exactly their columns, typed; nulls in the values are allowed, NaN is not."""
    frame = _typed(name, frame, POINT_COLUMNS, POINT_COLUMNS[:2])
    _point_checks().refuse(name, frame)
    return frame


@lru_cache
def _point_checks() -> Checks:
    early = pl.col("available_at") < pl.col("timestamp")
    finite = "expected a finite number, or null where CoinGecko has none"
    return Checks(
        *((column, ~pl.col(column).is_finite(), finite) for column in POINT_COLUMNS[2:]),
        *_order("timestamp", strictly=True),
        *_order("available_at", strictly=False),
        ("available_at", early, "expected no time before the point's own timestamp"),
    )


def check_all_time_highs(value: object) -> list[tuple[float, datetime]]:
    """Dated records from None, one ``(price, timestamp)`` or a sequence of them."""
    if value is None:
        return []
    records = [value] if isinstance(value, tuple) and len(value) == 2 and not isinstance(value[0], tuple) else value
    if not isinstance(records, Sequence):
        raise FeatureError(f"all_time_high is {value!r}: expected None, one (price, timestamp) or a list of them")
    checked: list[tuple[float, datetime]] = []
    for position, record in enumerate(records):
        price, at = record if isinstance(record, Sequence) and len(record) == 2 else (None, None)
        if (
            isinstance(price, bool)
            or not isinstance(price, int | float)
            or not 0 < price < math.inf
            or not isinstance(at, datetime)
            or at.tzinfo is None
        ):
            raise FeatureError(
                f"all_time_high[{position}] is {record!r}: expected (finite price above 0, timestamp with a timezone)"
            )
        checked.append((float(price), at))
    return sorted(checked, key=lambda record: record[1])


_MINUTE = timedelta(minutes=1)
_APART = pl.col("timestamp").diff()
_BEFORE_HOLE = pl.col("timestamp").shift(1) + _MINUTE
_MISSING = (_APART.dt.total_minutes() - 1).alias("minutes")
_OUTAGE = (pl.col("minutes") > candle_rules.MAX_NO_TRADE_MINUTES).alias("outage")
_SEGMENT = (_APART > (candle_rules.MAX_NO_TRADE_MINUTES + 1) * _MINUTE).fill_null(False).cum_sum().alias("segment")
_ONE_SEGMENT = pl.lit(0, pl.UInt32).alias("segment")
_NO_HOLES = pl.DataFrame(schema={"start": TIMESTAMP, "minutes": pl.Int64, "outage": pl.Boolean})
_HOLE_MINUTES = pl.datetime_ranges(
    pl.col("start"), pl.col("start") + (pl.col("minutes") - 1) * pl.duration(minutes=1), interval="1m", time_unit="us"
)


def fill_no_trade_minutes(minutes: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The minutes with the no-trade ones filled and a ``segment`` number, and the holes: ``start``, ``minutes``, ``outage``."""
    if minutes.height == (minutes["timestamp"][-1] - minutes["timestamp"][0]) // _MINUTE + 1:
        return minutes.with_columns_seq(_ONE_SEGMENT), _NO_HOLES
    filled = minutes.with_columns_seq(_SEGMENT)
    holes = minutes.select_seq(_BEFORE_HOLE.alias("start"), _MISSING).filter(pl.col("minutes") > 0).with_columns_seq(_OUTAGE)
    silent = holes.filter(~pl.col("outage"))
    if silent.height:
        added = silent.select_seq(timestamp=_HOLE_MINUTES).explode("timestamp")
        filled = (
            pl.concat([filled, added], how="diagonal")
            .sort("timestamp")
            .with_columns_seq(pl.col("segment", "close").forward_fill(), pl.col("volume").fill_null(0.0))
            .with_columns_seq(pl.col("open", "high", "low").fill_null(pl.col("close")))
        )
    return filled, holes


def _typed(name: str, frame: pl.DataFrame | None, columns: Sequence[str], times: Sequence[str]) -> pl.DataFrame:
    if frame is None:
        raise FeatureError(f"{name} are missing: expected a frame with {', '.join(columns)}")
    schema = frame.schema
    absent = [column for column in columns if column not in schema]
    if absent:
        raise FeatureError(f"{name}: no column {', '.join(absent)}; it has {', '.join(schema) or 'none'}")
    if frame.is_empty():
        raise FeatureError(f"{name} are empty: expected at least one row")
    for column in columns:
        dtype = schema[column]
        if column in times and not (isinstance(dtype, pl.Datetime) and dtype.time_zone == "UTC"):
            raise FeatureError(f"{name}, column {column}: the type is {dtype}, expected Datetime with time zone UTC")
        if column not in times and not dtype.is_numeric() and dtype != pl.Null:
            raise FeatureError(f"{name}, column {column}: the type is {dtype}, expected Float64")
    if any(frame[column].null_count() for column in times):
        Checks(*((column, pl.col(column).is_null(), "expected a time") for column in times)).refuse(name, frame)
    types = {column: TIMESTAMP if column in times else pl.Float64() for column in columns}
    frame = frame[list(columns)]
    return frame if frame.schema == types else frame.cast(types)  # type: ignore[arg-type]


def _order(column: str, *, strictly: bool) -> list[Check]:
    before = pl.col(column).shift(1)
    checks = [(column, pl.col(column) < before, "expected ascending order, this row lies before the one above it")]
    if strictly:
        checks.append((column, pl.col(column) == before, "expected each time once, this row repeats the one above it"))
    return checks
