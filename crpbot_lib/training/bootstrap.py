"""How sure a mean over minutes is whose labels overlap: the moving-block bootstrap over time. numpy only.

Labels of neighbouring minutes share all but one of their ``horizon`` minutes, so n of them are far fewer than n independent
ones, and a model's scores change slowly besides. Resampling whole blocks of consecutive minutes, several horizons long, keeps
what holds within a block (Künsch 1989). Blocks are stretches of time, not of rows: an outage or a dropped row leaves a block with
fewer values, and never joins what lies on its two sides. The blocks wrap around the end, so that every minute is drawn equally
often (circular: Politis and Romano 1992).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from crpbot_lib.training.dataset import Ints

Values = npt.NDArray[np.float64]
LEVEL = 0.95
DRAWS = 2000
LEAST_BLOCKS = 8
"""With fewer independent stretches of time no interval is given: Student's t with so few is no longer what the draws follow."""
_MINUTE_US = 60_000_000


class NoIntervalError(ValueError):
    """The values cannot carry an interval; the message says why, in words for a report."""


@dataclass(frozen=True)
class Interval:
    """A mean, the bounds that hold the true one with probability ``level``, and how many blocks of time tell so."""

    value: float
    low: float
    high: float
    level: float
    blocks: int
    block_minutes: int


def block_minutes(windows: int, horizon: int) -> int:
    """Minutes of one block for so many ``windows``: a multiple of the horizon that grows with the cube root of the number of
    independent ones, the rate at which bias and variance of the bootstrap's variance shrink alike; at least 4 horizons."""
    return horizon * max(4, ceil(float(np.cbrt(windows / horizon))))


def interval(values: npt.NDArray[Any], timestamps: Ints, horizon: int, level: float = LEVEL, seed: int = 0) -> Interval:
    """The mean of ``values`` (n,) at ``timestamps`` (n,), microseconds on the minute grid, sorted and unique, with its interval.

    Percentiles of ``DRAWS`` block bootstrap means, widened by what few blocks cost: Student's t instead of the normal, and the
    variance that the mean of so few blocks has taken away. The blocks that count are those of Kish: (sum of sizes)^2 / sum of
    squares, so many rows in a few hours are few blocks. Equal arguments give an equal interval.

    Raises NoIntervalError for a value that is not finite, values that are all equal, and fewer than ``LEAST_BLOCKS`` blocks.
    """
    n = len(values)
    if not n:
        raise NoIntervalError("there is no window")
    if not np.isfinite(values).all():
        raise NoIntervalError(f"{int((~np.isfinite(values)).sum()):,} of {n:,} values are NaN or infinite")
    length = block_minutes(n, horizon)
    minute = (timestamps - timestamps[0]) // _MINUTE_US
    sizes = np.bincount(minute // length).astype(np.float64)
    blocks = round(float(sizes.sum() ** 2 / (sizes**2).sum()))
    if blocks < LEAST_BLOCKS:
        raise NoIntervalError(
            f"too few windows for an interval: {n:,} fill {blocks} blocks of {length} minutes, it takes {LEAST_BLOCKS}"
        )
    mean = float(values.mean(dtype=np.float64))
    if np.ptp(values) == 0:
        raise NoIntervalError(f"all {n:,} values are {mean:g}: nothing varies that an interval could be taken from")
    # deviations: the ratio of two sums is then steady however many minutes of a block are absent
    minutes = int(minute[-1]) + 1
    sums, counts = (_block_sums(minute, of, minutes, length) for of in (values - mean, np.ones(n)))
    drawn = np.random.default_rng(seed).integers(0, minutes, (DRAWS, max(1, round(minutes / length))))
    total = counts[drawn].sum(axis=1)
    means = mean + sums[drawn].sum(axis=1)[total > 0] / total[total > 0]
    tail = (1 - level) / 2
    wider = student(1 - tail, blocks - 1) / NormalDist().inv_cdf(1 - tail) * sqrt(blocks / (blocks - 1))
    low, high = mean + wider * (np.quantile(means, [tail, 1 - tail]) - mean)
    return Interval(mean, float(low), float(high), level, blocks, length)


def _block_sums(minute: Ints, of: Values, minutes: int, length: int) -> Values:
    """For every minute the sum of ``of`` over the block that begins there; blocks wrap around the end."""
    laid = np.bincount(minute, weights=of, minlength=minutes)
    cumulated = np.concatenate([[0.0], np.cumsum(np.concatenate([laid, laid[: length % minutes or minutes]]))])
    sums: Values = cumulated[length : length + minutes] - cumulated[:minutes]
    return sums


def student(probability: float, freedom: int) -> float:
    """Quantile of Student's t, by its expansion around the normal's (Abramowitz and Stegun 26.7.5); to 0.002 from 7 degrees on."""
    z = NormalDist().inv_cdf(probability)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
