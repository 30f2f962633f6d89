"""Every fault in every frame is an error that names the frame and, where there is one, the column and the row (from 0)."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pytest

from crpbot_lib import config
from crpbot_lib.features import FeatureError, NoRowError, engineer_features, engineer_runtime_features

MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
CANDLES = {width: f"BTC-USD {width} candles" for width in ("1m", "5m", "15m", "1h")}
POINTS = {series: f"BTC-USD CoinGecko {series} points" for series in ("hourly", "daily")}
FRAMES = CANDLES | POINTS
PRICES = ("open", "high", "low", "close")
COLUMNS = {
    **dict.fromkeys(CANDLES, ("timestamp", *PRICES, "volume")),
    **dict.fromkeys(POINTS, ("timestamp", "available_at", "price", "market_cap", "total_volume")),
}
TIMES = ("timestamp", "available_at")
VALUES = [(name, column) for name, columns in COLUMNS.items() for column in columns if column not in TIMES]
ROW = 7

every_frame = pytest.mark.parametrize("name", FRAMES)
every_value = pytest.mark.parametrize(("name", "column"), VALUES)


def _frame(market: Any, name: str) -> pl.DataFrame:
    return market.candles[name] if name in CANDLES else getattr(market, name)


def _engineer(market: Any, name: str, frame: pl.DataFrame | None) -> pl.DataFrame:
    """The features of ``market`` with another frame ``name``; None leaves it out."""
    frames = {**market.candles, **market.points, name: frame}
    given = {k: v for k, v in frames.items() if v is not None}
    return engineer_features("BTC-USD", {k: given[k] for k in CANDLES if k in given}, {k: given[k] for k in POINTS if k in given})


def _refused(market: Any, name: str, frame: pl.DataFrame | None, said: str) -> None:
    with pytest.raises(FeatureError, match=f"^{re.escape(FRAMES[name])}{said}"):
        _engineer(market, name, frame)


def _with(frame: pl.DataFrame, column: str, value: object) -> pl.DataFrame:
    return frame.with_columns(pl.when(pl.int_range(pl.len()) == ROW).then(value).otherwise(pl.col(column)).alias(column))


@every_frame
def test_unsorted(small_market: Any, name: str) -> None:
    frame = _frame(small_market, name)
    swapped = pl.concat([frame[:10], frame[11:12], frame[10:11], frame[12:]])
    _refused(small_market, name, swapped, ", column timestamp, row 11: .* expected ascending order")


@every_frame
def test_duplicated(small_market: Any, name: str) -> None:
    frame = _frame(small_market, name)
    _refused(small_market, name, pl.concat([frame[:10], frame[9:]]), ", column timestamp, row 10: .* expected each time once")


@pytest.mark.parametrize(("name", "column"), [(n, c) for n, columns in COLUMNS.items() for c in columns])
def test_a_missing_column(small_market: Any, name: str, column: str) -> None:
    _refused(small_market, name, _frame(small_market, name).drop(column), f": no column {column}; it has ")


@pytest.mark.parametrize("zone", [None, "Europe/Berlin"])
@pytest.mark.parametrize(("name", "column"), [(n, c) for n, columns in COLUMNS.items() for c in columns if c in TIMES])
def test_a_time_that_is_naive_or_of_another_zone(small_market: Any, name: str, column: str, zone: str | None) -> None:
    other = _frame(small_market, name).with_columns(pl.col(column).dt.replace_time_zone(zone, non_existent="null"))
    _refused(small_market, name, other, f", column {column}: the type is Datetime.* expected Datetime with time zone UTC")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@every_value
def test_not_a_number(small_market: Any, name: str, column: str, value: float) -> None:
    broken = _with(_frame(small_market, name), column, value)
    _refused(small_market, name, broken, f", column {column}, row {ROW}: the value is {value}; expected a finite number")


@pytest.mark.parametrize(("name", "column"), [(n, c) for n, c in VALUES if n in CANDLES])
def test_a_null_in_a_candle(small_market: Any, name: str, column: str) -> None:
    broken = _with(_frame(small_market, name), column, None)
    _refused(small_market, name, broken, f", column {column}, row {ROW}: the value is None; expected a finite number")


@every_frame
def test_a_null_time(small_market: Any, name: str) -> None:
    broken = _with(_frame(small_market, name), "timestamp", None)
    _refused(small_market, name, broken, f", column timestamp, row {ROW}: the value is None; expected a time")


@every_value
def test_text(small_market: Any, name: str, column: str) -> None:
    broken = _frame(small_market, name).with_columns(pl.col(column).cast(pl.String))
    _refused(small_market, name, broken, f", column {column}: the type is String, expected Float64")


@every_frame
def test_a_missing_frame_is_no_placeholder(small_market: Any, name: str) -> None:
    _refused(small_market, name, None, " are missing: expected a frame with ")


@every_frame
def test_an_empty_frame(small_market: Any, name: str) -> None:
    _refused(small_market, name, _frame(small_market, name).clear(), " are empty: expected at least one row")


@every_frame
def test_one_row(small_market: Any, name: str) -> None:
    """It is no fault of a row: nothing can be computed from it, and the error counts what is lacking."""
    lacking = "1 lie too soon after the beginning" if name == "1m" else f"({name}|rsi_1h|macd_1h|market_cap)"
    with pytest.raises(NoRowError, match=f"^BTC-USD: no row .*{lacking}"):
        _engineer(small_market, name, _frame(small_market, name)[ROW : ROW + 1])


@pytest.mark.parametrize("name", CANDLES)
@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        *((column, price, f"{column}, row {ROW}: .* is not above 0") for column in PRICES for price in (0.0, -100.0)),
        ("volume", -5.0, f"volume, row {ROW}: the value is -5.0; this is below 0"),
        ("high", 1.0, f"high, row {ROW}: the value is 1.0; this is below open"),
        ("low", 1e9, f"high, row {ROW}: .* this is below low"),
    ],
)
def test_a_candle_that_cannot_be(small_market: Any, name: str, column: str, value: float, said: str) -> None:
    _refused(small_market, name, _with(small_market.candles[name], column, value), f", column {said}")


@pytest.mark.parametrize(("name", "seconds"), [("1m", 60), ("5m", 300), ("15m", 900), ("1h", 3600)])
def test_off_the_grid(small_market: Any, name: str, seconds: int) -> None:
    moved = small_market.candles[name].with_columns(pl.col("timestamp") + timedelta(seconds=30))
    _refused(small_market, name, moved, f", column timestamp, row 0: .* a multiple of {seconds} s")


@pytest.mark.parametrize("name", ["5m", "15m", "1h"])
def test_bars_of_another_market_or_shifted(small_market: Any, name: str) -> None:
    shifted = small_market.candles[name].with_columns(pl.col("timestamp").dt.offset_by(name))[:-1]
    _refused(small_market, name, shifted, r": the close of \d+ of \d+ bars is not that of the last 1m candle")


@pytest.mark.parametrize("name", POINTS)
def test_a_point_available_before_its_stamp_or_out_of_order(small_market: Any, name: str) -> None:
    points = _frame(small_market, name)
    early = points.with_columns(available_at=pl.col("timestamp") - MINUTE)
    _refused(small_market, name, early, ", column available_at, row 0: .* no time before the point's own timestamp")
    late = _with(points, "available_at", pl.col("available_at") + timedelta(days=3))
    _refused(small_market, name, late, f", column available_at, row {ROW + 1}: .* expected ascending order")


@pytest.mark.parametrize("wrong", [(1.0, datetime(2025, 1, 1)), [(0.0, datetime(2025, 1, 1, tzinfo=UTC))], 5.0])  # noqa: DTZ001
def test_an_all_time_high_without_a_zone_or_a_price(small_market: Any, wrong: Any) -> None:
    with pytest.raises(FeatureError, match="all_time_high"):
        replace(small_market, all_time_high=wrong).frame()


class TestThePandasEntry:
    """What the runtime hands over is judged by the same rules, before anything else is fetched."""

    @pytest.mark.parametrize(
        ("fault", "said"),
        [
            (lambda df: df.iloc[[0, 2, 1]], "column timestamp, row 2: .* expected ascending order"),
            (lambda df: df.iloc[[0, 1, 1]], "column timestamp, row 2: .* expected each time once"),
            (lambda df: df.drop(columns="close"), ": no column close; it has"),
            (
                lambda df: df.assign(timestamp=df["timestamp"].dt.tz_localize(None)),
                "column timestamp: the type is .* UTC",
            ),
            (lambda df: df.assign(timestamp=df["timestamp"].dt.tz_convert("Asia/Tokyo")), "column timestamp: the type is .* UTC"),
            (lambda df: df.assign(high=df["high"].where(df.index != ROW)), f"column high, row {ROW}: .* expected a finite number"),
            (lambda df: df.iloc[:0], "are empty"),
        ],
        ids=["unsorted", "duplicated", "column", "naive", "zone", "nan", "empty"],
    )
    def test_a_fault_in_the_candles(self, small_market: Any, fault: Any, said: str) -> None:
        with pytest.raises(FeatureError, match=f"^BTC-USD 1m candles.*{said}"):
            engineer_runtime_features(fault(small_market.minutes.to_pandas()), "BTC-USD", None, True, True)  # type: ignore[arg-type]

    def test_a_symbol_that_is_not_configured(self, small_market: Any) -> None:
        assert "XYZ-USD" not in {symbol.name for symbol in config.settings().symbols}
        with pytest.raises(ValueError, match="XYZ-USD"):
            engineer_runtime_features(small_market.minutes.to_pandas(), "XYZ-USD", None, True, True)  # type: ignore[arg-type]
