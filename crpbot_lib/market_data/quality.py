"""What can be said about candles and points by looking at them: is it possible, is it whole, do the timeframes agree.

Pure functions on frames. ``check_…`` raises on what cannot be true; ``suspicious``, ``coverage`` and ``compare`` only count.
docs/data_quality.md has the rules and what they were measured on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

import polars as pl

from crpbot_lib.market_data.frames import CANDLE_SCHEMA, SERIES_WIDTH, width
from crpbot_lib.market_data.http import MarketDataError

AGREES = 1e-9
"""Relative difference up to which two floats are the same number; a sum of 60 volumes differs by 1e-14 or so."""

FROZEN_MINUTES = 3
"""The thinnest market at hand that serves minutes without a trade has them two in a row at most; feeds that were down have 4, 13
and 72."""

SAME_FLAT_CANDLES = 4
"""Three flat candles in a row with the same number of contracts is the most that chance gave in 51,000 minutes."""

SPIKE_RANGES = 8
"""Of 1.9 million real candles two go beyond, both in the thinnest market; in liquid ones the largest real wicks reach 6."""

SURROUNDINGS = 60
"""Candles on either side by which a spike is judged."""

ONE_TICK = 1e-4
"""Relative; where most candles are flat, a tick is no spike."""

MINUTE = timedelta(minutes=1)


class QualityError(MarketDataError):
    """A frame holds something that cannot be true; the message names row, column and value."""

    def __init__(self, message: str) -> None:
        super().__init__(message, permanent=True)


@dataclass(frozen=True)
class Gap:
    """A run of absent candles (or points): where it begins and how many minutes it lasts."""

    start: datetime
    minutes: int


@dataclass(frozen=True)
class Coverage:
    """How much of an interval is there."""

    expected: int
    rows: int
    gaps: tuple[Gap, ...]

    @property
    def missing(self) -> int:
        """Absent rows; on 1m candles, minutes."""
        return self.expected - self.rows


@dataclass(frozen=True)
class Finding:
    """Something that can be true but seldom is. ``start`` is its first row, ``value`` the price it stood at or leapt to."""

    kind: Literal["frozen", "spike"]
    start: datetime
    rows: int
    value: float
    detail: str


def suspicious(frame: pl.DataFrame, timeframe: str) -> list[Finding]:
    """What in candles (CANDLE_SCHEMA, sorted) a person should look at, in order of time; never an error.

    ``frozen``: flat candles at one price with volume 0 for FROZEN_MINUTES or more, or the very same candle again (flat ones, which
    thin markets repeat by chance, SAME_FLAT_CANDLES times or more). ``spike``: a candle that stands out of both its neighbours by
    more than SPIKE_RANGES times the range that 90 % of the surrounding candles keep to. docs/data_quality.md has the measurements.
    """
    step = width(timeframe)
    flat, silent = pl.col("high") == pl.col("low"), pl.col("volume") == 0
    follows = pl.col("timestamp").diff() == step
    same = pl.all_horizontal(pl.col(c) == pl.col(c).shift(1) for c in CANDLE_SCHEMA if c != "timestamp")
    runs = (
        frame.lazy()
        .with_columns(run=(~(follows & same)).fill_null(True).cum_sum())
        .group_by("run", maintain_order=True)
        .agg(pl.first("timestamp", "close"), rows=pl.len(), flat=flat.first(), silent=(flat & silent).first())
        .filter(
            pl.when("silent")
            .then(pl.col("rows") * step >= FROZEN_MINUTES * MINUTE)
            .when("flat")
            .then(pl.col("rows") >= SAME_FLAT_CANDLES)
            .otherwise(pl.col("rows") > 1)
        )
        .collect()
    )
    findings = [
        Finding("frozen", at, rows, price, "volume 0, one price" if silent else "the same candle, volume included")
        for at, price, rows, silent in runs.select("timestamp", "close", "rows", "silent").iter_rows()
    ]

    high, low = pl.col("high").log(), pl.col("low").log()
    above = high - pl.max_horizontal(high.shift(1), high.shift(-1))
    below = pl.min_horizontal(low.shift(1), low.shift(-1)) - low
    usual = (high - low).rolling_quantile(0.9, window_size=2 * SURROUNDINGS + 1, center=True, min_samples=SURROUNDINGS // 3)
    spikes = (
        frame.lazy()
        .with_columns(above=above, below=below, usual=usual + ONE_TICK)
        .slice(1, max(frame.height - 2, 0))  # the first and the last have one neighbour: whether they come back is not known
        .with_columns(ratio=pl.max_horizontal("above", "below") / pl.col("usual"))
        .filter(pl.col("ratio") > SPIKE_RANGES)
        .collect()
    )
    for row in spikes.iter_rows(named=True):
        up = row["above"] > row["below"]
        size, price = (row["above"], row["high"]) if up else (row["below"], row["low"])
        side = "above" if up else "below"
        detail = f"{100 * math.expm1(size):.3g} % {side} both neighbours, {row['ratio']:.0f} times the usual range"
        findings.append(Finding("spike", row["timestamp"], 1, price, detail))
    return sorted(findings, key=lambda finding: finding.start)


def check_candles(frame: pl.DataFrame, timeframe: str, start: datetime, end: datetime, what: str) -> None:
    """QualityError unless ``frame`` has the candle schema, no null, NaN or infinity, timestamps on the timeframe's grid within
    ``[start, end)`` that rise, prices above 0, volumes not below 0, highs and lows that enclose open and close. Empty is fine."""
    from crpbot_lib.market_data import schemas

    _refuse(schemas.first_problem(schemas.candle_schema(width(timeframe), start, end), frame), what)


def check_points(frame: pl.DataFrame, series: str, what: str) -> None:
    """QualityError unless ``frame`` has the CoinGecko schema, timestamps on the series' grid that rise, an ``available_at`` after
    each, and values that are null or finite and not below 0. Empty is fine."""
    from crpbot_lib.market_data import schemas

    _refuse(schemas.first_problem(schemas.point_schema(SERIES_WIDTH[series]), frame), what)


def coverage(frame: pl.DataFrame, step: timedelta, start: datetime, end: datetime) -> Coverage:
    """How many of the rows that ``[start, end)`` should have on a grid of ``step`` are in ``frame`` (a column ``timestamp``), and
    where the absent ones are. ``start`` and ``end`` lie on the grid."""
    present = frame.select("timestamp").filter(pl.col("timestamp").is_between(start, end, closed="left")).get_column("timestamp")
    gaps: list[Gap] = []
    # gaps are where two neighbours are more than one step apart, with the interval's ends as neighbours too
    borders = pl.DataFrame({"timestamp": [start - step, end]}, schema={"timestamp": present.dtype}).get_column("timestamp")
    opens = pl.concat([borders.head(1), present, borders.tail(1)])
    wide = pl.DataFrame({"before": opens.head(-1), "after": opens.tail(-1)}).filter(pl.col("after") - pl.col("before") > step)
    for before, after in wide.iter_rows():
        gaps.append(Gap(before + step, (after - before - step) // timedelta(minutes=1)))
    return Coverage(expected=(end - start) // step, rows=present.len(), gaps=tuple(gaps))


def resample(minutes: pl.DataFrame, timeframe: str) -> pl.DataFrame:
    """The candles of ``timeframe`` that 1m candles add up to; a bucket without a minute has none."""
    return minutes.group_by_dynamic("timestamp", every=width(timeframe)).agg(
        pl.col("open").first(),
        pl.col("high").max(),
        pl.col("low").min(),
        pl.col("close").last(),
        pl.col("volume").sum(),
    )


def compare(minutes: pl.DataFrame, fetched: pl.DataFrame, timeframe: str) -> dict[str, Any]:
    """How the candles fetched at ``timeframe`` differ from the resampled 1m ones.

    ``compared``: candles in both; ``differing``: those with any value beyond rounding; ``columns``: of each differing column how
    many rows, the largest relative difference (``largest``) and where, and the largest in the column's own unit (``absolute``);
    ``only_fetched``/``only_resampled``: candles that the other side lacks.
    """
    added_up = resample(minutes, timeframe)
    both = fetched.join(added_up, on="timestamp", suffix="_1m")
    values = [c for c in CANDLE_SCHEMA if c != "timestamp"]
    apart = {c: (pl.col(c) - pl.col(f"{c}_1m")).abs() for c in values}
    scale = {c: pl.max_horizontal(pl.col(c).abs(), pl.col(f"{c}_1m").abs()) for c in values}
    relative = {c: pl.when(scale[c] > 0).then(apart[c] / scale[c]).otherwise(0.0) for c in values}
    columns: dict[str, Any] = {}
    for column in values:
        off = both.select("timestamp", relative=relative[column], absolute=apart[column]).filter(pl.col("relative") > AGREES)
        if off.height:
            at, largest, _ = off.sort("relative", "timestamp", descending=[True, False]).row(0)
            columns[column] = {"rows": off.height, "largest": largest, "at": iso(at), "absolute": off["absolute"].max()}
    return {
        "compared": both.height,
        "differing": both.filter(pl.any_horizontal(relative[c] > AGREES for c in values)).height,
        "only_fetched": fetched.height - both.height,
        "only_resampled": added_up.height - both.height,
        "columns": columns,
    }


def _refuse(problem: str | None, what: str) -> None:
    if problem:
        raise QualityError(f"{what}: {problem}")


def iso(moment: datetime) -> str:
    """``2025-05-05T00:00:00Z``, as records and messages have it."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
