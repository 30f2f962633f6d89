"""Ending a run: all of it, nothing else, until EC2 says so; an API error is never "nothing there"."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
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

    (ended,) = terminate_run(ec2, lake, gpu, run)
    assert (ended.id, ended.state) == (mine.id, "terminated")
    records = {i["id"]: i for i in cloud.instances()}
    assert records[mine.id]["pids"] == []
    assert records[other.id]["state"] in ("pending", "running")


def test_nothing_to_end_is_said_only_after_looking_twice(gpu: GpuSettings, lake: Lake, ec2: Any, wrapped: Any) -> None:
    looks: list[int] = []

    def paginator(name: str) -> Any:
        looks.append(1)
        return ec2.get_paginator(name)

    waits: list[float] = []
    assert terminate_run(wrapped(ec2, get_paginator=paginator), lake, gpu, "never-launched", sleep=waits.append) == []
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

    ended = terminate_run(wrapped(ec2, get_paginator=paginator), lake, gpu, run)
    assert [(i.id, i.state) for i in ended] == [(launched.id, "terminated")]


def test_an_api_that_stays_away_is_an_error_and_never_none_found(gpu: GpuSettings, lake: Lake, cloud: Sandbox, run: str) -> None:
    client = boto3.session.Session().client("ec2", region_name=gpu.region, config=Config(retries={"total_max_attempts": 1}))
    with Stubber(client) as stub:
        for _ in range(5):
            stub.add_client_error("describe_instances", "InternalError", http_status_code=500)
        with pytest.raises(TerminationError, match=r"unknown whether instances of 2025-05-29-.* live"):
            terminate_run(client, lake, gpu, run, sleep=lambda _: None)
        stub.assert_no_pending_responses()


def test_an_instance_that_does_not_end_is_named_after_the_time_limit(
    gpu: GpuSettings, lake: Lake, cloud: Sandbox, run: str
) -> None:
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
            terminate_run(client, lake, limit, "run-a", now=lambda: next(clock), sleep=lambda _: None)


def test_a_run_of_the_same_name_in_another_lake_stays(ec2: Any, gpu: GpuSettings, lake: Lake, tmp_path: Path, run: str) -> None:
    other = Lake(f"file://{tmp_path}/other")
    mine, theirs = launch.ensure_instance(ec2, lake, gpu, run), launch.ensure_instance(ec2, other, gpu, run)

    assert [i.id for i in terminate_run(ec2, lake, gpu, run)] == [mine.id]
    assert [i.id for i in instances.find(ec2, gpu.project_tag, run, instances.ALIVE)] == [theirs.id]


def test_an_instance_that_ec2_refuses_to_end_keeps_no_other_alive(ec2: Any, wrapped: Any) -> None:
    asked: list[str] = []

    def terminate_instances(InstanceIds: list[str]) -> None:  # noqa: N803
        asked.extend(InstanceIds)
        if InstanceIds[0] in ("i-1", "i-3"):
            answer: Any = {"Error": {"Code": "OperationNotPermitted", "Message": "it has disableApiTermination"}}
            raise ClientError(answer, "TerminateInstances")

    with pytest.raises(TerminationError, match=r"i-1 could not be terminated: .*; i-3 could not be"):
        terminate(wrapped(ec2, terminate_instances=terminate_instances), ["i-1", "i-2", "i-3"])
    assert asked == ["i-1", "i-2", "i-3"]


def test_a_runs_teardown_ends_what_it_can_and_names_what_it_cannot(ec2: Any, gpu: GpuSettings, lake: Lake, run: str) -> None:
    shielded = launch.ensure_instance(ec2, lake, gpu, run)
    tags = [{"Key": k, "Value": v} for k, v in shielded.tags.items()]
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    specification = [{"ResourceType": "instance", "Tags": tags}]
    ec2.run_instances(ImageId=image, InstanceType="g5.xlarge", MinCount=1, MaxCount=1, TagSpecifications=specification)
    ec2.modify_instance_attribute(InstanceId=shielded.id, DisableApiTermination={"Value": True})
    try:
        with pytest.raises(TerminationError, match=f"{shielded.id} could not be terminated"):
            terminate_run(ec2, lake, gpu, run, sleep=lambda _: None)
        assert [i.id for i in instances.find(ec2, gpu.project_tag, run, instances.ALIVE)] == [shielded.id]
    finally:
        ec2.modify_instance_attribute(InstanceId=shielded.id, DisableApiTermination={"Value": False})


def test_an_unreadable_generation_tag_keeps_no_instance_alive(ec2: Any, gpu: GpuSettings, lake: Lake, run: str) -> None:
    launched = launch.ensure_instance(ec2, lake, gpu, run)
    ec2.create_tags(Resources=[launched.id], Tags=[{"Key": instances.TAG_GENERATION, "Value": "1 (copy)"}])
    (ended,) = terminate_run(ec2, lake, gpu, run)
    assert (ended.state, ended.generation) == ("terminated", 0)


def test_an_id_that_ec2_no_longer_knows_is_no_failure(ec2: Any) -> None:
    assert terminate(ec2, ["i-0123456789abcdef0"]) == ["i-0123456789abcdef0"]
