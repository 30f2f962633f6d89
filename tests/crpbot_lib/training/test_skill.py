"""Whole trainings on markets in which it is known what there was to learn: the verdict must say so.

Forty small trainings through the real data set, trainer and evaluation. Each market has 36,000 minutes; its returns are independent
but for a planted drift in the direction of a slow signal (half-life of 34 minutes) that stands in a column of its own.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from crpbot_lib.training.config import TrainConfig
from crpbot_lib.training.dataset import Dataset, build
from crpbot_lib.training.evaluation import Scores, evaluate
from crpbot_lib.training.importance import importance
from crpbot_lib.training.notices import Notices
from crpbot_lib.training.scoring import Scorer
from crpbot_lib.training.smoke import ModelLog
from crpbot_lib.training.trainer import Trained, train

MINUTES, LEAD, HORIZON = 36_000, 100, 15
NAMES = ("momentum_5", "momentum_15", "momentum_60", "volatility", "signal")
CONFIG = TrainConfig(
    **{"sequence": 5, "horizon": HORIZON, "layers": 1, "hidden": 8, "bidirectional": False, "dropout": 0.0},
    **{"epochs": 3, "batch_size": 256, "window_stride": 1, "learning_rate": 5e-3, "validation_fraction": 0.1, "test_fraction": 0.4},
)
STRENGTH = 0.1
"""Standard deviations of a minute's return that the signal moves it by: its sign is then right in 60 % of the windows."""


def market(seed: int, strength: float) -> pl.DataFrame:
    """A features frame of ``NAMES``; with a strength of 0 a random walk."""
    rng = np.random.default_rng(seed)
    total, volatility = LEAD + MINUTES, 4e-4
    signal = np.convolve(rng.standard_normal(total + 399), 0.98 ** np.arange(400), "valid")
    signal /= signal.std()
    returns = volatility * (rng.standard_normal(total) + strength * np.concatenate([[0], signal[:-1]]))
    price = np.cumsum(returns)
    columns = {
        **{f"momentum_{k}": np.concatenate([np.zeros(k), price[k:] - price[:-k]]) / (volatility * k**0.5) for k in (5, 15, 60)},
        "volatility": np.sqrt(np.convolve(returns**2, np.ones(60) / 60)[:total]),
        "signal": signal,
    }
    first = int(datetime(2025, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000
    at = pl.Series(first + np.arange(total) * 60_000_000).cast(pl.Datetime("us", "UTC"))
    frame = pl.DataFrame({"timestamp": at, "close": 1e5 * np.exp(price), **{n: columns[n].astype(np.float32) for n in NAMES}})
    return frame[LEAD:]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained_on(seed: int, strength: float) -> tuple[Dataset, TrainConfig, Trained]:
    config = CONFIG.model_copy(update={"seed": seed})
    data = build("X", market(seed, strength), NAMES, config, [])
    log = ModelLog(logging.getLogger("test"), smoke=True)
    quiet: Any = lambda *_: None  # noqa: E731
    return data, config, train("X", data, config, torch.device("cpu"), log, quiet, quiet, Notices())


def verdict(seed: int, strength: float) -> dict[str, Any]:
    """What evaluation says of one training, at 99 %."""
    data, _, trained = trained_on(seed, strength)
    test = Scores(data.timestamps[data.test], trained.test_logits, data.labels[data.test])
    validation = Scores(data.timestamps[data.validation], trained.validation_logits, data.labels[data.validation])
    return evaluate(test, validation, HORIZON, float(data.labels[data.train].mean()), level=0.99)


def test_on_twenty_random_walks_no_skill_is_shown() -> None:
    found = [verdict(seed, strength=0) for seed in range(20)]

    assert sum(f["verdict"].startswith("no skill shown") for f in found) >= 17
    assert sum(f["accuracy_low"] <= 0.5 <= f["accuracy_high"] for f in found) >= 17


def test_in_twenty_markets_with_a_signal_it_is_found() -> None:
    found = [verdict(seed, STRENGTH) for seed in range(20)]

    assert sum(f["verdict"].startswith("better than the base rate by") for f in found) >= 17
    assert sum(f["auc_low"] > 0.5 for f in found) >= 17


def test_the_signal_is_as_strong_as_stated() -> None:
    frame = market(0, STRENGTH)
    close, signal = frame["close"].to_numpy(), frame["signal"].to_numpy()
    right = (signal[:-HORIZON] > 0) == (close[HORIZON:] > close[:-HORIZON])
    assert right.mean() == pytest.approx(0.6, abs=0.015)


def test_the_group_that_holds_the_signal_is_the_one_that_is_missed() -> None:
    data, config, trained = trained_on(0, STRENGTH)
    scorer = Scorer(data, config, trained.weights, torch.device("cpu"), Notices())
    groups = {"prices": (0, 1, 2, 3), "signal": (4,)}

    prices, signal = importance(scorer, data.test, data.timestamps, data.labels, groups, HORIZON)["groups"]

    assert signal["accuracy_lost_low"] > 0.03
    assert signal["log_loss_gained_low"] > 0
    assert prices["accuracy_lost_high"] < 0.03
