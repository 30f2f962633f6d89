"""The side of a training job that does not train: writing its spec, reading what became of it. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from crpbot_lib.config import Settings
from crpbot_lib.lake import KeyMissingError, Lake, keys
from crpbot_lib.training.config import FeatureFile, Gpu, JobSpec, TrainConfig
from crpbot_lib.training.errors import PermanentTrainingError, TrainingError
from crpbot_lib.training.smoke import ModelLog

logger = logging.getLogger(__name__)


def job_spec(settings: Settings, lake: Lake, run: str, feature_version: str, symbols: Sequence[str], smoke: bool) -> JobSpec:
    """The job of ``run``: the named symbols on the features of ``feature_version``, as its manifest describes them.

    Raises PermanentTrainingError when the manifest is absent or has not every symbol.
    """
    if not symbols:
        raise PermanentTrainingError(f"run {run}: no symbols to train; name at least one")
    try:
        manifest: dict[str, Any] = lake.read_json(keys.features_manifest(feature_version))
    except KeyMissingError as error:
        raise PermanentTrainingError(
            f"run {run}: features version {feature_version} has no manifest ({error}); "
            "the feature gate writes it once the files agree with the catalog"
        ) from error
    present: dict[str, dict[str, Any]] = manifest["symbols"]
    if missing := [s for s in symbols if s not in present]:
        raise PermanentTrainingError(
            f"run {run}: features version {feature_version} holds {', '.join(sorted(present))} and not "
            f"{', '.join(missing)}; build their features in the same version"
        )
    files = {
        s: FeatureFile(
            key=present[s]["key"],
            sha256=present[s]["sha256"],
            rows=present[s]["rows"],
            features=present[s]["features"],
            names=tuple(present[s]["names"]),
            catalog=present[s]["hash"],
        )
        for s in symbols
    }
    return JobSpec(
        run=run,
        feature_version=feature_version,
        symbols=tuple(symbols),
        features=files,
        smoke=smoke,
        train=TrainConfig.for_smoke() if smoke else TrainConfig(),
        image=settings.gpu.training_image,
        gpus=tuple(Gpu(instance_type=c.instance_type, name=c.gpu, memory_gb=c.gpu_memory_gb) for c in settings.gpu.candidates),
        synthetic=settings.training.synthetic,
        fee_bps_per_order=settings.training.fee_bps_per_order,
        compare_features=settings.training.compare_features,
    )


def write_job(lake: Lake, spec: JobSpec) -> str:
    """Stores the spec where the container looks for it; returns its key. Writing an equal spec again changes nothing."""
    key = keys.training_run(spec.run, "job.json")
    lake.write_json(key, spec.model_dump(mode="json"))
    ModelLog(logger, spec.smoke).info("run %s: job of %s written to %s", spec.run, ", ".join(spec.symbols), lake.url(key))
    return key


def read_status(lake: Lake, run: str) -> dict[str, Any] | None:
    """The job's last ``status.json``, or None where it has not written one yet."""
    try:
        status: dict[str, Any] = lake.read_json(keys.training_run(run, "status.json"))
    except KeyMissingError:
        return None
    return status


def check_model(lake: Lake, run: str, symbol: str) -> dict[str, Any]:
    """The metrics of one symbol's finished model. Only reads.

    Raises PermanentTrainingError when the symbol's training failed for good, TrainingError when it did not finish.
    """
    status = read_status(lake, run)
    if status is None:
        raise TrainingError(f"{symbol}: run {run} has no status at {lake.url(keys.training_run(run, 'status.json'))}")
    # a job that ended before it had read what to train names no symbol
    own = status["symbols"].get(symbol) or (None if status["symbols"] else {"state": status["state"]})
    if own is None:
        raise PermanentTrainingError(f"{symbol}: run {run} trains {', '.join(status['symbols'])} and not this symbol")
    if own["state"] != "succeeded":
        kind = PermanentTrainingError if status["permanent"] else TrainingError
        why = own.get("error") or status["error"] or f"the run is {status['state']}"
        raise kind(f"{symbol}: run {run} made no model, its state is {own['state']}: {why}")
    metrics: dict[str, Any] = lake.read_json(keys.run_symbol(run, symbol, "metrics.json"))
    log = ModelLog(logger, metrics["smoke"])
    log.info(
        "%s: accuracy %s against %.3f always naming the commoner side, log loss %.4f against %.4f; "
        "%s test windows, about %s independent",
        symbol,
        accuracy_words(metrics),
        metrics["majority_accuracy"],
        metrics["log_loss"],
        metrics["base_log_loss"],
        f"{metrics['test_windows']:,}",
        f"{metrics['effective_n']:,}",
    )
    log.info("%s: %s", symbol, metrics["verdict"])
    return metrics


def accuracy_words(metrics: Mapping[str, Any]) -> str:
    """The accuracy on the test rows with its interval, or that there is none."""
    low, high = metrics.get("accuracy_low"), metrics.get("accuracy_high")
    interval = "no interval" if low is None or high is None else f"{low:.3f} to {high:.3f}"
    return f"{metrics['accuracy']:.3f} ({interval})"
