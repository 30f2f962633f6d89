"""``crpbot fetch`` and ``crpbot coverage``: days in, numbers out, one line on stderr when it cannot be done."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer
from typer.testing import CliRunner, Result

from crpbot_lib import config
from crpbot_lib.cli import data

app = typer.Typer()
app.add_typer(data.fetch, name="fetch")
app.command("coverage")(data.coverage)

INTERVAL = ("--start", "2025-05-05", "--end", "2025-05-07")


@pytest.fixture(autouse=True)
def environment(wire: Any, timeframes: dict[str, pl.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wire.candles = {("BTC-USD", timeframe): frame for timeframe, frame in timeframes.items()}
    first = datetime(2025, 5, 1, tzinfo=UTC)
    wire.points["bitcoin", "hourly"] = [(int((first + timedelta(hours=n)).timestamp() * 1000), 1.0, 2.0, 3.0) for n in range(240)]
    wire.points["bitcoin", "daily"] = wire.points["bitcoin", "hourly"][::24]
    monkeypatch.setenv("CRPBOT_LAKE", f"file://{tmp_path}/lake")
    monkeypatch.setenv("CRPBOT_COINBASE_URL", wire.url)
    monkeypatch.setenv("CRPBOT_COINGECKO_URL", wire.url)
    monkeypatch.setenv("CRPBOT_COINBASE_REQUESTS_PER_SECOND", "1e6")


def crpbot(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_fetch_candles_takes_days_and_says_what_it_got(tmp_path: Path) -> None:
    result = crpbot("fetch", "candles", "--symbol", "BTC-USD", "--timeframe", "1m", *INTERVAL)
    assert (result.exit_code, result.stdout) == (0, "BTC-USD 1m: 2880 rows in 2 days, 0 absent\n")
    assert len(list(tmp_path.rglob("*.parquet"))) == 2


def test_fetch_coingecko_takes_a_coin(tmp_path: Path) -> None:
    result = crpbot("fetch", "coingecko", "--coin", "bitcoin", *INTERVAL)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("bitcoin: 48 hourly points in 2 days, 0 absent; daily history of ")
    assert len(list(tmp_path.rglob("*.parquet"))) == 4


def test_coverage_shows_days() -> None:
    crpbot("fetch", "candles", "--symbol", "BTC-USD", "--start", "2025-05-05", "--end", "2025-05-06")
    result = crpbot("coverage", "--symbol", "BTC-USD", "--timeframe", "1m", *INTERVAL)
    assert result.exit_code == 0
    assert "complete" in result.stdout
    assert "1440 rows, 1440 missing, 1 days not fetched" in result.stdout


def test_json_for_scripts() -> None:
    fetched = json.loads(crpbot("fetch", "candles", "--symbol", "BTC-USD", *INTERVAL, "--json").stdout)
    assert [p["rows"] for p in fetched["partitions"]] == [1440, 1440]
    covered = json.loads(crpbot("coverage", "--symbol", "BTC-USD", *INTERVAL, "--json").stdout)
    assert [d["state"] for d in covered["days"]] == ["complete", "complete"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("fetch", "candles", "--symbol", "NOPE-USD", *INTERVAL),
            "error: unknown symbol 'NOPE-USD': the configuration has BTC-USD",
        ),
        (("fetch", "candles", "--symbol", "ETH-USD", *INTERVAL), "error: Coinbase: GET /api/v3/"),
        (("fetch", "candles", "--symbol", "BTC-USD", "--timeframe", "2m", *INTERVAL), "error: unknown timeframe '2m'"),
        (
            ("fetch", "candles", "--symbol", "BTC-USD", "--start", "2999-01-01", "--end", "2999-01-02"),
            "error: 2999-01-01 is not over yet",
        ),
        (
            ("fetch", "candles", "--symbol", "BTC-USD", "--start", "2025-05-07", "--end", "2025-05-05"),
            "error: the interval [2025-05-07, 2025-",
        ),
        (
            ("fetch", "coingecko", "--coin", "nope", *INTERVAL),
            "error: unknown coin 'nope': the configuration has bitcoin, ethereum, solana",
        ),
        (
            ("fetch", "coingecko", "--coin", "solana", "--start", "2019-01-01", "--end", "2019-01-02"),
            "error: 2019-01-01 lies before the listing",
        ),
        (("coverage", "--symbol", "NOPE-USD", *INTERVAL), "error: unknown symbol 'NOPE-USD'"),
    ],
)
def test_what_cannot_be_done_is_one_line_on_stderr(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    result = crpbot(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(said)
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.rglob("*.parquet")) == []


def test_a_day_that_is_none_is_a_usage_error() -> None:
    result = crpbot("coverage", "--symbol", "BTC-USD", "--start", "5.5.2025", "--end", "2025-05-07")
    assert result.exit_code == 2
    assert "'5.5.2025' is not a day" in result.stderr


def test_without_a_lake_the_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRPBOT_LAKE", "")
    config.settings.cache_clear()
    result = crpbot("coverage", "--symbol", "BTC-USD", *INTERVAL)
    assert result.exit_code == 1
    assert "CRPBOT_LAKE='' is no address of a lake" in result.stderr
