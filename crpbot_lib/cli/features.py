"""``crpbot features``: build a version, verify it, explain a feature."""

from __future__ import annotations

import json
from datetime import date
from typing import Annotated

import typer
from rich.table import Table

from crpbot_lib.cli.common import AsJson, SymbolNames, clear_errors, day, named_symbols, open_lake, show_table
from crpbot_lib.config import settings
from crpbot_lib.features import catalog, dictionary
from crpbot_lib.features.runtime import check_flags
from crpbot_lib.steps import features as steps

app = typer.Typer(no_args_is_help=True, help="Features: build, verify, explain.")


@app.command()
def build(
    start: Annotated[date, typer.Option(parser=day, metavar="YYYY-MM-DD", help="first UTC day")],
    end: Annotated[date, typer.Option(parser=day, metavar="YYYY-MM-DD", help="UTC day after the last one")],
    symbols: SymbolNames = None,
    use_coingecko_premium: Annotated[
        bool | None, typer.Option(help="must agree with the symbols' catalogs; changes nothing")
    ] = None,
    include_multi_tf: Annotated[bool | None, typer.Option(help="must agree with the symbols' catalogs; changes nothing")] = None,
    as_json: AsJson = False,
) -> None:
    """Plan, build and gate one version of the features of the UTC days [start, end)."""
    with clear_errors():
        config, lake = open_lake()
        names = named_symbols(symbols) or [s.name for s in config.symbols]
        _check_mission_flags(names, include_multi_tf, use_coingecko_premium)
        plan = steps.plan_features(config, lake, names, start, end)
        built = [steps.build_features(config, lake, plan, name) for name in names]
        steps.gate_features(config, lake, plan)
    if as_json:
        typer.echo(json.dumps({**{k: plan[k] for k in ("version", "start", "end", "inputs")}, "symbols": built}))
        return
    table = Table("symbol", "features", "rows", "dropped", "filled", "outages", "seconds", title=f"features {plan['version']}")
    for row in built:
        table.add_row(*(str(row[k]) for k in ("symbol", "features", "rows", "dropped", "filled", "outages", "seconds")))
    show_table(table)
    typer.echo(f"gate passed; manifest and files are under features/version={plan['version']}/ of {lake.root}")


@app.command()
def verify(
    version: Annotated[str, typer.Option(help="a version that has passed the gate; without it the latest")] = "",
    as_json: AsJson = False,
) -> None:
    """Check a version's files against the catalog and against their manifest."""
    with clear_errors():
        config, lake = open_lake()
        manifest = steps.verify_features(config, lake, version or None)
    if as_json:
        typer.echo(json.dumps(manifest))
        return
    for symbol, entry in manifest["symbols"].items():
        typer.echo(f"{symbol}: {entry['features']} features, {entry['rows']} rows, catalog {entry['hash']}: agrees")


@app.command()
def explain(name: Annotated[str, typer.Argument(help="a feature, e.g. bb_position")], as_json: AsJson = False) -> None:
    """Say what a feature is, where it comes from and which symbols have it."""
    with clear_errors():
        feature = catalog.find(name)
        series, unit = dictionary.SERIES[feature.group]
        symbols = [s.name for s in settings().symbols if feature.group in s.feature_groups]
    facts = {
        "name": feature.name,
        "group": feature.group,
        "formula": feature.formula,
        "unit": feature.unit,
        "dtype": feature.dtype,
        "warm_up": feature.warm_up,
        "symbols": symbols,
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    typer.echo(f"{feature.name} ({feature.group}, {feature.dtype}, unit: {feature.unit})")
    typer.echo(f"  {feature.formula}")
    typer.echo(f"  from {series}; warm after {feature.warm_up} {unit}; symbols: {', '.join(symbols) or 'none'}")


@app.command("dictionary")
def dictionary_() -> None:
    """Print docs/features.md, the data dictionary, from the catalog."""
    typer.echo(dictionary.markdown(), nl=False)


def _check_mission_flags(names: list[str], include_multi_tf: bool | None, use_coingecko_premium: bool | None) -> None:
    """The flags of the written workflow hold for all symbols of one call: True asks for the groups where the catalog has them."""
    entries = [settings().symbol(name) for name in names]
    has = {
        "multi": [s for s in entries if "multi_timeframe" in s.feature_groups],
        "coingecko": [s for s in entries if "coingecko_hourly" in s.feature_groups],
    }
    for entry in entries:
        multi = None if include_multi_tf and has["multi"] else include_multi_tf
        premium = None if use_coingecko_premium and has["coingecko"] else use_coingecko_premium
        check_flags(entry, multi, premium)
