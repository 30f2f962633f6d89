"""One decision: features of the newest minutes, one window, one probability; and how to tell a model that does not react."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from math import isfinite
from typing import TYPE_CHECKING

import numpy as np

from crpbot_lib.config import Settings, Symbol
from crpbot_lib.features import DataFetcher, NoRowError, catalog, engineer_runtime_features
from crpbot_lib.registry import AlignmentError
from crpbot_lib.training import marked

if TYPE_CHECKING:
    import pandas as pd

    from crpbot_lib.training.checkpoint import Checkpoint

MINUTE = timedelta(minutes=1)
STUCK_TOLERANCE = 1e-6


class NoDecisionError(Exception):
    """The newest minutes do not give a whole window; the next minute may."""


class PredictionError(ValueError):
    """The model's answer is no probability; the message names the symbol and the time."""


@dataclass(frozen=True)
class Signal:
    """What one model says at ``at`` (UTC, the close of the newest minute). ``probability`` is that of a higher price."""

    symbol: str
    at: datetime
    probability: float
    smoke: bool

    @property
    def side(self) -> str:
        return "long" if self.probability >= 0.5 else "short"

    @property
    def line(self) -> str:
        """``BTC-USD: long @ 65.3% (LSTM: 0.653)``, marked where the model is a smoke model."""
        sure = max(self.probability, 1 - self.probability)
        return marked(f"{self.symbol}: {self.side} @ {100 * sure:.1f}% (LSTM: {self.probability:.3f})", self.smoke)


def live_features(
    symbol: Symbol, data: DataFetcher, at: datetime, window_minutes: int, settings: Settings | None = None
) -> pd.DataFrame:
    """The symbol's rows over the last ``window_minutes`` known at ``at`` (pandas, columns as in the features file), by ``settings``
    (None: the process's).

    NoDecisionError when the source has no candle there, or its newest minute has no row; it names what that lacks.
    """
    minutes = data.candles(symbol.name, "1m", at - window_minutes * MINUTE, at)
    if minutes.is_empty():
        raise NoDecisionError(f"{symbol.name}: no 1m candles in the {window_minutes} minutes before {at.isoformat()}")
    groups = symbol.feature_groups
    try:
        return engineer_runtime_features(
            minutes.to_pandas(), symbol.name, data, "multi_timeframe" in groups, "coingecko_hourly" in groups, settings
        )
    except NoRowError as error:
        raise NoDecisionError(str(error)) from error


def selected(features: pd.DataFrame) -> list[str]:
    """The numeric features of a live frame, in its order."""
    return [c for c in features.columns if c not in catalog.EXCLUDED]


def decide(checkpoint: Checkpoint, features: pd.DataFrame, at: datetime) -> Signal:
    """The model's word at ``at`` on the newest rows of ``features``.

    Raises AlignmentError when the frame's features are not the model's, NoDecisionError when the newest row is not the minute
    that has just closed, or the window has a hole, PredictionError when the probability is no finite number.
    """
    names = selected(features)
    if names != list(checkpoint.names):
        missing = [n for n in checkpoint.names if n not in names]
        extra = [n for n in names if n not in checkpoint.names]
        raise AlignmentError(
            f"{checkpoint.symbol}: run time has {len(names)} features, the checkpoint {checkpoint.input_size} (feature mismatch "
            f"between the three counts); missing: {', '.join(missing) or 'none'}; unknown: {', '.join(extra) or 'none'}"
            + ("" if missing or extra else "; the order differs")
        )
    sequence = checkpoint.config.sequence
    window = features.iloc[-sequence:]
    if len(window) < sequence:
        raise NoDecisionError(f"{checkpoint.symbol}: {len(window)} rows at {at.isoformat()}, a window takes {sequence}")
    first, newest = window["timestamp"].iloc[0].to_pydatetime(), window["timestamp"].iloc[-1].to_pydatetime()
    if newest != at - MINUTE:
        raise NoDecisionError(
            f"{checkpoint.symbol}: the newest row at {at.isoformat()} is {newest.isoformat()}, expected {(at - MINUTE).isoformat()}"
        )
    if newest - first != (sequence - 1) * MINUTE:
        raise NoDecisionError(
            f"{checkpoint.symbol}: the last {sequence} rows begin at {first.isoformat()}: there is a hole in them"
        )
    rows = np.ascontiguousarray(window[names].to_numpy(dtype=np.float32))
    probability = checkpoint.predict(rows)
    if not isfinite(probability):
        raise PredictionError(
            f"{checkpoint.symbol}: the model of run {checkpoint.run} gives {probability} at {at.isoformat()} on finite features, "
            "expected a probability; its weights or its scaler are spoiled: train and promote another, or roll back"
        )
    return Signal(checkpoint.symbol, at, probability, checkpoint.smoke)


def stuck(signals: Sequence[Signal]) -> str | None:
    """Why the signals of one symbol are not those of a model that reacts to its input; None when they are.

    The larger of p and 1 - p always exceeds 50 %, so what is looked for is a probability that never moves, or is 0.5.
    """
    if not signals:
        return "no decision at all: look at the reasons above"
    values = [s.probability for s in signals]
    name = signals[0].symbol
    if all(abs(v - 0.5) <= STUCK_TOLERANCE for v in values):
        return f"{name}: stuck at 50 % in all {len(values)} predictions: most likely a feature mismatch between the three counts"
    if len(values) > 1 and max(values) - min(values) <= STUCK_TOLERANCE:
        return (
            f"{name}: stuck at {values[0]:.6f} in all {len(values)} predictions, although the minutes moved on: most likely a "
            "feature mismatch between the three counts, or features far outside what the scaler was fitted on"
        )
    return None
