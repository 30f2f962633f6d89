"""The data dictionary ``docs/features.md``, written from the catalog. ``crpbot features dictionary`` prints it."""

from __future__ import annotations

from datetime import timedelta

from crpbot_lib import candle_rules
from crpbot_lib.config import ALL_GROUPS, DEFAULT_SYMBOLS, FeatureGroup, Symbol
from crpbot_lib.features import catalog, coingecko

SERIES: dict[FeatureGroup, tuple[str, str]] = {
    "base": ("the symbol's own 1-minute candles", "minutes"),
    "multi_timeframe": ("the last closed 5m, 15m and 1h candles", "minutes"),
    "coingecko_hourly": ("CoinGecko's hourly points, joined as of `available_at`", "hours"),
    "coingecko_daily": ("CoinGecko's daily points, joined as of `available_at`", "days"),
}


def markdown() -> str:
    """The whole page; equal catalogs give equal text."""
    symbols = "\n".join(_symbol(s) for s in DEFAULT_SYMBOLS)
    groups = "\n".join(_group(group) for group in ALL_GROUPS)
    return f"""# Features

Written by `crpbot features dictionary > docs/features.md` from `crpbot_lib/features/catalog.py`; a test keeps it fresh.

| symbol | features | groups | catalog hash |
|---|---:|---|---|
{symbols}

A row is the 1-minute candle that opens at `timestamp` (UTC); the decision is taken when it closes, a minute later. A value stands
on a row only if it was known then. All features are `Float32`, without nulls: a row that lacks a value is dropped. The file also
carries {", ".join(f"`{c}`" for c in catalog.EXCLUDED)}, which no model sees.

## How holes are treated

* Up to {candle_rules.MAX_NO_TRADE_MINUTES} missing minutes are minutes without a trade: a flat candle at the last close with
  volume 0, as the exchange's convention has it, listed in the sidecar file. More are an outage: nothing looks back over it, and
  rows stand again {catalog.SEGMENT_WARM_UP} minutes after it, when everything is warm. The same holds for the beginning of the
  candles.
* A 5m, 15m or 1h candle that is not served is flat where no minute traded, and unknown where minutes traded.
* CoinGecko slots without a point are unknown, and so is every window that holds one. RSI and MACD of the hours step over up to
  {_hours(coingecko.MAX_HOURLY_HOLE)} hours and begin anew after a longer hole. A point counts for at most
  {_hours(coingecko.HOURLY_MAX_AGE)} hours (daily: {coingecko.DAILY_MAX_AGE.days} days) after it became available.
* Nothing is back-filled, and no neutral value stands in for an unknown one.

Before an interval, {catalog.CANDLE_LEAD_DAYS} day of candles, {catalog.HOURLY_LEAD_DAYS} days of hourly points and the daily
history from the coin's listing are read, so that a day computed alone equals the same day of a longer run.

{groups}"""


def _symbol(symbol: Symbol) -> str:
    groups = symbol.feature_groups
    count, hash_ = len(catalog.names(groups)), catalog.catalog_hash(groups)
    return f"| {symbol.name} | {count} | {', '.join(groups)} | `{hash_}` |"


def _hours(span: timedelta) -> str:
    return f"{span.total_seconds() / 3600:.0f}"


def _group(group: FeatureGroup) -> str:
    series, unit = SERIES[group]
    rows = "\n".join(
        f"| `{f.name}` | {f.formula.replace('|', chr(92) + '|')} | {f.unit} | {f.warm_up} |" for f in catalog.features([group])
    )
    return f"""## {group} ({len(catalog.names([group]))})

From {series}.

| name | formula | unit | warm-up in {unit} |
|---|---|---|---:|
{rows}
"""
