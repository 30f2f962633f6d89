"""Years at once: how fast candles and fundamentals come into a lake, and that memory does not grow with the span.

Each line is a fresh process that loads three symbols, four timeframes and CoinGecko from a local exchange in another process, with
the rate limits lifted. BTC and ETH are real (Binance spot), SOL is synthetic; without the folder of real data all three are.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.common import Row, medians, peak_mib, show, worker
from crpbot_lib.config import TIMEFRAMES, Settings
from crpbot_lib.lake import Lake
from crpbot_lib.sandbox.beside import CloudBeside
from crpbot_lib.sandbox.server import default_data_dir

FIRST = date(2025, 5, 20)
"""The longest unbroken real 1m candles of two symbols begin here and reach 90 days."""
SPANS = (30, 90)


def load(days: int) -> None:
    """One process's work; prints its seconds and its memory."""
    from crpbot_lib.steps import ingest

    settings = Settings()
    lake = Lake(settings.lake)
    imported = peak_mib()
    began = time.monotonic()
    for symbol in settings.symbols:
        ingest.load(settings, lake, symbol.name, FIRST, FIRST + timedelta(days=days))
    sys.stdout.write(json.dumps({"seconds": time.monotonic() - began, "imported": imported, "peak": peak_mib()}) + "\n")


def measure(cloud: CloudBeside, days: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        env = {
            **cloud.env,
            "CRPBOT_LAKE": f"file://{folder}/lake",
            "CRPBOT_COINBASE_REQUESTS_PER_SECOND": "1000000",
            "CRPBOT_COINGECKO_REQUESTS_PER_SECOND": "1000000",
            "CRPBOT_RATE_LIMIT_DIR": folder,
        }
        before = cloud.ask("requests")
        process = worker("benchmarks.load", f"--days={days}", env=env)
        out, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"the load of {days} days ended with {process.returncode}")
        after = cloud.ask("requests")
        said = json.loads(out.splitlines()[-1])
        raw = Path(folder) / "lake" / "raw"
        candles = sum(_rows(raw / "candles" / timeframe) for timeframe in TIMEFRAMES)
        return {
            "days": days,
            "candles": candles,
            "points": _rows(raw / "coingecko"),
            "partitions": sum(1 for _ in raw.rglob("*.parquet")),
            "requests": sum(after[target]["requests"] - before[target]["requests"] for target in after),
            "seconds": said["seconds"],
            "candles /s": candles / said["seconds"],
            "MiB imported": said["imported"],
            "MiB peak": said["peak"],
        }


def _rows(folder: Path) -> int:
    return int(pl.scan_parquet(folder / "**/*.parquet").select(pl.len()).collect().item())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    add = parser.add_argument
    add("--span", type=int, action="append", help=f"days, repeatable (default: {SPANS})")
    add("--repeat", type=int, default=1)
    add("--json", action="store_true")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    add("--days", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        load(options.days)
        return
    with CloudBeside() as cloud:
        cloud.start(**_exchange())
        rows = [medians([measure(cloud, days) for _ in range(options.repeat)]) for days in options.span or SPANS]
    what = "BTC, ETH real, SOL SYNTHETIC" if default_data_dir() else "all SYNTHETIC"
    show(f"load: 3 symbols ({what}), {', '.join(TIMEFRAMES)} and CoinGecko, limits lifted", rows, options.json)


def _exchange() -> dict[str, Any]:
    folder = default_data_dir()
    if folder is None:
        start = datetime.combine(FIRST, datetime.min.time(), UTC)
        return {"synthetic_start": start, "synthetic_end": start + timedelta(days=max(SPANS))}
    return {"data_dir": folder, "venue": "candles_1m_spot", "synthetic_symbols": ["SOL-USD"]}


if __name__ == "__main__":
    main()
