"""One run, one instance: whoever asks, however often, and wherever the asking died."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, ReadTimeoutError
from botocore.stub import Stubber

from crpbot_lib.config import GpuCandidate, GpuSettings
from crpbot_lib.gpu import instances, launch
from crpbot_lib.gpu.terminate import terminate_run
from crpbot_lib.lake import Lake
from crpbot_lib.sandbox.server import Sandbox


def alive(ec2: Any, gpu: GpuSettings, run: str) -> list[instances.Instance]:
    return instances.find(ec2, gpu.project_tag, run, instances.ALIVE)


def test_the_cheapest_spot_candidate_is_launched_with_all_its_safeguards(
    ec2: Any, gpu: GpuSettings, lake: Lake, until: Callable[..., None], run: str
) -> None:
    before = datetime.now(UTC)
    launched = launch.ensure_instance(ec2, lake, gpu, run, dag="retrain", dag_run="manual__1")

    assert (launched.type, launched.market, launched.run, launched.generation) == ("g4dn.xlarge", "spot", run, 1)
    assert launched.tags[instances.TAG_DAG_RUN] == "manual__1"
    assert launched.deadline is not None
    assert timedelta(minutes=119) < launched.deadline - before < timedelta(minutes=121)

    behaviour = ec2.describe_instance_attribute(InstanceId=launched.id, Attribute="instanceInitiatedShutdownBehavior")
    assert behaviour["InstanceInitiatedShutdownBehavior"]["Value"] == "terminate"
    script = ec2.describe_instance_attribute(InstanceId=launched.id, Attribute="userData")["UserData"]["Value"]
    assert base64.b64decode(script).startswith(b"#!/bin/bash\nshutdown -h +120\n")

    def devices() -> list[Any]:
        return list(ec2.describe_instances(InstanceIds=[launched.id])["Reservations"][0]["Instances"][0]["BlockDeviceMappings"])

    until(devices)
    assert all(device["Ebs"]["DeleteOnTermination"] for device in devices())
    volumes = ec2.describe_volumes(Filters=[{"Name": "attachment.instance-id", "Values": [launched.id]}])["Volumes"]
    assert volumes
    assert {v["VolumeId"] for v in volumes} == {device["Ebs"]["VolumeId"] for device in devices()}
    assert all(v["Encrypted"] for v in volumes)
    assert all({"Key": instances.TAG_PROJECT, "Value": gpu.project_tag} in v["Tags"] for v in volumes)


def test_asking_again_finds_the_same_instance(ec2: Any, gpu: GpuSettings, lake: Lake, run: str) -> None:
    first = launch.ensure_instance(ec2, lake, gpu, run)
    assert launch.ensure_instance(ec2, lake, gpu, run).id == first.id
    assert len(alive(ec2, gpu, run)) == 1
    assert len(launch.records(lake, run)) == 1


def test_a_launcher_that_died_before_it_saw_the_answer_gets_the_same_instance_even_while_it_is_invisible(
    ec2: Any, gpu: GpuSettings, lake: Lake, wrapped: Any, run: str
) -> None:
    def launch_and_lose_the_answer(**request: Any) -> Any:
        ec2.run_instances(**request)
        raise ReadTimeoutError(endpoint_url="https://ec2")

    with pytest.raises(ReadTimeoutError):
        launch.ensure_instance(wrapped(ec2, run_instances=launch_and_lose_the_answer), lake, gpu, run)
    (lost,) = alive(ec2, gpu, run)

    class Nothing:
        def paginate(self, **_: Any) -> list[dict[str, Any]]:
            return [{"Reservations": []}]

    blind = wrapped(ec2, get_paginator=lambda _: Nothing())
    assert launch.ensure_instance(blind, lake, gpu, run).id == lost.id
    assert len(alive(ec2, gpu, run)) == 1


def test_launchers_at_the_same_time_get_one_instance(ec2: Any, gpu: GpuSettings, lake: Lake, run: str) -> None:
    together = threading.Barrier(4)
    found: list[str] = []

    def ask() -> None:
        client = boto3.session.Session().client("ec2", region_name=gpu.region)
        together.wait()
        found.append(launch.ensure_instance(client, lake, gpu, run).id)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert len(alive(ec2, gpu, run)) == 1


def test_without_capacity_the_next_candidate_is_tried_and_each_try_is_recorded(
    ec2: Any, gpu: GpuSettings, lake: Lake, no_capacity: Callable[..., None], run: str
) -> None:
    no_capacity("g4dn.xlarge")
    assert launch.ensure_instance(ec2, lake, gpu, run).type == "g5.xlarge"
    assert [(r.sequence, r.generation, r.instance_type) for r in launch.records(lake, run)] == [
        (1, 1, "g4dn.xlarge"),
        (2, 1, "g5.xlarge"),
    ]


def test_without_any_capacity_the_error_says_what_was_tried_and_a_later_try_begins_anew(
    ec2: Any, gpu: GpuSettings, lake: Lake, no_capacity: Callable[..., None], run: str
) -> None:
    no_capacity("g4dn.xlarge", "g5.xlarge")
    with pytest.raises(launch.NoCapacityError, match=r"g4dn\.xlarge \(spot\), g5\.xlarge \(spot\) were refused"):
        launch.ensure_instance(ec2, lake, gpu, run)
    assert alive(ec2, gpu, run) == []

    no_capacity()
    assert launch.ensure_instance(ec2, lake, gpu, run).type in ("g4dn.xlarge", "g5.xlarge")
    assert len(alive(ec2, gpu, run)) == 1


def test_on_demand_comes_last_and_only_where_it_is_allowed(ec2: Any, gpu: GpuSettings) -> None:
    spot_only = [(c.instance_type, market) for c, market, *_ in launch.candidates_by_price(ec2, gpu)]
    assert spot_only == [("g4dn.xlarge", "spot"), ("g5.xlarge", "spot")]
    both = launch.candidates_by_price(ec2, gpu.model_copy(update={"allow_on_demand": True}))
    assert [(c.instance_type, market) for c, market, *_ in both[2:]] == [("g4dn.xlarge", "on-demand"), ("g5.xlarge", "on-demand")]


def test_the_present_price_of_every_zone_is_asked_for_and_the_dearest_makes_the_worst_case(
    gpu: GpuSettings, lake: Lake, cloud: Sandbox, run: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = boto3.session.Session().client("ec2", region_name=gpu.region)
    at = datetime(2025, 5, 29, tzinfo=UTC)
    single = gpu.model_copy(update={"candidates": (GpuCandidate(instance_type="g5.xlarge", gpu="A10G", on_demand_usd_per_hour=1),)})
    pages = [
        {"SpotPriceHistory": [{"AvailabilityZone": f"us-east-1{zone}", "SpotPrice": price, "Timestamp": at}], "NextToken": token}
        for zone, price, token in (("a", "0.5", "more"), ("b", "0.3", ""))
    ]
    asked = {"InstanceTypes": ["g5.xlarge"], "ProductDescriptions": ["Linux/UNIX"], "StartTime": at}
    with Stubber(client) as stub, caplog.at_level("INFO", logger="crpbot_lib.gpu.launch"):
        stub.add_response("describe_instances", {"Reservations": []})
        stub.add_response("describe_spot_price_history", pages[0], asked)
        stub.add_response("describe_spot_price_history", pages[1], {**asked, "NextToken": "more"})
        stub.add_client_error("run_instances", "RequestLimitExceeded", http_status_code=503)
        with pytest.raises(ClientError, match="RequestLimitExceeded"):
            launch.ensure_instance(client, lake, single, run, now=lambda: at)
        stub.assert_no_pending_responses()
    assert launch.records(lake, run)[0].price_usd_per_hour == 0.3
    assert "worst case of this launch $1.00 (120 min)" in caplog.text


def test_a_run_of_the_same_name_in_another_lake_is_another_run(
    ec2: Any, gpu: GpuSettings, lake: Lake, tmp_path: Path, run: str
) -> None:
    other = Lake(f"file://{tmp_path}/other")
    mine, theirs = launch.ensure_instance(ec2, lake, gpu, run), launch.ensure_instance(ec2, other, gpu, run)
    assert mine.id != theirs.id
    assert launch.ensure_instance(ec2, lake, gpu, run).id == mine.id
    assert len(alive(ec2, gpu, run)) == 2


def test_a_launcher_that_was_overtaken_ends_what_it_launched_and_takes_the_newer_launch(
    ec2: Any, gpu: GpuSettings, lake: Lake, wrapped: Any, no_capacity: Callable[..., None], until: Callable[..., None], run: str
) -> None:
    faster: list[instances.Instance] = []

    def stall(**request: Any) -> Any:
        if not faster:
            # between this launcher's record and its call, another one is refused, moves on, and capacity comes back
            no_capacity("g4dn.xlarge")
            faster.append(launch.ensure_instance(ec2, lake, gpu, run))
            no_capacity()
        return ec2.run_instances(**request)

    slower = launch.ensure_instance(wrapped(ec2, run_instances=stall), lake, gpu, run)
    assert [r.instance_type for r in launch.records(lake, run)] == ["g4dn.xlarge", "g5.xlarge"]
    assert (slower.id, slower.type) == (faster[0].id, "g5.xlarge")
    until(lambda: [i.id for i in alive(ec2, gpu, run)] == [slower.id])


def test_after_an_instance_has_ended_a_new_generation_is_a_new_instance(ec2: Any, gpu: GpuSettings, lake: Lake, run: str) -> None:
    first = launch.ensure_instance(ec2, lake, gpu, run)
    terminate_run(ec2, lake, gpu, run)
    second = launch.ensure_instance(ec2, lake, gpu, run)
    assert (second.id != first.id, second.generation) == (True, 2)
    tokens = {r.token for r in launch.records(lake, run)}
    assert len(tokens) == 2


def test_an_instance_whose_job_has_failed_is_replaced(ec2: Any, gpu: GpuSettings, lake: Lake, run: str) -> None:
    first = launch.ensure_instance(ec2, lake, gpu, run)
    second = launch.ensure_instance(ec2, lake, gpu, run, replace=lambda i: i.id == first.id)
    assert second.generation == 2
    assert [i.id for i in alive(ec2, gpu, run)] == [second.id]


def test_a_second_living_instance_of_the_run_is_ended_and_the_newest_generation_stays(
    ec2: Any, gpu: GpuSettings, lake: Lake, until: Callable[..., None], run: str
) -> None:
    first = launch.ensure_instance(ec2, lake, gpu, run)
    tags = [{"Key": k, "Value": v} for k, v in {**first.tags, instances.TAG_GENERATION: "7"}.items()]
    specification = [{"ResourceType": "instance", "Tags": tags}]
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    ec2.run_instances(ImageId=image, InstanceType="g5.xlarge", MinCount=1, MaxCount=1, TagSpecifications=specification)

    assert launch.ensure_instance(ec2, lake, gpu, run).generation == 7
    until(lambda: [i.generation for i in alive(ec2, gpu, run)] == [7])


def test_changed_settings_do_not_change_a_recorded_launch(ec2: Any, gpu: GpuSettings, lake: Lake, wrapped: Any, run: str) -> None:
    def lose(**_: Any) -> Any:
        raise ReadTimeoutError(endpoint_url="https://ec2")

    with pytest.raises(ReadTimeoutError):
        launch.ensure_instance(wrapped(ec2, run_instances=lose), lake, gpu, run)
    other = gpu.model_copy(update={"training_image": "crpbot-training:0.2.0"})
    with pytest.raises(launch.LaunchRefusedError, match="start a new run"):
        launch.ensure_instance(ec2, lake, other, run)
    assert alive(ec2, gpu, run) == []


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("UnauthorizedOperation", "PassRole"),
        ("VcpuLimitExceeded", "Service Quotas"),
        ("MaxSpotInstanceCountExceeded", "quota"),
        ("AuthFailure.ServiceLinkedRoleCreationNotPermitted", "AWSServiceRoleForEC2Spot once"),
        ("InvalidParameterCombination", "GPU settings"),
        ("AccessDeniedException", "ssm:GetParameters"),
        ("AccessDenied", "ssm:GetParameters"),
        ("OptInRequired", "clear the task"),
    ],
)
def test_quota_and_permission_errors_stop_at_once_and_say_what_to_change(
    code: str, advice: str, gpu: GpuSettings, lake: Lake, run: str
) -> None:
    error = refused(gpu, lake, run, code, 400)
    assert isinstance(error, launch.LaunchRefusedError)
    assert advice in str(error)


@pytest.mark.parametrize(("code", "http"), [("RequestLimitExceeded", 503), ("Throttling", 400), ("InternalError", 500)])
def test_throttling_and_server_errors_are_no_refusal(code: str, http: int, gpu: GpuSettings, lake: Lake, run: str) -> None:
    assert isinstance(refused(gpu, lake, run, code, http), ClientError)


def refused(gpu: GpuSettings, lake: Lake, run: str, code: str, http: int) -> Exception:
    """What a launch raises where RunInstances answers with ``code``."""
    client = boto3.session.Session().client("ec2", region_name=gpu.region, config=Config(retries={"total_max_attempts": 1}))
    price = {"SpotPriceHistory": [{"AvailabilityZone": "us-east-1a", "SpotPrice": "0.3", "Timestamp": datetime.now(UTC)}]}
    single = gpu.model_copy(update={"candidates": (GpuCandidate(instance_type="g5.xlarge", gpu="A10G", on_demand_usd_per_hour=1),)})
    with Stubber(client) as stub:
        stub.add_response("describe_instances", {"Reservations": []})
        stub.add_response("describe_spot_price_history", price)
        stub.add_client_error("run_instances", code, "no", http_status_code=http)
        with pytest.raises((launch.LaunchRefusedError, ClientError)) as raised:
            launch.ensure_instance(client, lake, single, run)
    return raised.value


def test_an_error_while_looking_is_no_permission_to_launch(gpu: GpuSettings, lake: Lake, cloud: Sandbox, run: str) -> None:
    client = boto3.session.Session().client("ec2", region_name=gpu.region, config=Config(retries={"total_max_attempts": 1}))
    with Stubber(client) as stub:
        stub.add_client_error("describe_instances", "InternalError", http_status_code=500)
        with pytest.raises(ClientError):
            launch.ensure_instance(client, lake, gpu, run)
    assert launch.records(lake, run) == []
