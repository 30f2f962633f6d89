"""Following a job: its lines in order, and every way it can end told apart by name."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import pytest

from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import launch
from crpbot_lib.gpu.instances import Instance
from crpbot_lib.gpu.terminate import terminate_run
from crpbot_lib.gpu.watch import Watcher, job_failed
from crpbot_lib.lake import Lake, keys


@pytest.fixture
def instance(ec2: Any, gpu: GpuSettings, lake: Lake, run: str) -> Instance:
    return launch.ensure_instance(ec2, lake, gpu, run)


@pytest.fixture
def watcher(ec2: Any, gpu: GpuSettings, lake: Lake, instance: Instance, run: str) -> Watcher:
    logs = boto3.session.Session().client("logs", region_name=gpu.region)
    return Watcher(ec2, logs, lake, gpu, run, instance.generation, started=datetime.now(UTC))


def status(lake: Lake, run: str, state: str, generation: int = 1, age: timedelta = timedelta(0), **more: Any) -> None:
    beat = (datetime.now(UTC) - age).isoformat()
    content = {"state": state, "generation": generation, "heartbeat": beat, "error": None, "permanent": False, **more}
    lake.write_json(keys.training_run(run, "status.json"), content)


def test_the_jobs_lines_come_in_order_and_once(watcher: Watcher, until: Callable[..., None]) -> None:
    seen: list[str] = []

    def both() -> bool:
        seen.extend(watcher.new_lines())
        return len(seen) >= 2

    until(both)
    seen += watcher.new_lines()
    assert seen == ["first line", "second line"]


def test_a_booting_and_a_running_job_have_no_outcome_yet(watcher: Watcher, lake: Lake, run: str) -> None:
    assert watcher.outcome() is None
    status(lake, run, "running")
    assert watcher.outcome() is None


def test_success_and_failure_are_the_jobs_own_word(watcher: Watcher, lake: Lake, run: str) -> None:
    status(lake, run, "failed", error="NaN loss at step 12", permanent=True)
    outcome = watcher.outcome()
    assert outcome is not None
    assert (outcome.verdict, outcome.message, outcome.permanent) == ("failed", "NaN loss at step 12", True)
    status(lake, run, "succeeded")
    assert watcher.outcome().verdict == "succeeded"  # type: ignore[union-attr]


def test_the_last_word_of_an_earlier_generation_says_nothing_about_this_one(watcher: Watcher, lake: Lake, run: str) -> None:
    status(lake, run, "failed", generation=0, error="the former one")
    assert watcher.outcome() is None


def test_an_instance_that_vanished_without_a_word_is_named(
    watcher: Watcher, ec2: Any, gpu: GpuSettings, lake: Lake, until: Callable[..., None], run: str
) -> None:
    status(lake, run, "running")
    terminate_run(ec2, gpu, run)
    until(lambda: watcher.outcome() is not None)
    outcome = watcher.outcome()
    assert outcome is not None
    assert outcome.verdict == "instance-gone"
    assert not outcome.permanent


def test_a_stale_heartbeat_is_not_a_running_job(watcher: Watcher, lake: Lake, gpu: GpuSettings, run: str) -> None:
    status(lake, run, "running", age=timedelta(minutes=gpu.heartbeat_timeout_minutes + 1))
    assert watcher.outcome().verdict == "heartbeat-stale"  # type: ignore[union-attr]


def test_a_boot_that_never_finishes_is_named(watcher: Watcher, gpu: GpuSettings) -> None:
    watcher.now = lambda: datetime.now(UTC) + timedelta(minutes=gpu.boot_timeout_minutes + 1)
    outcome = watcher.outcome()
    assert outcome is not None
    assert outcome.verdict == "boot-timeout"
    assert "console output" in outcome.message


def test_a_retry_replaces_only_an_instance_whose_own_job_has_failed(lake: Lake, instance: Instance, run: str) -> None:
    assert not job_failed(lake, run)(instance)
    status(lake, run, "failed", generation=instance.generation + 1)
    assert not job_failed(lake, run)(instance)
    status(lake, run, "interrupted", generation=instance.generation)
    assert job_failed(lake, run)(instance)
