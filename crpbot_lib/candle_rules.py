"""What a candle cannot be. One list, by which fetched candles are judged before they are stored and again before features are
computed from them."""

from __future__ import annotations

import polars as pl

HIGH, LOW, VOLUME = pl.col("high"), pl.col("low"), pl.col("volume")

IMPOSSIBLE: tuple[tuple[str, pl.Expr, str], ...] = (
    *((column, pl.col(column) <= 0, "not above 0") for column in ("open", "high", "low", "close")),
    ("volume", VOLUME < 0, "below 0"),
    *(("high", pl.col(column) > HIGH, f"below {column}") for column in ("open", "close", "low")),
    *(("low", pl.col(column) < LOW, f"above {column}") for column in ("open", "close")),
)
"""The column at fault, where it is, and what it is there. Nulls, NaN and infinity are looked for elsewhere."""
