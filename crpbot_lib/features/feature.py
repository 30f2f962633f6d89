"""What one feature is, and the few numerical building blocks that every formula is written with.

A group module (``base``, ``multi_timeframe``, ``coingecko_hourly``, ``coingecko_daily``) lists its features: what is known
about each and the expression that computes it stand side by side, so that a formula has one place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import numpy as np
import numpy.typing as npt
import polars as pl

from crpbot_lib.config import FeatureGroup

Values = npt.NDArray[np.float64]
TIMESTAMP = pl.Datetime("us", "UTC")
CLOSES_AFTER = timedelta(minutes=1)
"""A row is the 1-minute candle that opens at ``timestamp``; its decision is taken when that candle closes."""
_EPOCH, _MICROSECOND = datetime(1970, 1, 1, tzinfo=UTC), timedelta(microseconds=1)


def steps(first: datetime, last: datetime, every: timedelta) -> pl.Series:
    """The times from ``first`` to ``last`` (included where a step meets it), ``every`` apart."""
    begin, end = ((at - _EPOCH) // _MICROSECOND for at in (first, last))
    return pl.Series("timestamp", np.arange(begin, end + 1, every // _MICROSECOND)).cast(TIMESTAMP)


def microseconds(times: pl.Series) -> npt.NDArray[np.int64]:
    """``times`` (``TIMESTAMP``) as microseconds since 1970."""
    return times.cast(pl.Int64).to_numpy()


def row_of(times: pl.Series, at: datetime) -> int:
    """The first row of ``times`` (sorted, ``TIMESTAMP``) at or after ``at``; their number when there is none."""
    return int(np.searchsorted(microseconds(times), (at - _EPOCH) // _MICROSECOND))


class AsOf:
    """For each of ``at`` the newest line known then, of lines that become known at ``known_at`` (both sorted) and stand for
    ``max_age``. What polars' ``join_asof`` does, without waking its threads for every live window."""

    def __init__(self, at: pl.Series, known_at: pl.Series, max_age: timedelta) -> None:
        asked, known = microseconds(at), microseconds(known_at)
        # of the lines that matter here, each stands from its first time to that of the next one
        first, end = np.searchsorted(known, asked[[0, -1]], side="right").tolist() if len(asked) else (0, 0)
        first = max(first - 1, 0)
        begins = np.searchsorted(asked, known[first:end])
        line = np.repeat(np.arange(first - 1, end), np.diff(begins, prepend=0, append=len(asked)))
        self._line = np.maximum(line, 0)
        unknown = line < 0
        if len(known):
            unknown |= asked - known[self._line] > max_age // _MICROSECOND
        self._unknown = unknown if unknown.any() else None

    def take(self, column: pl.Series) -> pl.Series:
        """Of ``column`` (floats of the lines, no NaN, null where one has none) the value that stands at each time; null where none
        does."""
        values = column.to_numpy()
        if self._unknown is None:
            return pl.Series(column.name, values[self._line], nan_to_null=column.null_count() > 0)
        taken = np.full(len(self._line), np.nan, values.dtype)
        taken[~self._unknown] = values[self._line[~self._unknown]]
        return pl.Series(column.name, taken, nan_to_null=True)


@dataclass(frozen=True)
class Feature:
    """One column that a model sees.

    ``warm_up`` counts the rows of the group's own series (minutes, hours, days) after which the value no longer depends on where
    the series began. ``expr`` is evaluated on the frame that the group's module prepares.
    """

    name: str
    group: FeatureGroup
    unit: str
    formula: str
    warm_up: int
    expr: pl.Expr = field(compare=False, repr=False)
    dtype: str = "Float32"
    may_be_constant: bool = False
    """Whether days without any change are ordinary: flags, signs, the all-time high in a rally."""


def wilder(values: pl.Expr, length: int) -> pl.Expr:
    """Wilder's smoothing: an exponential mean with weight 1/length on the newest value, begun at the first value.

    The textbook seed (mean of the first ``length``) and this one differ by a term that shrinks by (1 - 1/length) a row; the
    warm-up is what makes both the same number. Nulls are stepped over.
    """
    return values.ewm_mean(alpha=1 / length, adjust=False, ignore_nulls=True)


def ema(values: pl.Expr, span: int) -> pl.Expr:
    """Exponential mean with weight 2/(span + 1) on the newest value, begun at the first value. Nulls are stepped over."""
    return values.ewm_mean(span=span, adjust=False, ignore_nulls=True)


@dataclass(frozen=True)
class Window:
    """What is computed of the last ``length`` values of a column, for every row; null before there are so many.

    ``compute`` takes all values (NaN where one is missing) and gives one number for each whole window. It adds and compares whole
    series, once for each place of the window. So a window's number depends on nothing but its own values, where polars' rolling
    functions carry a sum along, whose last bits depend on where the series begins and on the number of threads; and a rolling rank
    takes ten times as long.
    """

    column: str
    length: int
    compute: Callable[[Values], Values]

    def of(self, frame: pl.DataFrame) -> pl.Series:
        result = np.full(frame.height, np.nan)
        if frame.height >= self.length:
            result[self.length - 1 :] = self.compute(frame[self.column].to_numpy())
        return pl.Series(result, nan_to_null=True)


Stage = Mapping[str, pl.Expr | Window]


def with_stages(frame: pl.DataFrame, stages: Iterable[Stage]) -> pl.DataFrame:
    """``frame`` with the columns of ``stages``, each computed from the frame with those before it."""
    for stage in stages:
        # windows one after the other and outside of polars: its threads would wait for each other at Python's lock
        frame = frame.with_columns_seq(**{name: how.of(frame) if isinstance(how, Window) else how for name, how in stage.items()})
    return frame


def sma(column: str, length: int) -> Window:
    """Mean of the last ``length`` values; null where one of them is missing."""

    def mean(x: Values) -> Values:
        # sums of 1, 2, 4, … neighbours; those of the binary digits of length are put one after the other
        rows = len(x) - length + 1
        total, sums, width, place = np.zeros(rows), x, 1, 0
        while place < length:
            if length & width:
                total += sums[place : place + rows]
                place += width
            sums, width = sums[:-width] + sums[width:], 2 * width
        return total / length

    return Window(column, length, mean)


def population_std(column: str, length: int) -> Window:
    """Population standard deviation of the last ``length`` values; exactly 0 where they are equal, null where one is missing."""

    def std(x: Values) -> Values:
        # around the newest value: it is near enough to the mean that nothing cancels
        rows = len(x) - length + 1
        newest, total, squares = x[length - 1 :], np.zeros(rows), np.zeros(rows)
        for place in range(length - 1):
            deviation = x[place : place + rows] - newest
            total += deviation
            squares += deviation * deviation
        return np.sqrt((squares - total * total / length) / length)

    return Window(column, length, std)


def slope(column: str, length: int) -> Window:
    """Least-squares slope over the last ``length`` values, per row; null where one of them is missing.

    The weights are antisymmetric, so a window is summed as weighted differences from the outside in: exactly 0 where it is flat.
    """
    middle = (length - 1) / 2
    squares = sum((place - middle) ** 2 for place in range(length))

    def weighted(x: Values) -> Values:
        rows = len(x) - length + 1
        total = np.zeros(rows)
        for place in range(length // 2):
            other = length - 1 - place
            total += (middle - place) * (x[other : other + rows] - x[place : place + rows])
        return total / squares

    return Window(column, length, weighted)


def share_at_most(column: str, length: int) -> Window:
    """The share of the last ``length`` (at most 255) values that are at most the newest one; none of them may be missing."""

    def counted(x: Values) -> Values:
        rows = len(x) - length + 1
        newest, count = x[length - 1 :], np.zeros(rows, np.uint8)
        for place in range(length):
            count += (x[place : place + rows] <= newest).view(np.uint8)
        return count / length

    return Window(column, length, counted)


def rsi(average_gain: pl.Expr, average_loss: pl.Expr) -> pl.Expr:
    """Wilder's relative strength index, 0-100; NaN where nothing has moved since the series began."""
    return 100 * average_gain / (average_gain + average_loss)


def percent_change(values: pl.Expr, steps: int) -> pl.Expr:
    """Change against the value ``steps`` rows before, in %."""
    return 100 * (values / values.shift(steps) - 1)
