"""Following a job: its lines in order, and every way it can end told apart by name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest

from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import launch
from crpbot_lib.gpu.instances import Instance
from crpbot_lib.gpu.terminate import terminate_run
from crpbot_lib.gpu.watch import Watcher, clear_status, job_failed, job_succeeded
from crpbot_lib.lake import Lake, keys

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def instance(ec2: Any, gpu: GpuSettings, lake: Lake, run: str) -> Instance:
    return launch.ensure_instance(ec2, lake, gpu, run)


@pytest.fixture
def watcher(ec2: Any, gpu: GpuSettings, lake: Lake, instance: Instance, run: str) -> Watcher:
    logs = boto3.session.Session().client("logs", region_name=gpu.region)
    return Watcher(ec2, logs, lake, gpu, run, instance.generation)


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
    terminate_run(ec2, lake, gpu, run)
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


def test_the_boot_counts_from_the_launch_however_late_the_watching_began(
    ec2: Any, gpu: GpuSettings, lake: Lake, instance: Instance, run: str
) -> None:
    at = instance.launched_at + timedelta(minutes=gpu.boot_timeout_minutes, seconds=1)
    logs = boto3.session.Session().client("logs", region_name=gpu.region)
    watcher = Watcher(ec2, logs, lake, gpu, run, instance.generation, now=lambda: at)
    assert watcher.outcome().verdict == "boot-timeout"  # type: ignore[union-attr]


def test_a_retry_replaces_only_an_instance_whose_own_job_has_failed(
    lake: Lake, gpu: GpuSettings, instance: Instance, run: str
) -> None:
    failed = job_failed(lake, gpu, run)
    assert not failed(instance)
    status(lake, run, "failed", generation=instance.generation + 1)
    assert not failed(instance)
    status(lake, run, "running", generation=instance.generation)
    assert not failed(instance)
    status(lake, run, "interrupted", generation=instance.generation)
    assert failed(instance)


def test_a_retry_replaces_an_instance_whose_job_hangs(ec2: Any, lake: Lake, gpu: GpuSettings, instance: Instance, run: str) -> None:
    status(lake, run, "running", age=timedelta(minutes=gpu.heartbeat_timeout_minutes + 1))
    second = launch.ensure_instance(ec2, lake, gpu, run, replace=job_failed(lake, gpu, run))
    assert (second.id != instance.id, second.generation) == (True, 2)


def test_a_retry_replaces_an_instance_whose_job_never_began(lake: Lake, gpu: GpuSettings, instance: Instance, run: str) -> None:
    at = instance.launched_at + timedelta(minutes=gpu.boot_timeout_minutes)
    assert not job_failed(lake, gpu, run, now=lambda: at)(instance)
    assert job_failed(lake, gpu, run, now=lambda: at + timedelta(seconds=1))(instance)
    # begun, and not looked at for longer than a boot may take
    late = at + timedelta(seconds=1)
    status(lake, run, "running", age=datetime.now(UTC) - late)
    assert not job_failed(lake, gpu, run, now=lambda: late)(instance)


def test_a_run_is_trained_when_its_last_instance_said_so(lake: Lake, instance: Instance, run: str) -> None:
    assert not job_succeeded(lake, f"{run}-never-launched")
    assert not job_succeeded(lake, run)
    status(lake, run, "succeeded", generation=instance.generation + 1)
    assert not job_succeeded(lake, run)
    status(lake, run, "succeeded", generation=instance.generation)
    assert job_succeeded(lake, run)


def test_a_deliberate_repetition_takes_an_ended_jobs_word_back_and_leaves_a_working_job_alone(
    lake: Lake, gpu: GpuSettings, instance: Instance, run: str
) -> None:
    clear_status(lake, run)
    assert not lake.exists(keys.training_run(run, "status.json"))
    status(lake, run, "running")
    clear_status(lake, run)
    assert lake.read_json(keys.training_run(run, "status.json"))["state"] == "running"
    status(lake, run, "succeeded")
    clear_status(lake, run)
    assert not job_succeeded(lake, run)
    status(lake, run, "failed")
    clear_status(lake, run)
    assert not job_failed(lake, gpu, run)(instance)


def test_the_tasks_launch_nothing_for_a_run_that_is_trained(
    ec2: Any, gpu: GpuSettings, lake: Lake, instance: Instance, run: str, tmp_path: Path
) -> None:
    status(lake, run, "succeeded")
    terminate_run(ec2, lake, gpu, run)
    # in a process of its own: Airflow reads its configuration once, when it is imported
    code = (
        "from crpbot_airflow.operators import LaunchTrainingInstance, TrainOnInstance\n"
        f"print(LaunchTrainingInstance(task_id='launch', run={run!r}).execute({{}}))\n"
        f"print(TrainOnInstance(task_id='train', run={run!r}).execute({{}})['verdict'])\n"
    )
    env = {
        **os.environ,
        "AIRFLOW_HOME": str(tmp_path / "airflow"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "CRPBOT_LAKE": lake.root,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "plugins")]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {str({"run": run}), "succeeded"} <= set(done.stdout.splitlines())
    assert len(launch.records(lake, run)) == 1
