"""What all commands share: options, one-line errors, tables whose ids can be copied."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from crpbot_lib.config import Settings, settings
from crpbot_lib.gpu.instances import API_ERRORS, GpuError
from crpbot_lib.lake import Lake, LakeError
from crpbot_lib.market_data import MarketDataError
from crpbot_lib.market_data.progress import LogMeter, Meter
from crpbot_lib.registry import RegistryError
from crpbot_lib.runtime import RuntimeRefusedError
from crpbot_lib.training import TrainingError

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]
SymbolNames = Annotated[
    list[str] | None,
    typer.Option(
        "--symbols",
        "--symbol",
        metavar="NAME,…",
        help="Symbols of the configuration, separated by commas or given again and again. Without it: all of them.",
    ),
]

EXPECTED = (
    RegistryError,
    RuntimeRefusedError,
    MarketDataError,
    TrainingError,
    GpuError,
    LakeError,
    *API_ERRORS,
    OSError,
    # FeatureError is one; so are an unknown symbol and a value that is not valid
    ValueError,
)


def day(value: str) -> date:
    """A UTC day of the command line, written as 2025-05-05."""
    try:
        return datetime.strptime(value, "%Y-%m-%d").replace(tzinfo=UTC).date()
    except ValueError:
        raise typer.BadParameter(f"{value!r} is not a day; write it as 2025-05-05") from None


def named_symbols(given: list[str] | None) -> list[str]:
    """The names of a ``SymbolNames`` option, each once, in their order; empty where none is given."""
    return list(dict.fromkeys(name.strip() for text in given or [] for name in text.split(",") if name.strip()))


def open_lake() -> tuple[Settings, Lake]:
    """The settings of this process and the lake that they name."""
    config = settings()
    return config, Lake(config.lake)


def show_table(table: Table) -> None:
    """Prints ``table`` as wide as it is: a terminal may wrap it, but no id is cut."""
    console = Console()
    width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    Console(width=max(width, console.width)).print(table)


class _Bar:
    """A ``Meter`` in the terminal: one bar for each thing that is started."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def start(self, what: str, partitions: int, requests: float) -> None:
        # without work there is nothing to show
        self._task = self._bars.add_task(what, total=requests, stored=0, partitions=partitions, doing="") if partitions else None
        self._stored = 0

    def advance(self, partitions: int, requests: float, doing: str) -> None:
        if self._task is not None:
            self._stored += partitions
            self._bars.update(self._task, advance=requests, stored=self._stored, doing=doing)


@contextmanager
def meter() -> Iterator[Meter]:
    """How far a long command is: a bar on stderr where that is a terminal, otherwise a line every ten seconds."""
    console = Console(stderr=True)
    if not sys.stderr.isatty() or console.is_dumb_terminal:
        log = logging.getLogger("crpbot")
        log.setLevel(logging.INFO)
        yield LogMeter(log)
        return
    stored = TextColumn("{task.fields[stored]} of {task.fields[partitions]} partitions")
    columns = (TextColumn("{task.description}"), BarColumn(), stored, TimeElapsedColumn(), TimeRemainingColumn())
    # log lines go through the bar, which else would be torn by them
    handlers = [h for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler) and h.stream is sys.stderr]
    with Progress(*columns, TextColumn("[dim]{task.fields[doing]}"), console=console) as bars:
        for handler in handlers:
            handler.setStream(sys.stderr)
        try:
            yield _Bar(bars)
        finally:
            for handler in handlers:
                handler.setStream(sys.__stderr__)


@contextmanager
def clear_errors() -> Iterator[None]:
    """An expected failure is a message on stderr and exit status 1, not a traceback; Ctrl-C is one line and 130."""
    try:
        yield
    except EXPECTED as error:
        typer.echo(f"error: {_text(error)}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("interrupted: nothing is half-written, and the command can be run again", err=True)
        raise typer.Exit(130) from None


def _text(error: Exception) -> str:
    """Pydantic's errors as one line each: the setting, what it was, what is wrong."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(f"{'.'.join(map(str, e['loc']))}={e.get('input')!r}: {e['msg']}" for e in error.errors())
