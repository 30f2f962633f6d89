"""``crpbot fetch``, ``coverage``, ``gaps`` and ``check``: days in, numbers out, one line on stderr when it cannot be done."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer
from typer.testing import CliRunner, Result

from crpbot_lib import config
from crpbot_lib.cli import data
from crpbot_lib.market_data import MarketData, coinbase

app = typer.Typer()
app.add_typer(data.fetch, name="fetch")
app.command("coverage")(data.coverage)
app.command("gaps")(data.gaps)
app.command("check")(data.check)

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
    monkeypatch.setenv("CRPBOT_COINGECKO_API_KEY", "key")
    monkeypatch.setenv("CRPBOT_RATE_LIMIT_DIR", str(tmp_path / "limits"))
    monkeypatch.setenv("CRPBOT_COINGECKO_REQUESTS_PER_SECOND", "1e6")
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


def without(wire: Any, timeframe: str, start: datetime, minutes: int) -> None:
    gone = pl.col("timestamp").is_between(start, start + timedelta(minutes=minutes), closed="left")
    wire.candles["BTC-USD", timeframe] = wire.candles["BTC-USD", timeframe].filter(~gone)


def test_coverage_is_a_map_of_days_that_needs_no_colour(wire: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coinbase, "EMPTY_CONFIRMATIONS", 0)
    for day, minutes in ((5, 5), (6, 100), (7, 1000)):
        without(wire, "1m", datetime(2025, 5, day, 6, tzinfo=UTC), minutes)
    crpbot("fetch", "candles", "--symbol", "BTC-USD", "--start", "2025-05-05", "--end", "2025-05-10")
    result = crpbot("coverage", "--symbol", "BTC-USD", "--timeframe", "1m", "--start", "2025-04-29", "--end", "2025-05-11")
    assert result.exit_code == 0
    title, days, april, may, legend, *table = result.stdout.splitlines()
    assert title == "BTC-USD 1m"
    assert days.split() == ["1", "6", "11", "16", "21", "26", "31"]
    assert (april, may) == ("2025-04 " + " " * 28 + "··", "2025-05 ····▓▒░█○·")
    assert legend.split("  ")[4:10] == ["█ complete", "▓ ≥ 99 %", "▒ ≥ 50 %", "░ < 50 %", "○ none served", "· not fetched"]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in table if line.startswith("│")]
    assert rows == [
        ["2025-04-29 to 2025-05-04", "absent", "0", str(6 * 1440), "", ""],
        ["2025-05-05", "partial", "1435", "5", "1", "5 min from 06:00"],
        ["2025-05-06", "partial", "1340", "100", "1", "100 min from 06:00"],
        ["2025-05-07", "partial", "440", "1000", "1", "1000 min from 06:00"],
        ["2025-05-09", "empty", "0", "1440", "", ""],
        ["2025-05-10", "absent", "0", "1440", "", ""],
    ]
    assert "7 days not fetched" in result.stdout


def test_coverage_is_of_all_symbols_where_none_is_named() -> None:
    result = crpbot("coverage", *INTERVAL, "--timeframe", "1m", "--timeframe", "1h")
    titles = [line for line in result.stdout.splitlines() if line.endswith((" 1m", " 1h"))]
    assert titles == [f"{symbol} {tf}" for symbol in ("BTC-USD", "ETH-USD", "SOL-USD") for tf in ("1m", "1h")]


def fetch_all(*arguments: str) -> Result:
    return crpbot("fetch", "all", "--symbol", "BTC-USD", *INTERVAL, *arguments)


def test_fetch_all_brings_everything_once(wire: Any, tmp_path: Path) -> None:
    result = fetch_all()
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("BTC-USD: 12 partitions fetched, 0 there; ")
    assert len(list(tmp_path.rglob("*.parquet"))) == 12
    wire.requests.clear()
    assert fetch_all().stdout.startswith("BTC-USD: 0 partitions fetched, 12 there; ")
    assert wire.requests == []
    assert fetch_all("--refetch", "all").stdout.endswith("(12 unchanged)\n")


@pytest.mark.parametrize(
    "command", [("all",), ("heal",), ("candles", "--symbol", "BTC-USD"), ("coingecko", "--coin", "bitcoin")], ids=lambda c: c[0]
)
def test_a_dry_run_says_what_it_would_take_and_asks_for_nothing(wire: Any, tmp_path: Path, command: tuple[str, ...]) -> None:
    result = crpbot("fetch", *command, *INTERVAL, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "Nothing was fetched." in result.stdout
    plan = json.loads(crpbot("fetch", *command, *INTERVAL, "--dry-run", "--json").stdout)
    assert plan["partitions"] == sum(one["partitions"] for one in plan["series"]) > 0
    assert (wire.requests, list(tmp_path.rglob("*.parquet"))) == ([], [])


def test_where_the_plan_does_not_reach_both_runs_say_so_and_candles_alone_can_be_had(
    wire: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRPBOT_COINGECKO_PLAN", "demo")
    for arguments in ((), ("--dry-run",), ("--refetch", "incomplete")):
        result = fetch_all(*arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "CoinGecko: the bitcoin daily history for 2025-05-05 begins on 2025-03-04, and the plan 'demo'" in result.stderr
        assert "`crpbot fetch all --candles-only`" in result.stderr
    assert (wire.requests, list(tmp_path.rglob("*.parquet"))) == ([], [])
    assert json.loads(fetch_all("--candles-only", "--dry-run", "--json").stdout)["partitions"] == 8
    result = fetch_all("--candles-only")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("BTC-USD: 8 partitions fetched, 0 there; ")
    assert {request.path.split("/")[-1] for request in wire.requests} == {"candles"}


def test_heal_fetches_incomplete_days_and_says_what_came_of_it(wire: Any) -> None:
    whole = dict(wire.candles)
    without(wire, "1m", datetime(2025, 5, 6, tzinfo=UTC), 60)
    fetch_all()
    wire.candles = whole
    result = crpbot("fetch", "heal", "--symbol", "BTC-USD", *INTERVAL)
    assert result.exit_code == 0, result.stderr
    assert "│ BTC-USD │ 1m        │ 2025-05-06 │ filled  │ 1440 │       0 │    60 │" in result.stdout
    assert result.stdout.endswith("8 partitions looked at, 1 fetched (1 filled); 60 candles added, 0 still absent\n")


def test_gaps_are_told_and_kept(wire: Any, tmp_path: Path) -> None:
    without(wire, "1m", datetime(2025, 5, 6, 3, tzinfo=UTC), 60)
    fetch_all()
    result = crpbot("gaps", "--symbol", "BTC-USD", *INTERVAL)
    assert result.exit_code == 0, result.stderr
    assert "│ BTC-USD │ 2025-05-06T03:00:00Z │ 60      │ long" in result.stdout
    assert result.stdout.endswith("BTC-USD: 1 outages, 60 minutes; 0 gaps without a trade, 0 minutes\n")
    as_json = json.loads(crpbot("gaps", "--symbol", "BTC-USD", *INTERVAL, "--json").stdout)
    assert [(gap["start"], gap["minutes"], gap["kind"]) for gap in as_json["gaps"]] == [("2025-05-06T03:00:00Z", 60, "outage")]
    assert len(list(tmp_path.rglob("gaps.parquet"))) == 1


def test_check_shows_where_wider_candles_are_not_what_the_minutes_add_up_to(wire: Any) -> None:
    noon = pl.col("timestamp") == datetime(2025, 5, 6, 12, tzinfo=UTC)
    wide = wire.candles["BTC-USD", "1h"]
    wire.candles["BTC-USD", "1h"] = wide.with_columns(volume=pl.when(noon).then(pl.col("volume") * 4).otherwise("volume"))
    fetch_all()
    result = crpbot("check", "--symbol", "BTC-USD", *INTERVAL)
    assert result.exit_code == 0, result.stderr
    assert "│ 1h        │ 2    │ 48   │ 0       │ 1             │ volume 0.75 of it, 2025-05-06T12:00:00Z │" in result.stdout
    [told] = json.loads(crpbot("check", "--symbol", "BTC-USD", *INTERVAL, "--json").stdout)
    assert [told["timeframes"][tf]["differing"] for tf in ("5m", "15m", "1h")] == [0, 0, 1]


def test_an_interrupted_command_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MarketData, "candles", interrupt)
    result = fetch_all()
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "interrupted: nothing is half-written, and the command can be run again\n"


def test_progress_is_a_bar_in_a_terminal_and_silence_in_a_short_pipe() -> None:
    """In a real terminal, of a real process."""
    command = [Path(sys.executable).with_name("crpbot"), "fetch", "all", "--symbol", "BTC-USD", *INTERVAL]
    terminal, inside = pty.openpty()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=inside, env={**os.environ, "TERM": "xterm"})
    os.close(inside)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal's end
        while read := os.read(terminal, 1 << 16):
            shown += read
    os.close(terminal)
    assert process.wait(timeout=60) == 0
    assert b"12 of 12 partitions" in shown
    again = subprocess.run([*command, "--refetch", "all"], capture_output=True, text=True, timeout=60)
    assert (again.returncode, "partitions in" in again.stderr) == (0, False)


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
        (("coverage", "--timeframe", "2m", *INTERVAL), "error: unknown timeframe '2m'"),
        (("gaps", "--symbol", "NOPE-USD", *INTERVAL), "error: unknown symbol 'NOPE-USD'"),
        (("gaps", *INTERVAL), "error: the lake has no 1m candles of BTC-USD, ETH-USD, SOL-USD from 2025-05-05 to 2025-05-06"),
        (("fetch", "heal", "--symbol", "NOPE-USD", *INTERVAL), "error: unknown symbol 'NOPE-USD'"),
        (("fetch", "all", "--symbol", "BTC-USD", "--symbol", "NOPE-USD", *INTERVAL), "error: unknown symbol 'NOPE-USD'"),
        (
            # of the last symbol too, before the first request
            ("fetch", "all", "--start", "2021-06-01", "--end", "2025-05-07"),
            "error: 2021-06-01 lies before the listing of SOL-USD on 2021-06-17",
        ),
        (("fetch", "all", "--start", "2025-05-05", "--end", "2999-01-02"), "error: 2999-01-01 is not over yet"),
    ],
)
def test_what_cannot_be_done_is_one_line_on_stderr(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    result = crpbot(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(said)
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.rglob("*.parquet")) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("coverage", "--start", "5.5.2025", "--end", "2025-05-07"), "'5.5.2025' is not a day"),
        (
            ("fetch", "candles", "--symbol", "BTC-USD", *INTERVAL, "--timeframe", "2m"),
            "'2m' is not one of '1m', '5m', '15m', '1h'",
        ),
        (("fetch", "all", *INTERVAL, "--refetch", "some"), "'some' is not one of 'absent', 'incomplete', 'all'"),
    ],
)
def test_what_an_option_does_not_take_is_a_usage_error(arguments: tuple[str, ...], said: str) -> None:
    result = crpbot(*arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.replace("│", " ").split())


def test_without_a_lake_the_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRPBOT_LAKE", "")
    config.settings.cache_clear()
    result = crpbot("coverage", "--symbol", "BTC-USD", *INTERVAL)
    assert result.exit_code == 1
    assert "CRPBOT_LAKE='' is no address of a lake" in result.stderr
