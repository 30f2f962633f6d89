"""Every feature against a second, plain computation: numpy and pandas, written row by row where that is the clearest."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest

from crpbot_lib.config import ALL_GROUPS
from crpbot_lib.features import catalog

MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)


@pytest.fixture(scope="module")
def computed(small_market: Any) -> pl.DataFrame:
    return small_market.frame()


def _wilder(values: np.ndarray, n: int) -> np.ndarray:
    out = np.empty(len(values))
    out[:n] = np.nan
    out[n - 1] = values[:n].mean()
    for i in range(n, len(values)):
        out[i] = (out[i - 1] * (n - 1) + values[i]) / n
    return out


def _rsi(price: np.ndarray) -> np.ndarray:
    change = np.diff(price)
    up, down = _wilder(np.maximum(change, 0), 14), _wilder(np.maximum(-change, 0), 14)
    return np.concatenate([[np.nan], 100 - 100 / (1 + up / down)])


def _macd(price: pd.Series) -> tuple[pd.Series, pd.Series]:
    macd = price.ewm(span=12, adjust=False).mean() - price.ewm(span=26, adjust=False).mean()
    return macd, macd.ewm(span=9, adjust=False).mean()


def _base(minutes: pd.DataFrame) -> pd.DataFrame:
    high, low, close, volume = (minutes[c] for c in ("high", "low", "close", "volume"))
    at = minutes.index
    previous = close.shift(1)
    atr = pd.Series(
        _wilder(np.maximum(high, previous).fillna(high).to_numpy() - np.minimum(low, previous).fillna(low).to_numpy(), 14), at
    )
    rank = atr.rolling(100).apply(lambda w: (w <= w[-1]).mean(), raw=True)
    macd, signal = _macd(close)
    mean, std = close.rolling(20).mean(), close.rolling(20).std(ddof=0)
    bands = (mean - 2 * std, mean + 2 * std)
    out = {
        "session_tokyo": at.hour < 8,
        "session_london": (at.hour >= 8) & (at.hour < 16),
        "session_new_york": at.hour >= 16,
        "day_of_week": at.day_of_week,
        "is_weekend": at.day_of_week >= 5,
        "spread": high - low,
        "spread_pct": (high - low) / close * 100,
        "atr": atr,
        "spread_atr_ratio": (high - low) / atr,
        "volume_ma": volume.rolling(20).mean(),
        "volume_ratio": volume / volume.rolling(20).mean(),
        "volume_trend": volume.rolling(20).apply(lambda w: np.polyfit(np.arange(20.0), w, 1)[0], raw=True),
        **{f"sma_{n}": close.rolling(n).mean() for n in (7, 14, 21, 50)},
        **{f"price_sma_{n}_ratio": close / close.rolling(n).mean() for n in (7, 14, 21, 50)},
        "rsi": _rsi(close.to_numpy()),
        "macd": macd,
        "macd_signal": signal,
        "macd_diff": macd - signal,
        "bb_high": bands[1],
        "bb_low": bands[0],
        "bb_width": (bands[1] - bands[0]) / close,
        "bb_position": (close - bands[0]) / (bands[1] - bands[0]),
        "volatility_low": rank < 0.33,
        "volatility_medium": (rank >= 0.33) & (rank <= 0.67),
        "volatility_high": rank > 0.67,
        "atr_percentile": rank,
    }
    return pd.DataFrame(out, index=at).astype(float)


def _assert_equal(computed: pl.DataFrame, expected: pd.DataFrame) -> None:
    rows = expected.loc[computed["timestamp"].to_pandas()]
    for name in expected.columns:
        mine, other = computed[name].to_numpy().astype(float), rows[name].to_numpy()
        allowed = 1e-9 * np.nanstd(other) + 2e-7 * np.abs(other)
        assert np.all(np.abs(mine - other) <= allowed), name


def test_base_features(small_market: Any, computed: pl.DataFrame) -> None:
    expected = _base(small_market.minutes.to_pandas().set_index("timestamp"))
    assert set(catalog.names(["base"])) <= set(expected.columns)
    _assert_equal(computed, expected)


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


def _hourly(points: pd.DataFrame) -> pd.DataFrame:
    price, volume = points["price"], points["total_volume"]
    macd, signal = _macd(price)
    mean, std = price.rolling(20).mean(), price.rolling(20).std(ddof=0)
    out = {
        "rsi_1h": _rsi(price.to_numpy()),
        "macd_1h": macd,
        "macd_signal_1h": signal,
        "macd_hist_1h": macd - signal,
        "bb_upper_1h": mean + 2 * std,
        "bb_lower_1h": mean - 2 * std,
        "bb_position_1h": (price - (mean - 2 * std)) / (4 * std),
        "volume_1h_ma": volume.rolling(24).mean(),
        "volume_1h_ratio": volume / volume.rolling(24).mean(),
        **{f"price_{n}h_change_pct": price.pct_change(n) * 100 for n in (1, 4, 24)},
    }
    return pd.DataFrame(out).set_index(points["available_at"])


def _daily(points: pd.DataFrame) -> pd.DataFrame:
    price, cap, volume = points["price"], points["market_cap"], points["total_volume"]
    highest = [price.iloc[: i + 1].idxmax() for i in range(len(price))]
    out = {
        "market_cap_change_pct": cap.pct_change() * 100,
        "volume_change_pct": volume.pct_change() * 100,
        "price_change_pct": price.pct_change() * 100,
        "market_cap_7d_ma": cap.rolling(7).mean(),
        "market_cap_30d_ma": cap.rolling(30).mean(),
        "market_cap_change_7d_pct": cap.pct_change(7) * 100,
        "market_cap_trend": np.where(cap > cap.rolling(7).mean(), 1.0, -1.0),
        "volume_7d_ma": volume.rolling(7).mean(),
        "volume_change_7d_pct": volume.pct_change(7) * 100,
        "ath_distance_pct": (price / price.cummax() - 1) * 100,
        "days_since_ath": [(points["timestamp"][i] - points["timestamp"][h]) / pd.Timedelta(days=1) for i, h in enumerate(highest)],
    }
    return pd.DataFrame(out).set_index(points["available_at"])


@pytest.mark.parametrize(("series", "oracle"), [("hourly", _hourly), ("daily", _daily)])
def test_coingecko_features_are_computed_on_their_own_series_and_joined_as_of(
    small_market: Any, computed: pl.DataFrame, series: str, oracle: Callable[[pd.DataFrame], pd.DataFrame]
) -> None:
    known = oracle(getattr(small_market, series).to_pandas())
    assert list(known.columns) == catalog.names([f"coingecko_{series}"])  # type: ignore[list-item]
    decisions = computed["timestamp"].to_pandas() + pd.Timedelta(minutes=1)
    at = known.index.searchsorted(decisions, side="right") - 1
    expected = known.iloc[at].set_index(decisions - pd.Timedelta(minutes=1))
    _assert_equal(computed, expected)


def test_every_feature_of_the_catalog_has_an_oracle_here() -> None:
    alone = {f"{w}_{c}" for w in ("5m", "15m", "1h") for c in ("open", "high", "low", "close", "volume")}
    alone |= {"tf_alignment_score", "tf_alignment_direction", "tf_alignment_strength", "atr_percentile"}
    groups = ("base", "coingecko_hourly", "coingecko_daily")
    covered = functools.reduce(set.union, (set(catalog.names([g])) for g in groups), alone)  # type: ignore[list-item]
    assert covered == set(catalog.names(ALL_GROUPS))
