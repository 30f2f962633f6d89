"""Ten days of market data through the real scheduler, by daily runs, by backfill and by one long run: the same bytes each time."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import boto3
import pytest

from crpbot_lib.config import DEFAULT_SYMBOLS, TIMEFRAMES
from crpbot_lib.lake import Lake
from crpbot_lib.sandbox import demo, processes
from crpbot_lib.sandbox.local_airflow import LocalAirflow

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

FIRST, LAST = date(2025, 5, 21), date(2025, 5, 30)
"""Recorded 5m candles begin in the middle of these days."""
DAYS = [FIRST + timedelta(days=n) for n in range((LAST - FIRST).days + 1)]
SYMBOLS = [s for s in DEFAULT_SYMBOLS if s.name == "BTC-USD"]
"""One: each more costs eighty starts of a task. test_workflow.py maps over all of them."""
LIMIT = 600
"""Seconds for one DAG run on a busy machine; nothing here asserts a time."""


@dataclass
class Deployment:
    """An Airflow with schedules on, and its lake."""

    airflow: LocalAirflow
    lake: Lake

    def stored(self) -> dict[str, bytes]:
        """Raw candles and points of the ten days: key -> bytes."""
        folders = ("raw/candles/", "raw/coingecko/")
        return {key: self.lake.read(key) for folder in folders for key in self.lake.keys(folder) if _day(key) in DAYS}

    def quality(self) -> dict[str, bytes]:
        return {key: self.lake.read(key) for key in self.lake.keys("raw/quality/") if _day(key) in DAYS}

    def empty_the_lake(self) -> None:
        bucket = boto3.session.Session().resource("s3").Bucket(self.lake.root.removeprefix("s3://"))
        bucket.objects.filter(Prefix="raw/").delete()
        assert self.lake.keys("raw/") == []


def _day(key: str) -> date:
    return date.fromisoformat(key.partition("date=")[2][:10])


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    state: Path = tmp_path_factory.mktemp("backfill")
    marker = f"test-{uuid.uuid4().hex}"
    with demo.local_cloud(state / "cloud", marker) as cloud:
        env = {
            **demo.profile(cloud["env"]),
            "CRPBOT_ORCHESTRATION__SCHEDULES": "true",
            "CRPBOT_SYMBOLS": json.dumps([s.model_dump(mode="json") for s in SYMBOLS]),
        }
        before = dict(os.environ)
        os.environ.update(env)
        try:
            with LocalAirflow(state / "airflow", env, marker=marker) as airflow:
                airflow.unpause("market_data")
                _end_yesterdays_run(airflow)
                yield Deployment(airflow, Lake(env["CRPBOT_LAKE"]))
        finally:
            os.environ.clear()
            os.environ.update(before)
    assert processes.processes_with_marker(processes.MARKER, marker) == []


def _end_yesterdays_run(airflow: LocalAirflow) -> None:
    """Unpausing starts the run of the clock's yesterday, which the recorded data does not reach."""
    until = time.monotonic() + 120
    while not (runs := [r for r in airflow.runs("market_data") if r["run_type"] == "scheduled"]):
        assert time.monotonic() < until, "the scheduler did not start yesterday's run"
        time.sleep(0.5)
    airflow.mark_run("market_data", runs[0]["dag_run_id"], "failed")


@pytest.fixture(scope="module")
def daily(deployment: Deployment) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """What ten daily runs store: (candles and points, quality records)."""
    runs = [deployment.airflow.trigger("market_data", partition_key=day.isoformat()) for day in DAYS]
    states = [deployment.airflow.wait("market_data", run, LIMIT) for run in runs]
    assert states == ["success"] * len(DAYS)
    return deployment.stored(), deployment.quality()


def test_ten_daily_runs_store_every_partition_of_their_days(daily: tuple[dict[str, bytes], dict[str, bytes]]) -> None:
    raw, quality = daily
    assert len(raw) == len(DAYS) * len(SYMBOLS) * (len(TIMEFRAMES) + 2)
    assert len(quality) == len(DAYS)


def test_a_day_that_runs_twice_is_byte_for_byte_the_same(
    deployment: Deployment, daily: tuple[dict[str, bytes], dict[str, bytes]]
) -> None:
    run = deployment.airflow.trigger("market_data", partition_key=DAYS[4].isoformat())
    assert deployment.airflow.wait("market_data", run, LIMIT) == "success"
    assert (deployment.stored(), deployment.quality()) == daily


def test_a_backfill_from_the_last_day_to_the_first_equals_the_daily_runs_byte_for_byte(
    deployment: Deployment, daily: tuple[dict[str, bytes], dict[str, bytes]], proof: list[str]
) -> None:
    deployment.empty_the_lake()
    deployment.airflow.backfill("market_data", FIRST, LAST, parallel=4, backwards=True)
    runs = [r for r in deployment.airflow.runs("market_data") if r["run_type"] == "backfill"]
    assert sorted(r["partition_key"] for r in runs) == [day.isoformat() for day in DAYS]
    states = [deployment.airflow.wait("market_data", r["dag_run_id"], LIMIT) for r in runs]
    assert states == ["success"] * len(DAYS)
    stored = deployment.stored(), deployment.quality()
    assert [part.keys() for part in stored] == [part.keys() for part in daily]
    assert [key for was, now in zip(daily, stored, strict=True) for key in was if was[key] != now[key]] == []
    files, size = sum(map(len, stored)), sum(len(data) for part in stored for data in part.values())
    proof.append(f"backfill of {len(DAYS)} days, 4 at once, newest first: {files} files, {size:,} bytes, equal to the daily runs'")


def test_one_run_over_the_whole_range_stores_the_same_bytes(
    deployment: Deployment, daily: tuple[dict[str, bytes], dict[str, bytes]]
) -> None:
    deployment.empty_the_lake()
    deployment.airflow.unpause("market_data_range")
    conf = {"start": FIRST.isoformat(), "end": (LAST + timedelta(days=1)).isoformat()}
    run = deployment.airflow.trigger("market_data_range", conf=conf)
    assert deployment.airflow.wait("market_data_range", run, LIMIT) == "success"
    stored, (raw, _) = deployment.stored(), daily
    assert stored.keys() == raw.keys()
    assert [key for key in raw if raw[key] != stored[key]] == []
