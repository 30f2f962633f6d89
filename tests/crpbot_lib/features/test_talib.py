"""Every indicator that TA-Lib has, against TA-Lib, on real data: within 1e-9 of the column's standard deviation, after warm-up.

TA-Lib is C code of other people; it shares nothing with ours but the textbook. Its series are the segments between outages, with
minutes without a trade filled here by pandas, and CoinGecko's own hours and days.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import talib

from crpbot_lib import candle_rules
from crpbot_lib.config import ALL_GROUPS
from crpbot_lib.features import catalog

SAME = 1e-9
NOT_IN_TALIB = {
    "session_tokyo",
    "session_london",
    "session_new_york",
    "day_of_week",
    "is_weekend",
    "market_cap_trend",
    "ath_distance_pct",
    "days_since_ath",
    "tf_alignment_score",
    "tf_alignment_direction",
    "tf_alignment_strength",
    *(f"{width}_{column}" for width in ("5m", "15m", "1h") for column in ("open", "high", "low", "close", "volume")),
}
"""Calendar, joins and a running maximum: no indicators."""


def _segments(minutes: pl.DataFrame) -> Iterator[pd.DataFrame]:
    """The stretches between outages, every minute of them, flat and with volume 0 where there is none."""
    served = minutes.to_pandas().set_index("timestamp")
    outage = served.index.to_series().diff() > pd.Timedelta(minutes=candle_rules.MAX_NO_TRADE_MINUTES + 1)
    for _, part in served.groupby(outage.cumsum()):
        every = part.asfreq("1min")
        close = every["close"].ffill()
        yield every.assign(close=close, volume=every["volume"].fillna(0.0)).apply(lambda c, close=close: c.fillna(close))


def _base(segment: pd.DataFrame) -> pd.DataFrame:
    high, low, close, volume = (segment[c].to_numpy() for c in ("high", "low", "close", "volume"))
    spread, atr, volume_ma = high - low, talib.ATR(high, low, close, 14), talib.SMA(volume, 20)
    macd, signal, histogram = talib.MACD(close, 12, 26, 9)
    bb_high, _, bb_low = talib.BBANDS(close, 20, 2, 2)
    averages = {n: talib.SMA(close, n) for n in (7, 14, 21, 50)}
    # of the 99 values before the current one, in %
    rank = (talib.PERCENTRANK(atr, 99) / 100 * 99 + 1) / 100
    out = {
        "spread": spread,
        "spread_pct": 100 * spread / close,
        "atr": atr,
        "spread_atr_ratio": spread / atr,
        "volume_ma": volume_ma,
        "volume_ratio": volume / volume_ma,
        "volume_trend": talib.LINEARREG_SLOPE(volume, 20),
        **{f"sma_{n}": average for n, average in averages.items()},
        **{f"price_sma_{n}_ratio": close / average for n, average in averages.items()},
        "rsi": talib.RSI(close, 14),
        "macd": macd,
        "macd_signal": signal,
        "macd_diff": histogram,
        "bb_high": bb_high,
        "bb_low": bb_low,
        "bb_width": (bb_high - bb_low) / close,
        # undefined where the price stands still; those rows are none of ours
        "bb_position": np.divide(close - bb_low, bb_high - bb_low, out=np.full_like(close, np.nan), where=bb_high > bb_low),
        "atr_percentile": rank,
        "volatility_low": (rank < 0.33).astype(float),
        "volatility_medium": ((rank >= 0.33) & (rank <= 0.67)).astype(float),
        "volatility_high": (rank > 0.67).astype(float),
    }
    return pd.DataFrame(out, index=segment.index)


def _hourly(points: pd.DataFrame) -> pd.DataFrame:
    price, volume = points["price"].to_numpy(), points["total_volume"].to_numpy()
    macd, signal, histogram = talib.MACD(price, 12, 26, 9)
    upper, _, lower = talib.BBANDS(price, 20, 2, 2)
    volume_ma = talib.SMA(volume, 24)
    out = {
        "rsi_1h": talib.RSI(price, 14),
        "macd_1h": macd,
        "macd_signal_1h": signal,
        "macd_hist_1h": histogram,
        "bb_upper_1h": upper,
        "bb_lower_1h": lower,
        "bb_position_1h": (price - lower) / (upper - lower),
        "volume_1h_ma": volume_ma,
        "volume_1h_ratio": volume / volume_ma,
        **{f"price_{n}h_change_pct": talib.ROC(price, n) for n in (1, 4, 24)},
    }
    return pd.DataFrame(out).set_index(points["available_at"])


def _daily(points: pd.DataFrame) -> pd.DataFrame:
    price, cap, volume = (points[c].to_numpy() for c in ("price", "market_cap", "total_volume"))
    out = {
        "market_cap_change_pct": talib.ROC(cap, 1),
        "volume_change_pct": talib.ROC(volume, 1),
        "price_change_pct": talib.ROC(price, 1),
        "market_cap_7d_ma": talib.SMA(cap, 7),
        "market_cap_30d_ma": talib.SMA(cap, 30),
        "market_cap_change_7d_pct": talib.ROC(cap, 7),
        "volume_7d_ma": talib.SMA(volume, 7),
        "volume_change_7d_pct": talib.ROC(volume, 7),
    }
    return pd.DataFrame(out).set_index(points["available_at"])


def _as_of(known: pd.DataFrame, rows: pd.DatetimeIndex) -> pd.DataFrame:
    at = known.index.searchsorted(rows + pd.Timedelta(minutes=1), side="right") - 1
    return known.iloc[at].set_index(rows)


def _oracle(market: Any, rows: pd.DatetimeIndex) -> pd.DataFrame:
    base = pd.concat([_base(segment) for segment in _segments(market.minutes)]).loc[rows]
    hourly = _as_of(_hourly(market.hourly.to_pandas()), rows)
    daily = _as_of(_daily(market.daily.to_pandas().tail(400).reset_index(drop=True)), rows)
    return pd.concat([base, hourly, daily], axis=1)


@pytest.fixture(scope="module")
def apart(proof: list[str]) -> Iterator[dict[str, float]]:
    """The largest difference of every feature so far, in standard deviations, for the end of pytest's output."""
    apart: dict[str, float] = {}
    yield apart
    worst = max(apart, key=lambda name: apart[name])
    proof.append(f"TA-Lib: {len(apart)} features on all spans, at most {apart[worst]:.1e} standard deviations apart ({worst})")


@pytest.mark.usefixtures("before_the_cast")
def test_talib_agrees(span: Any, market_data_dir: Path | None, apart: dict[str, float]) -> None:
    market = replace(span, hours=span.hours + 36).market(market_data_dir)
    frame = market.frame()
    expected = _oracle(market, pd.DatetimeIndex(frame["timestamp"].to_pandas()))
    assert frame.height > 1000
    here = {n: np.max(np.abs(frame[n].to_numpy() - expected[n].to_numpy())) / (frame[n].std() or 1.0) for n in expected.columns}
    apart |= {name: max(difference, apart.get(name, 0.0)) for name, difference in here.items()}
    assert {name: difference for name, difference in here.items() if not difference <= SAME} == {}


def test_every_feature_is_compared_or_no_indicator(small_market: Any) -> None:
    rows = pd.DatetimeIndex(small_market.frame()["timestamp"].to_pandas())
    assert set(_oracle(small_market, rows).columns) == set(catalog.names(ALL_GROUPS)) - NOT_IN_TALIB
