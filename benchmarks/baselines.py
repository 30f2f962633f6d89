"""The same 73 features as others would compute them, to race against: pandas with TA-Lib, and the way of FreqAI.

Both take pandas frames (``1m, 5m, 15m, 1h``: candles; ``hourly, daily``: CoinGecko points) without a hole, as the benchmark makes
them, and return what the engine returns: the columns of a features file, features in float32, without the rows of the warm-up.
They do less than the engine: nothing is validated, no outage is looked for, no bar is compared with its minutes.

Where several spellings of a formula are common, the fastest stands here.
"""

from __future__ import annotations

import functools

import numpy as np
import pandas as pd
import talib
import talib.abstract as ta

from crpbot_lib.config import ALL_GROUPS
from crpbot_lib.features import catalog

Frames = dict[str, pd.DataFrame]
OHLCV = ["open", "high", "low", "close", "volume"]
WIDTHS = {"5m": pd.Timedelta(minutes=5), "15m": pd.Timedelta(minutes=15), "1h": pd.Timedelta(hours=1)}
MINUTE = pd.Timedelta(minutes=1)
SMAS = (7, 14, 21, 50)
SESSIONS, REGIMES = ["tokyo", "london", "new_york"], ["low", "medium", "high"]


def with_talib(frames: Frames) -> pd.DataFrame:
    """A column at a time from numpy arrays, one frame made of all of them at the end, ``merge_asof`` on the decision time alone."""
    minutes = frames["1m"]
    high, low, close, volume = (minutes[c].to_numpy() for c in OHLCV[1:])
    atr, spread, volume_ma = talib.ATR(high, low, close, 14), high - low, talib.SMA(volume, 20)
    smas = {n: talib.SMA(close, n) for n in SMAS}
    macd, signal, diff = talib.MACD(close, 12, 26, 9)
    bb_high, _, bb_low = talib.BBANDS(close, 20, 2.0, 2.0)
    rank = pd.Series(atr).rolling(100).rank(method="max", pct=True).to_numpy()
    hour, weekday = minutes["timestamp"].dt.hour.to_numpy(), minutes["timestamp"].dt.dayofweek.to_numpy()
    regime = np.digitize(rank, [0.33, np.nextafter(0.67, 1)])
    out = {
        **{f"session_{name}": hour // 8 == i for i, name in enumerate(SESSIONS)},
        "day_of_week": weekday,
        "is_weekend": weekday >= 5,
        "spread": spread,
        "spread_pct": 100 * spread / close,
        "atr": atr,
        "spread_atr_ratio": spread / atr,
        "volume_ma": volume_ma,
        "volume_ratio": volume / volume_ma,
        "volume_trend": talib.LINEARREG_SLOPE(volume, 20),
        **{f"sma_{n}": mean for n, mean in smas.items()},
        **{f"price_sma_{n}_ratio": close / mean for n, mean in smas.items()},
        "rsi": talib.RSI(close, 14),
        "macd": macd,
        "macd_signal": signal,
        "macd_diff": diff,
        "bb_high": bb_high,
        "bb_low": bb_low,
        "bb_width": (bb_high - bb_low) / close,
        "bb_position": (close - bb_low) / (bb_high - bb_low),
        **{f"volatility_{name}": regime == i for i, name in enumerate(REGIMES)},
        "atr_percentile": rank,
    }
    decided = (minutes["timestamp"] + MINUTE).to_frame("known_at")
    signs = [np.sign(minutes["close"].diff(5).to_numpy())]
    for width, span in WIDTHS.items():
        bars = frames[width]
        known = bars[OHLCV].assign(known_at=bars["timestamp"] + span, sign=np.sign(bars["close"].diff(5)))
        joined = pd.merge_asof(decided, known, on="known_at")
        out |= {f"{width}_{c}": joined[c].to_numpy() for c in OHLCV}
        signs.append(joined["sign"].to_numpy())
    up, down, flat = (sum((s == sign).astype(np.int8) for s in signs) for sign in (1, -1, 0))
    most = np.maximum(np.maximum(up, down), flat)
    out["tf_alignment_score"] = most / 4
    out["tf_alignment_direction"] = np.where((up > down) & (up > flat), 1, np.where((down > up) & (down > flat), -1, 0))
    out["tf_alignment_strength"] = 2 * np.abs(most / 4 - 0.5)
    for points, columns in ((frames["hourly"], _hourly(frames["hourly"])), (frames["daily"], _daily(frames["daily"]))):
        joined = pd.merge_asof(decided, pd.DataFrame(columns).assign(known_at=points["available_at"]), on="known_at")
        out |= {name: joined[name].to_numpy() for name in columns}
    carried = pd.concat([minutes, _labels(hour, regime)], axis=1).iloc[catalog.SEGMENT_WARM_UP :]
    # each float64 column goes as soon as its float32 is there
    features = {name: out.pop(name)[catalog.SEGMENT_WARM_UP :].astype(np.float32) for name in catalog.names(ALL_GROUPS)}
    return pd.DataFrame({**carried.reset_index(drop=True), **features}, copy=False).dropna(ignore_index=True)


def freqai(frames: Frames) -> pd.DataFrame:
    """A strategy's ``populate_indicators``: features are columns named ``%-…``, added one by one; each informative series has its
    own and is merged on the minute at whose close it is known, filled forward; then the features are picked out by their mark.

    Kinder than FreqAI itself, which sends the features of the base timeframe through such a merge, too.
    """
    dataframe = _base_indicators(frames["1m"].rename(columns={"timestamp": "date"}))
    for width, span in WIDTHS.items():
        informative = frames[width].rename(columns={"timestamp": "date"})
        for column in OHLCV:
            informative[f"%-{column}"] = informative[column]
        informative["sign"] = np.sign(informative["close"].diff(5))
        dataframe = _merge_informative(dataframe, informative, informative["date"] + span - MINUTE, width)
    for series, compute in (("hourly", _hourly), ("daily", _daily)):
        informative = frames[series].rename(columns={"timestamp": "date"})
        for name, values in compute(frames[series]).items():
            informative[f"%-{name}"] = values
        known = (informative["available_at"] - MINUTE).dt.ceil("min")
        dataframe = _merge_informative(dataframe, informative, known, series)

    signs = [np.sign(dataframe["close"].diff(5)), *(dataframe[f"sign_{width}"] for width in WIDTHS)]
    up, down, flat = (functools.reduce(lambda a, b: a + b, ((s == sign).astype(np.int8) for s in signs)) for sign in (1, -1, 0))
    most = np.maximum(np.maximum(up, down), flat)
    dataframe["%-tf_alignment_score"] = most / 4
    dataframe["%-tf_alignment_direction"] = np.select([(up > down) & (up > flat), (down > up) & (down > flat)], [1, -1], 0)
    dataframe["%-tf_alignment_strength"] = 2 * (dataframe["%-tf_alignment_score"] - 0.5).abs()

    suffixed = {f"{width}_{column}": f"{column}_{width}" for width in WIDTHS for column in OHLCV}
    suffixed |= {name: f"{name}_{s}" for s in ("hourly", "daily") for name in catalog.names([f"coingecko_{s}"])}
    marked = {f"%-{suffixed.get(name, name)}": name for name in catalog.names(ALL_GROUPS)}
    features = dataframe[list(marked)].astype(np.float32)
    carried = dataframe[["date", *OHLCV, "session", "volatility_regime"]].rename(columns={"date": "timestamp"})
    del dataframe
    features = features.replace([np.inf, -np.inf], np.nan).rename(columns=marked)
    whole = ~features.isnull().any(axis=1)
    whole.iloc[: catalog.SEGMENT_WARM_UP] = False
    return pd.concat([carried[whole], features[whole]], axis=1).reset_index(drop=True)


def _base_indicators(dataframe: pd.DataFrame) -> pd.DataFrame:
    hour, weekday = dataframe["date"].dt.hour, dataframe["date"].dt.dayofweek
    for i, name in enumerate(SESSIONS):
        dataframe[f"%-session_{name}"] = hour // 8 == i
    dataframe["%-day_of_week"] = weekday
    dataframe["%-is_weekend"] = weekday >= 5
    dataframe["%-spread"] = dataframe["high"] - dataframe["low"]
    dataframe["%-spread_pct"] = 100 * dataframe["%-spread"] / dataframe["close"]
    dataframe["%-atr"] = ta.ATR(dataframe, timeperiod=14)
    dataframe["%-spread_atr_ratio"] = dataframe["%-spread"] / dataframe["%-atr"]
    dataframe["%-volume_ma"] = ta.SMA(dataframe, timeperiod=20, price="volume")
    dataframe["%-volume_ratio"] = dataframe["volume"] / dataframe["%-volume_ma"]
    dataframe["%-volume_trend"] = ta.LINEARREG_SLOPE(dataframe, timeperiod=20, price="volume")
    for n in SMAS:
        dataframe[f"%-sma_{n}"] = ta.SMA(dataframe, timeperiod=n)
        dataframe[f"%-price_sma_{n}_ratio"] = dataframe["close"] / dataframe[f"%-sma_{n}"]
    dataframe["%-rsi"] = ta.RSI(dataframe, timeperiod=14)
    macd = ta.MACD(dataframe, fastperiod=12, slowperiod=26, signalperiod=9)
    for name, column in {"macd": "macd", "macd_signal": "macdsignal", "macd_diff": "macdhist"}.items():
        dataframe[f"%-{name}"] = macd[column]
    bands = ta.BBANDS(dataframe, timeperiod=20, nbdevup=2.0, nbdevdn=2.0)
    dataframe["%-bb_high"], dataframe["%-bb_low"] = bands["upperband"], bands["lowerband"]
    width = dataframe["%-bb_high"] - dataframe["%-bb_low"]
    dataframe["%-bb_width"] = width / dataframe["close"]
    dataframe["%-bb_position"] = (dataframe["close"] - dataframe["%-bb_low"]) / width
    dataframe["%-atr_percentile"] = dataframe["%-atr"].rolling(100).rank(method="max", pct=True)
    regime = np.digitize(dataframe["%-atr_percentile"], [0.33, np.nextafter(0.67, 1)])
    for i, name in enumerate(REGIMES):
        dataframe[f"%-volatility_{name}"] = regime == i
    labels = _labels(hour.to_numpy(), regime)
    dataframe["session"], dataframe["volatility_regime"] = labels["session"], labels["volatility_regime"]
    return dataframe


def _merge_informative(dataframe: pd.DataFrame, informative: pd.DataFrame, known: pd.Series, suffix: str) -> pd.DataFrame:
    """``informative``, every column with ``suffix``, on the minutes that close when it is known or later."""
    unmarked = [f"{c}_{suffix}" for c in informative.columns if not c.startswith("%-") and c != "sign"]
    informative = informative.add_suffix(f"_{suffix}").assign(date_merge=known)
    merged = pd.merge_ordered(dataframe, informative, fill_method="ffill", left_on="date", right_on="date_merge", how="left")
    return merged.drop(columns=["date_merge", *unmarked])


def _hourly(points: pd.DataFrame) -> dict[str, np.ndarray]:
    price, volume = points["price"].to_numpy(), points["total_volume"].to_numpy()
    macd, signal, histogram = talib.MACD(price, 12, 26, 9)
    upper, _, lower = talib.BBANDS(price, 20, 2.0, 2.0)
    mean = talib.SMA(volume, 24)
    return {
        "rsi_1h": talib.RSI(price, 14),
        "macd_1h": macd,
        "macd_signal_1h": signal,
        "macd_hist_1h": histogram,
        "bb_upper_1h": upper,
        "bb_lower_1h": lower,
        "bb_position_1h": (price - lower) / (upper - lower),
        "volume_1h_ma": mean,
        "volume_1h_ratio": volume / mean,
        **{f"price_{n}h_change_pct": talib.ROC(price, n) for n in (1, 4, 24)},
    }


def _daily(points: pd.DataFrame) -> dict[str, np.ndarray]:
    price, cap, volume = (points[c].to_numpy() for c in ("price", "market_cap", "total_volume"))
    cap_mean = talib.SMA(cap, 7)
    highest = np.maximum.accumulate(price)
    # a price that only equals the high before it is no new one
    new = np.concatenate([[True], price[1:] > highest[:-1]])
    high_at = points.index.to_series().where(new).ffill().astype(int).to_numpy()
    stamps = points["timestamp"].to_numpy()
    return {
        "market_cap_change_pct": talib.ROC(cap, 1),
        "volume_change_pct": talib.ROC(volume, 1),
        "price_change_pct": talib.ROC(price, 1),
        "market_cap_7d_ma": cap_mean,
        "market_cap_30d_ma": talib.SMA(cap, 30),
        "market_cap_change_7d_pct": talib.ROC(cap, 7),
        "market_cap_trend": np.where(cap > cap_mean, 1, -1),
        "volume_7d_ma": talib.SMA(volume, 7),
        "volume_change_7d_pct": talib.ROC(volume, 7),
        "ath_distance_pct": 100 * (price / highest - 1),
        "days_since_ath": (stamps - stamps[high_at]) / np.timedelta64(1, "D"),
    }


def _labels(hour: np.ndarray, regime: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "session": pd.Categorical.from_codes(hour // 8, SESSIONS),
            "volatility_regime": pd.Categorical.from_codes(np.minimum(regime, 2), REGIMES),
        }
    )
