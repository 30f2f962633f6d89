"""What is said of a model on rows it never saw."""

from __future__ import annotations

from math import log, sqrt

import numpy as np
import pytest

from crpbot_lib.training.evaluation import evaluate


def test_metrics_of_a_known_case() -> None:
    label = np.array([1, 1, 1, 0] * 75, dtype=np.float32)
    probability = np.full(300, 0.8, dtype=np.float32)

    scores = evaluate(probability, label, horizon=15, train_base_rate=0.5)

    assert scores["accuracy"] == scores["base_rate"] == scores["majority_accuracy"] == 0.75
    assert scores["log_loss"] == pytest.approx(-(0.75 * log(0.8) + 0.25 * log(0.2)), rel=1e-5)
    assert scores["base_log_loss"] == pytest.approx(log(2), rel=1e-5)


def test_the_standard_error_counts_overlapping_labels_once() -> None:
    label = np.tile(np.array([1, 0], dtype=np.float32), 750)

    scores = evaluate(np.full(1500, 0.6, dtype=np.float32), label, horizon=15, train_base_rate=0.5)

    assert scores["validation_windows"] == 1500
    assert scores["effective_n"] == 100
    assert scores["accuracy_se"] == pytest.approx(sqrt(0.25 / 100))


def test_a_few_lucky_rows_are_not_certain() -> None:
    scores = evaluate(np.array([0.9] * 30, dtype=np.float32), np.ones(30, dtype=np.float32), 15, 0.5)

    assert scores["accuracy"] == 1.0
    assert scores["accuracy_se"] > 0.2
