"""``crpbot runtime``: decisions by the promoted models, or by one version on trial."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated

import typer

from crpbot_lib.cli.common import AsJson, SymbolNames, clear_errors, named_symbols, open_lake
from crpbot_lib.config import Settings
from crpbot_lib.runtime import run

At = Annotated[str | None, typer.Option(help="Replay from this UTC time without waiting, e.g. 2025-05-29T00:00:00Z (dryrun only).")]


def as_of(config: Settings, at: str | None) -> Settings:
    """``config`` deciding as of the time ``at``; ValueError says how to write it."""
    if at is None:
        return config
    try:
        time = datetime.fromisoformat(at)
    except ValueError:
        time = None
    if time is None or time.tzinfo is None:
        raise ValueError(f"--at {at} is no time with a timezone; write it as 2025-05-29T00:00:00Z")
    return config.model_copy(update={"runtime": config.runtime.model_copy(update={"as_of": time.astimezone(UTC)})})


class RunMode(StrEnum):
    DRYRUN = "dryrun"
    LIVE = "live"


def runtime(
    mode: Annotated[RunMode, typer.Option(help="dryrun decides and tells; live also sends to Telegram, champions only.")],
    iterations: Annotated[int, typer.Option(min=1, help="Rounds of one decision per symbol, one a minute.")] = 5,
    model: Annotated[str | None, typer.Option(help="Dry-run this version instead of the champions.")] = None,
    at: At = None,
    symbols: SymbolNames = None,
    as_json: AsJson = False,
) -> None:
    """Decide once a minute per symbol. Exits 1 when predictions are stuck, 0 otherwise."""
    with clear_errors():
        config, lake = open_lake()
        result = run(
            as_of(config, at),
            lake,
            mode.value,
            iterations,
            model,
            symbols=named_symbols(symbols) or None,
            emit=(lambda line: typer.echo(line, err=True)) if as_json else typer.echo,
        )
    if as_json:
        typer.echo(json.dumps(result))
    for reason in [*result["skipped"], *result["stuck"].values()]:
        typer.echo(f"error: {reason}" if reason in result["stuck"].values() else f"warning: {reason}", err=True)
    if not result["not_stuck"]:
        raise typer.Exit(1)
