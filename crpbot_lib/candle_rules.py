"""What a candle cannot be, and how long nobody may trade. One place, for the judging of what was fetched and for features."""

from __future__ import annotations

import polars as pl

MAX_NO_TRADE_MINUTES = 15
"""A longer run of missing minutes is an outage. In the thinnest market at hand (a Coinbase derivative with 28 % of its minutes
empty) 99.7 % of the holes are no longer than this; the shortest hole that is known to be a trading break lasts 60 minutes. It is
also the horizon of the label."""

HIGH, LOW, VOLUME = pl.col("high"), pl.col("low"), pl.col("volume")

IMPOSSIBLE: tuple[tuple[str, pl.Expr, str], ...] = (
    *((column, pl.col(column) <= 0, "not above 0") for column in ("open", "high", "low", "close")),
    ("volume", VOLUME < 0, "below 0"),
    *(("high", pl.col(column) > HIGH, f"below {column}") for column in ("open", "close", "low")),
    *(("low", pl.col(column) < LOW, f"above {column}") for column in ("open", "close")),
)
"""The column at fault, where it is, and what it is there. Nulls, NaN and infinity are looked for elsewhere."""
