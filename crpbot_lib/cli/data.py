"""``crpbot fetch candles|coingecko`` and ``crpbot coverage``: the lake's raw data by hand, over days in UTC."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from crpbot_lib.config import Settings, settings
from crpbot_lib.lake import Lake, LakeError
from crpbot_lib.market_data import MarketDataError
from crpbot_lib.steps import ingest

fetch = typer.Typer(help="Fetch market data into the lake.", no_args_is_help=True)


def _day(value: str) -> date:
    try:
        return datetime.strptime(value, "%Y-%m-%d").replace(tzinfo=UTC).date()
    except ValueError:
        raise typer.BadParameter(f"{value!r} is not a day; write it as 2025-05-05") from None


Start = Annotated[date, typer.Option(parser=_day, metavar="YYYY-MM-DD", help="First UTC day.")]
End = Annotated[date, typer.Option(parser=_day, metavar="YYYY-MM-DD", help="UTC day after the last one.")]
SymbolName = Annotated[str, typer.Option(help="A symbol of the configuration, e.g. BTC-USD.")]
Timeframe = Annotated[str, typer.Option(help="1m, 5m, 15m or 1h.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


@fetch.command("candles")
def fetch_candles(symbol: SymbolName, start: Start, end: End, timeframe: Timeframe = "1m", as_json: AsJson = False) -> None:
    """Fetch the candles of the UTC days [start, end), replacing the partitions that are there."""
    with _clear_errors():
        config, lake = _open()
        summary = ingest.fetch_candle_days(config, lake, symbol, timeframe, start, end)
        text = f"{symbol} {timeframe}: {summary['rows']} rows in {len(summary['partitions'])} days, {summary['missing']} absent"
        _show(summary, text, as_json)


@fetch.command("coingecko")
def fetch_coingecko(
    coin: Annotated[str, typer.Option(help="A coin of the configuration, by its CoinGecko id, e.g. bitcoin.")],
    start: Start,
    end: End,
    as_json: AsJson = False,
) -> None:
    """Fetch a coin's hourly points of the UTC days [start, end) and its daily history as known on each of them."""
    with _clear_errors():
        config, lake = _open()
        by_coin = {s.coin: s.name for s in config.symbols}
        if coin not in by_coin:
            raise ValueError(f"unknown coin {coin!r}: the configuration has {', '.join(by_coin)}; add its symbol to `symbols`")
        summary = ingest.fetch_coingecko_days(config, lake, by_coin[coin], start, end)
        hourly, daily = summary["hourly"], summary["daily"][-1]
        rows, missing = sum(p["rows"] for p in hourly), sum(p["missing"] for p in hourly)
        text = f"{coin}: {rows} hourly points in {len(hourly)} days, {missing} absent; daily history of {daily['rows']} days"
        _show(summary, text, as_json)


def coverage(symbol: SymbolName, start: Start, end: End, timeframe: Timeframe = "1m", as_json: AsJson = False) -> None:
    """Show what the lake has of a symbol's candles on the UTC days [start, end)."""
    with _clear_errors():
        config, lake = _open()
        summary = ingest.coverage(config, lake, symbol, timeframe, start, end)
        if as_json:
            typer.echo(json.dumps(summary))
            return
        table = Table(title=f"{symbol} {timeframe}")
        for heading in ("day", "state", "rows", "missing", "gaps", "longest gap"):
            table.add_column(heading, justify="left" if heading in ("day", "state", "longest gap") else "right")
        for day in summary["days"]:
            longest = max(day["gaps"], key=lambda gap: gap["minutes"], default=None)
            where = f"{longest['minutes']} min from {longest['start'][11:16]}" if longest else ""
            table.add_row(day["day"], day["state"], str(day["rows"]), str(day["missing"]), str(len(day["gaps"])), where)
        Console().print(table)
        typer.echo(f"{summary['rows']} rows, {summary['missing']} missing, {summary['absent']} days not fetched")


def _open() -> tuple[Settings, Lake]:
    config = settings()
    return config, Lake(config.lake)


def _show(summary: dict[str, Any], text: str, as_json: bool) -> None:
    typer.echo(json.dumps(summary) if as_json else text)


@contextmanager
def _clear_errors() -> Iterator[None]:
    """An expected failure is one line on stderr and exit status 1, not a traceback."""
    try:
        yield
    except (MarketDataError, LakeError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
