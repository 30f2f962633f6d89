"""Every key of the lake, relative to its root. No other module spells a key."""

from __future__ import annotations

from datetime import date


def candles(timeframe: str, symbol: str, day: date) -> str:
    """Candles of one symbol, one timeframe, one UTC day, as served."""
    return f"raw/candles/{timeframe}/symbol={symbol}/date={day.isoformat()}/candles.parquet"


def coingecko(series: str, coin: str, day: date) -> str:
    """CoinGecko points of one coin. ``hourly``: the points of that UTC day. ``daily``: the daily history from the coin's listing,
    or what features need of it where the plan is short, up to and including the point of that day."""
    return f"raw/coingecko/{series}/coin={coin}/date={day.isoformat()}/points.parquet"


def partitions(key: str) -> str:
    """The prefix of all days of the series that the partition ``key`` belongs to."""
    return key[: key.index("/date=") + 1]


def quality(day: date) -> str:
    """The quality record of one day's partitions."""
    return f"raw/quality/date={day.isoformat()}/report.json"


def gaps(start: date, end: date) -> str:
    """The minutes without a 1m candle in the UTC days ``[start, end)``, of all symbols, each told as no trade or as outage."""
    return f"raw/gaps/start={start.isoformat()}/end={end.isoformat()}/gaps.parquet"


def features(version: str, symbol: str) -> str:
    return f"features/version={version}/features_{symbol}_1m.parquet"


def features_sidecar(version: str, symbol: str) -> str:
    """What was filled and dropped on the way to one features file."""
    return f"features/version={version}/features_{symbol}_1m.json"


def features_manifest(version: str) -> str:
    return f"features/version={version}/manifest.json"


FEATURES_LATEST = "features/latest.json"


TRAINING_RUNS = "training-runs/"


def training_run(run: str, name: str = "") -> str:
    """A file of one training run: ``job.json``, ``status.json``, ``cost.json``, …; without a name the run's prefix."""
    return f"{TRAINING_RUNS}{run}/{name}"


def launch(run: str, generation: int) -> str:
    """The record of one launch, written before RunInstances (termination.md, Identity)."""
    return training_run(run, f"launches/{generation:03d}.json")


LEDGER = "ledger/"


def ledger_month(month: str) -> str:
    """The prefix of what the launches of one UTC month, written 2026-11, cost."""
    return f"{LEDGER}month={month}/"


def ledger(month: str, run: str, generation: int) -> str:
    """What one generation of a run cost, or may cost yet, under the month in which it was begun."""
    return f"{ledger_month(month)}{run}-{generation:03d}.json"


def run_symbol(run: str, symbol: str, name: str) -> str:
    """A file that training wrote for one symbol: ``model.pt``, ``metrics.json``."""
    return training_run(run, f"{symbol}/{name}")


def run_manifest(run: str) -> str:
    """What the training of a run has left, with the sha256 of each file; written last."""
    return training_run(run, "manifest.json")


CHECKPOINT_SLOTS = ("checkpoint", "checkpoint-2")
"""Written in turn, so that the writer's death never touches the last good one."""


def checkpoint(run: str, symbol: str, slot: str) -> str:
    """The state of a training between two steps, in one of ``CHECKPOINT_SLOTS``; valid with its ``checkpoint_note`` alone."""
    return run_symbol(run, symbol, f"{slot}.pt")


def checkpoint_note(run: str, symbol: str, slot: str) -> str:
    """What the checkpoint beside it is, its sha256 among it; written after it."""
    return run_symbol(run, symbol, f"{slot}.json")


def model(prefix: str, version: str, name: str = "") -> str:
    """A file of one published model version; ``prefix`` is the setting ``training.prefix``."""
    return f"{prefix}/{version}/{name}"


def promoted(prefix: str) -> str:
    """The pointer that the runtime follows."""
    return f"{prefix}/promoted.json"
