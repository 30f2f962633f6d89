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
from crpbot_lib.gpu import budget, instances, launch
from crpbot_lib.gpu.terminate import terminate_run
from crpbot_lib.lake import Lake, keys
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

    with pytest.raises(launch.LaunchUnresolvedError, match=r"5 requests to launch g4dn\.xlarge \(spot\) .* had no clear answer"):
        launch.ensure_instance(wrapped(ec2, run_instances=launch_and_lose_the_answer), lake, gpu, run, sleep=lambda _: None)
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


def test_an_answer_that_is_lost_is_asked_for_with_the_same_token_before_anything_else_is_tried(
    ec2: Any, gpu: GpuSettings, lake: Lake, wrapped: Any, run: str
) -> None:
    tokens: list[str] = []
    waits: list[float] = []

    def lose_the_first_two(**request: Any) -> Any:
        tokens.append(request["ClientToken"])
        answer = ec2.run_instances(**request)
        if len(tokens) == 1:
            raise ReadTimeoutError(endpoint_url="https://ec2")
        if len(tokens) == 2:
            error: Any = {"Error": {"Code": "InternalError"}, "ResponseMetadata": {"HTTPStatusCode": 500}}
            raise ClientError(error, "RunInstances")
        return answer

    launched = launch.ensure_instance(wrapped(ec2, run_instances=lose_the_first_two), lake, gpu, run, sleep=waits.append)
    assert (len(tokens), len(set(tokens)), waits) == (3, 1, [2, 4])
    assert [i.id for i in alive(ec2, gpu, run)] == [launched.id]
    assert len(launch.records(lake, run)) == 1


@pytest.mark.parametrize("mode", ["legacy", "standard", "adaptive"])
def test_a_missing_capacity_is_asked_for_once_whatever_the_clients_retry_mode(
    mode: Any, gpu: GpuSettings, lake: Lake, no_capacity: Callable[..., None], cloud: Sandbox, run: str
) -> None:
    client = boto3.session.Session().client("ec2", region_name=gpu.region, config=Config(retries={"mode": mode}))
    asked: list[str] = []
    client.meta.events.register("before-send.ec2.RunInstances", lambda request, **_: asked.append(request.url))
    no_capacity("g4dn.xlarge")
    assert launch.ensure_instance(client, lake, gpu, run).type == "g5.xlarge"
    # botocore's own retries would have sent each of the refused three or five times
    assert len(asked) == len(launch.records(lake, run)) > 1
    terminate_run(client, lake, gpu, run)


def test_without_capacity_the_next_candidate_is_tried_and_each_try_is_recorded(
    ec2: Any, gpu: GpuSettings, lake: Lake, no_capacity: Callable[..., None], run: str
) -> None:
    no_capacity("g4dn.xlarge")
    assert launch.ensure_instance(ec2, lake, gpu, run).type == "g5.xlarge"
    *refused, taken = launch.records(lake, run)
    zones = {o.zone for o in launch.candidates_by_price(ec2, gpu) if o.instance_type == "g4dn.xlarge"}
    assert [(r.generation, r.instance_type, r.sequence) for r in refused] == [(1, "g4dn.xlarge", n + 1) for n in range(len(zones))]
    assert {r.zone for r in refused} == zones
    assert (taken.generation, taken.instance_type, taken.sequence) == (1, "g5.xlarge", len(zones) + 1)


def test_without_any_capacity_the_error_says_what_was_tried_and_a_later_try_begins_anew(
    ec2: Any, gpu: GpuSettings, lake: Lake, no_capacity: Callable[..., None], run: str
) -> None:
    no_capacity("g4dn.xlarge", "g5.xlarge")
    tried = r"g4dn\.xlarge \(spot\), g5\.xlarge \(spot\) were refused in us-east-1a, us-east-1b"
    with pytest.raises(launch.NoCapacityError, match=tried):
        launch.ensure_instance(ec2, lake, gpu, run)
    assert alive(ec2, gpu, run) == []

    no_capacity()
    assert launch.ensure_instance(ec2, lake, gpu, run).type in ("g4dn.xlarge", "g5.xlarge")
    assert len(alive(ec2, gpu, run)) == 1


def test_on_demand_comes_last_and_only_where_it_is_allowed(ec2: Any, gpu: GpuSettings) -> None:
    spot = [(o.instance_type, o.market) for o in launch.candidates_by_price(ec2, gpu)]
    assert list(dict.fromkeys(spot)) == [("g4dn.xlarge", "spot"), ("g5.xlarge", "spot")]
    both = [(o.instance_type, o.market) for o in launch.candidates_by_price(ec2, gpu.model_copy(update={"allow_on_demand": True}))]
    assert both[: len(spot)] == spot
    assert list(dict.fromkeys(both[len(spot) :])) == [("g4dn.xlarge", "on-demand"), ("g5.xlarge", "on-demand")]


AT = datetime(2025, 5, 29, tzinfo=UTC)


def zoned(**prices: float) -> list[dict[str, Any]]:
    """Spot prices as EC2 tells them: ``g5_a=0.3`` is g5.xlarge in us-east-1a."""
    return [
        {
            "InstanceType": f"{name[:-2]}.xlarge",
            "AvailabilityZone": f"us-east-1{name[-1]}",
            "SpotPrice": str(price),
            "Timestamp": AT - timedelta(hours=1),
        }
        for name, price in prices.items()
    ]


def candidates(gpu: GpuSettings, *subnets: str, **more: Any) -> GpuSettings:
    """Two types in the same subnets."""
    both = tuple(
        GpuCandidate(instance_type=f"{name}.xlarge", gpu="any", on_demand_usd_per_hour=price, subnet_ids=subnets)
        for name, price in (("g5", 1.0), ("g6", 0.8))
    )
    return gpu.model_copy(update={"candidates": both, **more})


def test_every_type_is_a_candidate_in_every_subnet_by_the_price_of_the_subnets_own_zone(
    gpu: GpuSettings, caplog: pytest.LogCaptureFixture
) -> None:
    client = boto3.session.Session().client("ec2", region_name=gpu.region)
    listed = {"Subnets": [{"SubnetId": f"subnet-{z}", "AvailabilityZone": f"us-east-1{z}"} for z in "ab"]}
    no_longer_in_force = {**zoned(g5_a=0.1)[0], "Timestamp": AT - timedelta(days=2)}
    prices = [*zoned(g5_a=0.5, g5_b=0.3, g5_c=0.01, g6_b=0.9), no_longer_in_force]
    asked = {"InstanceTypes": ["g5.xlarge", "g6.xlarge"], "ProductDescriptions": ["Linux/UNIX"], "StartTime": AT}
    with Stubber(client) as stub:
        stub.add_response("describe_subnets", listed, {"SubnetIds": ["subnet-b", "subnet-a"]})
        stub.add_response("describe_spot_price_history", {"SpotPriceHistory": prices[:2], "NextToken": "more"}, asked)
        stub.add_response("describe_spot_price_history", {"SpotPriceHistory": prices[2:]}, {**asked, "NextToken": "more"})
        allowed = candidates(gpu, "subnet-b", "subnet-a", allow_on_demand=True)
        offers = launch.candidates_by_price(client, allowed, now=lambda: AT)
        stub.assert_no_pending_responses()
    assert [(o.instance_type, o.subnet_id, o.market, o.zone, o.price_usd_per_hour, o.max_usd_per_hour) for o in offers] == [
        ("g5.xlarge", "subnet-b", "spot", "us-east-1b", 0.3, 1.0),
        ("g5.xlarge", "subnet-a", "spot", "us-east-1a", 0.5, 1.0),
        ("g6.xlarge", "subnet-b", "spot", "us-east-1b", 0.9, 0.9),  # dearer than on demand: the limit follows
        ("g6.xlarge", "subnet-b", "on-demand", "us-east-1b", 0.8, 0.8),
        ("g6.xlarge", "subnet-a", "on-demand", "us-east-1a", 0.8, 0.8),
        ("g5.xlarge", "subnet-b", "on-demand", "us-east-1b", 1.0, 1.0),
        ("g5.xlarge", "subnet-a", "on-demand", "us-east-1a", 1.0, 1.0),
    ]
    assert "no spot price for g6.xlarge in us-east-1a, the zone of subnet-a" in caplog.text


def test_the_launch_goes_to_the_candidates_subnet_with_its_limit_of_the_price(
    ec2: Any, gpu: GpuSettings, lake: Lake, until: Callable[..., None], run: str
) -> None:
    subnets = {s["AvailabilityZone"][-1]: s["SubnetId"] for s in ec2.describe_subnets()["Subnets"]}
    chosen = GpuCandidate(
        instance_type="g5.xlarge", gpu="A10G", on_demand_usd_per_hour=1.006, subnet_ids=(subnets["c"], subnets["b"])
    )
    launched = launch.ensure_instance(ec2, lake, gpu.model_copy(update={"candidates": (chosen,)}), run)
    assert launched.zone == "us-east-1b"  # cheaper than c
    assert launched.max_usd_per_hour == 1.006
    (record,) = launch.records(lake, run)
    assert (record.subnet_id, record.max_usd_per_hour, record.worst_usd) == (subnets["b"], 1.006, 2.012)


@pytest.mark.parametrize(
    ("code", "advice"), [("InvalidSubnetID.NotFound", "subnet_ids"), ("UnauthorizedOperation", "ec2:DescribeSubnets")]
)
def test_a_subnet_that_cannot_be_looked_up_stops_the_launch_and_says_what_to_change(
    code: str, advice: str, gpu: GpuSettings
) -> None:
    client = boto3.session.Session().client("ec2", region_name=gpu.region)
    with Stubber(client) as stub:
        stub.add_client_error("describe_subnets", code, "no", http_status_code=400)
        with pytest.raises(launch.LaunchRefusedError, match=advice):
            launch.candidates_by_price(client, candidates(gpu, "subnet-0"))


def test_a_region_without_default_subnets_asks_for_some_in_the_settings(gpu: GpuSettings) -> None:
    client = boto3.session.Session().client("ec2", region_name=gpu.region)
    with Stubber(client) as stub:
        stub.add_response("describe_subnets", {"Subnets": []}, {"Filters": [{"Name": "default-for-az", "Values": ["true"]}]})
        with pytest.raises(launch.LaunchRefusedError, match="name some in subnet_ids"):
            launch.candidates_by_price(client, gpu)


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
    assert list(dict.fromkeys(r.instance_type for r in launch.records(lake, run))) == ["g4dn.xlarge", "g5.xlarge"]
    assert (slower.id, slower.type) == (faster[0].id, "g5.xlarge")
    until(lambda: [i.id for i in alive(ec2, gpu, run)] == [slower.id])


def test_after_an_instance_has_ended_a_new_generation_is_a_new_instance(ec2: Any, gpu: GpuSettings, lake: Lake, run: str) -> None:
    first = launch.ensure_instance(ec2, lake, gpu, run)
    terminate_run(ec2, lake, gpu, run)
    second = launch.ensure_instance(ec2, lake, gpu, run)
    assert (second.id != first.id, second.generation) == (True, 2)
    tokens = {r.token for r in launch.records(lake, run)}
    assert len(tokens) == 2


def test_a_job_that_succeeds_while_a_task_looks_for_its_instance_is_not_done_again(
    ec2: Any, gpu: GpuSettings, lake: Lake, run: str
) -> None:
    """The job says so before its instance ends: whoever finds none alive asks then, and not before it looks."""
    launch.ensure_instance(ec2, lake, gpu, run)
    asked: list[int] = []

    def done() -> bool:
        asked.append(len(alive(ec2, gpu, run)))
        return True

    assert launch.ensure_instance(ec2, lake, gpu, run, done=done).state in instances.ALIVE
    assert asked == [], "a living instance is what was asked for"
    terminate_run(ec2, lake, gpu, run)
    with pytest.raises(launch.JobDoneError, match=f"{run} has been trained already"):
        launch.ensure_instance(ec2, lake, gpu, run, done=done)
    assert asked == [0]
    assert len(launch.records(lake, run)) == 1


def test_a_job_that_succeeds_between_the_look_and_the_launch_is_not_done_again(
    ec2: Any, gpu: GpuSettings, lake: Lake, cloud: Sandbox, run: str
) -> None:
    first = launch.ensure_instance(ec2, lake, gpu, run)
    answers = iter([False, True])

    def done() -> bool:
        if said := next(answers):
            return said
        # it ends right after it was looked for
        cloud.runner.get(first.id).terminate()
        return said

    cloud.aws.invisible_seconds = 3600.0
    try:
        with pytest.raises(launch.JobDoneError, match="trained meanwhile"):
            launch.ensure_instance(ec2, lake, gpu, run, done=done)
    finally:
        cloud.aws.invisible_seconds = 0.0
    assert len(launch.records(lake, run)) == 1


def test_an_instance_whose_job_has_failed_is_replaced(ec2: Any, gpu: GpuSettings, lake: Lake, run: str) -> None:
    first = launch.ensure_instance(ec2, lake, gpu, run)
    second = launch.ensure_instance(ec2, lake, gpu, run, replace=lambda i: i.id == first.id)
    assert second.generation == 2
    assert [i.id for i in alive(ec2, gpu, run)] == [second.id]


@pytest.mark.parametrize(("billed", "state"), [(False, "open"), (True, "ended")])
def test_an_instance_that_ec2_has_forgotten_is_followed_by_a_new_generation_and_stays_in_the_ledger(
    billed: bool, state: str, ec2: Any, gpu: GpuSettings, lake: Lake, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = launch.ensure_instance(ec2, lake, gpu, run)
    terminate_run(ec2, lake, gpu, run)
    if billed:
        budget.report(ec2, lake, gpu, run)
    # an hour after its end an instance is no longer described, its token is known for a day
    monkeypatch.setattr(instances, "find", lambda *_, **__: [])
    second = launch.ensure_instance(ec2, lake, gpu, run)
    assert (first.generation, second.generation) == (1, 2)
    entries = [lake.read_json(key) for key in lake.keys(keys.LEDGER)]
    assert [entry["state"] for entry in entries] == [state, "open"], "where it is not known what it came to, its worst case counts"


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

    with pytest.raises(launch.LaunchUnresolvedError):
        launch.ensure_instance(wrapped(ec2, run_instances=lose), lake, gpu, run, sleep=lambda _: None)
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
    error = refused(gpu, lake, run, code, http, times=5)
    assert isinstance(error, launch.LaunchUnresolvedError)
    assert code in str(error)


def refused(gpu: GpuSettings, lake: Lake, run: str, code: str, http: int, times: int = 1) -> Exception:
    """What a launch raises where RunInstances answers ``times`` times with ``code``."""
    client = boto3.session.Session().client("ec2", region_name=gpu.region)
    single = candidates(gpu, "subnet-a")
    with Stubber(client) as stub:
        stub.add_response("describe_instances", {"Reservations": []})
        stub.add_response("describe_subnets", {"Subnets": [{"SubnetId": "subnet-a", "AvailabilityZone": "us-east-1a"}]})
        stub.add_response("describe_spot_price_history", {"SpotPriceHistory": zoned(g5_a=0.3)})
        stub.add_response("describe_instances", {"Reservations": []})
        for _ in range(times):
            stub.add_client_error("run_instances", code, "no", http_status_code=http)
        with pytest.raises((launch.LaunchRefusedError, launch.LaunchUnresolvedError)) as raised:
            launch.ensure_instance(client, lake, single, run, sleep=lambda _: None)
        stub.assert_no_pending_responses()
    return raised.value


def test_an_error_while_looking_is_no_permission_to_launch(gpu: GpuSettings, lake: Lake, cloud: Sandbox, run: str) -> None:
    client = boto3.session.Session().client("ec2", region_name=gpu.region, config=Config(retries={"total_max_attempts": 1}))
    with Stubber(client) as stub:
        stub.add_client_error("describe_instances", "InternalError", http_status_code=500)
        with pytest.raises(ClientError):
            launch.ensure_instance(client, lake, gpu, run)
    assert launch.records(lake, run) == []
