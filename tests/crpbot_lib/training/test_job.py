"""The job that the container runs: a real training of a few steps on real features where they are at hand."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from crpbot_lib import training
from crpbot_lib.config import settings
from crpbot_lib.features import catalog
from crpbot_lib.lake import Lake, keys
from crpbot_lib.training import JobSpec, PermanentTrainingError, TrainingError, check_model, read_status
from crpbot_lib.training import job as training_job
from crpbot_lib.training.checkpoint import Checkpoint, CheckpointError

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
