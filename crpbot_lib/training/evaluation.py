"""What a model is worth on rows it never saw: accuracy and log loss, with an honest error. numpy only."""

from __future__ import annotations

from math import sqrt

import numpy as np

from crpbot_lib.training.dataset import Floats


def _log_loss(probability: Floats, label: Floats) -> float:
    p = np.clip(probability.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-np.mean(label * np.log(p) + (1 - label) * np.log(1 - p)))


def evaluate(probability: Floats, label: Floats, horizon: int, train_base_rate: float) -> dict[str, float | int]:
    """Metrics of ``probability`` of UP against ``label`` (both (n,), n >= 1).

    Labels of neighbouring minutes share most of their ``horizon`` minutes, so n of them carry about n / horizon independent
    ones; the standard error of the accuracy is that of so many. ``base_log_loss`` is the log loss of always saying the
    training rows' share of UP; ``majority_accuracy`` is the accuracy of always naming the commoner side.
    """
    n = len(label)
    effective = max(1, n // horizon)
    accuracy = float(np.mean((probability >= 0.5) == (label == 1)))
    base_rate = float(label.mean())
    return {
        "validation_windows": n,
        "effective_n": effective,
        "accuracy": accuracy,
        "accuracy_se": sqrt(max(accuracy * (1 - accuracy), 1 / effective / 4) / effective),
        "base_rate": base_rate,
        "majority_accuracy": max(base_rate, 1 - base_rate),
        "log_loss": _log_loss(probability, label),
        "base_log_loss": _log_loss(np.full(n, train_base_rate, dtype=np.float32), label),
    }
