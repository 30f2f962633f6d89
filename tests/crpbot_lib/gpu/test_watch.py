"""Following a job: its lines in order, and every way it can end told apart by name."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests

from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import launch
from crpbot_lib.gpu.instances import Instance
from crpbot_lib.gpu.terminate import terminate_run
from crpbot_lib.gpu.watch import Watcher, clear_status, job_failed, job_succeeded
from crpbot_lib.lake import Lake, keys
from crpbot_lib.sandbox.server import Sandbox

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


class Stream:
    """A job's log stream, written to at will; lines carry the second at which the job wrote them."""

    def __init__(self, client: Any, gpu: GpuSettings, run: str) -> None:
        self.client = client
        self.names = {"logGroupName": gpu.log_group, "logStreamName": launch.log_stream(run, 1)}
        self.began = int(time.time()) * 1000 - 3_600_000
        client.create_log_stream(**self.names)

    def write(self, *lines: tuple[float, str]) -> None:
        events = [{"timestamp": self.began + int(second * 1000), "message": text} for second, text in lines]
        self.client.put_log_events(**self.names, logEvents=events)


@pytest.fixture
def stream(ec2: Any, gpu: GpuSettings, run: str) -> Stream:
    return Stream(boto3.session.Session().client("logs", region_name=gpu.region), gpu, run)


@pytest.fixture
def reader(ec2: Any, gpu: GpuSettings, lake: Lake, stream: Stream, run: str) -> Watcher:
    return Watcher(ec2, stream.client, lake, gpu, run, 1)


def test_a_line_that_arrives_after_a_later_one_is_shown_when_it_comes_and_once(reader: Watcher, stream: Stream) -> None:
    stream.write((10, "a"), (50, "d"))
    assert reader.new_lines() == ["a", "d"]
    stream.write((30, "b, late"), (49, "c, late"), (60, "e"))
    assert reader.new_lines() == ["b, late", "c, late", "e"]
    stream.write((-59, "two minutes before the newest"))
    assert reader.new_lines() == ["two minutes before the newest"]
    stream.write((-61, "later than anybody waits for"))
    assert reader.new_lines() == []


def test_equal_lines_of_one_millisecond_are_as_many_as_the_job_wrote(reader: Watcher, stream: Stream) -> None:
    stream.write((10, "again"), (10, "again"))
    assert reader.new_lines() == ["again", "again"]
    assert reader.new_lines() == []
    stream.write((10, "again"))
    assert reader.new_lines() == ["again"]


def test_lines_of_many_pages_come_in_order_and_once_while_more_are_written(
    reader: Watcher, stream: Stream, wrapped: Callable[..., Any]
) -> None:
    reader.logs = wrapped(stream.client, get_log_events=lambda **asked: stream.client.get_log_events(**asked, limit=3))
    stream.write(*((n, f"line {n}") for n in range(20)))
    shown = reader.new_lines()
    stream.write(*((n, f"line {n}") for n in range(200, 220)))
    shown += reader.new_lines()
    shown += reader.new_lines()
    assert shown == [f"line {n}" for n in (*range(20), *range(200, 220))]


def test_an_empty_page_is_not_the_end_of_the_stream(reader: Watcher, stream: Stream, wrapped: Callable[..., Any]) -> None:
    def first_page_empty(**asked: Any) -> Any:
        if "nextToken" not in asked:
            return {"events": [], "nextForwardToken": "f/-1"}
        return stream.client.get_log_events(**asked)

    stream.write((1, "a"), (2, "b"))
    reader.logs = wrapped(stream.client, get_log_events=first_page_empty)
    assert reader.new_lines() == ["a", "b"]


def test_a_page_that_fails_loses_nothing_and_doubles_nothing(reader: Watcher, stream: Stream, wrapped: Callable[..., Any]) -> None:
    stream.write(*((n, f"line {n}") for n in range(5)))
    assert reader.new_lines() == [f"line {n}" for n in range(5)]
    stream.write(*((n, f"line {n}") for n in range(5, 10)))

    def fails_on_the_second_page(**asked: Any) -> Any:
        if "nextToken" in asked:
            raise ConnectionError("away")
        return stream.client.get_log_events(**asked, limit=7)

    reader.logs = wrapped(stream.client, get_log_events=fails_on_the_second_page)
    with pytest.raises(ConnectionError):
        reader.new_lines()
    reader.logs = stream.client
    assert reader.new_lines() == [f"line {n}" for n in range(5, 10)]


def test_a_line_that_one_answer_leaves_out_is_not_new_in_the_next(
    reader: Watcher, stream: Stream, wrapped: Callable[..., Any]
) -> None:
    stream.write((1, "a"), (2, "b"))
    assert reader.new_lines() == ["a", "b"]

    def incomplete(**asked: Any) -> Any:
        answer = stream.client.get_log_events(**asked)
        return {**answer, "events": [e for e in answer["events"] if e["message"] != "a"]}

    reader.logs = wrapped(stream.client, get_log_events=incomplete)
    assert reader.new_lines() == []
    reader.logs = stream.client
    assert reader.new_lines() == []


def test_a_watcher_made_anew_shows_the_lines_from_the_first_on(reader: Watcher, stream: Stream) -> None:
    stream.write((1, "a"), (600, "b"))
    assert reader.new_lines() == ["a", "b"]
    again = Watcher(reader.ec2, reader.logs, reader.lake, reader.gpu, reader.run, 1)
    assert again.new_lines() == ["a", "b"]


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


def test_an_instance_that_ec2_took_back_before_its_job_had_a_word_is_told_apart(
    watcher: Watcher, cloud: Sandbox, instance: Instance, lake: Lake, until: Callable[..., None], run: str
) -> None:
    status(lake, run, "running")
    url = f"{cloud.control_url}/_sandbox/instances/{instance.id}/interrupt"
    requests.post(url, json={"notice_seconds": 0.1, "rebalance": False}, timeout=10).raise_for_status()
    until(lambda: watcher.outcome() is not None)
    outcome = watcher.outcome()
    assert outcome is not None
    assert (outcome.verdict, outcome.permanent) == ("spot-interruption", False)
    assert outcome.message.startswith(f"EC2 took {instance.id} ({instance.type}, {instance.zone}) back: its last state was running")


def test_a_job_that_stopped_in_order_says_why(watcher: Watcher, lake: Lake, run: str) -> None:
    status(lake, run, "interrupted", error="spot notice: EC2 will terminate this instance at 2025-05-29T10:02:00Z")
    outcome = watcher.outcome()
    assert outcome is not None
    assert (outcome.verdict, outcome.permanent) == ("interrupted", False)
    assert outcome.message == "the job stopped in order: spot notice: EC2 will terminate this instance at 2025-05-29T10:02:00Z"


def test_the_progress_is_told_when_it_changes_and_not_too_often_and_what_it_cost(
    watcher: Watcher, lake: Lake, instance: Instance, run: str
) -> None:
    def at(seconds: float) -> str | None:
        watcher.now = lambda: instance.launched_at + timedelta(seconds=seconds)
        assert watcher.outcome() is None
        return watcher.progress()

    def trained(step: int) -> None:
        beat = (instance.launched_at + timedelta(seconds=1)).isoformat()
        told = {"epoch": 2, "epochs": 15, "step": step, "steps": 750, "loss": 0.69125, "eta_seconds": 95.4}
        symbols = {"BTC-USD": {"state": "succeeded"}, "ETH-USD": {"state": "running", **told}, "SOL-USD": {"state": "pending"}}
        status(lake, run, "running", heartbeat=beat, symbols=symbols)

    price = launch.records(lake, run)[-1].price_usd_per_hour
    booting = at(1)
    assert booting is not None
    assert booting.startswith(f"{instance.id} is ")
    assert ", its job has not begun; $0.0" in booting
    trained(70)
    assert at(5) is None, "the last line is too young"
    assert at(36) == (
        f"ETH-USD (2 of 3): epoch 2/15, step 70/750, loss 0.6913, ETA 95 s; "
        f"${36 / 3600 * price:.4f} so far ({instance.type} spot, 36 s at ${price:.4f}/h)"
    )
    assert at(60) is None, "nothing has changed but the dollars"
    trained(75)
    assert "step 75/750" in (at(61) or "")
    trained(80)
    assert at(70) is None
    assert "step 80/750" in (at(71) or "")


def test_before_there_is_an_instance_or_a_status_there_is_no_progress(reader: Watcher) -> None:
    assert reader.outcome() is None
    assert reader.progress() is None


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


def test_a_job_whose_spec_was_written_anew_is_replaced_and_its_success_is_none_of_the_runs(
    lake: Lake, gpu: GpuSettings, instance: Instance, run: str
) -> None:
    """As when features are built anew, under a new version, while the job is at work."""
    job = keys.training_run(run, "job.json")
    lake.write_json(job, {"run": run, "feature_version": "one"})
    told = lake.sha256(job)
    for state, replaced in (("running", False), ("succeeded", False), ("failed", True)):
        status(lake, run, state, job=told)
        assert job_failed(lake, gpu, run)(instance) is replaced
        assert job_succeeded(lake, run) is (state == "succeeded")
    lake.write_json(job, {"run": run, "feature_version": "two"})
    for state in ("running", "succeeded", "failed"):
        status(lake, run, state, job=told)
        assert job_failed(lake, gpu, run)(instance)
        assert not job_succeeded(lake, run)


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
    code = (
        "from types import SimpleNamespace\n"
        "from crpbot_airflow.operators import LaunchTrainingInstance, TrainOnInstance\n"
        "context = {'dag_run': SimpleNamespace(dag_id='retrain', run_id='r')}\n"
        f"print(LaunchTrainingInstance(task_id='launch', run={run!r}).execute(context))\n"
        f"print(TrainOnInstance(task_id='train', run={run!r}).execute(context)['verdict'])\n"
    )
    done = airflow(code, lake, tmp_path)
    output, _ = done.communicate(timeout=120)
    assert done.returncode == 0, output
    assert {str({"run": run}), "succeeded"} <= set(output.splitlines())
    assert len(launch.records(lake, run)) == 1


def airflow(code: str, lake: Lake, folder: Path) -> subprocess.Popen[str]:
    """A process with Airflow in it: Airflow reads its configuration once, when it is imported."""
    env = {
        **os.environ,
        "AIRFLOW_HOME": str(folder / "airflow"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "CRPBOT_LAKE": lake.root,
        "CRPBOT_GPU__POLL_SECONDS": "0.2",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "plugins")]),
    }
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_worker_that_was_killed_after_its_launch_is_followed_by_one_that_attaches_to_the_same_job(
    ec2: Any, cloud: Sandbox, lake: Lake, run: str, tmp_path: Path
) -> None:
    train = (
        "import os, signal\n"
        "from types import SimpleNamespace\n"
        "from airflow.sdk.exceptions import TaskDeferred\n"
        "from crpbot_airflow.operators import TrainOnInstance\n"
        "{before}\n"
        "context = {{'dag_run': SimpleNamespace(dag_id='retrain', run_id='manual')}}\n"
        "try:\n"
        "    TrainOnInstance(task_id='train', run={run!r}).execute(context)\n"
        "except TaskDeferred as deferred:\n"
        "    print('DEFERRED', deferred.trigger.serialize()[1], flush=True)\n"
    )
    killed = airflow(
        train.format(before="TrainOnInstance.defer = lambda *_, **__: os.kill(os.getpid(), 9)", run=run), lake, tmp_path
    )
    output, _ = killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL, output
    for _ in range(2):
        retried = airflow(train.format(before="", run=run), lake, tmp_path)
        output, _ = retried.communicate(timeout=120)
        assert f"DEFERRED {{'run': {run!r}, 'generation': 1}}" in output
    assert [r.generation for r in launch.records(lake, run)] == [1]
    assert len([i for i in cloud.instances() if i["tags"].get("crpbot:run") == run]) == 1


def test_a_triggerer_that_was_killed_is_followed_by_one_that_shows_all_lines_and_the_end_of_the_same_job(
    cloud: Sandbox, instance: Instance, lake: Lake, run: str, tmp_path: Path
) -> None:
    code = (
        "import asyncio\n"
        "from crpbot_airflow.triggers import TrainingJobTrigger\n"
        "async def follow():\n"
        f"    trigger = TrainingJobTrigger(**{{'run': {run!r}, 'generation': {instance.generation}}})\n"
        "    trigger.log.info = lambda text, *values: print('LINE', text % values, flush=True)\n"
        "    async for event in trigger.run():\n"
        "        print('EVENT', event.payload, flush=True)\n"
        "asyncio.run(follow())\n"
    )
    with airflow(code, lake, tmp_path) as first:
        shown = _until(first, "LINE second line")
        first.kill()
    with airflow(code, lake, tmp_path) as second:
        assert [line for line in _until(second, "LINE second line") if "first line" in line or "second line" in line] == [
            line for line in shown if "first line" in line or "second line" in line
        ]
        status(lake, run, "succeeded")
        output, _ = second.communicate(timeout=60)
    assert re.search(r"EVENT \{.*'verdict': 'succeeded'", output)
    assert "line" not in output.replace("LINE", ""), "what was shown is not shown twice by one trigger"
    assert len([i for i in cloud.instances() if i["tags"].get("crpbot:run") == run]) == 1


def _until(process: subprocess.Popen[str], wanted: str) -> list[str]:
    """The process's lines up to the one that is waited for."""
    assert process.stdout is not None
    seen: list[str] = []
    for line in process.stdout:
        seen.append(line.rstrip())
        if wanted in line:
            return seen
    raise AssertionError("it ended before the line that was waited for:\n" + "\n".join(seen))
