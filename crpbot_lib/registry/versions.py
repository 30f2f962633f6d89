"""Publishing what a run trained, and reading it back.

A version is ``<prefix>/<version>/`` with one checkpoint a symbol and ``manifest.json``, which is written last: a version without
one was never finished. The version's name and every byte derive from the run's own files, so publishing twice changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crpbot_lib.config import Settings
from crpbot_lib.features import catalog
from crpbot_lib.lake import KeyMissingError, Lake, keys
from crpbot_lib.registry.errors import AlignmentError, RegistryError
from crpbot_lib.training import ModelLog, check_model, marked, read_status

if TYPE_CHECKING:
    from crpbot_lib.training.checkpoint import Checkpoint

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
Manifest = dict[str, Any]
_SHOWN = (
    *("verdict", "skill", "accuracy", "accuracy_low", "accuracy_high", "accuracy_se", "majority_accuracy", "auc"),
    *("log_loss", "base_log_loss", "test_windows", "validation_windows", "steps", "seconds"),
)
"""Metrics; None where a version was trained before there were such."""


def publish(settings: Settings, lake: Lake, run: str) -> dict[str, Any]:
    """Copies the models of a succeeded run to a version of its own; returns its entry of ``list_versions``.

    Raises RegistryError when the run did not succeed, a model's bytes are not those that were trained, or its metrics are those
    of another symbol, run or features version.
    """
    status = read_status(lake, run)
    if status is None or status["state"] != "succeeded":
        state = "has no status" if status is None else f"is {status['state']} ({status['error']})"
        raise RegistryError(f"run {run} {state}; only a succeeded run is published")
    job: dict[str, Any] = lake.read_json(keys.training_run(run, "job.json"))
    contents: dict[str, bytes] = {}
    entries: dict[str, dict[str, Any]] = {}
    for symbol in job["symbols"]:
        metrics = check_model(lake, run, symbol)
        content = lake.read(keys.run_symbol(run, symbol, "model.pt"))
        found = hashlib.sha256(content).hexdigest()
        if found != metrics["sha256"]:
            raise RegistryError(
                f"{symbol}: the model of run {run} has sha256 {found}, training wrote {metrics['sha256']}; train it again"
            )
        # two symbols may have the same names, order and hash: only this tells their models apart
        told = {"symbol": symbol, "run": run, "feature_version": job["feature_version"], "smoke": job["smoke"]}
        if other := _unlike(metrics, told):
            raise RegistryError(f"{symbol}: metrics.json of run {run} is not the job's: {'; '.join(other)}; train it again")
        slug = settings.symbol(symbol).slug
        file = f"lstm_{slug}_1m_{found[:8]}.pt"
        contents[file] = content
        entries[symbol] = {
            "file": file,
            "sha256": found,
            "input_size": metrics["input_size"],
            "catalog": metrics["catalog"],
            "names": job["features"][symbol]["names"],
            "metrics": metrics,
        }
    smoke = bool(job["smoke"])
    trained_date = min(entry["metrics"]["trained_at"] for entry in entries.values())[:10]
    identity = json.dumps([smoke, run, job["feature_version"], {s: e["sha256"] for s, e in entries.items()}], sort_keys=True)
    version = f"{'smoke-' if smoke else ''}{trained_date}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    manifest: Manifest = {
        "version": version,
        "run": run,
        "smoke": smoke,
        "trained_date": trained_date,
        "gpu": status["gpu"],
        "feature_version": job["feature_version"],
        "train": job["train"],
        "image": job["image"],
        "symbols": entries,
    }
    prefix = settings.training.prefix
    tags = {"trained_date": trained_date, "gpu": _tag(status["gpu"] or "none"), "run": _tag(run)}
    for file, content in contents.items():
        lake.write(keys.model(prefix, version, file), content, tags=tags)
    lake.write_json(keys.model(prefix, version, MANIFEST), manifest, tags=tags)
    ModelLog(logger, smoke).info(
        "version %s: %d models of run %s published to %s", version, len(entries), run, lake.url(keys.model(prefix, version))
    )
    return _summary(manifest)


def show(settings: Settings, lake: Lake, version: str) -> Manifest:
    """The manifest of ``version``; RegistryError names the known versions when it is absent."""
    try:
        manifest: Manifest = lake.read_json(keys.model(settings.training.prefix, version, MANIFEST))
    except KeyMissingError:
        known = ", ".join(_versions(settings, lake)) or "none"
        raise RegistryError(
            f"no model version {version!r} under {lake.url(settings.training.prefix)}; published: {known}"
        ) from None
    return manifest


def list_versions(settings: Settings, lake: Lake) -> list[dict[str, Any]]:
    """Every published version, oldest first: version, trained_date, run, gpu, smoke, feature_version and, per symbol, file,
    sha256, input_size and the metrics that a person looks at."""
    found = [_summary(show(settings, lake, version)) for version in _versions(settings, lake)]
    return sorted(found, key=lambda summary: (summary["trained_date"], summary["version"]))


def load_model(settings: Settings, lake: Lake, version: str, symbol: str) -> Checkpoint:
    """The checkpoint of one symbol, byte for byte the published one.

    Raises RegistryError when the version has no such symbol, AlignmentError when the bytes are not the manifest's.
    """
    return _open(settings, lake, show(settings, lake, version), symbol)


def verify(settings: Settings, lake: Lake, version: str) -> dict[str, Any]:
    """Reads every model back and holds it against its manifest and against today's catalog.

    Returns per symbol the file, sha256, catalog hash and the three counts (features file, run time, checkpoint). Raises
    AlignmentError that lists every difference.
    """
    manifest = show(settings, lake, version)
    log = ModelLog(logger, manifest["smoke"])
    wrong: list[str] = []
    report: dict[str, Any] = {}
    for symbol, entry in manifest["symbols"].items():
        try:
            checkpoint = _open(settings, lake, manifest, symbol)
        except AlignmentError as error:
            wrong.append(str(error))
            continue
        groups = settings.symbol(symbol).feature_groups
        counts = {
            "features_file": entry["metrics"]["file_features"],
            "run_time": len(catalog.names(groups)),
            "checkpoint": checkpoint.input_size,
        }
        today = list(catalog.names(groups))
        differences = _differences(symbol, checkpoint, manifest, entry, today, catalog.catalog_hash(groups), counts)
        wrong += [f"{symbol}: {difference}" for difference in differences]
        report[symbol] = {"file": entry["file"], "sha256": entry["sha256"], "catalog": checkpoint.catalog, "counts": counts}
        log.info("%s: version %s, counts %s", symbol, version, ", ".join(f"{name} {count}" for name, count in counts.items()))
    if wrong:
        raise AlignmentError(
            marked(
                f"version {version} is not aligned (feature mismatch between the three counts): {'; '.join(wrong)}",
                manifest["smoke"],
            )
        )
    log.info("version %s: %d models verified, sha256, names, order, counts and catalog hash agree", version, len(report))
    return {"version": version, "smoke": manifest["smoke"], "aligned": True, "symbols": report}


def download(settings: Settings, lake: Lake, version: str, directory: Path) -> list[Path]:
    """The version's checkpoints and manifest as files in ``directory``; AlignmentError when a checkpoint's sha256 is wrong."""
    manifest = show(settings, lake, version)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for symbol, entry in manifest["symbols"].items():
        path = directory / entry["file"]
        path.write_bytes(_content(settings, lake, manifest, symbol))
        paths.append(path)
    path = directory / MANIFEST
    path.write_bytes(lake.read(keys.model(settings.training.prefix, version, MANIFEST)))
    return [*paths, path]


def diff(settings: Settings, lake: Lake, old: str, new: str) -> dict[str, Any]:
    """What differs between two versions: features added, removed or reordered, training parameters, and metrics per symbol."""
    a, b = show(settings, lake, old), show(settings, lake, new)
    symbols: dict[str, Any] = {}
    for symbol in sorted({*a["symbols"], *b["symbols"]}):
        before, after = a["symbols"].get(symbol), b["symbols"].get(symbol)
        if before is None or after is None:
            symbols[symbol] = {"only_in": new if before is None else old}
            continue
        names_before, names_after = before["names"], after["names"]
        symbols[symbol] = {
            "same_model": before["sha256"] == after["sha256"],
            "features_added": [n for n in names_after if n not in names_before],
            "features_removed": [n for n in names_before if n not in names_after],
            "same_order": names_before == names_after,
            "same_catalog": before["catalog"] == after["catalog"],
            "metrics": {name: [before["metrics"].get(name), after["metrics"].get(name)] for name in _SHOWN},
        }
    return {
        "old": old,
        "new": new,
        "changed": _changes(a, b, ("run", "smoke", "trained_date", "gpu", "feature_version", "image")),
        "train": _changes(a["train"], b["train"], sorted({*a["train"], *b["train"]})),
        "symbols": symbols,
    }


def _summary(manifest: Manifest) -> dict[str, Any]:
    summary = {k: manifest[k] for k in ("version", "trained_date", "run", "gpu", "smoke", "feature_version")}
    summary["symbols"] = {
        symbol: {k: entry[k] for k in ("file", "sha256", "input_size")} | {k: entry["metrics"].get(k) for k in _SHOWN}
        for symbol, entry in manifest["symbols"].items()
    }
    return summary


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], names: Iterable[str]) -> dict[str, list[Any]]:
    return {n: [before.get(n), after.get(n)] for n in names if before.get(n) != after.get(n)}


def _versions(settings: Settings, lake: Lake) -> list[str]:
    prefix = settings.training.prefix
    ends = f"/{MANIFEST}"
    return [key[len(prefix) + 1 : -len(ends)] for key in lake.keys(f"{prefix}/") if key.endswith(ends)]


def _content(settings: Settings, lake: Lake, manifest: Manifest, symbol: str) -> bytes:
    version = manifest["version"]
    entry = manifest["symbols"].get(symbol)
    if entry is None:
        raise RegistryError(f"version {version} has models of {', '.join(manifest['symbols'])} and none of {symbol}")
    key = keys.model(settings.training.prefix, version, entry["file"])
    try:
        content = lake.read(key)
    except KeyMissingError as error:
        raise AlignmentError(f"{symbol}: {error}; publish run {manifest['run']} again") from error
    found = hashlib.sha256(content).hexdigest()
    if found != entry["sha256"]:
        raise AlignmentError(
            f"{symbol}: {lake.url(key)} has sha256 {found}, the manifest says {entry['sha256']}; "
            f"publish run {manifest['run']} again"
        )
    return content


def _open(settings: Settings, lake: Lake, manifest: Manifest, symbol: str) -> Checkpoint:
    # torch costs seconds to import, and listing or promoting by name does not need it
    from crpbot_lib.training.checkpoint import Checkpoint, CheckpointError

    content = _content(settings, lake, manifest, symbol)
    try:
        return Checkpoint.from_bytes(content, origin=f"{manifest['version']}/{manifest['symbols'][symbol]['file']}")
    except CheckpointError as error:
        raise AlignmentError(f"{symbol}: {error}") from error


def _differences(
    symbol: str,
    checkpoint: Checkpoint,
    manifest: Manifest,
    entry: dict[str, Any],
    today: list[str],
    today_hash: str,
    counts: dict[str, int],
) -> list[str]:
    expected = {"symbol": symbol} | {name: manifest[name] for name in ("run", "feature_version", "smoke")}
    wrong = [f"the checkpoint's {difference}" for difference in _unlike({n: getattr(checkpoint, n) for n in expected}, expected)]
    if len(set(counts.values())) != 1:
        wrong.append("counts differ: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    if checkpoint.input_size != entry["input_size"]:
        wrong.append(f"input_size is {checkpoint.input_size}, the manifest says {entry['input_size']}")
    names = list(checkpoint.names)
    if added := [n for n in today if n not in names]:
        wrong.append(f"in today's catalog and not in the model: {', '.join(added)}")
    if removed := [n for n in names if n not in today]:
        wrong.append(f"in the model and not in today's catalog: {', '.join(removed)}")
    if not added and not removed and names != today:
        at = next(i for i, (a, b) in enumerate(zip(names, today, strict=True)) if a != b)
        wrong.append(f"the order differs from position {at}: model {names[at]}, catalog {today[at]}")
    if checkpoint.catalog != today_hash:
        wrong.append(
            f"the model was trained under catalog {checkpoint.catalog}, today's is {today_hash}: retrain on today's features"
        )
    return wrong


def _unlike(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    return [f"{name} is {found.get(name)!r}, expected {value!r}" for name, value in expected.items() if found.get(name) != value]


def _tag(value: str) -> str:
    """S3 object tag values take letters, digits, spaces and + - = . _ : / @, up to 256 characters (S3 user guide)."""
    return re.sub(r"[^A-Za-z0-9 +\-=._:/@]", "_", value)[:256]
