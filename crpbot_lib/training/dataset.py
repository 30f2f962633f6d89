"""From a features frame to windows and labels that know nothing they must not know. numpy only.

A window is named by its last row, the anchor ``i``: it holds rows ``i - sequence + 1 … i``, and its label compares the close of
row ``i + horizon`` with that of row ``i``. All of these rows must follow each other minute by minute: a row that is absent is
an outage, and neither a window nor a label may reach over it. A minute without a trade was filled because a trade came later:
such a row may stand inside a window but is no anchor, for live such a minute is refused.

The rows are split by time: training, then validation (choices, calibration), then test (the final judgement). At each of the two
borders the earlier side's windows and labels end before it, and the later side's windows begin an embargo after it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from crpbot_lib.features.catalog import EXCLUDED
from crpbot_lib.training.config import FeatureFile, TrainConfig
from crpbot_lib.training.errors import PermanentTrainingError

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
_MINUTE_US = 60_000_000
UP, DOWN, EQUAL, UNKNOWN = 1, 0, -1, -2
"""Codes of a row's label. EQUAL: the price did not move. UNKNOWN: an outage or the end of the data lies between."""


@dataclass(frozen=True)
class Scaler:
    """Per feature: ``(x - mean) / scale``, cut at ``+-clip``. All arrays of length ``features``."""

    mean: Floats
    scale: Floats
    clip: float

    @classmethod
    def fit(cls, values: Floats, clip: float) -> Scaler:
        """Fitted on ``values`` (rows, features). A feature without variance is only centred: scale 1."""
        mean = values.mean(axis=0, dtype=np.float64)
        # column by column: one float64 copy of a year of all columns would be 600 MB
        std = np.array([values[:, c].std(dtype=np.float64) for c in range(values.shape[1])])
        constant = std <= np.abs(mean) * 1e-6
        return cls(mean.astype(np.float32), np.where(constant, 1.0, std).astype(np.float32), clip)

    def transform(self, values: Floats) -> Floats:
        """``values`` (…, features) scaled; a new array."""
        scaled: Floats = np.clip((values - self.mean) / self.scale, -self.clip, self.clip).astype(np.float32)
        return scaled


@dataclass(frozen=True)
class Dataset:
    """One symbol, ready to train on. ``values`` (rows, features) are scaled, each row in one piece; anchors index the rows."""

    values: Floats
    labels: Floats
    """Per row 1.0 or 0.0; NaN where the row has no label (no anchor points there)."""
    timestamps: Ints
    """Per row: when its minute opens, microseconds since the epoch, UTC."""
    close: npt.NDArray[np.float64]
    """Per row, in USD."""
    train: Ints
    validation: Ints
    test: Ints
    tradable: Ints
    """The test's anchors and those between them after which the price stood still: whoever trades does not know that it will."""
    scaler: Scaler
    counts: dict[str, int]
    """rows, filled, gaps, equal_prices_dropped, without_label, without_window, at_split (purged and embargoed, both borders)."""
    split: str
    """The first instant (UTC, ISO 8601) that training knows nothing of; validation's rows begin there."""
    test_split: str
    """The first instant that validation knows nothing of either; the test's rows begin there."""


def labels(timestamps: Ints, close: npt.NDArray[np.floating[Any]], horizon: int) -> npt.NDArray[np.int8]:
    """UP, DOWN, EQUAL or UNKNOWN per row. ``timestamps`` are microseconds, sorted and unique."""
    rows = len(timestamps)
    result = np.full(rows, UNKNOWN, dtype=np.int8)
    if rows <= horizon:
        return result
    # rows are unique and on the minute grid, so `horizon` rows in `horizon` minutes are all there
    reached = timestamps[horizon:] - timestamps[:-horizon] == horizon * _MINUTE_US
    now, later = close[:-horizon], close[horizon:]
    moved = np.where(later > now, UP, np.where(later < now, DOWN, EQUAL))
    result[:-horizon] = np.where(reached, moved, UNKNOWN)
    return result


def anchors(timestamps: Ints, sequence: int) -> npt.NDArray[np.bool_]:
    """Per row: whether the window of ``sequence`` rows that ends there has every minute."""
    result = np.zeros(len(timestamps), dtype=np.bool_)
    if len(timestamps) >= sequence:
        span = timestamps[sequence - 1 :] - timestamps[: len(timestamps) - sequence + 1]
        result[sequence - 1 :] = span == (sequence - 1) * _MINUTE_US
    return result


def filled_rows(timestamps: Ints, ranges: Iterable[tuple[str, int]]) -> npt.NDArray[np.bool_]:
    """Per row: whether its minute had no trade and was filled. ``ranges``: (first minute, ISO 8601 in UTC; how many), as the
    features' sidecar lists them."""
    result = np.zeros(len(timestamps), dtype=np.bool_)
    for start, minutes in ranges:
        first = int(datetime.fromisoformat(start).timestamp()) * 1_000_000
        begin, end = np.searchsorted(timestamps, [first, first + minutes * _MINUTE_US])
        result[begin:end] = True
    return result


def split_anchors(
    timestamps: Ints, usable: npt.NDArray[np.bool_], borders: tuple[int, int], config: TrainConfig
) -> tuple[Ints, Ints, Ints]:
    """The anchors of training, validation and test, chronologically, among the ``usable`` rows; ``borders`` are the first rows of
    the latter two.

    Purge: a label ends before the next border. Embargo: a window begins ``embargo`` minutes after the border before it.
    """
    label_end = timestamps + config.horizon * _MINUTE_US
    window_begin = timestamps - (config.sequence - 1) * _MINUTE_US
    validation_begin, test_begin = timestamps[list(borders)]
    embargo = config.embargo * _MINUTE_US
    train = np.flatnonzero(usable & (label_end < validation_begin))
    validation = np.flatnonzero(usable & (window_begin >= validation_begin + embargo) & (label_end < test_begin))
    test = np.flatnonzero(usable & (window_begin >= test_begin + embargo))
    return train, validation, test


def check_frame(symbol: str, frame: pl.DataFrame, expected: FeatureFile) -> None:
    """Compares the file with what the job was told: rows, names, order, dtypes, values. PermanentTrainingError lists the
    differences; it is the mission's "feature mismatch between the three counts"."""
    needed = ("timestamp", "close", "volatility_regime")
    wrong: list[str] = [f"column {c} is absent" for c in needed if c not in frame.columns]
    names = [c for c in frame.columns if c not in EXCLUDED]
    if len(names) != expected.features:
        wrong.append(f"the file has {len(names)} numeric features, the job expects {expected.features}")
    if absent := [n for n in expected.names if n not in names]:
        wrong.append(f"not in the file: {', '.join(absent)}")
    if extra := [n for n in names if n not in expected.names]:
        wrong.append(f"not in the job: {', '.join(extra)}")
    if not absent and not extra and names != list(expected.names):
        at = next(i for i, (a, b) in enumerate(zip(names, expected.names, strict=True)) if a != b)
        wrong.append(f"the order differs from position {at}: file {names[at]}, job {expected.names[at]}")
    if frame.height != expected.rows:
        wrong.append(f"the file has {frame.height} rows, the job expects {expected.rows}")
    if "timestamp" in frame.columns and frame.schema["timestamp"] != pl.Datetime("us", "UTC"):
        wrong.append(f"timestamp is {frame.schema['timestamp']}, expected Datetime('us', 'UTC')")
    present = [n for n in names if n in expected.names]
    wrong += [f"{n} is {frame.schema[n]}, expected Float32" for n in present if frame.schema[n] != pl.Float32]
    if not wrong:
        finite = frame.select(pl.col(*names, "close").is_finite().fill_null(False).all()).row(0, named=True)
        wrong += [f"{n} holds null, NaN or infinite values" for n, ok in finite.items() if not ok]
        step = frame["timestamp"].dt.epoch("us").diff().drop_nulls()
        if frame.height > 1 and bool(((step <= 0) | (step % _MINUTE_US != 0)).any()):
            wrong.append("timestamps are not sorted, unique and on the minute grid")
    if wrong:
        raise PermanentTrainingError(
            f"{symbol}: {expected.key} is not what the job was told (feature mismatch between the three counts): "
            f"{'; '.join(wrong)}. Build the features again and start a run on that version"
        )


def build(
    symbol: str, frame: pl.DataFrame, names: tuple[str, ...], config: TrainConfig, filled: Iterable[tuple[str, int]]
) -> Dataset:
    """Labels, windows, split and scaler of one symbol's features frame (checked by ``check_frame``). ``filled``: see
    ``filled_rows``.

    Raises PermanentTrainingError when training, validation or test is left without a window.
    """
    timestamps = frame["timestamp"].dt.epoch("us").to_numpy()
    close = frame["close"].cast(pl.Float64).to_numpy()
    values = frame.select(names).to_numpy().astype(np.float32, copy=False)
    label = labels(timestamps, close, config.horizon)
    window = anchors(timestamps, config.sequence)
    no_trade = filled_rows(timestamps, filled)
    known = window & (label > UNKNOWN) & ~no_trade
    usable = known & (label != EQUAL)
    shares = (config.validation_fraction + config.test_fraction, config.test_fraction)
    # each border is a row: at least one lies behind it
    split_row, test_row = (min(round(frame.height * (1 - share)), frame.height - 1) for share in shares)
    train = validation = test = tradable = np.empty(0, dtype=np.int64)
    if frame.height:
        train, validation, test = split_anchors(timestamps, usable, (split_row, test_row), config)
        tradable = split_anchors(timestamps, known, (split_row, test_row), config)[2]
    if not (len(train) and len(validation) and len(test)):
        need = config.sequence + config.horizon
        raise PermanentTrainingError(
            f"{symbol}: {frame.height} rows give {len(train)} training, {len(validation)} validation and {len(test)} test windows; "
            f"each part needs unbroken stretches of {need} minutes (the later two after an embargo of {config.embargo}): "
            "train on more days"
        )
    # no row beyond the last training window, so not even the purged rows before the split
    scaler = Scaler.fit(values[: train[-1] + 1], config.scaler_clip)
    counts = {
        "rows": frame.height,
        "filled": int(no_trade.sum()),
        "gaps": int((np.diff(timestamps) > _MINUTE_US).sum()),
        "equal_prices_dropped": int((label == EQUAL).sum()),
        "without_label": int((label == UNKNOWN).sum()),
        "without_window": int((~window).sum()),
        "at_split": int(usable.sum()) - len(train) - len(validation) - len(test),
    }
    return Dataset(
        # a frame's values come column by column; a window is read row by row
        values=np.ascontiguousarray(scaler.transform(values)),
        labels=np.where(label >= DOWN, label, np.nan).astype(np.float32),
        timestamps=timestamps,
        close=close,
        train=train,
        validation=validation,
        test=test,
        tradable=tradable,
        scaler=scaler,
        counts=counts,
        split=frame["timestamp"][split_row].isoformat(),
        test_split=frame["timestamp"][test_row].isoformat(),
    )
