"""``crpbot demo``: the whole workflow on one machine."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class DemoSource(StrEnum):
    """Where the demonstration's candles come from."""

    AUTO = "auto"
    SYNTHETIC = "synthetic"
    LIVE = "live"


def demo(
    source: Annotated[
        DemoSource,
        typer.Option(help="auto: the data folder if there is one, else synthetic; live: candles from Coinbase's public API"),
    ] = DemoSource.AUTO,
    days: Annotated[int, typer.Option(min=1, max=14, help="days of market data to train on")] = 3,
    keep: Annotated[bool, typer.Option("--keep", help="keep Airflow and the local cloud up afterwards, until Ctrl-C")] = False,
    port: Annotated[int, typer.Option(help="port of Airflow's UI; 0 takes a free one")] = 0,
    state: Annotated[Path, typer.Option(help="directory of the demonstration; emptied at the start")] = Path(".crpbot/demo"),
) -> None:
    """Fetch, train, terminate, verify and promote on this machine, with no AWS account. Exits 0 only if every step succeeded."""
    from crpbot_lib.sandbox.demo import Demo, demonstrate

    raise typer.Exit(demonstrate(Demo(state=state, source=source.value, days=days, keep=keep, port=port)))
