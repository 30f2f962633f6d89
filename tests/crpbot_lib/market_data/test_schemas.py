"""The schemas say what the rules say, and a refusal names the row."""

from __future__ import annotations

import math
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from pandera.config import ValidationDepth, config_context

from crpbot_lib import candle_rules
from crpbot_lib.market_data.frames import CANDLE_SCHEMA, POINT_SCHEMA
from crpbot_lib.market_data.quality import QualityError, check_candles, check_points

START = datetime(2025, 5, 5, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
POINT = (START, START + HOUR, 95_000.0, None, 1.0)


def candles(**changes: float) -> pl.DataFrame:
    """Three minutes, of which the last differs by ``changes``."""
    candle = {"open": 10.0, "high": 12.0, "low": 9.0, "close": 11.0, "volume": 0.0}
    rows = [{"timestamp": START + n * MINUTE, **candle, **(changes if n == 2 else {})} for n in range(3)]
    return pl.DataFrame(rows, schema=CANDLE_SCHEMA)


def said_of(frame: pl.DataFrame) -> str:
    with pytest.raises(QualityError) as refused:
        check_candles(frame, "1m", START, START + HOUR, "BTC-USD")
    assert refused.value.permanent
    return str(refused.value)


def test_a_candle_without_a_trade_is_possible() -> None:
    check_candles(candles(open=11, high=11, low=11, close=11, volume=0), "1m", START, START + HOUR, "BTC-USD")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"open": 0, "low": 0}, "column 'open': 0.0 is not above 0"),
        ({"low": -9}, "column 'low': -9.0 is not above 0"),
        ({"volume": -1}, "column 'volume': -1.0 is below 0"),
        ({"high": 9.5}, "column 'high': 9.5 is below open"),
        ({"high": 10.5}, "column 'high': 10.5 is below close"),
        ({"low": 10.5}, "column 'low': 10.5 is above open"),
        ({"open": 11, "close": 10, "low": 10.5}, "column 'low': 10.5 is above close"),
        ({"close": math.nan}, "column 'close': nan is not a number"),
        ({"volume": math.inf}, "column 'volume': inf is not a number"),
        ({"volume": None}, "column 'volume': None is not a number"),
    ],
)
def test_what_a_candle_cannot_be_is_named_with_row_value_and_count(changes: dict[str, float], said: str) -> None:
    assert said_of(candles(**changes)) == f"BTC-USD: row 2 (2025-05-05T00:02:00Z), {said} (so 1 of 3 rows)"


def test_every_rule_of_candles_has_its_case_above() -> None:
    problems = {problem for _, _, problem in candle_rules.IMPOSSIBLE}
    assert problems == {"not above 0", "below 0", "below open", "below close", "below low", "above open", "above close"}


def test_rows_off_the_grid_are_counted() -> None:
    off = candles().with_columns(pl.col("timestamp").dt.offset_by("10s"))
    assert "2025-05-05T00:00:10Z is off the grid of 0:01:00 (so 3 of 3 rows)" in said_of(off)


def test_a_missing_timestamp_is_named_by_its_row() -> None:
    unknown = candles().with_columns(pl.when(pl.col("timestamp") > START).then("timestamp").alias("timestamp"))
    assert "row 0 (no timestamp), column 'timestamp': None is not a number" in said_of(unknown)


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ((START, None, 1.0, 1.0, 1.0), "column 'available_at': None is not a number"),
        ((START, START, 1.0, 1.0, 1.0), "column 'available_at': 2025-05-05T00:00:00Z is not after its timestamp"),
        ((START, START + HOUR, -1.0, 1.0, 1.0), "column 'price': -1.0 is below 0"),
        ((START, START + HOUR, 1.0, math.nan, 1.0), "column 'market_cap': nan is not a number"),
        ((START + HOUR, START + 2 * HOUR, 1.0, 1.0, 1.0), "off the grid of 1 day"),
    ],
)
def test_what_a_point_cannot_be(point: tuple[object, ...], said: str) -> None:
    with pytest.raises(QualityError, match=said):
        check_points(pl.DataFrame([point], schema=POINT_SCHEMA, orient="row"), "daily", "bitcoin daily")


def test_values_that_coingecko_does_not_know_stay_null() -> None:
    check_points(pl.DataFrame([POINT], schema=POINT_SCHEMA, orient="row"), "daily", "bitcoin daily")
    check_points(pl.DataFrame(schema=POINT_SCHEMA), "hourly", "bitcoin hourly")


def test_no_setting_of_pandera_switches_the_checks_off() -> None:
    with config_context(validation_enabled=False):
        assert "is below 0" in said_of(candles(volume=-1))
    with config_context(validation_depth=ValidationDepth.SCHEMA_ONLY):
        assert "is below 0" in said_of(candles(volume=-1))


def test_pandera_is_imported_where_a_frame_is_checked_only() -> None:
    script = "import crpbot_lib.market_data.gaps, sys; print(sorted({'pandera', 'pandas'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert answer.stdout.strip() == "[]", answer.stderr


def test_every_real_candle_passes(market_data_dir: Path | None) -> None:
    if market_data_dir is None:
        pytest.skip("needs the real candles (CRPBOT_SANDBOX_DATA)")
    rows = 0
    for path in sorted(market_data_dir.glob("candles_*/**/*.parquet")):
        timeframe = next((part for part in path.stem.split("_") if part in ("5m", "15m", "1h")), "1m")
        frame = pl.read_parquet(path)
        check_candles(frame, timeframe, frame["timestamp"][0], frame["timestamp"][-1] + MINUTE, str(path))
        rows += frame.height
    assert rows > 1_000_000
