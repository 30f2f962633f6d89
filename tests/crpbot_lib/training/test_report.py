"""The page about a run and its plots, of a real smoke run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crpbot_lib.config import ALL_GROUPS, Settings, TrainingSettings
from crpbot_lib.lake import keys
from crpbot_lib.training import JobSpec, PermanentTrainingError, job_spec
from crpbot_lib.training import job as training_job
from crpbot_lib.training.job import read_spec
from crpbot_lib.training.report import write_report

PNG = b"\x89PNG\r\n\x1a\n"


def page(own: Any) -> str:
    content: bytes = own.lake.read(keys.training_run(own.run, "report.html"))
    return content.decode()


def test_the_run_leaves_one_page_with_every_model_its_interval_and_its_verdict(trained_lake: Any) -> None:
    html = page(trained_lake)
    text = re.sub(r"<[^>]+>", " ", html)
    for symbol in ("BTC-USD", "ETH-USD"):
        metrics = trained_lake.lake.read_json(keys.run_symbol(trained_lake.run, symbol, "metrics.json"))
        assert f"SMOKE {symbol}" in text
        assert metrics["verdict"] in text
        assert f"{100 * metrics['accuracy_low']:.1f} % to {100 * metrics['accuracy_high']:.1f} %" in text


def test_the_runs_manifest_lists_the_page_and_what_it_is_made_of(trained_lake: Any) -> None:
    listed = trained_lake.lake.read_json(keys.run_manifest(trained_lake.run))["files"]
    assert {"report.html", "BTC-USD/metrics.json", "BTC-USD/evaluation.json", "BTC-USD/calibration.png"} <= set(listed)


def test_the_page_needs_nothing_from_outside(trained_lake: Any) -> None:
    html = page(trained_lake)
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', html) == []
    assert re.findall(r"https?://|@import|url\(|<script|<link", html) == []
    assert "prefers-color-scheme: dark" in html
    assert len(re.findall(r'<img src="data:image/png;base64,', html)) == 8


def test_each_model_has_its_plots_and_what_they_are_drawn_from(trained_lake: Any) -> None:
    for symbol, groups in (("BTC-USD", list(ALL_GROUPS)), ("ETH-USD", [g for g in ALL_GROUPS if g != "multi_timeframe"])):
        for name in ("loss", "calibration", "rolling_accuracy", "importance"):
            assert trained_lake.lake.read(keys.run_symbol(trained_lake.run, symbol, f"{name}.png")).startswith(PNG)
        found = trained_lake.lake.read_json(keys.run_symbol(trained_lake.run, symbol, "evaluation.json"))
        assert [row["group"] for row in found["importance"]["groups"]] == groups
        assert [row["part"] for row in found["months"]] == ["2025-05"]
        assert {row["part"] for row in found["regimes"]} <= {"low", "medium", "high"}
        windows = trained_lake.lake.read_json(keys.run_symbol(trained_lake.run, symbol, "metrics.json"))["test_windows"]
        assert sum(row["windows"] for row in found["regimes"]) == windows
        assert sum(row["windows"] for row in found["calibration"]) == windows
        assert [row["epoch"] for row in found["history"]] == [1, 2]
        assert found["back_test"]["fee_bps_per_order"] == 10


def test_smoke_and_synthetic_are_said_wherever_it_applies(trained_lake: Any, tmp_path: Path) -> None:
    own = trained_lake.copy(tmp_path)
    spec = read_spec(own.lake, own.run)
    plain = spec.model_copy(update={"smoke": False})
    marked = spec.model_copy(update={"synthetic": True})

    write_report(own.lake, plain)
    assert not re.search(r"SMOKE|SYNTHETIC", re.sub(r'"data:[^"]*"', "", page(own)))
    without = own.lake.read(keys.run_symbol(own.run, "BTC-USD", "calibration.png"))

    write_report(own.lake, marked)
    text = page(own)
    assert "<title>SMOKE " in text
    assert len(re.findall("SYNTHETIC", re.sub(r'"data:[^"]*"', "", text))) == 3, "above, and at each model"
    assert own.lake.read(keys.run_symbol(own.run, "BTC-USD", "calibration.png")) != without


def test_on_request_the_coin_is_trained_on_fewer_features_too(
    features_lake: Any, tmp_path: Path, respec: Callable[..., JobSpec], caplog: pytest.LogCaptureFixture
) -> None:
    own = features_lake.copy(tmp_path)
    respec(own, symbols=("BTC-USD",), compare_features=True, train={"max_steps": 3})

    with caplog.at_level("INFO"):
        training_job.run(own.lake, own.run)

    rows = own.lake.read_json(keys.run_symbol(own.run, "BTC-USD", "evaluation.json"))["compared"]
    metrics = own.lake.read_json(keys.run_symbol(own.run, "BTC-USD", "metrics.json"))
    assert [row["features"] for row in rows] == [31, 54]
    for row in rows:
        assert row["accuracy_lost"] == pytest.approx(metrics["accuracy"] - row["accuracy"])
        assert row["verdict"]
    assert metrics["input_size"] == 73
    assert "SMOKE BTC-USD on 54 features: epoch 1/1 step 3/3" in caplog.text
    assert "On fewer features" in page(own)


def test_a_comparison_that_fails_costs_no_model(
    features_lake: Any, tmp_path: Path, respec: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    own = features_lake.copy(tmp_path)
    respec(own, symbols=("BTC-USD",), compare_features=True, train={"max_steps": 3})

    def diverges(*_: Any) -> Any:
        raise PermanentTrainingError("BTC-USD on 31 features: the loss is nan")

    monkeypatch.setattr("crpbot_lib.training.comparison.train", diverges)
    training_job.run(own.lake, own.run)

    assert own.lake.read_json(keys.run_symbol(own.run, "BTC-USD", "evaluation.json"))["compared"] == []
    assert "BTC-USD: not compared with fewer features: PermanentTrainingError" in caplog.text


def test_what_is_compared_is_what_the_model_has_more_of(features_lake: Any, tmp_path: Path, respec: Callable[..., JobSpec]) -> None:
    own = features_lake.copy(tmp_path)
    respec(own, symbols=("ETH-USD",), compare_features=True, train={"max_steps": 3})

    training_job.run(own.lake, own.run)

    rows = own.lake.read_json(keys.run_symbol(own.run, "ETH-USD", "evaluation.json"))["compared"]
    assert [row["features"] for row in rows] == [31]


def test_the_settings_say_what_is_synthetic_and_what_an_order_costs(features_lake: Any) -> None:
    settings = Settings(training=TrainingSettings(synthetic=True, fee_bps_per_order=40))
    spec = job_spec(settings, features_lake.lake, "r", features_lake.version, ["BTC-USD"], smoke=True)
    assert (spec.synthetic, spec.fee_bps_per_order) == (True, 40)


def test_what_is_unknown_is_said_and_what_is_finished_is_shown(trained_lake: Any, tmp_path: Path) -> None:
    own = trained_lake.copy(tmp_path)
    key = keys.run_symbol(own.run, "BTC-USD", "metrics.json")
    nothing = {name: None for name in ("auc", "auc_low", "auc_high", "accuracy_low", "accuracy_high", "temperature", "skill")}
    notes = {"auc_note": "the price went UP after all 9 windows", "verdict": "no verdict: <why>"}
    own.lake.write_json(key, own.lake.read_json(key) | nothing | notes)
    (tmp_path / keys.run_symbol(own.run, "ETH-USD", "metrics.json")).unlink()

    write_report(own.lake, read_spec(own.lake, own.run))

    text = page(own)
    assert "no interval" in text
    assert "auc: the price went UP after all 9 windows" in text
    assert "no verdict: &lt;why&gt;" in text
    assert "ETH-USD" not in text
    assert "1 model is judged here" in text


def test_a_report_that_fails_costs_no_model(
    features_lake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, respec: Callable[..., JobSpec], caplog: Any
) -> None:
    own = features_lake.copy(tmp_path)
    respec(own, symbols=("ETH-USD",))

    def broken(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr("crpbot_lib.training.report.write_report", broken)
    # an earlier repetition's page is none of this one
    own.lake.write(keys.training_run(own.run, "report.html"), b"earlier figures")
    training_job.run(own.lake, own.run)

    assert own.lake.exists(keys.run_symbol(own.run, "ETH-USD", "metrics.json"))
    assert not any(name.endswith((".html", ".png")) for name in own.lake.read_json(keys.run_manifest(own.run))["files"])
    assert "SMOKE run run-1: no report: OSError: no space" in caplog.text
