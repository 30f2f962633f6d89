"""The same coin trained on fewer features, side by side with its model: whether CoinGecko and the wider timeframes earn their keep.

Only on request (``JobSpec.compare_features``): every comparison is a training of its own, as long as the model's. Nothing of it is
kept but its figures, so an interruption begins it anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import polars as pl
import torch

from crpbot_lib.config import FeatureGroup
from crpbot_lib.features import catalog
from crpbot_lib.training import dataset
from crpbot_lib.training.config import JobSpec
from crpbot_lib.training.evaluation import Scores, bounded, evaluate
from crpbot_lib.training.notices import Notices
from crpbot_lib.training.smoke import ModelLog
from crpbot_lib.training.trainer import train

FEWER: tuple[tuple[FeatureGroup, ...], ...] = (("base",), ("base", "coingecko_hourly", "coingecko_daily"))
"""What is trained besides: 31 and 54 features, as far as the model has more."""
_SHOWN = ("accuracy", "accuracy_low", "accuracy_high", "auc", "auc_low", "auc_high", "log_loss", "verdict")


def compare(
    spec: JobSpec,
    symbol: str,
    frame: pl.DataFrame,
    filled: Iterable[tuple[str, int]],
    test: Scores,
    device: torch.device,
    log: ModelLog,
    notices: Notices,
) -> list[dict[str, Any]]:
    """The figures of the same training with fewer features, and ``accuracy_lost`` against the model's ``test`` scores, window by
    window, with its interval. Raises as ``dataset.build`` and ``trainer.train`` do."""
    horizon, names = spec.train.horizon, spec.features[symbol].names
    rows = []
    for groups in FEWER:
        chosen = tuple(name for name in catalog.names(groups) if name in names)
        if not 0 < len(chosen) < len(names):
            continue
        label = f"{symbol} on {len(chosen)} features"
        log.info("%s: training, to compare", label)
        data = dataset.build(symbol, frame, chosen, spec.train, filled)
        trained = train(label, data, spec.train, device, log, lambda _: None, lambda *_: None, notices)
        own, validation = (
            Scores(data.timestamps[anchors], logits, data.labels[anchors])
            for anchors, logits in ((data.test, trained.test_logits), (data.validation, trained.validation_logits))
        )
        figures = evaluate(own, validation, horizon, float(data.labels[data.train].mean()))
        lost = bounded("accuracy_lost", test.hits - own.hits, test.timestamps, horizon)
        rows.append({"features": len(chosen), "groups": list(groups), **{k: figures[k] for k in _SHOWN}, **lost})
    return rows
