"""Every feature against a second computation that shares nothing with ours but the textbook.

Every indicator that TA-Lib has, in other people's C code, on real data within 1e-9 of the column's standard deviation after
warm-up: on the segments between outages, with minutes without a trade filled here by pandas, and on CoinGecko's own hours and days.
The rest in plain pandas, the joins row by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
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

MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
SAME = 1e-9
ROW_BY_ROW = {
    "tf_alignment_score",
    "tf_alignment_direction",
    "tf_alignment_strength",
    *(f"{width}_{column}" for width in ("5m", "15m", "1h") for column in ("open", "high", "low", "close", "volume")),
}
"""Compared at the end of this file."""


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
    at = segment.index
    out = {
        "session_tokyo": at.hour < 8,
        "session_london": (at.hour >= 8) & (at.hour < 16),
        "session_new_york": at.hour >= 16,
        "day_of_week": at.day_of_week,
        "is_weekend": at.day_of_week >= 5,
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
        "volatility_low": rank < 0.33,
        "volatility_medium": (rank >= 0.33) & (rank <= 0.67),
        "volatility_high": rank > 0.67,
    }
    return pd.DataFrame(out, index=at).astype(float)


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


def _daily(points: pd.DataFrame, records: list[tuple[float, datetime]]) -> pd.DataFrame:
    """``points``: the whole history; the last 100 days of it come back."""
    stamps, prices = points["timestamp"].to_list(), points["price"].to_list()
    highs = []
    for now in stamps[-100:]:
        known = [r for r in [*records, *zip(prices, stamps, strict=True)] if r[1] <= now and r[0] == r[0]]
        highs.append(max(known, key=lambda r: (r[0], -r[1].timestamp())))
    points = points.tail(140).reset_index(drop=True)
    price, cap, volume = (points[c].to_numpy() for c in ("price", "market_cap", "total_volume"))
    week = talib.SMA(cap, 7)
    out = {
        "market_cap_change_pct": talib.ROC(cap, 1),
        "volume_change_pct": talib.ROC(volume, 1),
        "price_change_pct": talib.ROC(price, 1),
        "market_cap_7d_ma": week,
        "market_cap_30d_ma": talib.SMA(cap, 30),
        "market_cap_change_7d_pct": talib.ROC(cap, 7),
        "market_cap_trend": np.where(cap > week, 1.0, -1.0),
        "volume_7d_ma": talib.SMA(volume, 7),
        "volume_change_7d_pct": talib.ROC(volume, 7),
    }
    known = pd.DataFrame(out).set_index(points["available_at"]).tail(len(highs))
    known["ath_distance_pct"] = 100 * (price[-len(highs) :] / np.array([high for high, _ in highs]) - 1)
    known["days_since_ath"] = [(now - at) / pd.Timedelta(days=1) for now, (_, at) in zip(stamps[-100:], highs, strict=False)]
    return known


def _as_of(known: pd.DataFrame, rows: pd.DatetimeIndex) -> pd.DataFrame:
    at = known.index.searchsorted(rows + pd.Timedelta(minutes=1), side="right") - 1
    return known.iloc[at].set_index(rows)


def _oracle(market: Any, rows: pd.DatetimeIndex) -> pd.DataFrame:
    base = pd.concat([_base(segment) for segment in _segments(market.minutes)]).loc[rows]
    hourly = _as_of(_hourly(market.hourly.to_pandas()), rows)
    daily = _as_of(_daily(market.daily.to_pandas(), market.all_time_high or []), rows)
    return pd.concat([base, hourly, daily], axis=1)


@pytest.fixture(scope="module")
def apart(proof: list[str]) -> Iterator[dict[str, float]]:
    """The largest difference of every feature so far, in standard deviations, for the end of pytest's output."""
    apart: dict[str, float] = {}
    yield apart
    worst = max(apart, key=lambda name: apart[name])
    proof.append(
        f"TA-Lib and pandas: {len(apart)} features on all spans, at most {apart[worst]:.1e} standard deviations apart ({worst})"
    )


@pytest.mark.usefixtures("before_the_cast")
def test_talib_and_pandas_agree(span: Any, market_data_dir: Path | None, apart: dict[str, float]) -> None:
    market = replace(span, hours=span.hours + 36).market(market_data_dir)
    frame = market.frame()
    expected = _oracle(market, pd.DatetimeIndex(frame["timestamp"].to_pandas()))
    assert frame.height > 1000
    here = {n: np.max(np.abs(frame[n].to_numpy() - expected[n].to_numpy())) / (frame[n].std() or 1.0) for n in expected.columns}
    apart |= {name: max(difference, apart.get(name, 0.0)) for name, difference in here.items()}
    assert {name: difference for name, difference in here.items() if not difference <= SAME} == {}


@pytest.fixture(scope="module")
def computed(small_market: Any) -> pl.DataFrame:
    return small_market.frame()


def test_categorical_columns_agree_with_their_flags(computed: pl.DataFrame) -> None:
    for column, values in {"session": ("tokyo", "london", "new_york"), "volatility_regime": ("low", "medium", "high")}.items():
        prefix = "session_" if column == "session" else "volatility_"
        for value in values:
            assert ((computed[column] == value).cast(pl.Float32) == computed[prefix + value]).all()


def test_a_row_has_the_last_candle_closed_by_its_decision(small_market: Any, computed: pl.DataFrame) -> None:
    for width, span in {"5m": 5 * MINUTE, "15m": 15 * MINUTE, "1h": HOUR}.items():
        bars = {row["timestamp"]: row for row in small_market.candles[width].iter_rows(named=True)}
        for row in computed.gather_every(7).iter_rows(named=True):
            decision = row["timestamp"] + MINUTE
            last = max(u for u in (decision - span - k * MINUTE for k in range(int(span / MINUTE))) if u in bars)
            for column in ("open", "high", "low", "close", "volume"):
                assert row[f"{width}_{column}"] == np.float32(bars[last][column])


def test_alignment_is_the_share_and_the_sign_of_the_majority(small_market: Any, computed: pl.DataFrame) -> None:
    closes = {w: dict(small_market.candles[w].select("timestamp", "close").iter_rows()) for w in ("1m", "5m", "15m", "1h")}
    spans = {"1m": MINUTE, "5m": 5 * MINUTE, "15m": 15 * MINUTE, "1h": HOUR}
    for row in computed.gather_every(11).iter_rows(named=True):
        decision, signs = row["timestamp"] + MINUTE, []
        for width, span in spans.items():
            seconds = int(span.total_seconds())
            last = datetime.fromtimestamp(int(decision.timestamp()) // seconds * seconds, UTC) - span
            signs.append(np.sign(closes[width][last] - closes[width][last - 5 * span]))
        counts = {s: signs.count(s) for s in (1, -1, 0)}
        winners = [s for s, n in counts.items() if n == max(counts.values())]
        assert row["tf_alignment_score"] == max(counts.values()) / 4
        assert row["tf_alignment_direction"] == (winners[0] if len(winners) == 1 else 0)
        assert row["tf_alignment_strength"] == pytest.approx(2 * abs(max(counts.values()) / 4 - 0.5))


def test_every_feature_of_the_catalog_has_an_oracle_here(small_market: Any, computed: pl.DataFrame) -> None:
    alone = set(_oracle(small_market, pd.DatetimeIndex(computed["timestamp"].to_pandas())).columns)
    assert alone | ROW_BY_ROW == set(catalog.names(ALL_GROUPS))
