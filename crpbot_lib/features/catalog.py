"""The catalog: every feature, in the order in which every file, model and live frame carries them.

Counts, names, types, the gate, ``docs/features.md`` and the hash that a model carries derive from here.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable
from datetime import date, timedelta
from functools import lru_cache
from pathlib import Path

import polars as pl

from crpbot_lib import candle_rules, config
from crpbot_lib.config import ALL_GROUPS, FeatureGroup, Settings
from crpbot_lib.features import base, coingecko, multi_timeframe
from crpbot_lib.features.errors import FeatureError
from crpbot_lib.features.feature import TIMESTAMP, Feature

FEATURES: tuple[Feature, ...] = (
    *base.FEATURES,
    *multi_timeframe.FEATURES,
    *coingecko.HOURLY_FEATURES,
    *coingecko.DAILY_FEATURES,
)

EXCLUDED = ("timestamp", "open", "high", "low", "close", "volume", "session", "volatility_regime")
"""Columns of a features file that no model sees."""

EXCLUDED_DTYPES: dict[str, pl.DataType] = {
    "timestamp": TIMESTAMP,
    **{column: pl.Float64() for column in ("open", "high", "low", "close", "volume")},
    "session": pl.String(),
    "volatility_regime": pl.String(),
}

SEGMENT_WARM_UP = max(f.warm_up for f in FEATURES if f.group in ("base", "multi_timeframe"))
"""Minutes after the beginning of the candles, and after each outage, that give no row."""
CANDLE_LEAD_DAYS = 1
"""Days of candles read before an interval: more than SEGMENT_WARM_UP, so that a day computed alone equals the same day of a
longer run even where its first minutes had no trade."""
HOURLY_LEAD_DAYS = 17
"""Days of hourly CoinGecko points read before an interval: 408 points for the 400 of the warm-up."""
DAILY_LEAD_DAYS = max(f.warm_up for f in FEATURES if f.group == "coingecko_daily") + 2
"""Days of daily CoinGecko points read before an interval where not all are: the longest window, and the age at which a point still
counts."""


def first_hourly_day(start: date, listed: date) -> date:
    """The first UTC day whose hourly points are read for features from ``start`` on: there are none before the listing."""
    return max(start - timedelta(days=HOURLY_LEAD_DAYS), listed)


_SOURCES: dict[FeatureGroup, tuple[str, ...]] = {
    "base": ("base.py",),
    "multi_timeframe": ("multi_timeframe.py",),
    "coingecko_hourly": ("coingecko.py",),
    "coingecko_daily": ("coingecko.py",),
}
_SHARED_SOURCES = ("feature.py", "candles.py", "engineer.py")


def features(groups: Iterable[FeatureGroup]) -> tuple[Feature, ...]:
    """The features of ``groups``, in catalog order, whatever the order of ``groups``."""
    wanted = set(groups)
    return tuple(f for f in FEATURES if f.group in wanted)


def names(groups: Iterable[FeatureGroup]) -> list[str]:
    """The ordered feature names of ``groups``."""
    return [f.name for f in features(groups)]


def feature_names(symbol: str, settings: Settings | None = None) -> list[str]:
    """The ordered features of ``symbol``'s model; ValueError when the symbol is not configured."""
    return names((settings or config.settings()).symbol(symbol).feature_groups)


def schema(groups: Iterable[FeatureGroup]) -> dict[str, pl.DataType]:
    """The ordered columns of a features file and their types."""
    return EXCLUDED_DTYPES | {f.name: pl.Float32() for f in features(groups)}


def find(name: str) -> Feature:
    """The feature called ``name``; FeatureError names similar ones."""
    for feature in FEATURES:
        if feature.name == name:
            return feature
    import difflib

    near = difflib.get_close_matches(name, [f.name for f in FEATURES], n=4, cutoff=0.4)
    hint = f"; did you mean {', '.join(near)}?" if near else "; docs/features.md lists all"
    raise FeatureError(f"no feature is called {name!r}{hint}")


def catalog_hash(groups: Iterable[FeatureGroup]) -> str:
    """Identifies the features of ``groups``: their rows of the catalog and the source that computes them.

    The source counts as its syntax tree without docstrings: a changed formula changes the hash, a changed comment does not, since
    every promoted model is bound to the hash it was trained with.
    """
    return _hash(tuple(g for g in ALL_GROUPS if g in set(groups)))


@lru_cache
def _hash(groups: tuple[FeatureGroup, ...]) -> str:
    files = sorted({*_SHARED_SOURCES, *(name for g in groups for name in _SOURCES[g])})
    folder = Path(__file__).parent
    content = {
        "features": [[f.name, f.group, f.dtype, f.unit, f.formula, f.warm_up] for f in features(groups)],
        "max_no_trade_minutes": candle_rules.MAX_NO_TRADE_MINUTES,
        "source": {name: normalized_source((folder / name).read_text(encoding="utf-8")) for name in files},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def normalized_source(text: str) -> str:
    """``text`` as its syntax tree, without comments, layout and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.dump(tree)
