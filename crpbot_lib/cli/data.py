"""``crpbot fetch candles|coingecko`` and ``crpbot coverage``: the lake's raw data by hand, over days in UTC."""

from __future__ import annotations

import json
from datetime import date
from typing import Annotated, Any

import typer
from rich.table import Table

from crpbot_lib.cli.common import AsJson, clear_errors, day, open_lake, show_table
from crpbot_lib.steps import ingest

fetch = typer.Typer(help="Fetch market data into the lake.", no_args_is_help=True)


Start = Annotated[date, typer.Option(parser=day, metavar="YYYY-MM-DD", help="First UTC day.")]
End = Annotated[date, typer.Option(parser=day, metavar="YYYY-MM-DD", help="UTC day after the last one.")]
SymbolName = Annotated[str, typer.Option(help="A symbol of the configuration, e.g. BTC-USD.")]
Timeframe = Annotated[str, typer.Option(help="1m, 5m, 15m or 1h.")]


@fetch.command("candles")
def fetch_candles(symbol: SymbolName, start: Start, end: End, timeframe: Timeframe = "1m", as_json: AsJson = False) -> None:
    """Fetch the candles of the UTC days [start, end), replacing the partitions that are there."""
    with clear_errors():
        config, lake = open_lake()
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
    with clear_errors():
        config, lake = open_lake()
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
    with clear_errors():
        config, lake = open_lake()
        summary = ingest.coverage(config, lake, symbol, timeframe, start, end)
        if as_json:
            typer.echo(json.dumps(summary))
            return
        table = Table(title=f"{symbol} {timeframe}")
        for heading in ("day", "state", "rows", "missing", "gaps", "longest gap"):
            table.add_column(heading, justify="left" if heading in ("day", "state", "longest gap") else "right")
        for row in summary["days"]:
            longest = max(row["gaps"], key=lambda gap: gap["minutes"], default=None)
            where = f"{longest['minutes']} min from {longest['start'][11:16]}" if longest else ""
            table.add_row(row["day"], row["state"], str(row["rows"]), str(row["missing"]), str(len(row["gaps"])), where)
        show_table(table)
        typer.echo(f"{summary['rows']} rows, {summary['missing']} missing, {summary['absent']} days not fetched")


def _show(summary: dict[str, Any], text: str, as_json: bool) -> None:
    typer.echo(json.dumps(summary) if as_json else text)
