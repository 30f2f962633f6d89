"""The job that the container runs: a real training of a few steps on real features where they are at hand."""

from __future__ import annotations

import hashlib
import io
import logging
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import polars as pl
import pytest
import torch
from moto.server import ThreadedMotoServer

from crpbot_lib import training
from crpbot_lib.config import settings
from crpbot_lib.features import catalog
from crpbot_lib.lake import Lake, LakeError, keys
from crpbot_lib.training import JobSpec, PermanentTrainingError, TrainingError, check_model, read_status
from crpbot_lib.training import job as training_job
from crpbot_lib.training.checkpoint import Checkpoint, CheckpointError
from crpbot_lib.training.notices import Interrupted, Notices
from crpbot_lib.training.smoke import ModelLog

SYMBOLS = ("BTC-USD", "ETH-USD")
Respec = Callable[..., JobSpec]


def status_of(trained: Any) -> dict[str, Any]:
    status = read_status(trained.lake, trained.run)
    assert status is not None
    return status


def test_a_smoke_run_leaves_models_metrics_and_a_status(trained_lake: Any) -> None:
    status = status_of(trained_lake)

    assert status["state"] == "succeeded"
    assert (status["error"], status["permanent"], status["smoke"], status["gpu"]) == (None, False, True, None)
    assert status["generation"] == 1
    assert datetime.fromisoformat(status["heartbeat"]).tzinfo is not None
    for symbol in SYMBOLS:
        assert status["symbols"][symbol]["state"] == "succeeded"
        metrics = check_model(trained_lake.lake, trained_lake.run, symbol)
        assert metrics["steps"] == 30
        assert metrics["smoke"] is True
        assert metrics["seconds"] > 0
        assert 0 <= metrics["accuracy"] <= 1
        assert metrics["effective_n"] == metrics["test_windows"] // 15
        assert metrics["accuracy_se"] > 0.02, "some 34 independent labels cannot be more certain"
        assert metrics["accuracy_low"] + 0.1 < metrics["accuracy"] < metrics["accuracy_high"] - 0.1
        assert metrics["skill"] is not None
        assert metrics["verdict"]


def test_the_three_counts_are_one(trained_lake: Any) -> None:
    for symbol, count in (("BTC-USD", 73), ("ETH-USD", 54)):
        metrics = check_model(trained_lake.lake, trained_lake.run, symbol)
        content = torch.load(
            io.BytesIO(trained_lake.lake.read(keys.run_symbol(trained_lake.run, symbol, "model.pt"))), weights_only=True
        )
        assert metrics["file_features"] == metrics["input_size"] == content["input_size"] == count
        assert content["names"] == catalog.feature_names(symbol)
        assert content["weights"]["lstm.weight_ih_l0"].shape[1] == count
        assert content["catalog"] == catalog.catalog_hash(settings().symbol(symbol).feature_groups)
        assert content["smoke"] is True


def test_every_line_of_a_smoke_job_says_so_and_the_counts_are_logged(
    features_lake: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, respec: Respec
) -> None:
    own = features_lake.copy(tmp_path)
    respec(own, symbols=("ETH-USD",))
    with caplog.at_level(logging.INFO, "crpbot_lib.training"):
        training_job.run(own.lake, own.run)

    lines = [r.getMessage() for r in caplog.records if r.name.startswith("crpbot_lib.training")]
    assert len(lines) >= 5
    assert [line for line in lines if not line.startswith("SMOKE ")] == []
    assert "SMOKE ETH-USD: Numeric features selected: 54" in lines


def test_training_again_gives_the_same_bytes(trained_lake: Any, features_lake: Any, tmp_path: Path, respec: Respec) -> None:
    again = features_lake.copy(tmp_path)
    respec(again, symbols=("ETH-USD",))
    training_job.run(again.lake, again.run)

    key = keys.run_symbol(again.run, "ETH-USD", "model.pt")
    assert again.lake.read(key) == trained_lake.lake.read(key)


def test_a_real_job_is_refused_without_cuda(features_lake: Any, tmp_path: Path) -> None:
    own = features_lake.copy(tmp_path)
    spec = training.job_spec(settings(), own.lake, own.run, own.version, SYMBOLS, smoke=False)
    training.write_job(own.lake, spec)

    with pytest.raises(PermanentTrainingError, match=r"never trained locally"):
        training_job.run(own.lake, own.run)

    status = status_of(own)
    assert (status["state"], status["permanent"], status["smoke"]) == ("failed", True, False)
    assert "never trained locally" in status["error"]
    assert not own.lake.exists(keys.run_symbol(own.run, "BTC-USD", "model.pt"))
    with pytest.raises(PermanentTrainingError, match=r"BTC-USD: run run-1 made no model, its state is pending"):
        check_model(own.lake, own.run, "BTC-USD")


def test_a_corrupted_features_file_is_refused(features_lake: Any, tmp_path: Path) -> None:
    own = features_lake.copy(tmp_path)
    key = keys.features(own.version, "BTC-USD")
    own.lake.write(key, own.lake.read(key)[:-1000])

    with pytest.raises(PermanentTrainingError, match=r"BTC-USD: .* has sha256 .*the manifest says"):
        training_job.run(own.lake, own.run)

    status = status_of(own)
    assert (status["state"], status["permanent"]) == ("failed", True)
    assert status["symbols"]["BTC-USD"]["state"] == "failed"
    assert status["symbols"]["ETH-USD"]["state"] == "pending"


def test_the_minutes_that_were_filled_are_read_from_the_sidecar(features_lake: Any, tmp_path: Path, respec: Respec) -> None:
    own = features_lake.copy(tmp_path)
    respec(own, symbols=("ETH-USD",))
    key = keys.features_sidecar(own.version, "ETH-USD")
    own.lake.write_json(key, own.lake.read_json(key) | {"filled": [["2025-05-27T00:00Z", 3], ["2025-05-27T05:00Z", 1]]})

    training_job.run(own.lake, own.run)

    assert check_model(own.lake, own.run, "ETH-USD")["filled"] == 4


def test_a_sidecar_that_is_absent_or_of_another_file_is_refused(features_lake: Any, tmp_path: Path) -> None:
    own = features_lake.copy(tmp_path)
    spec = training_job.read_spec(own.lake, own.run)
    expected = spec.features["ETH-USD"]
    with pytest.raises(PermanentTrainingError, match=r"ETH-USD: .*\.json describes a file with sha256 \w+, the manifest says 00"):
        training_job.load_filled(own.lake, "ETH-USD", own.version, expected.model_copy(update={"sha256": "00"}))
    with pytest.raises(PermanentTrainingError, match=r"ETH-USD: .*does not exist; build the features of this version again"):
        training_job.load_filled(own.lake, "ETH-USD", "nope", expected)


def test_a_file_with_a_feature_too_few_names_the_three_counts(features_lake: Any, tmp_path: Path, respec: Respec) -> None:
    own = features_lake.copy(tmp_path)
    spec = respec(own)
    key = keys.features(own.version, "BTC-USD")
    own.lake.write_frame(key, own.lake.read_frame(key).drop("rsi"))
    sha256 = training_job.hashlib.sha256(own.lake.read(key)).hexdigest()
    respec(own, features={**spec.features, "BTC-USD": spec.features["BTC-USD"].model_copy(update={"sha256": sha256})})

    with pytest.raises(PermanentTrainingError, match=r"between the three counts.*72 numeric features.*73.*not in the file: rsi"):
        training_job.run(own.lake, own.run)


def test_a_loss_that_is_no_number_fails_for_good(
    features_lake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, respec: Respec
) -> None:
    own = features_lake.copy(tmp_path)
    spec = training_job.read_spec(own.lake, own.run)
    respec(own, train=spec.train.model_copy(update={"learning_rate": 1e37, "gradient_clip": 1e38}))
    monkeypatch.setattr("crpbot_lib.training.trainer.LOG_SECONDS", 0.0)

    with pytest.raises(PermanentTrainingError, match=r"BTC-USD: the loss is (nan|inf).*diverged|gives NaN on later rows"):
        training_job.run(own.lake, own.run)

    status = status_of(own)
    assert (status["state"], status["permanent"]) == ("failed", True)
    assert status["error"].startswith("SMOKE ")


def test_a_crash_is_no_permanent_failure(features_lake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = features_lake.copy(tmp_path)

    def out_of_reach(*_: Any) -> pl.DataFrame:
        raise ConnectionError("the store is away")

    monkeypatch.setattr(training_job, "load_features", out_of_reach)
    with pytest.raises(ConnectionError):
        training_job.run(own.lake, own.run)

    status = status_of(own)
    assert (status["state"], status["permanent"]) == ("failed", False)
    assert status["error"] == "SMOKE ConnectionError: the store is away"
    with pytest.raises(TrainingError) as failure:
        check_model(own.lake, own.run, "BTC-USD")
    assert not failure.value.permanent


def test_a_run_without_a_job_fails_and_says_so(tmp_path: Path) -> None:
    lake = Lake(f"file://{tmp_path}")

    with pytest.raises(PermanentTrainingError, match=r"run nobody has no job"):
        training_job.run(lake, "nobody")

    status = read_status(lake, "nobody")
    assert status is not None
    assert (status["state"], status["permanent"]) == ("failed", True)


def test_the_spec_names_what_the_manifest_lacks(features_lake: Any) -> None:
    with pytest.raises(PermanentTrainingError, match=r"holds BTC-USD, ETH-USD and not SOL-USD"):
        training.job_spec(settings(), features_lake.lake, "r", features_lake.version, ["SOL-USD"], smoke=True)
    with pytest.raises(PermanentTrainingError, match=r"features version nope has no manifest"):
        training.job_spec(settings(), features_lake.lake, "r", "nope", ["SOL-USD"], smoke=True)


def test_a_real_spec_has_the_teams_defaults(features_lake: Any) -> None:
    train = training.job_spec(settings(), features_lake.lake, "r", features_lake.version, SYMBOLS, smoke=False).train

    assert (train.sequence, train.horizon, train.layers, train.hidden, train.bidirectional) == (60, 15, 3, 128, True)
    assert (train.dropout, train.epochs, train.max_steps) == (0.35, 15, None)


def test_a_checkpoint_that_contradicts_itself_is_refused(trained_lake: Any) -> None:
    data = trained_lake.lake.read(keys.run_symbol(trained_lake.run, "BTC-USD", "model.pt"))
    content = torch.load(io.BytesIO(data), weights_only=True)
    content["names"] = content["names"][:-1]
    buffer = io.BytesIO()
    torch.save(content, buffer)

    with pytest.raises(CheckpointError, match=r"three counts.*'names': 72"):
        Checkpoint.from_bytes(buffer.getvalue(), "m.pt")
    with pytest.raises(CheckpointError, match=r"m\.pt is no checkpoint"):
        Checkpoint.from_bytes(data[: len(data) // 2], "m.pt")


def test_importing_the_package_imports_no_torch_pandas_or_cli() -> None:
    code = (
        "import sys, crpbot_lib.training as t; t.job_spec, t.check_model;"
        "print([m for m in ('torch', 'pandas', 'typer', 'rich', 'airflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert done.stdout.strip() == "[]"


def test_the_container_trains_with_base_dependencies_and_torch_only(
    features_lake: Any, tmp_path: Path, respec: Respec, job: Callable[..., Any]
) -> None:
    own = features_lake.copy(tmp_path)
    respec(own, symbols=("ETH-USD",))
    process = job(own)

    assert process.end() == 0, process.output
    assert status_of(own)["state"] == "succeeded"
    assert status_of(own)["generation"] == 2
    assert all(" SMOKE " in line for line in process.output.splitlines()), process.output


def test_the_status_tells_how_far_each_symbol_is(features_lake: Any, tmp_path: Path, respec: Respec) -> None:
    own = features_lake.copy(tmp_path)
    respec(own, symbols=("ETH-USD",), train={"max_steps": None, "epochs": 2})
    training_job.run(own.lake, own.run)

    metrics = check_model(own.lake, own.run, "ETH-USD")
    told = status_of(own)["symbols"]["ETH-USD"]
    assert (told["epoch"], told["epochs"]) == (2, 2)
    assert told["step"] == told["steps"] == told["checkpoint_step"] == metrics["steps"] > 30
    assert told["loss"] == pytest.approx(metrics["train_loss"])
    assert told["eta_seconds"] == 0
    history = own.lake.read_json(keys.run_symbol(own.run, "ETH-USD", "evaluation.json"))["history"]
    assert [(row["epoch"], row["validation_loss"] > 0) for row in history] == [(1, True), (2, True)]
    assert history[-1]["validation_loss"] == told["validation_loss"]


def test_the_heartbeat_goes_on_while_the_job_works(tmp_path: Path) -> None:
    from crpbot_lib.training.status import StatusFile

    lake = Lake(f"file://{tmp_path}")
    beats: list[datetime] = []

    def clock() -> datetime:
        beats.append(datetime.now().astimezone())
        return beats[-1]

    status = StatusFile(lake, "r", symbols=("BTC-USD",), smoke=True, now=clock)
    status.start(every=0.01)
    deadline = time.monotonic() + 5
    while len(beats) < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    status.symbol("BTC-USD", state="running")
    status.finish("failed", "it broke")
    written = lake.read(keys.training_run("r", "status.json"))
    time.sleep(0.05)

    assert len(beats) >= 5
    assert lake.read(keys.training_run("r", "status.json")) == written, "nothing follows the final state"
    final = read_status(lake, "r")
    assert final is not None
    assert final["symbols"]["BTC-USD"] == {"state": "failed", "error": "SMOKE it broke"}


# --- the machine, the catalog, the manifest -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gigabytes", "fits"),
    [
        ("NVIDIA A10G", 23.7, True),  # what CUDA tells on g5.xlarge
        ("Tesla T4", 15.6, True),  # and on g4dn.xlarge
        ("NVIDIA A10", 23.7, False),
        ("NVIDIA A10G", 11.0, False),
        ("NVIDIA T400", 23.7, False),
    ],
)
def test_a_gpu_is_known_by_its_name_and_its_memory(features_lake: Any, name: str, gigabytes: float, fits: bool) -> None:
    gpus = training.job_spec(settings(), features_lake.lake, "r", features_lake.version, SYMBOLS, smoke=False).gpus
    assert [str(gpu) for gpu in gpus] == ["A10G with 24 GB (g5.xlarge)", "T4 with 16 GB (g4dn.xlarge)"]
    assert any(gpu.matches(name, int(gigabytes * 1e9)) for gpu in gpus) == fits


def test_a_machine_that_the_run_was_not_launched_on_is_refused(features_lake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = training.job_spec(settings(), features_lake.lake, "r", features_lake.version, SYMBOLS, smoke=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GeForce RTX 3060")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=12_600_000_000))

    expected = r"the GPU is NVIDIA GeForce RTX 3060 with 12\.6 GB, expected A10G with 24 GB \(g5\.xlarge\) or T4 with 16 GB"
    with pytest.raises(PermanentTrainingError, match=expected):
        training_job.select_device(spec, ModelLog(logging.getLogger("test"), smoke=False))


def test_the_gpu_must_be_that_of_the_instance_type_that_was_launched(
    features_lake: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = training.job_spec(settings(), features_lake.lake, "r", features_lake.version, SYMBOLS, smoke=False)
    lake = Lake(tmp_path.as_uri())
    training.write_job(lake, spec)
    for sequence, generation, kind in ((1, 1, "g4dn.xlarge"), (2, 2, "g4dn.xlarge"), (3, 2, "g5.xlarge")):
        lake.write_json(keys.launch("r", sequence), {"generation": generation, "instance_type": kind})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=15_600_000_000))

    with pytest.raises(PermanentTrainingError, match=r"the GPU is Tesla T4 with 15\.6 GB, expected A10G with 24 GB \(g5"):
        training_job.run(lake, "r", generation=2)
    assert read_status(lake, "r")["permanent"]


def test_a_gpu_that_does_not_compute_is_refused_before_anything_is_read(
    features_lake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # no GPU is at hand: the first kernel fails as it does where torch was not built for the card
    spec = training.job_spec(settings(), features_lake.lake, "r", features_lake.version, SYMBOLS, smoke=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=15_600_000_000))
    monkeypatch.setattr(torch, "ones", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no kernel image is available")))

    with pytest.raises(
        PermanentTrainingError, match=r"Tesla T4 is there and does not compute: no kernel image is available; driver"
    ):
        training_job.select_device(spec, ModelLog(logging.getLogger("test"), smoke=False))


def test_features_of_another_catalog_are_refused_before_they_are_read(features_lake: Any, tmp_path: Path, respec: Respec) -> None:
    own = features_lake.copy(tmp_path)
    spec = respec(own)
    other = spec.features["ETH-USD"].model_copy(update={"catalog": "0123456789abcdef"})
    respec(own, features={**spec.features, "ETH-USD": other})

    ours = catalog.catalog_hash(settings().symbol("ETH-USD").feature_groups)
    expected = rf"ETH-USD: the features were built under catalog 0123456789abcdef, this container has {ours}"
    with pytest.raises(PermanentTrainingError, match=expected):
        training_job.run(own.lake, own.run)

    assert status_of(own)["permanent"] is True
    assert not own.lake.exists(keys.run_symbol(own.run, "BTC-USD", "checkpoint.pt")), "not even the symbol before it was trained"


def test_the_manifest_lists_every_file_with_its_sha256_and_nothing_that_changes(trained_lake: Any) -> None:
    manifest = trained_lake.lake.read_json(keys.run_manifest(trained_lake.run))

    assert {name: manifest[name] for name in ("run", "generation", "smoke", "feature_version")} == {
        "run": "run-1",
        "generation": 1,
        "smoke": True,
        "feature_version": trained_lake.version,
    }
    present = {key.removeprefix("training-runs/run-1/") for key in trained_lake.lake.keys(keys.training_run("run-1"))}
    changing = {name for name in present if "checkpoint" in name} | {"status.json", "manifest.json"}
    assert set(manifest["files"]) == present - changing
    assert {"job.json", "BTC-USD/model.pt", "ETH-USD/metrics.json"} <= set(manifest["files"])
    for name, entry in manifest["files"].items():
        data = trained_lake.lake.read(keys.training_run("run-1", name))
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


# --- a lake that fails --------------------------------------------------------------------------------------------------------


class Away(Lake):
    """A lake that refuses writes whose key ends with one of ``refused``, so many times."""

    def __init__(self, url: str, times: int, *refused: str) -> None:
        super().__init__(url)
        self.times, self.refused = times, refused

    def write(self, key: str, data: bytes, **options: Any) -> None:
        if self.times and key.endswith(self.refused):
            self.times -= 1
            raise LakeError(f"{key}: the store is away")
        super().write(key, data, **options)


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the job would have waited for the lake."""
    pauses: list[float] = []
    monkeypatch.setattr(Notices, "pause", lambda _, seconds: pauses.append(seconds))
    monkeypatch.setattr(training_job.time, "sleep", pauses.append)
    return pauses


@pytest.mark.parametrize("refused", ["model.pt", "metrics.json", "manifest.json", "status.json"])
def test_what_a_training_has_earned_is_written_anew_until_it_is_stored(
    features_lake: Any, tmp_path: Path, respec: Respec, no_pause: list[float], refused: str
) -> None:
    own = features_lake.copy(tmp_path)
    respec(own, symbols=("ETH-USD",))

    training_job.run(Away(own.lake.root, 4, refused), own.run)

    assert no_pause == [1, 2, 5, 10]
    assert status_of(own)["state"] == "succeeded"
    assert "ETH-USD/model.pt" in own.lake.read_json(keys.run_manifest(own.run))["files"]


def test_a_checkpoint_that_is_not_stored_is_a_warning_and_the_training_goes_on(
    features_lake: Any, tmp_path: Path, respec: Respec, no_pause: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    own = features_lake.copy(tmp_path)
    respec(own, symbols=("ETH-USD",))

    training_job.run(Away(own.lake.root, 99, "checkpoint.pt", "checkpoint-2.pt"), own.run)

    assert no_pause == []
    assert "SMOKE ETH-USD: no checkpoint at epoch 1, step " in caplog.text
    assert status_of(own)["state"] == "succeeded"


def test_the_checkpoint_of_a_job_that_must_end_is_tried_until_it_is_stored(
    features_lake: Any, tmp_path: Path, respec: Respec, no_pause: list[float]
) -> None:
    own = features_lake.copy(tmp_path)
    respec(own, symbols=("ETH-USD",))
    notices = Notices()
    lake = Away(own.lake.root, 3, "checkpoint.pt")
    # the notice comes in mid-training, and the store is away just then
    asked = iter([False] * 5)
    notices.wants_checkpoint = lambda: next(asked, None) is None and (notices.end("spot notice") or True)  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="spot notice"):
        training_job.run(lake, own.run, notices=notices)

    assert no_pause == [2, 2, 2]
    assert status_of(own)["symbols"]["ETH-USD"]["checkpoint_step"] == 6
    training_job.run(own.lake, own.run, generation=2)
    assert status_of(own)["state"] == "succeeded"


def test_a_job_that_cannot_know_which_earlier_work_counts_says_nothing_for_good(
    features_lake: Any, tmp_path: Path, respec: Respec, caplog: pytest.LogCaptureFixture
) -> None:
    own = features_lake.copy(tmp_path)
    respec(own, symbols=("ETH-USD",))
    own.lake.write(keys.training_run(own.run, "status.json"), b"no JSON")
    with pytest.raises(LakeError, match="is not JSON"):
        training_job.run(own.lake, own.run)
    assert own.lake.read(keys.training_run(own.run, "status.json")) == b"no JSON"
    assert "the former status could not be read, so the job ends without its last word" in caplog.text


def test_a_status_that_cannot_be_written_hides_neither_the_failure_nor_the_interruption(
    features_lake: Any, tmp_path: Path, respec: Respec, no_pause: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    own = features_lake.copy(tmp_path)
    spec = respec(own, symbols=("ETH-USD",))
    notices = Notices()
    notices.end("enough")

    class GoneAfterTheStart(Away):
        def write(self, key: str, data: bytes, **options: Any) -> None:
            if b'"state": "running"' in data:
                return Lake.write(self, key, data, **options)
            return super().write(key, data, **options)

    lake = GoneAfterTheStart(own.lake.root, 10**9, "status.json")
    clock = iter(range(0, 10**6, 60))
    patience = partial(training_job.patiently, now=lambda: float(next(clock)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_job, "patiently", patience)
        with pytest.raises(Interrupted, match="enough"):
            training_job.run(lake, own.run, notices=notices)
        respec(own, features={"ETH-USD": spec.features["ETH-USD"].model_copy(update={"rows": 1})})
        with pytest.raises(PermanentTrainingError, match="the job expects 1"):
            training_job.run(lake, own.run)
    assert "the job ends without its last word: LakeError: training-runs/run-1/status.json: the store is away" in caplog.text


def test_a_training_that_hangs_has_no_heartbeat_until_it_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from crpbot_lib.training.status import HANGS_SECONDS, StatusFile

    clock, beats = [0.0], threading.Semaphore(0)

    class Told(Lake):
        def write_json(self, key: str, value: Any, **options: Any) -> None:
            super().write_json(key, value, **options)
            beats.release()

    notices = Notices(clock=lambda: clock[0])
    status = StatusFile(Told(f"file://{tmp_path}"), "r", symbols=("BTC-USD",))
    status.start(every=0.01, idle=notices.asked_seconds_ago)
    for _ in range(3):
        assert beats.acquire(timeout=60)

    clock[0] = HANGS_SECONDS + 1
    until = time.monotonic() + 60
    while "the job has not gone on for 301 s: no heartbeat until it does" not in caplog.text:
        assert time.monotonic() < until
        time.sleep(0.01)
    while beats.acquire(timeout=0.1):
        pass  # one may have been on its way
    assert caplog.text.count("has not gone on") == 1

    notices.wants_checkpoint()
    assert beats.acquire(timeout=60)
    status.finish("succeeded")


def test_the_loop_does_not_wait_for_a_heartbeat_that_hangs(tmp_path: Path) -> None:
    from crpbot_lib.training.status import StatusFile

    hanging, answered = threading.Event(), threading.Event()

    class Hangs(Lake):
        def write_json(self, key: str, value: Any, **options: Any) -> None:
            if threading.current_thread().name == "heartbeat":
                hanging.set()
                answered.wait(60)
            super().write_json(key, value, **options)

    status = StatusFile(Hangs(f"file://{tmp_path}"), "r", symbols=("BTC-USD",))
    status.start(every=0.01)
    assert hanging.wait(60)
    told = threading.Thread(target=lambda: (status.symbol("BTC-USD", step=7), status.gpu("T4")))
    told.start()
    told.join(60)
    assert not told.is_alive(), "the store still does not answer"
    answered.set()
    status.finish("succeeded")
    final = read_status(Lake(f"file://{tmp_path}"), "r")
    assert final is not None
    assert (final["state"], final["gpu"], final["symbols"]["BTC-USD"]["step"]) == ("succeeded", "T4", 7)


def test_a_full_disk_fails_with_an_error_of_its_own_and_publishes_nothing(
    features_lake: Any, tmp_path: Path, respec: Respec, job: Callable[..., Any]
) -> None:
    own = features_lake.copy(tmp_path)
    respec(own, symbols=("ETH-USD",))
    # the kernel refuses to write more than so much to a file: status and notes fit, checkpoints and the model do not
    process = job(own, "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))")

    assert process.end() == 1, process.output
    assert "no checkpoint at epoch 1, step " in process.output
    assert "model.pt cannot be written: [Errno 27] File too large; is the disk full" in process.output
    status = status_of(own)
    assert (status["state"], status["permanent"]) == ("failed", False)
    assert "is the disk full" in status["error"]
    left = [
        key for key in own.lake.keys("") if key.endswith(("model.pt", "metrics.json", "manifest.json")) and "features" not in key
    ]
    assert left == []
    assert not list((tmp_path / ".parts").iterdir()), "nothing half-written stays"


class Gate:
    """A way to a server on loopback that can be shut: connections are cut, and new ones refused."""

    def __init__(self, host: str, port: int) -> None:
        self._to = (host, port)
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._listen(0)
        self.port = self._server.server_address[1]

    def _listen(self, port: int) -> None:
        gate = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection(gate._to) as there:
                    with gate._lock:
                        gate._open += [self.request, there]
                    back = threading.Thread(target=self.pump, args=(there, self.request), daemon=True)
                    back.start()
                    self.pump(self.request, there)
                    back.join()

            @staticmethod
            def pump(source: socket.socket, sink: socket.socket) -> None:
                with suppress(OSError):
                    while data := source.recv(65536):
                        sink.sendall(data)
                with suppress(OSError):
                    sink.shutdown(socket.SHUT_WR)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True

        self._server = Server(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def shut(self) -> None:
        self._server.shutdown()
        self._thread.join()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._open.clear()
        self._server.server_close()

    def reopen(self) -> None:
        self._listen(self.port)


@pytest.fixture
def gate() -> Iterator[Gate]:
    """The way to moto's S3."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    way = Gate(*server.get_host_and_port())
    yield way
    way.shut()
    server.stop()


def test_a_store_that_goes_away_in_mid_training_costs_nothing_but_a_checkpoint(
    features_lake: Any, tmp_path: Path, respec: Respec, job: Callable[..., Any], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = features_lake.copy(tmp_path)
    respec(own, symbols=("ETH-USD",), train={"max_steps": None, "epochs": 4})
    training_job.run(own.lake, own.run)
    expected = own.lake.read(keys.run_symbol(own.run, "ETH-USD", "model.pt"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{gate.port}")
    boto3.client("s3").create_bucket(Bucket="crpbot-lake")
    away = replace(own, lake=Lake("s3://crpbot-lake"))
    for key in own.lake.keys(""):
        if key.startswith("features/") or key.endswith("job.json"):
            away.lake.write(key, own.lake.read(key))

    process = job(away)
    process.until("ETH-USD: checkpoint at epoch 1,")
    gate.shut()
    # boto's own patience, some 15 s, ends first
    process.until("ETH-USD: no checkpoint at epoch 2, ")
    gate.reopen()

    assert process.end() == 0, process.output
    assert away.lake.read(keys.run_symbol(own.run, "ETH-USD", "model.pt")) == expected
    assert status_of(away)["state"] == "succeeded"
    assert "ETH-USD/model.pt" in away.lake.read_json(keys.run_manifest(own.run))["files"]
