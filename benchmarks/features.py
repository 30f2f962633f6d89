"""The 73 features of two years of minutes: how fast, in how much memory, and how fast when live.

Three pipelines compute the same columns from the same SYNTHETIC frames (a random walk without holes): the engine, pandas with
TA-Lib, and a pipeline in the way of FreqAI (``benchmarks/baselines.py``). Before the race their results are compared, every row and
column; then they run in turn, each time in a fresh process, from frames in memory to the frame, imports and reading apart.
``x …`` is the median over the rounds of the ratio to the engine, which a busy machine distorts less than the seconds.
Memory is the process's, with polars in every one and the frames as read.

The task is ``build_features`` from the partitions of a lake to the features file in it, beside what only planning takes.
A live window is what a decision costs: each pipeline repeats it in a process of its own, as the runtime is one, and the
processes take turns.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.common import Row, medians, peak_mib, show, worker
from crpbot_lib.config import ALL_GROUPS, Settings
from crpbot_lib.features import catalog, coingecko
from crpbot_lib.lake import Lake, keys

SYMBOL = "BTC-USD"
FIRST = date(2023, 11, 10)
DAYS = 730
WIDTHS = ("5m", "15m", "1h")
SERIES = ("1m", *WIDTHS, "hourly", "daily")
ENGINE, TALIB, FREQAI = PIPELINES = ("engine", "pandas + TA-Lib", "FreqAI style")
RUNTIME = "runtime (pandas in and out)"
TOLERANCE = 1e-6
"""Of a column's standard deviation."""
LIVE_ROWS, LIVE_HOURS = 1500, 417
LIVE_PROCESSES = 3

Frames = dict[str, pl.DataFrame]


def synthetic(days: int) -> Frames:
    """Candles of ``days`` UTC days from ``FIRST`` on, hourly points from what they need before, daily ones from the listing on.

    Log prices walk with independent normal steps, in cents, four a minute; CoinGecko stamps its hourly points inside the hour.
    """
    rng = np.random.default_rng(4)
    listed = Settings().symbol(SYMBOL).coin_listed
    begin = datetime.combine(FIRST, datetime.min.time(), UTC)
    count = days * 1440
    path = 37_000 * np.exp(np.concatenate([[0.0], rng.normal(0, 3e-4, 4 * count).cumsum()]))
    inside = np.lib.stride_tricks.sliding_window_view(path.round(2), 5)[::4]
    minutes = pl.DataFrame(
        {
            "timestamp": pl.datetime_range(begin, begin + timedelta(days=days), "1m", closed="left", time_unit="us", eager=True),
            **{"open": inside[:, 0], "high": inside.max(axis=1), "low": inside.min(axis=1), "close": inside[:, -1]},
            "volume": rng.lognormal(1, 1, count).round(8),
        }
    )

    def points(series: str, first: datetime, every: str, inside: int) -> pl.DataFrame:
        slots = pl.datetime_range(first, begin + timedelta(days=days), every, closed="left", time_unit="us", eager=True)
        stamps = slots + pl.Series(rng.integers(0, inside, len(slots)) * 1_000_000).cast(pl.Duration("us"))
        price = 37_000 * np.exp(rng.normal(0, 0.004, len(slots)).cumsum())
        return pl.DataFrame(
            {
                "timestamp": stamps,
                "available_at": stamps + coingecko.PUBLICATION_LAG[series],
                "price": price,
                "market_cap": price * 1.95e7,
                "total_volume": rng.lognormal(24, 0.3, len(slots)),
            }
        )

    return {
        "1m": minutes,
        **{width: _bars(minutes, width) for width in WIDTHS},
        "hourly": points("hourly", begin - timedelta(days=catalog.HOURLY_LEAD_DAYS), "1h", 2400),
        "daily": points("daily", datetime.combine(listed, datetime.min.time(), UTC), "1d", 1),
    }


def _bars(minutes: pl.DataFrame, width: str) -> pl.DataFrame:
    return minutes.group_by(pl.col("timestamp").dt.truncate(width), maintain_order=True).agg(
        pl.col("open").first(), pl.col("high").max(), pl.col("low").min(), pl.col("close").last(), pl.col("volume").sum()
    )


def known_at(frames: Frames, end: datetime, minutes: int, hours: int | None = None) -> Frames:
    """What a reader has at ``end``: the last ``minutes`` candles, the bars since the hour in which they begin, the last ``hours``
    hourly points (None: all) and all daily ones."""
    first = (end - timedelta(minutes=minutes)).replace(minute=0)
    candles = {
        w: frames[w].filter(pl.col("timestamp") >= first, pl.col("timestamp").dt.offset_by(w) <= end) for w in ("1m", *WIDTHS)
    }
    points = {s: frames[s].filter(pl.col("available_at") <= end) for s in ("hourly", "daily")}
    return {
        **candles,
        "1m": candles["1m"].tail(minutes),
        "hourly": points["hourly"].tail(hours or points["hourly"].height),
        "daily": points["daily"],
    }


def pipeline(name: str, folder: Path) -> Callable[[], Any]:
    """One pipeline with all that it imports, and the frames of ``folder`` in memory as it takes them."""
    if name == ENGINE:
        from crpbot_lib.features import engineer_features

        frames = {series: pl.read_parquet(folder / f"{series}.parquet") for series in SERIES}
        candles = {width: frames[width] for width in ("1m", *WIDTHS)}
        points = {"hourly": frames["hourly"], "daily": frames["daily"], "all_time_high": None}
        return functools.partial(engineer_features, SYMBOL, candles, points)
    import pandas as pd

    from benchmarks import baselines

    compute = {TALIB: baselines.with_talib, FREQAI: baselines.freqai}[name]
    return functools.partial(compute, {series: pd.read_parquet(folder / f"{series}.parquet") for series in SERIES})


def race(name: str, folder: Path, out: Path | None) -> Row:
    """One process's work: a pipeline once, from frames in memory to the frame."""
    compute = pipeline(name, folder)
    before, wall, cpu = peak_mib(), time.perf_counter(), time.process_time()
    frame = compute()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    row = {"seconds": wall, "cpu seconds": cpu, "MiB before": before, "MiB peak": peak_mib()}
    if out:
        (frame if name == ENGINE else pl.from_pandas(frame)).write_parquet(out)
    return row


def task() -> Row:
    """One process's work: the task of one symbol, parquet in and out."""
    from crpbot_lib.steps import features

    settings = Settings()
    lake = Lake(settings.lake)
    first = FIRST + timedelta(days=catalog.CANDLE_LEAD_DAYS)
    began = time.perf_counter()
    plan = features.plan_features(settings, lake, [SYMBOL], first, first + timedelta(days=DAYS))
    planned, cpu = time.perf_counter(), time.process_time()
    built = features.build_features(settings, lake, plan, SYMBOL)
    seconds, cpu = time.perf_counter() - planned, time.process_time() - cpu
    return {"rows": built["rows"], "plan s": planned - began, "build s": seconds, "build cpu s": cpu, "MiB peak": peak_mib()}


def live(name: str, folder: Path, repeat: int) -> Row:
    """One process's work: a pipeline on the live window, again and again. Lists of milliseconds."""
    compute = _runtime(folder) if name == RUNTIME else pipeline(name, folder)
    wall_ms, cpu_ms = [], []
    for _ in range(repeat):
        wall, cpu = time.perf_counter(), time.process_time()
        compute()
        wall_ms.append((time.perf_counter() - wall) * 1000)
        cpu_ms.append((time.process_time() - cpu) * 1000)
    return {"wall": wall_ms, "cpu": cpu_ms}


def live_row(name: str, processes: Sequence[Row]) -> Row:
    """What several processes of one pipeline took: all their repetitions together, each one's first also apart."""
    wall, cpu = ([ms for process in processes for ms in process[kind]] for kind in ("wall", "cpu"))
    return {
        "pipeline": name,
        "first ms": statistics.median(process["wall"][0] for process in processes),
        "fastest ms": min(wall),
        "median ms": statistics.median(wall),
        "p95 ms": statistics.quantiles(wall, n=20)[-1],
        "median cpu ms": statistics.median(cpu),
    }


def _runtime(folder: Path) -> Callable[[], Any]:
    """The runtime's entry, with a fetcher that has everything in memory."""
    from crpbot_lib.features import engineer_runtime_features

    frames = {series: pl.read_parquet(folder / f"{series}.parquet") for series in SERIES}

    class Fetcher:
        def candles(self, symbol: str, timeframe: str, start: datetime, end: datetime) -> pl.DataFrame:  # noqa: ARG002
            return frames[timeframe]

        def hourly(self, coin: str, start: datetime, end: datetime) -> pl.DataFrame:  # noqa: ARG002
            return frames["hourly"]

        def daily(self, coin: str, start: datetime, end: datetime) -> pl.DataFrame:  # noqa: ARG002
            return frames["daily"]

    return functools.partial(engineer_runtime_features, frames["1m"].to_pandas(), SYMBOL, Fetcher(), True, True)


def differences(engine: pl.DataFrame, other: pl.DataFrame) -> list[str]:
    """The columns of a baseline that are not the engine's, with how much; float32 keeps 7 digits."""
    if (engine.columns, engine.height) != (other.columns, other.height):
        return [f"{other.height} rows of {other.columns}, expected {engine.height} of {engine.columns}"]
    if not engine["timestamp"].equals(other["timestamp"]):
        return ["timestamp"]
    found = [c for c in ("session", "volatility_regime") if not engine[c].equals(other[c].cast(pl.String))]
    for name in catalog.names(ALL_GROUPS):
        mine, theirs = (frame[name].to_numpy().astype(np.float64) for frame in (engine, other))
        apart = np.abs(mine - theirs)
        wrong = apart > TOLERANCE * mine.std() + 2e-7 * np.abs(mine)
        if wrong.any():
            found.append(f"{name} ({wrong.sum():,} rows, up to {apart.max() / mine.std():.1e} standard deviations)")
    return found


def ask(*arguments: str, env: dict[str, str] | None = None) -> Any:
    """What a fresh process measured."""
    process = worker("benchmarks.features", *arguments, env=env or {})
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    return json.loads(out.splitlines()[-1])


def write_frames(frames: Frames, folder: Path) -> None:
    folder.mkdir()
    for series, frame in frames.items():
        frame.write_parquet(folder / f"{series}.parquet")


def fill_lake(frames: Frames, url: str) -> None:
    """The frames as the partitions that fetching makes of them."""
    lake, coin = Lake(url), Settings().symbol(SYMBOL).coin
    for series in ("1m", *WIDTHS, "hourly"):
        for (day,), part in frames[series].group_by(pl.col("timestamp").dt.date(), maintain_order=True):
            key = keys.coingecko("hourly", coin, day) if series == "hourly" else keys.candles(series, SYMBOL, day)
            lake.write_frame(key, part)
    lake.write_frame(keys.coingecko("daily", coin, frames["daily"]["timestamp"][-1].date()), frames["daily"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.features", description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=7)
    add("--live-repeat", type=int, default=100, help="in each of three processes a pipeline")
    add("--json", action="store_true")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    for hidden in ("--pipeline", "--live", "--frames", "--out"):
        add(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        said = _work(options)
        sys.stdout.write(json.dumps(said) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        _measure(Path(folder), options)


def _work(options: argparse.Namespace) -> Any:
    if options.pipeline == "task":
        return task()
    if options.live:
        return live(options.live, Path(options.frames), options.live_repeat)
    return race(options.pipeline, Path(options.frames), Path(options.out) if options.out else None)


def _measure(folder: Path, options: argparse.Namespace) -> None:
    # one more day: the task's first, which is warm-up
    frames = synthetic(DAYS + catalog.CANDLE_LEAD_DAYS)
    minutes = DAYS * 1440 + catalog.SEGMENT_WARM_UP
    begin = frames["1m"]["timestamp"][0]
    write_frames(known_at(frames, begin + timedelta(minutes=minutes), minutes), folder / "race")
    write_frames(known_at(frames, frames["1m"]["timestamp"][-1] + timedelta(minutes=1), LIVE_ROWS, LIVE_HOURS), folder / "live")
    fill_lake(frames, f"file://{folder}/lake")
    del frames

    compare = {name: folder / f"{i}.parquet" for i, name in enumerate(PIPELINES)}
    for name, out in compare.items():
        ask(f"--pipeline={name}", f"--frames={folder}/race", f"--out={out}")
    engine = pl.read_parquet(compare[ENGINE])
    for name in (TALIB, FREQAI):
        if found := differences(engine, pl.read_parquet(compare[name])):
            raise SystemExit(f"{name} does not compute what the engine computes, so there is no race: {'; '.join(found)}")
    shape = f"{engine.height:,} x {len(catalog.names(ALL_GROUPS))} SYNTHETIC"
    del engine

    runs: dict[str, list[Row]] = {name: [] for name in PIPELINES}
    for _ in range(options.rounds):
        done = [ask(f"--pipeline={name}", f"--frames={folder}/race") for name in PIPELINES]
        for name, run in zip(PIPELINES, done, strict=True):
            ratios = {f"x {unit}": run[unit] / done[0][unit] for unit in ("seconds", "cpu seconds")}
            runs[name].append({"pipeline": name, **run, **ratios})
    rows = [medians(each) for each in runs.values()]
    show(f"features: {shape}, frames to frame, median of {options.rounds}, all rows equal{_load()}", rows, options.json)
    env = {"CRPBOT_LAKE": f"file://{folder}/lake"}
    row = medians([ask("--pipeline=task", env=env) for _ in range(options.rounds)])
    show(f"features: the task of one symbol, parquet in and out, median of {options.rounds}{_load()}", [row], options.json)
    runs = {name: [] for name in (*PIPELINES, RUNTIME)}
    for _ in range(LIVE_PROCESSES):
        for name, taken in runs.items():
            taken.append(ask(f"--live={name}", f"--frames={folder}/live", f"--live-repeat={options.live_repeat}"))
    rows = [live_row(name, taken) for name, taken in runs.items()]
    times = f"{LIVE_PROCESSES} processes, {options.live_repeat} times in each"
    show(f"features: a live window of {LIVE_ROWS} rows, {times}{_load()}", rows, options.json)


def _load() -> str:
    return f", load {os.getloadavg()[0]:.1f}"


if __name__ == "__main__":
    main()
