"""``crpbot fetch …``, ``crpbot coverage`` and ``crpbot gaps``: the lake's raw data by hand, over days in UTC."""

from __future__ import annotations

import json
from datetime import date, timedelta
from itertools import groupby
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from crpbot_lib.cli.common import AsJson, SymbolNames, clear_errors, day, meter, named_symbols, open_lake, show_table
from crpbot_lib.config import Settings, Timeframe
from crpbot_lib.steps import ingest, quality
from crpbot_lib.steps.partitions import Refetch

fetch = typer.Typer(help="Fetch market data into the lake.", no_args_is_help=True)

Start = Annotated[date, typer.Option(parser=day, metavar="YYYY-MM-DD", help="First UTC day.")]
End = Annotated[date, typer.Option(parser=day, metavar="YYYY-MM-DD", help="UTC day after the last one.")]
SymbolName = Annotated[str, typer.Option(help="A symbol of the configuration, e.g. BTC-USD.")]
OneTimeframe = Annotated[Timeframe, typer.Option(help="Width of the candles.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be fetched, in how many requests; fetch nothing.")]

LISTED = 40
"""Rows of a table in the terminal; ``--json`` has all."""

CELLS = (
    # at least this share of the day's candles; the glyphs alone tell the states apart, colour only helps
    (1.0, "█", "green", "complete"),
    (0.99, "▓", "yellow", "≥ 99 %"),
    (0.5, "▒", "dark_orange", "≥ 50 %"),
    (0.0, "░", "red", "< 50 %"),
)
EMPTY, ABSENT = ("○", "red", "none served"), ("·", "dim", "not fetched")


@fetch.command("candles")
def fetch_candles(
    symbol: SymbolName, start: Start, end: End, timeframe: OneTimeframe = "1m", dry_run: DryRun = False, as_json: AsJson = False
) -> None:
    """Fetch the candles of the UTC days [start, end), replacing the partitions that are there."""
    with clear_errors():
        config, lake = open_lake()
        if dry_run:
            only: dict[str, Any] = {"timeframes": [timeframe], "coingecko": False, "refetch": "all"}
            _show_plan(ingest.plan_load(config, lake, [symbol], start, end, **only), as_json)
            return
        with meter() as progress:
            summary = ingest.fetch_candle_days(config, lake, symbol, timeframe, start, end, replace=True, progress=progress)
        text = f"{symbol} {timeframe}: {summary['rows']} rows in {len(summary['partitions'])} days, {summary['missing']} absent"
        _show(summary, text, as_json)


@fetch.command("coingecko")
def fetch_coingecko(
    coin: Annotated[str, typer.Option(help="A coin of the configuration, by its CoinGecko id, e.g. bitcoin.")],
    start: Start,
    end: End,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Fetch a coin's hourly points of the UTC days [start, end) and its daily history as known on each of them, replacing what is
    there."""
    with clear_errors():
        config, lake = open_lake()
        by_coin = {s.coin: s.name for s in config.symbols}
        if coin not in by_coin:
            raise ValueError(f"unknown coin {coin!r}: the configuration has {', '.join(by_coin)}; add its symbol to `symbols`")
        if dry_run:
            _show_plan(ingest.plan_load(config, lake, [by_coin[coin]], start, end, timeframes=(), refetch="all"), as_json)
            return
        with meter() as progress:
            summary = ingest.fetch_coingecko_days(config, lake, by_coin[coin], start, end, replace=True, progress=progress)
        hourly, daily = summary["hourly"], summary["daily"][-1]
        rows, missing = sum(p["rows"] for p in hourly), sum(p["missing"] for p in hourly)
        text = f"{coin}: {rows} hourly points in {len(hourly)} days, {missing} absent; daily history of {daily['rows']} days"
        _show(summary, text, as_json)


@fetch.command("all")
def fetch_all(
    start: Start,
    end: End,
    symbols: SymbolNames = None,
    refetch: Annotated[
        Refetch, typer.Option(help="absent: what is not there; incomplete: also what lacks rows; all: everything again.")
    ] = "absent",
    candles_only: Annotated[
        bool, typer.Option("--candles-only", help="Nothing of CoinGecko, whose plan may not reach back so far.")
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Fetch everything of the UTC days [start, end), years at once: candles of all timeframes and CoinGecko's points.

    Run it again after whatever stopped it: with absent it goes on where it was.
    Nothing stored is lost: where a source now serves less, the partition is kept."""
    with clear_errors():
        config, lake = open_lake()
        names = _symbols(config, symbols)
        coingecko = not candles_only
        # of all symbols before the first request: a wrong one must not be found out after hours. What is incomplete is found by
        # reading all partitions, which is done once
        planned = "absent" if refetch == "incomplete" and not dry_run else refetch
        plan = ingest.plan_load(config, lake, names, start, end, coingecko=coingecko, refetch=planned)
        if dry_run:
            _show_plan(plan, as_json)
            return
        with meter() as progress:
            loaded = {
                name: ingest.load(config, lake, name, start, end, coingecko=coingecko, refetch=refetch, progress=progress)
                for name in names
            }
        text = "\n".join(
            f"{name}: {done['fetched']} partitions fetched, {done['present']} there; {done['rows']} rows, {done['missing']} absent"
            + _outcomes(done["outcomes"], "fetched")
            for name, done in loaded.items()
        )
        _show(loaded, text, as_json)


@fetch.command("heal")
def fetch_heal(
    start: Start,
    end: End,
    symbols: SymbolNames = None,
    every: Annotated[bool, typer.Option("--every", help="Also days that lack only minutes in which nobody traded.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Fetch the candles of the incomplete days of [start, end) again: those that lack more than minutes without a trade.

    Nothing stored is lost: where the exchange serves less now, the partition is
    kept. What it never served stays missing. Both are shown, and are no error.
    Afterwards `crpbot gaps` renews the record."""
    with clear_errors():
        config, lake = open_lake()
        names = _symbols(config, symbols)
        if dry_run:
            _show_plan(ingest.plan_heal(config, lake, names, start, end, every=every), as_json)
            return
        with meter() as progress:
            healed = ingest.heal(config, lake, names, start, end, every=every, progress=progress)
        if as_json:
            typer.echo(json.dumps(healed))
            return
        if told := [d for d in healed["days"] if d["outcome"] != "unchanged"]:
            table = Table("symbol", "timeframe", "day", "outcome")
            for heading in ("rows", "missing", "added", "changed", "lost"):
                table.add_column(heading, justify="right")
            for row in told[:LISTED]:
                table.add_row(*(str(row[name]) for name in ("symbol", "timeframe", "day", "outcome")), *map(str, _numbers(row)))
            show_table(table)
            _more(len(told))
        typer.echo(
            f"{healed['looked_at']} partitions looked at, {len(healed['days'])} fetched{_outcomes(healed['outcomes'])}; "
            f"{healed['added']} candles added, {healed['missing']} still absent"
        )


def coverage(
    start: Start,
    end: End,
    symbols: SymbolNames = None,
    timeframe: Annotated[list[str] | None, typer.Option(help="1m, 5m, 15m or 1h; may be repeated. Without it: 1m.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what the lake has of the candles of the UTC days [start, end): a month a row, a day a cell, then the incomplete days."""
    with clear_errors():
        config, lake = open_lake()
        wanted = [(name, tf) for name in _symbols(config, symbols) for tf in timeframe or ["1m"]]
        summaries = [quality.coverage(config, lake, name, tf, start, end) for name, tf in wanted]
        if as_json:
            one = symbols is not None and len(summaries) == 1
            typer.echo(json.dumps(summaries[0] if one else summaries))
            return
        for summary in summaries:
            _heat_map(summary)
            _incomplete(summary)
            typer.echo(f"{summary['rows']} rows, {summary['missing']} missing, {summary['absent']} days not fetched\n")


def gaps(start: Start, end: End, symbols: SymbolNames = None, as_json: AsJson = False) -> None:
    """Tell the minutes without a candle in the UTC days [start, end) as outage or no trade, and keep the record in the lake.

    All symbols are compared and recorded, since an outage shows in all at once;
    --symbols says which are shown."""
    with clear_errors():
        config, lake = open_lake()
        summary = quality.gaps(config, lake, _symbols(config, symbols), start, end)
        record = [gap for gap in quality.read_gaps(lake, start, end) if gap["symbol"] in summary["symbols"]]
        if as_json:
            typer.echo(json.dumps({**summary, "gaps": record}))
            return
        if outages := [gap for gap in record if gap["kind"] == "outage"]:
            table = Table("symbol", "outage from", "minutes", "evidence")
            for gap in outages[:LISTED]:
                table.add_row(gap["symbol"], gap["start"], str(gap["minutes"]), ", ".join(gap["evidence"]))
            show_table(table)
            _more(len(outages))
        for name, told in summary["symbols"].items():
            absent = f"; {told['not_fetched']} days are not fetched" if told["not_fetched"] else ""
            typer.echo(
                f"{name}: {told['outages']} outages, {told['outage_minutes']} minutes; "
                f"{told['no_trade']} gaps without a trade, {told['no_trade_minutes']} minutes{absent}"
            )


def check(start: Start, end: End, symbols: SymbolNames = None, as_json: AsJson = False) -> None:
    """Judge the stored candles of the UTC days [start, end).

    Whether they can be true, whether the 5m, 15m and 1h candles are what the minutes add
    up to, and what looks frozen or like a spike. Fails where a partition is broken."""
    with clear_errors():
        config, lake = open_lake()
        reports = [quality.report(config, lake, name, start, end) for name in _symbols(config, symbols)]
        if as_json:
            typer.echo(json.dumps(reports))
            return
        table = Table("symbol", "timeframe", "days", "rows", "missing", "not as the 1m", "largest difference", "frozen", "spikes")
        for told in reports:
            for timeframe, of in told["timeframes"].items():
                days = sum(of[state] for state in ("complete", "partial", "empty"))
                off = max(of.get("columns", {}).items(), key=lambda item: item[1]["largest"], default=None)
                largest = f"{off[0]} {off[1]['largest']:.3g} of it, {off[1]['at']}" if off else ""
                counts = (days, of["rows"], of["missing"], of.get("differing", ""), largest, of["frozen"], of["spikes"])
                table.add_row(told["symbol"], timeframe, *map(str, counts))
        show_table(table)


def _symbols(config: Settings, named: list[str] | None) -> list[str]:
    """The symbols of the command line, each once; all of the configuration where none is named."""
    return [config.symbol(name).name for name in named_symbols(named)] or [s.name for s in config.symbols]


def _heat_map(summary: dict[str, Any]) -> None:
    console = Console()
    console.print(Text(f"{summary['symbol']} {summary['timeframe']}", style="bold"))
    console.print(Text("        " + "".join(f"{n:<5}" for n in (1, 6, 11, 16, 21, 26, 31)), style="dim"))
    for month, days in groupby(summary["days"], key=lambda d: d["day"][:7]):
        row = Text(f"{month} ")
        for n, one in enumerate(days):
            if not n:
                row.append(" " * (int(one["day"][8:]) - 1))
            glyph, style = _cell(one)
            row.append(glyph, style)
        console.print(row)
    legend = Text("        ")
    for _, glyph, style, meaning in CELLS:
        legend.append(glyph, style).append(f" {meaning}  ")
    for glyph, style, meaning in (EMPTY, ABSENT):
        legend.append(glyph, style).append(f" {meaning}  ")
    console.print(legend)


def _cell(one: dict[str, Any]) -> tuple[str, str]:
    if one["state"] in ("empty", "absent"):
        return (EMPTY if one["state"] == "empty" else ABSENT)[:2]
    share = one["rows"] / one["expected"]
    return next((glyph, style) for least, glyph, style, _ in CELLS if share >= least)


def _incomplete(summary: dict[str, Any]) -> None:
    """The days that are not complete; neighbours without any candle as one row."""
    rows: list[tuple[str, ...]] = []
    for state, run in groupby(summary["days"], key=lambda d: d["state"]):
        days = list(run)
        if state == "partial":
            for one in days:
                longest = max(one["gaps"], key=lambda gap: gap["minutes"])
                where = f"{longest['minutes']} min from {longest['start'][11:16]}"
                rows.append((one["day"], state, str(one["rows"]), str(one["missing"]), str(len(one["gaps"])), where))
        elif state != "complete":
            span = days[0]["day"] if len(days) == 1 else f"{days[0]['day']} to {days[-1]['day']}"
            rows.append((span, state, "0", str(sum(d["missing"] for d in days)), "", ""))
    if not rows:
        return
    table = Table()
    for heading in ("day", "state", "rows", "missing", "gaps", "longest gap"):
        table.add_column(heading, justify="left" if heading in ("day", "state", "longest gap") else "right")
    for row in rows[:LISTED]:
        table.add_row(*row)
    show_table(table)
    _more(len(rows))


def _show_plan(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(plan))
        return
    table = Table("series")
    for heading in ("present", "to fetch", "requests"):
        table.add_column(heading, justify="right")
    for one in plan["series"]:
        table.add_row(one["series"], *(str(one[name]) for name in ("present", "partitions", "requests")))
    show_table(table)
    time = timedelta(seconds=round(plan["seconds"]))
    typer.echo(
        f"{plan['partitions']} partitions to fetch, {plan['present']} left alone; about {plan['requests']} requests, {time} at the "
        "allowed rates. Nothing was fetched."
    )


def _numbers(row: dict[str, Any]) -> list[int]:
    return [row[name] for name in ("rows", "missing", "added", "changed", "lost")]


def _outcomes(outcomes: dict[str, int], *unsaid: str) -> str:
    told = ", ".join(f"{n} {name}" for name, n in sorted(outcomes.items()) if name not in unsaid)
    return f" ({told})" if told else ""


def _more(count: int) -> None:
    if count > LISTED:
        typer.echo(f"… and {count - LISTED} more; --json lists all")


def _show(summary: dict[str, Any], text: str, as_json: bool) -> None:
    typer.echo(json.dumps(summary) if as_json else text)
