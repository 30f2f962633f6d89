"""All that is said of one trained model: its figures (``metrics.json``) and what its plots are drawn from (``evaluation.json``)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import polars as pl
import torch

from crpbot_lib.config import ALL_GROUPS
from crpbot_lib.features.catalog import FEATURES
from crpbot_lib.training import evaluation
from crpbot_lib.training.comparison import compare
from crpbot_lib.training.config import JobSpec
from crpbot_lib.training.dataset import Dataset
from crpbot_lib.training.errors import PermanentTrainingError
from crpbot_lib.training.evaluation import Scores
from crpbot_lib.training.importance import importance
from crpbot_lib.training.notices import Notices
from crpbot_lib.training.scoring import Scorer
from crpbot_lib.training.smoke import ModelLog
from crpbot_lib.training.trainer import Trained

REGIMES = ("low", "medium", "high")


def assess(
    spec: JobSpec,
    symbol: str,
    frame: pl.DataFrame,
    filled: Iterable[tuple[str, int]],
    data: Dataset,
    trained: Trained,
    device: torch.device,
    log: ModelLog,
    notices: Notices,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures and the evaluation of ``trained`` on the test anchors of ``data``, which was built from ``frame`` and ``filled``.

    Raises PermanentTrainingError where nothing can be said (scores that are not finite, training rows of one side only),
    Interrupted when ``notices`` say so.
    """
    horizon, at = spec.train.horizon, data.timestamps
    try:
        test, validation = (
            Scores(at[anchors], logits, data.labels[anchors])
            for anchors, logits in ((data.test, trained.test_logits), (data.validation, trained.validation_logits))
        )
        figures = evaluation.evaluate(test, validation, horizon, float(data.labels[data.train].mean()))
    except ValueError as error:
        raise PermanentTrainingError(f"{symbol}: the trained model cannot be judged: {error}") from error
    moves = data.close[data.tradable + horizon] / data.close[data.tradable] - 1
    months = evaluation.months(test.timestamps)
    regimes = frame["volatility_regime"].to_numpy()[data.test].astype(str)
    group_of = {feature.name: feature.group for feature in FEATURES}
    names = spec.features[symbol].names
    groups = {group: [i for i, name in enumerate(names) if group_of.get(name) == group] for group in ALL_GROUPS}
    compared: list[dict[str, Any]] = []
    if spec.compare_features:
        try:
            compared = compare(spec, symbol, frame, filled, test, device, log, notices)
        except Exception as error:  # the model is trained and paid for, and worth as much without
            log.error("%s: not compared with fewer features: %s: %s", symbol, type(error).__name__, error)
    scorer = Scorer(data, spec.train, trained.weights, device, notices)
    return figures, {
        "calibration": evaluation.calibration(test, figures["temperature"], horizon),
        "rolling_accuracy": evaluation.rolling_accuracy(test, horizon),
        "regimes": evaluation.by_part(test, REGIMES, regimes, horizon),
        "months": evaluation.by_part(test, np.unique(months).tolist(), months, horizon),
        "importance": importance(scorer, data.test, at, data.labels, {g: c for g, c in groups.items() if c}, horizon),
        "back_test": evaluation.back_test(
            at[data.tradable], scorer(data.tradable, data.tradable, ()), moves, spec.fee_bps_per_order, horizon
        ),
        "compared": compared,
    }
