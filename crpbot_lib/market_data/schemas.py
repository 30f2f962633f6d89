"""What a frame of market data may hold, as pandera schemas, and a refusal that names the row.

Imported where a frame is checked, not at the top of a module: pandera brings pandas along, 2 s that most commands never need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta

import pandera.polars as pa
import polars as pl
from pandera.config import ValidationDepth, config_context
from pandera.errors import SchemaError

from crpbot_lib import candle_rules
from crpbot_lib.market_data.frames import CANDLE_SCHEMA, POINT_SCHEMA
from crpbot_lib.market_data.quality import iso

Rule = tuple[str, pl.Expr, str]
"""A column, where it is wrong, and what it is there."""


def candle_schema(step: timedelta, start: datetime, end: datetime) -> pa.DataFrameSchema:
    """Candles of width ``step`` that open in ``[start, end)``."""
    outside = ~pl.col("timestamp").is_between(start, end, closed="left")
    rules = [
        *_rising("timestamp", step),
        ("timestamp", outside, f"outside [{iso(start)}, {iso(end)})"),
        *candle_rules.IMPOSSIBLE,
    ]
    return _schema(CANDLE_SCHEMA, rules, nullable=())


def point_schema(step: timedelta) -> pa.DataFrameSchema:
    """CoinGecko points, one every ``step`` at most; a value that CoinGecko does not know is null."""
    values = ("price", "market_cap", "total_volume")
    rules = [
        *_rising("timestamp", step),
        ("available_at", pl.col("available_at") <= pl.col("timestamp"), "not after its timestamp"),
        *((column, pl.col(column) < 0, "below 0") for column in values),
    ]
    return _schema(POINT_SCHEMA, rules, nullable=values)


def first_problem(schema: pa.DataFrameSchema, frame: pl.DataFrame) -> str | None:
    """What the first broken rule finds in ``frame``: row, column, value, expectation and how many rows; None if none is broken."""
    try:
        # whatever the environment tells pandera: a check that can be switched off from there is none
        with config_context(validation_enabled=True, validation_depth=ValidationDepth.SCHEMA_AND_DATA):
            schema.validate(frame)
    except SchemaError as error:
        return _columns(schema, frame) or _row(error, frame)
    return None


def _rising(column: str, step: timedelta) -> list[Rule]:
    opens = pl.col(column)
    return [
        (column, opens == opens.shift(1), "there twice"),
        (column, opens < opens.shift(1), "before the row above it"),
        (column, opens != opens.dt.truncate(step), f"off the grid of {step}"),
    ]


def _schema(dtypes: Mapping[str, pl.DataType], rules: Sequence[Rule], *, nullable: Sequence[str]) -> pa.DataFrameSchema:
    """Columns first: what is compared with another column is a number by then."""
    columns = {
        column: pa.Column(
            dtype,
            nullable=column in nullable,
            checks=_check((column, ~pl.col(column).is_finite(), "not a number")) if dtype.is_float() else None,
        )
        for column, dtype in dtypes.items()
    }
    return pa.DataFrameSchema(columns, checks=[_check(rule) for rule in rules], strict=True, ordered=True)


def _check(rule: Rule) -> pa.Check:
    column, wrong, problem = rule
    return pa.Check(_holds(wrong), name=column, error=problem)


def _holds(wrong: pl.Expr) -> Callable[[pa.PolarsData], pl.LazyFrame]:
    # a comparison with null finds nothing: whether null is allowed, the column says
    return lambda data: data.lazyframe.select(~wrong.fill_null(False))


def _columns(schema: pa.DataFrameSchema, frame: pl.DataFrame) -> str | None:
    for name, column in schema.columns.items():
        if name not in frame.columns:
            return f"column {name!r} is missing; the frame has {', '.join(frame.columns)}"
        if frame.schema[name] != column.dtype.type:
            return f"column {name!r} is {frame.schema[name]}, expected {column.dtype.type}"
    if frame.columns != list(schema.columns):
        return f"the columns are {', '.join(frame.columns)}, expected {', '.join(schema.columns)}"
    return None


def _row(error: SchemaError, frame: pl.DataFrame) -> str:
    of_rule = isinstance(error.check, pa.Check)
    column, problem = (error.check.name, error.check.error) if of_rule else (error.schema.name, "not a number")
    bad = (~error.check_output.to_series()).arg_true()
    value, at = frame[column][bad[0]], frame["timestamp"][bad[0]]
    return (
        f"row {bad[0]} ({iso(at) if at else 'no timestamp'}), column {column!r}: "
        f"{iso(value) if isinstance(value, datetime) else value} is {problem} (so {bad.len()} of {frame.height} rows)"
    )
