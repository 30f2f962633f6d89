"""What a group of features is worth to a model, where it is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from crpbot_lib.training.config import TrainConfig
from crpbot_lib.training.dataset import Dataset, Floats, Ints, Scaler
from crpbot_lib.training.importance import MOST_WINDOWS, importance, shuffled
from crpbot_lib.training.model import PriceLSTM
from crpbot_lib.training.notices import Interrupted, Notices
from crpbot_lib.training.scoring import Scorer

MINUTE_US = 60_000_000
GROUPS = {"knows": (0, 1), "noise": (2,), "unused": (3, 4)}
WEIGHTS = np.array([0.5, 0.5, 0.1, 0, 0], dtype=np.float32)


class Linear:
    """A model that adds up the columns of the anchor's own row; column 0 knows something of the label."""

    def __init__(self, rows: int) -> None:
        rng = np.random.default_rng(0)
        self.labels = (rng.random(rows) < 0.5).astype(np.float32)
        self.values = rng.normal(0, 1, (rows, 5)).astype(np.float32)
        self.values[:, 0] += self.labels - 0.5
        self.timestamps = np.arange(rows) * MINUTE_US
        self.asked: list[int] = []

    def __call__(self, anchors: Ints, donors: Ints, columns: Sequence[int]) -> Floats:
        self.asked.append(len(anchors))
        own = self.values[anchors].copy()
        own[:, list(columns)] = self.values[donors][:, list(columns)]
        return own @ WEIGHTS


def test_a_group_that_knows_is_missed_and_one_that_is_unused_is_not() -> None:
    model = Linear(12_000)

    found = importance(model, np.arange(2000, 12_000), model.timestamps, model.labels, GROUPS, 15)

    knows, noise, unused = found["groups"]
    assert [(g["group"], g["features"]) for g in found["groups"]] == [("knows", 2), ("noise", 1), ("unused", 2)]
    assert 0.05 < knows["accuracy_lost_low"] < knows["accuracy_lost"] < knows["accuracy_lost_high"]
    assert knows["log_loss_gained_low"] > 0
    assert noise["accuracy_lost_low"] < 0 < noise["accuracy_lost_high"]
    assert (unused["accuracy_lost"], unused["accuracy_lost_low"]) == (0.0, None)
    assert unused["accuracy_lost_note"].startswith("all 10,000 values are 0: nothing varies")
    assert found == importance(model, np.arange(2000, 12_000), model.timestamps, model.labels, GROUPS, 15), "of fixed seeds"


def test_of_many_anchors_some_are_asked() -> None:
    model = Linear(3 * MOST_WINDOWS)

    assert importance(model, np.arange(3 * MOST_WINDOWS), model.timestamps, model.labels, GROUPS, 15)["windows"] == MOST_WINDOWS
    assert set(model.asked) == {MOST_WINDOWS}


def test_blocks_of_time_are_shuffled_whole() -> None:
    minutes = np.concatenate([np.arange(0, 100), np.arange(400, 1000)])

    order = shuffled(minutes * MINUTE_US, 60, np.random.default_rng(0))

    assert sorted(order.tolist()) == list(range(700))
    assert (order != np.arange(700)).mean() > 0.8
    blocks = minutes[order] // 60
    assert len(np.flatnonzero(np.diff(blocks))) + 1 == len(np.unique(blocks)), "each block stands in one piece"


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    """A network with random weights over 300 random rows of 4 features."""
    torch.manual_seed(0)
    config = TrainConfig(sequence=10, hidden=8, layers=2)
    values = np.random.default_rng(0).normal(0, 1, (300, 4)).astype(np.float32)
    none = np.empty(0, dtype=np.int64)
    scaler = Scaler(np.zeros(4, np.float32), np.ones(4, np.float32), 10)
    data = Dataset(
        **{"values": values, "labels": np.zeros(300, np.float32), "timestamps": np.arange(300) * MINUTE_US, "close": np.ones(300)},
        **{
            "train": none,
            "validation": none,
            "test": none,
            "tradable": none,
            "scaler": scaler,
            "counts": {},
            "split": "",
            "test_split": "",
        },
    )
    return Scorer(data, config, PriceLSTM(4, config).state_dict(), torch.device("cpu"), Notices())


def test_a_window_takes_the_groups_columns_from_the_donors_window_and_the_rest_from_its_own(scorer: Scorer) -> None:
    anchors, donors = np.arange(50, 150), np.arange(150, 250)

    own = scorer(anchors, donors, ())

    assert np.array_equal(scorer(anchors, anchors, (0, 1, 2, 3)), own)
    assert np.array_equal(scorer(anchors, donors, (0, 1, 2, 3)), scorer(donors, donors, ()))
    mixed = scorer(anchors, donors, (1, 2))
    assert not np.isclose(mixed, own).any()
    assert np.allclose(mixed, scorer(donors, anchors, (0, 3))), "the same windows, told the other way round"


def test_scoring_ends_at_a_notice(scorer: Scorer) -> None:
    notices = Notices()
    notices.end("a spot notice")
    told = Scorer.__new__(Scorer)
    told.__dict__ |= {**scorer.__dict__, "_notices": notices}
    with pytest.raises(Interrupted):
        told(np.arange(50, 60), np.arange(50, 60), ())
