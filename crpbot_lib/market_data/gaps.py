"""Missing minutes: nobody traded, or they were not served.

An exchange serves no candle for a minute without a trade, and none while it is down. One day of one symbol cannot tell which: a
day's edges depend on its neighbours, and an outage shows in the other symbols and in the wider candles. So first each symbol's
holes are summed up over the whole interval (``holes``, one symbol in memory at a time), then they are judged together
(``classify``). Pure functions on frames; docs/data_quality.md has the rules and what they were measured on.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from datetime import UTC, date, datetime, timedelta

import polars as pl

from crpbot_lib import candle_rules
from crpbot_lib.market_data.frames import TIMESTAMP, width
from crpbot_lib.market_data.quality import AGREES, FROZEN_MINUTES, MINUTE

MINUTE_COLUMNS = ("timestamp", "high", "low", "volume")
"""What ``holes`` reads of 1m candles."""

WIDER_COLUMNS = ("timestamp", "volume")
"""What ``holes`` reads of wider candles."""

QUIET_MINUTES = 120
"""On either side of a hole: how often this symbol is silent at this time of the day."""

BESIDE = timedelta(days=1)
"""What lies so far beyond the interval still tells something about the holes at its ends."""

MINUTES_PER_YEAR = 365 * 24 * 60
CHANCE_PER_YEAR = 1e-3
"""All symbols silent at once is an outage where chance would give fewer such minutes a year than this. In the thin markets at hand
the least likely common silence has 0.045 a year, 45 times as many; the two real breaks have less than 1e-80."""

HOLE_SCHEMA: dict[str, pl.DataType] = {
    "start": TIMESTAMP,
    "minutes": pl.Int64(),
    "known": pl.Boolean(),
    "inside": pl.Boolean(),
    "edge": pl.Boolean(),
    "frozen_before": pl.Int64(),
    "traded": pl.Boolean(),
    "quiet": pl.Float64(),
}
"""``inside``: in the interval or over an end of it, not only beside it; ``frozen_before`` in minutes; ``quiet``: the share of
missing minutes in the QUIET_MINUTES on either side."""

GAP_SCHEMA: dict[str, pl.DataType] = {
    "symbol": pl.String(),
    "start": TIMESTAMP,
    "minutes": pl.Int64(),
    "kind": pl.String(),
    "evidence": pl.List(pl.String()),
}
"""``kind`` is ``no_trade`` or ``outage``, ``evidence`` out of EVIDENCE, in its order."""

EVIDENCE = ("long", "frozen_before", "traded", "all_symbols", "edge")
"""``edge`` says that the hole ends where nothing was fetched and may be longer; each of the others makes it an outage."""

END = pl.col("start") + pl.col("minutes") * MINUTE
"""Of a hole: the first minute after it."""


def holes(
    minutes: pl.DataFrame,
    wider: Mapping[str, pl.DataFrame],
    start: datetime,
    end: datetime,
    *,
    fetched: Collection[date] | None = None,
) -> pl.DataFrame:
    """The holes of one symbol's 1m candles in and beside ``[start, end)``, one a row (HOLE_SCHEMA), for ``classify``.

    ``minutes`` (MINUTE_COLUMNS) and ``wider`` (timeframe to WIDER_COLUMNS), sorted and checked, may reach a day beyond the
    interval: a hole over its ends is then one hole, with its true start and length. ``fetched`` are the UTC days that were asked
    of the exchange, those beyond the interval included (None: all of the interval, and what lies between it and the outermost
    minutes). A day that was not fetched is no hole; it stands in the result as ``known`` false, and a hole beside it is an
    ``edge``.
    """
    opens = minutes.get_column("timestamp")
    spans = _spans(start, end, opens, fetched)
    unknown = _unknown(spans, start - BESIDE, end + BESIDE)
    found = pl.concat([unknown.clear(), *(_absent(opens, since, until) for since, until in spans)], how="diagonal")
    found = found.with_columns(inside=(pl.col("start") < end) & (start < END))
    found = _with_traded(_with_frozen(found, minutes), minutes, wider)
    return pl.concat([found.select(*HOLE_SCHEMA), unknown]).sort("start")


def classify(by_symbol: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """What each hole is (GAP_SCHEMA, sorted by symbol and start), from the ``holes`` of all symbols over one interval.

    An outage has evidence: it is longer than ``candle_rules.MAX_NO_TRADE_MINUTES``, the price stood still with volume 0 right
    before it, a wider candle knows of trades in it, or all symbols that were fetched (two at least) are missing at once for
    longer than chance allows. Without any, nobody traded. ``edge`` alone is no evidence.
    """
    together = _all_at_once(by_symbol)
    judged = [pl.DataFrame(schema=GAP_SCHEMA)]
    for symbol in sorted(by_symbol):
        known = by_symbol[symbol].filter("known", "inside")
        signs = {
            "long": pl.col("minutes") > candle_rules.MAX_NO_TRADE_MINUTES,
            "frozen_before": pl.col("frozen_before") >= FROZEN_MINUTES,
            "traded": pl.col("traded"),
            "all_symbols": pl.col("at_once"),
            "edge": pl.col("edge"),
        }
        judged.append(
            _with_overlap(known, together, "at_once").select(
                pl.lit(symbol).alias("symbol"),
                "start",
                "minutes",
                kind=pl.when(pl.any_horizontal(signs[name] for name in EVIDENCE if name != "edge"))
                .then(pl.lit("outage"))
                .otherwise(pl.lit("no_trade")),
                evidence=pl.concat_list(pl.when(signs[name]).then(pl.lit(name)) for name in EVIDENCE).list.drop_nulls(),
            )
        )
    return pl.concat(judged)


def _spans(start: datetime, end: datetime, opens: pl.Series, fetched: Collection[date] | None) -> list[tuple[datetime, datetime]]:
    """The stretches of time that were asked for, in order, none touching the next."""
    if fetched is None:
        first, last = (opens[0], opens[-1] + MINUTE) if opens.len() else (start, end)
        return [(min(start, first), max(end, last))]
    spans: list[tuple[datetime, datetime]] = []
    for day in sorted(fetched):
        midnight = datetime(day.year, day.month, day.day, tzinfo=UTC)
        since = spans.pop()[0] if spans and spans[-1][1] == midnight else midnight
        spans.append((since, midnight + timedelta(days=1)))
    return spans


def _unknown(spans: list[tuple[datetime, datetime]], start: datetime, end: datetime) -> pl.DataFrame:
    """The parts of ``[start, end)`` outside of ``spans``, as rows of HOLE_SCHEMA."""
    borders = [start, *(moment for span in spans for moment in span), end]
    parts = [(max(since, start), min(until, end)) for since, until in zip(borders[::2], borders[1::2], strict=True)]
    rows = [(since, (until - since) // MINUTE, False, False, False, 0, False, 0.0) for since, until in parts if until > since]
    return pl.DataFrame(rows, schema=HOLE_SCHEMA, orient="row")


def _absent(opens: pl.Series, since: datetime, until: datetime) -> pl.DataFrame:
    """``start, minutes, known, edge, quiet`` of the runs of missing minutes in ``[since, until)``."""
    inside = opens.filter((opens >= since) & (opens < until))
    ends = pl.Series([since - MINUTE, until], dtype=TIMESTAMP)
    borders = pl.concat([ends.head(1), inside.cast(TIMESTAMP), ends.tail(1)])
    runs = pl.DataFrame({"start": borders.head(-1) + MINUTE, "end": borders.tail(-1)}).filter(pl.col("end") > pl.col("start"))

    left = pl.max_horizontal(pl.col("start") - QUIET_MINUTES * MINUTE, pl.lit(since, TIMESTAMP))
    right = pl.min_horizontal(pl.col("end") + QUIET_MINUTES * MINUTE, pl.lit(until, TIMESTAMP))
    length = (pl.col("end") - pl.col("start")).dt.total_minutes()
    runs = runs.with_columns(left=left, right=right, minutes=length)
    before, after = (inside.search_sorted(runs[side], side="left").cast(pl.Int64) for side in ("left", "right"))
    around = (pl.col("right") - pl.col("left")).dt.total_minutes() - pl.col("minutes")
    # one more than there are, so that a market that is never silent still has a share above 0
    return runs.select(
        "start",
        "minutes",
        known=True,
        edge=(pl.col("start") == since) | (pl.col("end") == until),
        quiet=(around - (after - before) + 1) / (around + 1),
    )


def _with_frozen(found: pl.DataFrame, minutes: pl.DataFrame) -> pl.DataFrame:
    """Adds how many minutes the price stood still, with volume 0, right before each hole."""
    still = (pl.col("high") == pl.col("low")) & (pl.col("volume") == 0)
    goes_on = still & still.shift(1) & (pl.col("high") == pl.col("high").shift(1)) & (pl.col("timestamp").diff() == MINUTE)
    row = pl.int_range(pl.len())
    began = pl.when(goes_on.fill_null(False)).then(None).otherwise(row).forward_fill()
    runs = minutes.lazy().select(
        before=pl.col("timestamp").cast(TIMESTAMP), frozen_before=pl.when(still).then(row - began + 1).otherwise(0)
    )
    return (
        found.lazy()
        .drop("frozen_before")
        .with_columns(before=pl.col("start") - MINUTE)
        .join(runs, on="before", how="left", maintain_order="left")
        .with_columns(pl.col("frozen_before").fill_null(0))
        .collect()
    )


def _with_traded(found: pl.DataFrame, minutes: pl.DataFrame, wider: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """Adds whether a wider candle has volume that its minutes do not add up to, where the hole is all that these lack."""
    traded: set[int] = set()
    for timeframe, candles in wider.items():
        step = width(timeframe)
        served = (
            minutes.lazy()
            .group_by(timestamp=pl.col("timestamp").dt.truncate(step))
            .agg(there=pl.len().cast(pl.Int64), served=pl.sum("volume"))
        )
        short = (
            candles.lazy()
            .select("timestamp", "volume")
            .join(served, on="timestamp", how="left")
            .with_columns(pl.col("there", "served").fill_null(0))
            .filter(pl.col("there") < step // MINUTE, pl.col("volume") > pl.col("served") * (1 + AGREES))
            .select(
                start=pl.col("timestamp").cast(TIMESTAMP),
                end=(pl.col("timestamp") + step).cast(TIMESTAMP),
                lacks=step // MINUTE - pl.col("there"),
                last=(pl.col("timestamp") + step - MINUTE).cast(TIMESTAMP),
            )
            .sort("end")
            .collect()
        )
        pairs = short.join_asof(
            found.select(hole=pl.int_range(pl.len()), hole_start="start", hole_end=END),
            left_on="last",
            right_on="hole_start",
        ).drop_nulls("hole")
        common = pl.min_horizontal("end", "hole_end") - pl.max_horizontal("start", "hole_start")
        traded.update(pairs.filter(common == pl.col("lacks") * MINUTE)["hole"])
    return found.drop("traded").with_columns(traded=pl.int_range(pl.len()).is_in(sorted(traded)))


def _with_overlap(found: pl.DataFrame, runs: pl.DataFrame, name: str) -> pl.DataFrame:
    """Adds whether any of ``runs`` (``start, end``, sorted, apart) touches the hole."""
    last = runs.select(run_start="start", run_end="end")
    return (
        found.with_columns(last=END - MINUTE)
        .join_asof(last, left_on="last", right_on="run_start")
        .with_columns((pl.col("run_end") > pl.col("start")).fill_null(False).alias(name))
    )


def _all_at_once(by_symbol: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """``start, end`` of the runs of minutes that all symbols miss, where that cannot be chance. A symbol that was not fetched has
    no say, but two must be missing."""
    fewest = min(by_symbol.values(), key=pl.DataFrame.__len__, default=pl.DataFrame(schema=HOLE_SCHEMA))
    possible = fewest.select("start", end=END)
    near = [_with_overlap(found, possible, "near").filter("near") for found in by_symbol.values()]
    rows = pl.concat([_with_overlap(fewest, possible, "near").clear(), *near]).lazy()
    change = {"missing": pl.col("known").cast(pl.Int64), "silent": pl.lit(1)}
    events = pl.concat(
        [
            rows.select(pl.col("start").alias("at"), **change),
            rows.select(END.alias("at"), **{name: -by for name, by in change.items()}),
        ]
    )
    runs = (
        events.group_by("at")
        .sum()
        .sort("at")
        .select(start="at", end=pl.col("at").shift(-1), missing=pl.col("missing").cum_sum(), silent=pl.col("silent").cum_sum())
        .with_columns(all=(pl.col("silent") == len(by_symbol)) & (pl.col("missing") >= 2))
        .with_columns(run=pl.col("all").rle_id())
        .filter("all")
        .group_by("run", maintain_order=True)
        .agg(pl.first("start"), pl.last("end"))
        .drop("run")
        .with_columns(chance=pl.lit(math.log(MINUTES_PER_YEAR)))
        .collect()
    )
    for found in by_symbol.values():
        hole = found.filter("known").select(hole_start="start", hole_end=END, quiet="quiet")
        long = (pl.col("end") - pl.col("start")).dt.total_minutes()
        silent = pl.when(pl.col("hole_end") > pl.col("start")).then(long * pl.col("quiet").log()).otherwise(0.0)
        runs = runs.join_asof(hole, left_on="start", right_on="hole_start").select(
            "start", "end", chance=pl.col("chance") + silent.fill_null(0.0)
        )
    return runs.filter(pl.col("chance") < math.log(CHANCE_PER_YEAR))
