"""On a random walk nothing predicts the label; a feature that does has seen the future.

The walk is of independent symmetric log returns. Of every 17 rows one counts, so that labels do not overlap and every minute of the
hour decides: sign(x - median) of every feature and, for those in units of price, sign(x - close) against the sign of the next 15
minutes. Without the second the classic leak stays unseen: an hour candle joined at its open time shows in ``1h_close > close``, and
hardly in ``1h_close``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest

from crpbot_lib.config import ALL_GROUPS
from crpbot_lib.features import catalog, multi_timeframe

HORIZON, STEP = 15, 17
ROWS = 1_051_200
"""Two years."""
LIMIT = 4.5
PRICES = ("price", "USD")


@pytest.fixture(scope="module")
def walk(random_market: Callable[..., Any]) -> Any:
    return random_market(ROWS, seed=11)


@pytest.fixture(scope="module")
def frame(walk: Any) -> pl.DataFrame:
    return walk.frame()


def z_scores(frame: pl.DataFrame) -> dict[str, float]:
    """Per feature |z| of sign(x - median) against the label and, as ``name > close``, in units of price that of sign(x - close)."""
    labelled = frame.with_columns(future=pl.col("close").shift(-HORIZON)).gather_every(STEP).drop_nulls("future")
    close = labelled["close"].to_numpy()
    label = np.sign(labelled["future"].to_numpy() - close)
    found = {}
    for feature in catalog.features(ALL_GROUPS):
        x = labelled[feature.name].to_numpy().astype(float)
        found[feature.name] = _z(x - np.nanmedian(x), label)
        if feature.unit in PRICES:
            found[f"{feature.name} > close"] = _z(x - close, label)
    return found


def _z(guess: np.ndarray, label: np.ndarray) -> float:
    hits = (np.sign(guess) * label)[np.isfinite(guess)]
    decided = np.count_nonzero(hits)
    return abs(float(hits.sum())) / np.sqrt(decided) if decided else 0.0


def test_no_feature_knows_the_future(frame: pl.DataFrame, proof: list[str]) -> None:
    scores = z_scores(frame)
    worst = max(scores, key=lambda name: scores[name])
    proof.append(
        f"random walk: {frame.height:,} rows, {frame.height // STEP:,} labels, 73 features in {len(scores)} tests, "
        f"largest |z| {scores[worst]:.2f} ({worst})"
    )
    assert frame.height >= 1_000_000
    assert set(catalog.names(ALL_GROUPS)) <= set(scores)
    assert {name: z for name, z in scores.items() if z > LIMIT} == {}


class TestThatAMistakeIsFound:
    def test_bars_joined_at_their_open_time(self, walk: Any, proof: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """The bar stands on rows from its open on, before it is known: its open time shifted back by its width does that."""
        # the comparison with the minutes would refuse bars this wrong, so the test goes around it
        monkeypatch.setattr(multi_timeframe, "MAX_DISAGREEING_SHARE", 2.0)
        early = {
            width: walk.candles[width].with_columns(pl.col("timestamp").dt.offset_by(f"-{width}"))[1:]
            for width in multi_timeframe.WIDTHS
        }
        scores = z_scores(replace(walk, candles=walk.candles | early).frame())
        found = {width: scores[f"{width}_close > close"] for width in early}
        proof.append(
            f"random walk, bars joined at their open time: |z| of close {', '.join(f'{w} {z:.0f}' for w, z in found.items())}"
        )
        assert min(found.values()) > 5 * LIMIT
        assert scores["rsi"] <= LIMIT

    def test_bars_filled_backwards(self, frame: pl.DataFrame) -> None:
        known = pl.col("timestamp").dt.minute() == 59
        filled = frame.with_columns(pl.when(known).then("1h_close").backward_fill().alias("1h_close"))
        assert z_scores(filled)["1h_close > close"] > 5 * LIMIT

    def test_a_point_used_before_it_was_available(self, walk: Any) -> None:
        ahead = walk.hourly.with_columns(pl.col("price", "market_cap", "total_volume").shift(-1)).drop_nulls()
        assert z_scores(replace(walk, hourly=ahead).frame())["price_1h_change_pct"] > LIMIT

    def test_the_all_time_high_of_the_evening_on_the_whole_day(self, frame: pl.DataFrame) -> None:
        """That of two years no count of labels tells from a drift (test_truncation.py finds it); that of each day it does."""
        evening = pl.col("high").max().over(pl.col("timestamp").dt.date())
        scores = z_scores(frame.with_columns(ath_distance_pct=100 * (pl.col("close") / evening - 1)))
        assert scores["ath_distance_pct"] > LIMIT
