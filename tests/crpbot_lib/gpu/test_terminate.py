"""Ending a run: all of it, nothing else, until EC2 says so; an API error is never "nothing there"."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.stub import Stubber

from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import instances, launch
from crpbot_lib.gpu.terminate import TerminationError, terminate, terminate_run
from crpbot_lib.lake import Lake
from crpbot_lib.sandbox.server import Sandbox


def test_the_runs_instance_ends_with_its_processes_and_another_runs_stays(
    ec2: Any, gpu: GpuSettings, lake: Lake, cloud: Sandbox, until: Callable[..., None], run: str
) -> None:
    mine = launch.ensure_instance(ec2, lake, gpu, run)
    other = launch.ensure_instance(ec2, lake, gpu, "run-b")
    until(lambda: all(i["pids"] for i in cloud.instances() if i["id"] in (mine.id, other.id)))

    (ended,) = terminate_run(ec2, gpu, run)
    assert (ended.id, ended.state) == (mine.id, "terminated")
    records = {i["id"]: i for i in cloud.instances()}
    assert records[mine.id]["pids"] == []
    assert records[other.id]["state"] in ("pending", "running")


def test_nothing_to_end_is_said_only_after_looking_twice(gpu: GpuSettings, ec2: Any, wrapped: Any) -> None:
    looks: list[int] = []

    def paginator(name: str) -> Any:
        looks.append(1)
        return ec2.get_paginator(name)

    waits: list[float] = []
    assert terminate_run(wrapped(ec2, get_paginator=paginator), gpu, "never-launched", sleep=waits.append) == []
    assert (len(looks), waits) == (2, [gpu.visibility_grace_seconds])


def test_an_instance_that_is_invisible_at_first_is_ended_all_the_same(
    ec2: Any, gpu: GpuSettings, lake: Lake, wrapped: Any, run: str
) -> None:
    launched = launch.ensure_instance(ec2, lake, gpu, run)
    answers = iter([True])

    class Nothing:
        def paginate(self, **_: Any) -> list[dict[str, Any]]:
            return [{"Reservations": []}]

    def paginator(name: str) -> Any:
        return Nothing() if next(answers, False) else ec2.get_paginator(name)

    ended = terminate_run(wrapped(ec2, get_paginator=paginator), gpu, run)
    assert [(i.id, i.state) for i in ended] == [(launched.id, "terminated")]


def test_an_api_that_stays_away_is_an_error_and_never_none_found(gpu: GpuSettings, cloud: Sandbox, run: str) -> None:
    client = boto3.session.Session().client("ec2", region_name=gpu.region, config=Config(retries={"total_max_attempts": 1}))
    with Stubber(client) as stub:
        for _ in range(5):
            stub.add_client_error("describe_instances", "InternalError", http_status_code=500)
        with pytest.raises(TerminationError, match=r"unknown whether instances of 2025-05-29-.* live"):
            terminate_run(client, gpu, run, sleep=lambda _: None)
        stub.assert_no_pending_responses()


def test_an_instance_that_does_not_end_is_named_after_the_time_limit(gpu: GpuSettings, cloud: Sandbox, run: str) -> None:
    client = boto3.session.Session().client("ec2", region_name=gpu.region)
    stuck = {
        "InstanceId": "i-0123456789abcdef0",
        "State": {"Name": "shutting-down"},
        "LaunchTime": datetime(2025, 5, 29, tzinfo=UTC),
        "Tags": [{"Key": instances.TAG_RUN, "Value": run}],
    }
    clock = iter(datetime(2025, 5, 29, tzinfo=UTC) + timedelta(minutes=n) for n in range(100))
    with Stubber(client) as stub:
        for _ in range(11):
            stub.add_response("describe_instances", {"Reservations": [{"Instances": [stuck]}]})
        limit = gpu.model_copy(update={"termination_timeout_seconds": 600})
        with pytest.raises(TerminationError, match="i-0123456789abcdef0 is shutting-down"):
            terminate_run(client, limit, "run-a", now=lambda: next(clock), sleep=lambda _: None)


def test_an_id_that_ec2_no_longer_knows_is_no_failure(ec2: Any) -> None:
    terminate(ec2, ["i-0123456789abcdef0"])
