"""What the benchmarks share: fresh processes to measure in, their peak memory, medians, tables."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table

from crpbot_lib.sandbox import processes

Row = dict[str, Any]


def machine() -> str:
    """What the figures were measured on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}, polars {pl.__version__}"


def worker(module: str, *arguments: str, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A fresh process of a benchmark, which ends with this one. Of the caller's settings and AWS credentials it sees none."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("CRPBOT_", "AWS_"))}
    command = [sys.executable, "-m", module, "--worker", *arguments]
    return processes.spawn(command, env={**inherited, **env}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def peak_mib() -> float:
    """The most memory that this process has held. Not ``ru_maxrss``, which a process inherits from the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def medians(runs: Sequence[Row]) -> Row:
    """One row of several: the median of each number, the rest as in the first."""
    return {k: statistics.median(r[k] for r in runs) if isinstance(v, float) else v for k, v in runs[0].items()}


def show(title: str, rows: Sequence[Row], as_json: bool) -> None:
    """Prints the rows under ``title``, with the machine."""
    if as_json:
        sys.stdout.write(json.dumps({"benchmark": title, "machine": machine(), "rows": list(rows)}) + "\n")
        return
    table = Table(title=f"{title} ({machine()})", title_justify="left")
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _cell(value: float | str) -> str:
    if isinstance(value, float):
        if abs(value) < 1:
            return f"{value:.4g}"
        return f"{value:,.2f}" if abs(value) < 10 else f"{value:,.1f}"
    return value if isinstance(value, str) else f"{value:,}"
