"""An instance whose image pull hangs, with nobody to look after it: the deadline of its own user data ends it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import pytest
import requests

from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import launch
from crpbot_lib.gpu.instances import Instance
from crpbot_lib.gpu.watch import Watcher
from crpbot_lib.lake import Lake
from crpbot_lib.sandbox.instances import Timing
from crpbot_lib.sandbox.server import Sandbox


@pytest.fixture
def hanging(
    ec2: Any, gpu: GpuSettings, lake: Lake, cloud: Sandbox, run: str, until: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> Callable[[float], Instance]:
    """Launches the run's instance with minutes of so many seconds; its pull hangs when this returns."""

    def hang(minute: float) -> Instance:
        monkeypatch.setattr(cloud.runner, "_timing", Timing(boot=0.2, shutdown=0.2, minute=minute))
        hold = {"run": run, "at": "pull"}
        requests.post(f"{cloud.control_url}/_sandbox/holds", json=hold, timeout=10).raise_for_status()
        launched = launch.ensure_instance(ec2, lake, gpu, run)
        until(lambda: "the registry says nothing" in cloud.runner.get(launched.id).console)
        return launched

    return hang


def test_an_instance_whose_pull_hangs_ends_itself_at_its_deadline_with_nothing_else_running(
    hanging: Callable[[float], Instance], gpu: GpuSettings, ec2: Any, cloud: Sandbox, until: Callable[..., None]
) -> None:
    instance = hanging(8 / gpu.max_lifetime_minutes)
    until(lambda: {i["id"]: i["state"] for i in cloud.instances()}[instance.id] == "terminated")
    (record,) = [i for i in cloud.instances() if i["id"] == instance.id]
    assert (record["pids"], [entry["state"] for entry in record["history"]]) == (
        [],
        ["pending", "running", "shutting-down", "terminated"],
    )
    # not by TerminateInstances, which says "User", and not by the job's end, which never began
    described = ec2.describe_instances(InstanceIds=[instance.id])["Reservations"][0]["Instances"][0]
    assert described["StateReason"]["Code"] == "Client.InstanceInitiatedShutdown"
    assert described["StateTransitionReason"].startswith("Instance initiated (")
    console = cloud.runner.get(instance.id).console
    assert "Shutdown scheduled for" in console
    assert "first line" not in console


def test_a_hanging_pull_is_a_boot_timeout_to_the_one_who_watches(
    hanging: Callable[[float], Instance], gpu: GpuSettings, lake: Lake, ec2: Any
) -> None:
    instance = hanging(60)
    logs = boto3.session.Session().client("logs", region_name=gpu.region)
    late = timedelta(minutes=gpu.boot_timeout_minutes + 1)
    watchers = [
        Watcher(ec2, logs, lake, gpu, instance.run, instance.generation, now=now)
        for now in (lambda: datetime.now(UTC), lambda: datetime.now(UTC) + late)
    ]
    early, outcome = (watcher.outcome() for watcher in watchers)
    assert early is None
    assert outcome is not None
    assert (outcome.verdict, outcome.permanent) == ("boot-timeout", False)
    assert f"{instance.id} is running but its job has not started within 15 min" in outcome.message
