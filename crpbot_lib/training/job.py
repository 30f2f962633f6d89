"""What the container does: check the machine, check the features, train every symbol that is not trained yet, store the models.

Knows nothing of Airflow or EC2. torch is imported when the job runs, not when this module is.
"""

from __future__ import annotations

import hashlib
import io
import logging
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import polars as pl
from pydantic import ValidationError

from crpbot_lib.config import ALL_GROUPS
from crpbot_lib.features import catalog
from crpbot_lib.lake import KeyMissingError, Lake, UnreadableError, keys
from crpbot_lib.training import dataset
from crpbot_lib.training.config import FeatureFile, JobSpec
from crpbot_lib.training.errors import PermanentTrainingError
from crpbot_lib.training.notices import Interrupted, Notices
from crpbot_lib.training.patience import patiently
from crpbot_lib.training.smoke import ModelLog
from crpbot_lib.training.spec import accuracy_words, read_status
from crpbot_lib.training.status import HEARTBEAT_SECONDS, State, StatusFile

if TYPE_CHECKING:
    import torch

    from crpbot_lib.training.resume import Checkpoints

logger = logging.getLogger(__name__)
_RESULTS = ("model.pt", "evaluation.json", "metrics.json")
_LAST_CHECKPOINT_SECONDS = 40.0
"""So long the checkpoint of a job that must end is tried: of the 60 s until it is ended as it stands, the last word needs some."""
_PAUSE_SECONDS = 2.0


def run(lake: Lake, run_id: str, generation: int = 0, heartbeat: float = HEARTBEAT_SECONDS, notices: Notices | None = None) -> None:
    """Runs the job ``training-runs/<run_id>/job.json`` to its end and leaves its status in the lake.

    ``generation`` counts the run's instances; the status carries it, so that an earlier instance's last word is not taken for
    this one's. What earlier ones have finished is kept, and what they have begun is gone on with.
    Raises what made it fail (PermanentTrainingError where a retry would repeat it), and Interrupted when ``notices`` told it to
    end, after the status says so.
    """
    notices = notices or Notices()
    status: StatusFile | None = None
    log = ModelLog(logger, smoke=False)
    try:
        # a run that was begun anew on purpose says from which generation on its work counts; every later status repeats it, so
        # none is written before it is known
        since = int((patiently(lambda: read_status(lake, run_id), log, notices.pause) or {}).get("since", 0))
        status = StatusFile(lake, run_id, generation, since=since)
        spec = patiently(lambda: read_spec(lake, run_id), log, notices.pause)
        log = ModelLog(logger, spec.smoke)
        job = patiently(lambda: lake.sha256(keys.training_run(run_id, "job.json")), log, notices.pause)
        status = StatusFile(lake, run_id, generation, spec.symbols, spec.smoke, since=since, job=job)
        patiently(lambda: status.start(heartbeat, notices.asked_seconds_ago), log, notices.pause)
        report = _train_all(lake, spec, generation, since, status, log, notices)
        patiently(lambda: write_manifest(lake, spec, generation, report), log, notices.pause)
        patiently(lambda: status.finish("succeeded"), log, notices.pause)
    except Interrupted as interruption:
        log.warning("run %s interrupted: %s", run_id, interruption)
        _last_word(status, log, "interrupted", str(interruption))
        raise
    except Exception as error:
        permanent = bool(getattr(error, "permanent", False))
        text = f"{type(error).__name__}: {error}"
        log.error("run %s failed%s: %s", run_id, " for good" if permanent else "", text)
        _last_word(status, log, "failed", text, permanent)
        raise


def _last_word(status: StatusFile | None, log: ModelLog, state: State, why: str, permanent: bool = False) -> None:
    """Writes the status of a run that did not succeed; that this fails too must not hide why, nor change the job's exit status."""
    if status is None:
        log.error("the former status could not be read, so the job ends without its last word")
        return
    try:
        patiently(lambda: status.finish(state, why, permanent), log, time.sleep)
    except Exception as error:
        log.error("the status could not be written, the job ends without its last word: %s: %s", type(error).__name__, error)


def write_manifest(lake: Lake, spec: JobSpec, generation: int, report: Sequence[str]) -> None:
    """Lists what ``generation`` leaves, job, results and the keys of ``report``, with size and sha256 as they are read back: all of
    them are whole while the status is this generation's. Not among them: what changes (status, launches, cost), the
    checkpoints, and what an earlier repetition of the run has left.
    """
    prefix = keys.training_run(spec.run)
    results = [keys.run_symbol(spec.run, symbol, name) for symbol in spec.symbols for name in _RESULTS]
    files: dict[str, dict[str, Any]] = {}
    for key in (keys.training_run(spec.run, "job.json"), *results, *report):
        data = lake.read(key)
        files[key.removeprefix(prefix)] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest = {
        "run": spec.run,
        "generation": generation,
        "smoke": spec.smoke,
        "feature_version": spec.feature_version,
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": files,
    }
    lake.write_json(keys.run_manifest(spec.run), manifest)


def read_spec(lake: Lake, run_id: str) -> JobSpec:
    """The job's spec; PermanentTrainingError when it is absent or not valid."""
    key = keys.training_run(run_id, "job.json")
    try:
        spec = JobSpec.model_validate(lake.read_json(key))
    except KeyMissingError as error:
        raise PermanentTrainingError(f"run {run_id} has no job: {error}; write it with training.write_job") from error
    except (ValidationError, UnreadableError) as error:
        raise PermanentTrainingError(f"{lake.url(key)} is no valid job of this version of the code: {error}") from error
    if spec.run != run_id:
        raise PermanentTrainingError(f"{lake.url(key)} is the job of run {spec.run}, expected {run_id}")
    return spec


def _train_all(
    lake: Lake, spec: JobSpec, generation: int, since: int, status: StatusFile, log: ModelLog, notices: Notices
) -> list[str]:
    """Trains what is not trained yet; returns the keys of the report, none where it failed."""
    from crpbot_lib.training.report import write_report
    from crpbot_lib.training.resume import Checkpoints

    started = time.monotonic()
    log.info("run %s: %s on features version %s, image %s", spec.run, ", ".join(spec.symbols), spec.feature_version, spec.image)
    device, gpu = select_device(spec, log, patiently(lambda: _launched_type(lake, spec.run, generation), log, notices.pause))
    status.gpu(gpu)
    for symbol in spec.symbols:
        check_catalog(symbol, spec.features[symbol])
    for symbol in spec.symbols:
        notices.check()
        checkpoints = Checkpoints(lake, spec, symbol, generation, since)
        metrics = patiently(checkpoints.finished, log, notices.pause)
        if metrics is not None:
            log.info("%s: trained by generation %s already, its model is kept", symbol, metrics["generation"])
        else:
            status.symbol(symbol, state="running")
            metrics = _train_symbol(lake, spec, symbol, generation, device, gpu, checkpoints, status, log, notices)
        status.symbol(symbol, state="succeeded", accuracy=metrics["accuracy"], seconds=metrics["seconds"])
    log.info("run %s: %d models in %.1f s", spec.run, len(spec.symbols), time.monotonic() - started)
    try:
        return patiently(lambda: write_report(lake, spec), log, notices.pause)
    except Exception as error:  # the models are trained and paid for; the page can be made from what the lake holds at any time
        log.error("run %s: no report: %s: %s", spec.run, type(error).__name__, error)
        return []


def _launched_type(lake: Lake, run_id: str, generation: int) -> str | None:
    """The instance type that the generation was launched as, by its last record; None where there is no record of it."""
    launches = [lake.read_json(key) for key in lake.keys(keys.training_run(run_id, "launches/"))]
    return next((str(one["instance_type"]) for one in reversed(launches) if one["generation"] == generation), None)


def select_device(spec: JobSpec, log: ModelLog, instance_type: str | None = None) -> tuple[torch.device, str | None]:
    """The GPU and its name; the CPU and None for a smoke run on a machine without one.

    Raises PermanentTrainingError without CUDA (the rule is never to train locally, on CPU or GPU of one's own), and on a GPU that
    cannot compute or is not that of ``instance_type``; where the job does not know the type, or it is None, that none of the job's
    types has.
    """
    import torch

    if not torch.cuda.is_available():
        if not spec.smoke:
            raise PermanentTrainingError(
                "torch.cuda.is_available() is False and the job is no smoke run: models are never trained locally or on a CPU. "
                "Start it through the retrain DAG, which launches a GPU instance; if this is one, its driver or the container's "
                "GPU access (docker run --gpus all) is missing"
            )
        # more threads gain a third on a free machine, and on a busy one they wait for each other ten times as long
        torch.set_num_threads(1)
        log.info("no GPU: a few steps of a small model on one CPU thread")
        return torch.device("cpu"), None
    device = torch.device("cuda", 0)
    name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    log.info("GPU: %s, %.1f GB, CUDA %s, torch %s", name, memory / 1e9, torch.version.cuda, torch.__version__)
    log.info("nvidia-smi: %s", _nvidia_smi())
    expected = [gpu for gpu in spec.gpus if gpu.instance_type == instance_type] or spec.gpus
    if not spec.smoke and expected and not any(gpu.matches(name, memory) for gpu in expected):
        raise PermanentTrainingError(
            f"the GPU is {name} with {memory / 1e9:.1f} GB, expected {' or '.join(map(str, expected))}: this run was launched on "
            "no such machine. Correct gpu.candidates (gpu, gpu_memory_gb), or look where the job was started"
        )
    try:
        torch.ones(1024, device=device).sum().item()
    except RuntimeError as error:
        raise PermanentTrainingError(
            f"{name} is there and does not compute: {error}; driver {_nvidia_smi()}, torch was built for CUDA {torch.version.cuda}"
        ) from error
    return device, name


def _nvidia_smi() -> str:
    """One line of what the driver says; what is wrong with it where it does not."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,temperature.gpu", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no answer ({error})"
    return (answer.stdout or answer.stderr).strip()


def check_catalog(symbol: str, expected: FeatureFile) -> None:
    """PermanentTrainingError when this container's catalog is not the one that the features were built with: its models would
    carry a hash that no runtime of either version accepts."""
    groups = [g for g in ALL_GROUPS if set(catalog.names([g])) <= set(expected.names)]
    if (found := catalog.catalog_hash(groups)) != expected.catalog:
        raise PermanentTrainingError(
            f"{symbol}: the features were built under catalog {expected.catalog}, this container has {found} (groups "
            f"{', '.join(groups) or 'none'}): the image is of another version than what built them. Build and push the training "
            "image of this version, or build the features again"
        )


def load_features(lake: Lake, symbol: str, expected: FeatureFile) -> pl.DataFrame:
    """The symbol's features, byte for byte what the manifest says; PermanentTrainingError with the difference when not."""
    try:
        data = lake.read(expected.key)
    except KeyMissingError as error:
        raise PermanentTrainingError(f"{symbol}: {error}; build the features of this version again") from error
    found = hashlib.sha256(data).hexdigest()
    if found != expected.sha256:
        raise PermanentTrainingError(
            f"{symbol}: {lake.url(expected.key)} ({len(data):,} bytes) has sha256 {found}, the manifest says {expected.sha256}: "
            "the file was truncated or changed after the gate; build the features of this version again"
        )
    try:
        frame = pl.read_parquet(io.BytesIO(data))
    except pl.exceptions.PolarsError as error:
        raise PermanentTrainingError(f"{symbol}: {lake.url(expected.key)} is no readable parquet file: {error}") from error
    dataset.check_frame(symbol, frame, expected)
    return frame


def load_filled(lake: Lake, symbol: str, feature_version: str, expected: FeatureFile) -> list[tuple[str, int]]:
    """The minutes without a trade that were filled, as the sidecar of the symbol's features file lists them: (first, how many).

    PermanentTrainingError when the sidecar is absent or is that of another file.
    """
    key = keys.features_sidecar(feature_version, symbol)
    try:
        sidecar: dict[str, Any] = lake.read_json(key)
    except KeyMissingError as error:
        raise PermanentTrainingError(f"{symbol}: {error}; build the features of this version again") from error
    if sidecar["sha256"] != expected.sha256:
        raise PermanentTrainingError(
            f"{symbol}: {lake.url(key)} describes a file with sha256 {sidecar['sha256']}, the manifest says {expected.sha256}; "
            "build the features of this version again"
        )
    return [(start, minutes) for start, minutes in sidecar["filled"]]


def _train_symbol(
    lake: Lake,
    spec: JobSpec,
    symbol: str,
    generation: int,
    device: torch.device,
    gpu: str | None,
    checkpoints: Checkpoints,
    status: StatusFile,
    log: ModelLog,
    notices: Notices,
) -> dict[str, Any]:
    import torch

    from crpbot_lib.training.assessment import assess
    from crpbot_lib.training.checkpoint import Checkpoint
    from crpbot_lib.training.resume import identity
    from crpbot_lib.training.trainer import Progress, Snapshot, train

    def report(progress: Progress) -> None:
        # between two epochs the last one's validation stays
        status.symbol(symbol, **{name: value for name, value in asdict(progress).items() if value is not None})

    def save(snapshot: Snapshot, epoch: int) -> None:
        ending: float | None = None
        while not (stored := checkpoints.save(snapshot, epoch)):
            # another epoch will write another one, but a job that must end has no other
            if not notices.ending:
                break
            ending = ending or time.monotonic()
            if time.monotonic() - ending > _LAST_CHECKPOINT_SECONDS:
                break
            time.sleep(_PAUSE_SECONDS)
        if stored:
            status.symbol(symbol, checkpoint_step=snapshot.step)

    expected = spec.features[symbol]
    frame = patiently(lambda: load_features(lake, symbol, expected), log, notices.pause)
    log.info(
        "%s: %s rows, sha256, names, order and dtypes are the manifest's, catalog %s", symbol, f"{frame.height:,}", expected.catalog
    )
    filled = patiently(lambda: load_filled(lake, symbol, spec.feature_version, expected), log, notices.pause)
    data = dataset.build(symbol, frame, expected.names, spec.train, filled)
    log.info("%s: Numeric features selected: %d", symbol, data.values.shape[1])
    log.info(
        "%s: %s training, %s validation and %s test windows, split at %s and %s; %s",
        symbol,
        f"{len(data.train):,}",
        f"{len(data.validation):,}",
        f"{len(data.test):,}",
        data.split,
        data.test_split,
        ", ".join(f"{name} {count:,}" for name, count in data.counts.items()),
    )
    notices.check()
    resume = patiently(checkpoints.newest, log, notices.pause)
    try:
        trained = train(symbol, data, spec.train, device, log, report, save, notices, resume)
    except torch.OutOfMemoryError as error:
        raise PermanentTrainingError(
            f"{symbol}: batches of {spec.train.batch_size} do not fit the memory of {gpu}: {error}; lower train.batch_size"
        ) from error
    figures, evaluation = assess(spec, symbol, frame, filled, data, trained, device, log, notices)
    checkpoint = Checkpoint(
        symbol=symbol,
        run=spec.run,
        smoke=spec.smoke,
        names=expected.names,
        catalog=expected.catalog,
        feature_version=spec.feature_version,
        scaler=data.scaler,
        config=spec.train,
        weights=trained.weights,
    )
    content = checkpoint.to_bytes()
    metrics: dict[str, Any] = {
        "run": spec.run,
        "symbol": symbol,
        "generation": generation,
        "smoke": spec.smoke,
        "gpu": gpu,
        "trained_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(trained.seconds, 3),
        **identity(spec, symbol),
        "file_features": expected.features,
        "input_size": checkpoint.input_size,
        "sha256": hashlib.sha256(content).hexdigest(),
        "steps": trained.steps,
        "epochs": trained.epochs,
        "train_loss": trained.train_loss,
        "train_windows": len(data.train),
        "split": data.split,
        "test_split": data.test_split,
        **data.counts,
        **figures,
    }
    evaluation["history"] = trained.history
    patiently(lambda: lake.write(keys.run_symbol(spec.run, symbol, "model.pt"), content), log, notices.pause)
    patiently(lambda: lake.write_json(keys.run_symbol(spec.run, symbol, "evaluation.json"), evaluation), log, notices.pause)
    # last: they say that the model is finished
    patiently(lambda: lake.write_json(keys.run_symbol(spec.run, symbol, "metrics.json"), metrics), log, notices.pause)
    log.info(
        "%s: accuracy %s on the test rows, %s windows, about %s independent; checkpoint input_size %d, %s bytes",
        symbol,
        accuracy_words(metrics),
        f"{metrics['test_windows']:,}",
        f"{metrics['effective_n']:,}",
        checkpoint.input_size,
        f"{len(content):,}",
    )
    log.info("%s: %s", symbol, metrics["verdict"])
    return metrics
