"""Intervals of means over overlapping labels, against simulations in which the truth is known."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from crpbot_lib.training import evaluation
from crpbot_lib.training.bootstrap import NoIntervalError, block_minutes, interval, student

HORIZON = 15
MINUTE_US = 60_000_000
RUNS = 1000


def random_walks(minutes: int, seed: int) -> list[evaluation.Scores]:
    """``RUNS`` markets of ``minutes`` without any memory of returns, and what a model without any skill says in them.

    Returns are heavy-tailed, with a volatility that clusters. The scores are a slow noise (half-life of 69 minutes, as features
    over an hour have) beside the momentum of the last hour, so they read real prices, know nothing of later ones, and change
    slowly. Of each market 2 % of the rows are dropped, a stretch of 90 minutes is an outage, and one of 20 minutes another.
    """
    rng = np.random.default_rng(seed)
    lead, total = 300, 300 + minutes + HORIZON
    decay = 0.99 ** np.arange(500)

    def slow(noise: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.fft.irfft(np.fft.rfft(noise, total + 500) * np.fft.rfft(decay, total + 500), total + 500)[:, :total]

    volatility = np.exp(0.07 * slow(rng.standard_normal((RUNS, total), dtype=np.float32)))
    returns = volatility * rng.standard_t(4, (RUNS, total))
    price = np.cumsum(returns, axis=1)
    at = np.arange(lead, lead + minutes)
    noise = slow(rng.standard_normal((RUNS, total), dtype=np.float32))[:, at]
    momentum = price[:, at] - price[:, at - 60]
    logits = noise / noise.std() + momentum / momentum.std()
    up = price[:, at + HORIZON] > price[:, at]
    runs = []
    for run in range(RUNS):
        kept = rng.random(minutes) >= 0.02
        for length in (90, 20):
            begin = rng.integers(0, minutes - length)
            kept[begin : begin + length] = False
        runs.append(evaluation.Scores(at[kept] * MINUTE_US, logits[run, kept] / 10, up[run, kept].astype(np.float32)))
    return runs


@pytest.fixture(scope="module")
def runs() -> list[evaluation.Scores]:
    """Two days each: 192 labels that do not overlap."""
    return random_walks(2 * 1440, seed=1)


def share_that_covers(runs: list[evaluation.Scores], values: Any, level: float = 0.95) -> float:
    """Of the runs, those whose interval of ``values(run)`` holds 0.5."""
    intervals = [interval(values(run), run.timestamps, HORIZON, level) for run in runs]
    return float(np.mean([i.low <= 0.5 <= i.high for i in intervals]))


def test_of_a_thousand_runs_without_skill_95_percent_cover_the_truth(runs: list[evaluation.Scores]) -> None:
    assert 0.92 <= share_that_covers(runs, lambda run: run.hits) <= 0.98


def test_so_do_99_percent_at_99(runs: list[evaluation.Scores]) -> None:
    assert 0.98 <= share_that_covers(runs, lambda run: run.hits, level=0.99) <= 0.998


def test_the_auc_is_covered_as_often(runs: list[evaluation.Scores]) -> None:
    assert 0.92 <= share_that_covers(runs, lambda run: evaluation.auc(run)[1]) <= 0.98


def test_eleven_hours_cover_as_often_as_four_days() -> None:
    for minutes, seed in ((660, 2), (4 * 1440, 3)):
        runs = random_walks(minutes, seed)
        assert 0.92 <= share_that_covers(runs, lambda run: run.hits) <= 0.98, minutes


def test_counting_overlapping_labels_as_independent_would_cover_in_half_of_the_runs(runs: list[evaluation.Scores]) -> None:
    """The simulation is hard enough to tell a wrong interval from a right one."""
    within = [abs(run.hits.mean() - 0.5) <= 1.96 * 0.5 / sqrt(len(run)) for run in runs]
    assert np.mean(within) < 0.6


def test_blocks_shorter_than_the_horizon_would_be_too_narrow(
    runs: list[evaluation.Scores], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crpbot_lib.training.bootstrap.block_minutes", lambda *_: HORIZON // 3)
    assert share_that_covers(runs[:300], lambda run: run.hits) < 0.88


@pytest.mark.parametrize("windows", [1, 500, 2_000, 10_000, 300_000])
def test_blocks_are_several_horizons_long_and_grow_with_the_rows(windows: int) -> None:
    assert block_minutes(windows, HORIZON) >= 4 * HORIZON
    assert block_minutes(windows, HORIZON) % HORIZON == 0
    assert block_minutes(8 * windows, HORIZON) >= block_minutes(windows, HORIZON)


def test_an_equal_call_gives_an_equal_interval() -> None:
    values, at = np.random.default_rng(0).random(2000), np.arange(2000) * MINUTE_US
    assert interval(values, at, HORIZON) == interval(values, at, HORIZON)


def test_a_year_of_silence_between_two_days_changes_little() -> None:
    """An outage leaves blocks empty; it neither joins its two sides nor counts as time that was observed."""
    values = np.random.default_rng(0).random(2880)
    at = np.arange(2880) * MINUTE_US
    apart = at + np.where(np.arange(2880) < 1440, 0, 525_600 * MINUTE_US)

    near, far = interval(values, at, HORIZON), interval(values, apart, HORIZON)

    assert far.value == near.value
    assert far.blocks == pytest.approx(near.blocks, abs=1)
    assert far.high - far.low == pytest.approx(near.high - near.low, rel=0.2)


def test_many_rows_of_few_hours_are_few_blocks() -> None:
    at = np.concatenate([np.arange(400), [100_000, 200_000, 300_000]]) * MINUTE_US
    with pytest.raises(NoIntervalError, match=r"403 fill \d blocks of 60 minutes, it takes 8"):
        interval(np.random.default_rng(0).random(403), at, HORIZON)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([], "there is no window"),
        ([1.0, float("nan")] * 1000, "1,000 of 2,000 values are NaN or infinite"),
        ([1.0] * 2000, "all 2,000 values are 1: nothing varies"),
        ([0.0, 1.0] * 100, "too few windows for an interval: 200 fill 4 blocks of 60 minutes, it takes 8"),
    ],
)
def test_what_carries_no_interval_says_why(values: list[float], why: str) -> None:
    with pytest.raises(NoIntervalError, match=why):
        interval(np.array(values), np.arange(len(values)) * MINUTE_US, HORIZON)


@pytest.mark.parametrize(
    ("probability", "freedom", "table"), [(0.975, 7, 2.365), (0.975, 20, 2.086), (0.995, 10, 3.169), (0.995, 30, 2.750)]
)
def test_students_quantiles_are_the_tables(probability: float, freedom: int, table: float) -> None:
    assert student(probability, freedom) == pytest.approx(table, abs=0.006)
