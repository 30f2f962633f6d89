"""Missing minutes: nobody traded, or they were not served.

An exchange serves no candle for a minute without a trade, and none while it is down. One day of one symbol cannot tell which: a
day's edges depend on its neighbours, and an outage shows in the other symbols and in the wider candles. So first each symbol's
holes are summed up over the whole interval (``holes``, one symbol in memory at a time), then they are judged together
(``classify``). Pure functions on frames; docs/data_quality.md has the rules and what they were measured on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import date, datetime

import polars as pl

from crpbot_lib.market_data.frames import TIMESTAMP

MINUTE_COLUMNS = ("timestamp", "high", "low", "volume")
"""What ``holes`` reads of 1m candles."""

WIDER_COLUMNS = ("timestamp", "volume")
"""What ``holes`` reads of wider candles."""

HOLE_SCHEMA: dict[str, pl.DataType] = {
    "start": TIMESTAMP,
    "minutes": pl.Int64(),
    "known": pl.Boolean(),
    "edge": pl.Boolean(),
    "frozen_before": pl.Int64(),
    "traded": pl.Boolean(),
}

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


def holes(
    minutes: pl.DataFrame,
    wider: Mapping[str, pl.DataFrame],
    start: datetime,
    end: datetime,
    *,
    fetched: Collection[date] | None = None,
) -> pl.DataFrame:
    """The holes of one symbol's 1m candles that touch ``[start, end)``, one a row (HOLE_SCHEMA), for ``classify``.

    ``minutes`` (MINUTE_COLUMNS) and ``wider`` (timeframe to WIDER_COLUMNS), both sorted, may reach beyond the interval: a hole over
    its ends is then one hole, with its true start and length. ``fetched`` are the UTC days that were asked of the exchange, those
    beyond the interval included (None: the interval's and all that have a minute). A day that was not fetched is no hole; it
    stands in the result as ``known`` false, and a hole beside it is an ``edge``.
    """
    raise NotImplementedError


def classify(by_symbol: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """What each hole is (GAP_SCHEMA, sorted by symbol and start), from the holes of all symbols over one interval."""
    raise NotImplementedError
