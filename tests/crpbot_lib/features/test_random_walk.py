"""On a random walk nothing predicts the label; a feature that does has seen the future."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest

from crpbot_lib.config import ALL_GROUPS
from crpbot_lib.features import catalog

HORIZON = 15
ROWS = 150_000
LIMIT = 4.5


@pytest.fixture(scope="module")
def walk(random_market: Callable[..., Any]) -> Any:
    return random_market(ROWS, seed=11)


def z_scores(frame: pl.DataFrame) -> dict[str, float]:
    """Per feature the larger |z| of sign(x - median) and, in price units, of sign(x - close) against the label, on rows whose
    labels do not overlap."""
    labelled = frame.with_columns(future=pl.col("close").shift(-HORIZON)).gather_every(HORIZON).drop_nulls()
    label = (labelled["future"] - labelled["close"]).sign().to_numpy()
    found = {}
    for feature in catalog.features(ALL_GROUPS):
        x = labelled[feature.name].to_numpy().astype(float)
        guesses = [np.sign(x - np.median(x))]
        if feature.unit in ("price", "USD"):
            guesses.append(np.sign(x - labelled["close"].to_numpy()))
        sums = [(np.sum(g * label), np.count_nonzero(g * label)) for g in guesses]
        found[feature.name] = max(abs(s) / np.sqrt(n) if n else 0.0 for s, n in sums)
    return found


def test_no_feature_knows_the_future(walk: Any) -> None:
    scores = z_scores(walk.frame())
    assert len(scores) == 73
    assert {name: z for name, z in scores.items() if z > LIMIT} == {}


def test_an_hour_candle_joined_at_its_open_time_is_found(walk: Any) -> None:
    """The classic mistake: the bar stands on rows from its open on, 59 minutes before it is known. Shifting its open time back by
    its width does exactly that."""
    # the comparison with the minutes would refuse bars this wrong, so the test goes around it
    early = walk.candles["1h"].with_columns(pl.col("timestamp") - timedelta(hours=1))[1:]
    from crpbot_lib.features import multi_timeframe

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multi_timeframe, "MAX_DISAGREEING_SHARE", 2.0)
        scores = z_scores(walk.with_candles(h1=early).frame())
    assert scores["1h_close"] > 10 * LIMIT
    assert scores["15m_close"] <= LIMIT


def test_a_point_used_before_it_was_available_is_found(walk: Any) -> None:
    ahead = walk.hourly.with_columns(
        pl.col("price").shift(-1), pl.col("market_cap").shift(-1), pl.col("total_volume").shift(-1)
    ).drop_nulls()
    assert max(z_scores(replace(walk, hourly=ahead).frame()).values()) > LIMIT
