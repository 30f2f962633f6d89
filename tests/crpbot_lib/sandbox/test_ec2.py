"""EC2 as it treats those who rely on it: refuses what is wrong, fails on demand, shows things late, and has a price per zone."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionClosedError, ReadTimeoutError
from botocore.parsers import ResponseParserError

IDLE = "#!/bin/bash\n"


@pytest.fixture(autouse=True)
def as_before(cloud: Any) -> Iterator[None]:
    """No rule and no instance of one test is left to the next."""
    yield
    cloud.post("/_sandbox/ec2/faults", []).raise_for_status()
    cloud.post("/_sandbox/ec2/visibility", {"seconds": 0}).raise_for_status()
    if living := [i["id"] for i in cloud.sandbox.instances() if i["state"] != "terminated"]:
        cloud.ec2.terminate_instances(InstanceIds=living)


@pytest.fixture
def rules(cloud: Any) -> Callable[..., None]:
    def post(*rules: dict[str, Any]) -> None:
        cloud.post("/_sandbox/ec2/faults", list(rules)).raise_for_status()

    return post


@pytest.fixture
def impatient(cloud: Any) -> Callable[[str], Any]:
    """Clients that wait half a second for an answer, and ask once."""
    env = cloud.env
    session = boto3.session.Session(env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"], region_name=env["AWS_REGION"])
    config = Config(retries={"max_attempts": 0}, read_timeout=0.5)
    return lambda service: session.client(service, endpoint_url=env["AWS_ENDPOINT_URL"], config=config)


def refused(call: Callable[..., Any], *arguments: Any, **request: Any) -> tuple[str, int, str]:
    """Code, HTTP status and message of the error that ``call`` must meet."""
    with pytest.raises(ClientError) as error:
        call(*arguments, **request)
    response = error.value.response
    return response["Error"]["Code"], response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Message"]


def launched(cloud: Any) -> list[str]:
    return [instance["id"] for instance in cloud.sandbox.instances()]


def zone_of(cloud: Any, instance: str) -> str:
    return str(cloud.describe(instance)["Placement"]["AvailabilityZone"])


def subnet_of(cloud: Any, zone: str) -> str:
    found = cloud.ec2.describe_subnets(Filters=[{"Name": "availability-zone", "Values": [zone]}])["Subnets"]
    return str(found[0]["SubnetId"])


# --- errors on demand --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("InsufficientInstanceCapacity", 500),
        ("InternalError", 500),
        ("RequestLimitExceeded", 503),
        ("UnauthorizedOperation", 403),
        ("MaxSpotInstanceCountExceeded", 400),
        ("VcpuLimitExceeded", 400),
        ("Client.AnyOther", 400),
    ],
)
def test_an_error_on_demand_has_the_status_that_ec2_gives_it_and_launches_nothing(
    cloud: Any, rules: Any, code: str, status: int
) -> None:
    before = launched(cloud)
    rules({"error": code, "action": "RunInstances"})
    assert refused(cloud.run, IDLE)[:2] == (code, status)
    assert launched(cloud) == before


def test_a_rule_hits_the_type_zone_and_market_that_it_names_and_nothing_else(cloud: Any, rules: Any) -> None:
    subnet = {zone: subnet_of(cloud, zone) for zone in ("us-east-1a", "us-east-1b")}
    rules({"error": "InsufficientInstanceCapacity", "type": "g5.xlarge", "zone": "us-east-1a", "market": "spot"})
    code, _, message = refused(cloud.run, IDLE, SubnetId=subnet["us-east-1a"])
    assert code == "InsufficientInstanceCapacity"
    assert "g5.xlarge" in message
    assert "us-east-1a" in message
    assert refused(cloud.run, IDLE, Placement={"AvailabilityZone": "us-east-1a"})[0] == code
    assert zone_of(cloud, cloud.launch(IDLE, SubnetId=subnet["us-east-1b"])) == "us-east-1b"
    assert zone_of(cloud, cloud.launch(IDLE, SubnetId=subnet["us-east-1a"], InstanceType="g4dn.xlarge")) == "us-east-1a"
    assert zone_of(cloud, cloud.launch(IDLE, SubnetId=subnet["us-east-1a"], InstanceMarketOptions={})) == "us-east-1a"


def test_without_subnet_and_zone_ec2_takes_one_that_has_capacity(cloud: Any, rules: Any) -> None:
    zones = [f"us-east-1{letter}" for letter in "abcdf"]
    shortage = [{"error": "InsufficientInstanceCapacity", "type": "g5.xlarge", "zone": zone} for zone in zones]
    rules(*shortage[:2])
    assert zone_of(cloud, cloud.launch(IDLE)) == "us-east-1c"
    rules(*shortage)
    assert refused(cloud.run, IDLE)[0] == "InsufficientInstanceCapacity"


def test_a_rule_with_a_count_ends_after_so_many_hits_and_hits_are_counted(cloud: Any, rules: Any) -> None:
    before = cloud.get("/_sandbox/ec2/faults").json()["injected"].get("DescribeInstances:RequestLimitExceeded", 0)
    rules({"error": "RequestLimitExceeded", "action": "DescribeInstances", "count": 2})
    for _ in range(2):
        assert refused(cloud.ec2.describe_instances)[:2] == ("RequestLimitExceeded", 503)
    assert cloud.ec2.describe_instances()["ResponseMetadata"]["HTTPStatusCode"] == 200
    said = cloud.get("/_sandbox/ec2/faults").json()
    assert said["injected"]["DescribeInstances:RequestLimitExceeded"] == before + 2
    assert said["active"] == []


def test_a_rule_without_an_action_hits_every_call(cloud: Any, rules: Any) -> None:
    rules({"error": "UnauthorizedOperation"})
    for call in (cloud.ec2.describe_instances, cloud.ec2.describe_spot_price_history, cloud.ec2.describe_subnets):
        assert refused(call)[0] == "UnauthorizedOperation"
    assert refused(cloud.run, IDLE, DryRun=True)[0] == "UnauthorizedOperation"


def test_an_empty_list_clears_and_the_capacity_said_by_type_is_another_list(cloud: Any, rules: Any) -> None:
    rules({"error": "InternalError"})
    cloud.post("/_sandbox/capacity", {"unavailable": ["g5.xlarge"]}).raise_for_status()
    rules()
    assert cloud.ec2.describe_instances()
    assert refused(cloud.run, IDLE)[0] == "InsufficientInstanceCapacity"
    cloud.post("/_sandbox/capacity", {}).raise_for_status()
    assert cloud.launch(IDLE)


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        ({"error": "InternalError", "action": "RunInstance"}, "EC2 has no action 'RunInstance'"),
        ({"error": "InternalError", "type": "g5.huge"}, "us-east-1 offers no instance type g5.huge"),
        ({"error": "InternalError", "zone": "eu-west-1a"}, "us-east-1 has no zone eu-west-1a; it has us-east-1a"),
        ({"error": "InternalError", "action": "DescribeInstances", "type": "g5.xlarge"}, "would never hit"),
        ({"error": "InternalError", "market": "cheap"}, "market"),
        ({"error": "InternalError", "count": 0}, "count"),
        ({"error": "no code"}, "error"),
        ({"action": "RunInstances"}, "exactly one of error, cut, stall"),
        ({"error": "InternalError", "cut": "reset"}, "exactly one of error, cut, stall"),
        ({"cut": "body", "after": True}, "always that of a call that was carried out"),
        ({"cut": "head"}, "cut"),
        ({"stall": 0}, "stall"),
        ({"error": "InternalError", "action": "PutObject"}, "PutObject of S3 can be cut or stall"),
        ({"error": "InternalError", "times": 1}, "times"),
    ],
)
def test_a_rule_that_could_never_hit_is_refused_and_the_rules_stay(cloud: Any, rules: Any, rule: Any, complaint: str) -> None:
    rules({"error": "VcpuLimitExceeded"})
    answer = cloud.post("/_sandbox/ec2/faults", [rule])
    assert answer.status_code == 400
    assert complaint in answer.json()["error"]
    assert cloud.get("/_sandbox/ec2/faults").json()["active"] == [{"error": "VcpuLimitExceeded"}]


# --- the lost answer, and the token --------------------------------------------------------------------------------------------


def test_when_the_answer_is_lost_the_instance_is_there_and_the_token_gives_it_back(cloud: Any, rules: Any) -> None:
    before = launched(cloud)
    rules({"error": "InternalError", "action": "RunInstances", "count": 1, "after": True})
    assert refused(cloud.run, IDLE, ClientToken="lost")[:2] == ("InternalError", 500)
    (made,) = [i for i in launched(cloud) if i not in before]
    assert cloud.launch(IDLE, ClientToken="lost") == made
    assert launched(cloud) == [*before, made]


def test_a_termination_whose_answer_is_lost_has_happened(cloud: Any, rules: Any) -> None:
    instance = cloud.launch(IDLE)
    rules({"error": "InternalError", "action": "TerminateInstances", "count": 1, "after": True})
    assert refused(cloud.ec2.terminate_instances, InstanceIds=[instance])[:2] == ("InternalError", 500)
    cloud.wait_for_state(instance, "terminated")
    again = cloud.ec2.terminate_instances(InstanceIds=[instance])["TerminatingInstances"][0]
    assert (again["PreviousState"]["Name"], again["CurrentState"]["Name"]) == ("terminated", "terminated")


# --- cut connections -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "error", "carried_out"),
    [
        ({"cut": "reset"}, ConnectionClosedError, False),
        ({"cut": "reset", "after": True}, ConnectionClosedError, True),
        ({"cut": "headers"}, ResponseParserError, True),
        ({"cut": "body"}, ResponseParserError, True),
        ({"stall": 3600}, ReadTimeoutError, False),
        ({"stall": 3600, "after": True}, ReadTimeoutError, True),
    ],
)
def test_a_connection_is_cut_or_stalls_before_or_after_the_call_is_carried_out(
    cloud: Any, rules: Any, impatient: Callable[[str], Any], rule: dict[str, Any], error: type[Exception], carried_out: bool
) -> None:
    instance = cloud.launch(IDLE)
    rules({"action": "TerminateInstances", "count": 1, **rule})
    with pytest.raises(error):
        impatient("ec2").terminate_instances(InstanceIds=[instance])
    assert (cloud.record(instance)["state"] in ("shutting-down", "terminated")) == carried_out
    cloud.ec2.terminate_instances(InstanceIds=[instance])
    cloud.wait_for_state(instance, "terminated")
    name = rule.get("cut") and f"cut-{rule['cut']}"
    assert f"TerminateInstances:{name or 'stall'}" in cloud.get("/_sandbox/ec2/faults").json()["injected"]


def test_a_call_that_stalled_is_carried_out_late_though_its_client_has_gone(
    cloud: Any, rules: Any, impatient: Callable[[str], Any]
) -> None:
    instance = cloud.launch(IDLE)
    rules({"action": "TerminateInstances", "count": 1, "stall": 1.5})
    with pytest.raises(ReadTimeoutError):
        impatient("ec2").terminate_instances(InstanceIds=[instance])
    cloud.wait_for_state(instance, "terminated")


def test_a_stall_holds_up_no_other_call(cloud: Any, rules: Any, impatient: Callable[[str], Any]) -> None:
    rules({"action": "DescribeSubnets", "stall": 3600})
    with pytest.raises(ReadTimeoutError):
        impatient("ec2").describe_subnets()
    assert cloud.ec2.describe_instances()


@pytest.mark.parametrize(
    ("rule", "there"),
    [({"cut": "reset"}, False), ({"cut": "reset", "after": True}, True), ({"stall": 3600}, False), ({"cut": "headers"}, True)],
)
def test_a_conditional_put_can_be_cut_and_its_repetition_says_whether_the_first_was_carried_out(
    cloud: Any, rules: Any, impatient: Callable[[str], Any], rule: dict[str, Any], there: bool
) -> None:
    put = {"Bucket": "crpbot-local", "Key": f"cut/{rule}", "Body": b"first", "IfNoneMatch": "*"}
    rules({"action": "PutObject", "count": 1, **rule})
    with contextlib.suppress(ConnectionClosedError, ReadTimeoutError):
        impatient("s3").put_object(**put)
    if there:
        assert refused(cloud.s3.put_object, **put)[0] == "PreconditionFailed"
    else:
        cloud.s3.put_object(**put)


def test_rules_without_an_action_are_ec2s_alone(cloud: Any, rules: Any) -> None:
    rules({"cut": "reset"})
    cloud.s3.put_object(Bucket="crpbot-local", Key="whole", Body=b"whole")
    assert cloud.s3.get_object(Bucket="crpbot-local", Key="whole")["Body"].read() == b"whole"
    with pytest.raises(ConnectionClosedError):
        cloud.ec2.describe_instances()


def test_a_token_gives_its_instance_back_where_a_new_launch_would_find_no_capacity_but_not_under_throttling(
    cloud: Any, rules: Any
) -> None:
    instance = cloud.launch(IDLE, ClientToken="kept")
    for code in ("InsufficientInstanceCapacity", "VcpuLimitExceeded", "MaxSpotInstanceCountExceeded"):
        rules({"error": code})
        assert cloud.launch(IDLE, ClientToken="kept") == instance
        assert refused(cloud.run, IDLE, ClientToken=f"not kept: {code}")[0] == code
    rules({"error": "RequestLimitExceeded"})
    assert refused(cloud.run, IDLE, ClientToken="kept")[0] == "RequestLimitExceeded"


def test_of_many_launches_at_once_with_one_token_there_is_one_instance(cloud: Any) -> None:
    before = launched(cloud)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda _: cloud.launch(IDLE, ClientToken="at once"), range(16)))
    assert launched(cloud) == [*before, got[0]]
    assert set(got) == {got[0]}


def test_a_token_whose_launch_was_refused_is_free_for_other_parameters(cloud: Any, rules: Any) -> None:
    rules({"error": "InsufficientInstanceCapacity", "type": "g5.xlarge"})
    assert refused(cloud.run, IDLE, ClientToken="free")[0] == "InsufficientInstanceCapacity"
    instance = cloud.launch(IDLE, ClientToken="free", InstanceType="g4dn.xlarge")
    assert refused(cloud.run, IDLE, ClientToken="free")[0] == "IdempotentParameterMismatch"
    assert cloud.record(instance)["type"] == "g4dn.xlarge"


# --- what a launch may ask for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "code", "named"),
    [
        ({"InstanceType": "g5.huge"}, "InvalidParameterValue", "g5.huge"),
        ({"ImageId": "ami-00000000000000000"}, "InvalidAMIID.NotFound", "ami-00000000000000000"),
        ({"ImageId": "ubuntu"}, "InvalidAMIID.Malformed", "ubuntu"),
        ({"SubnetId": "subnet-00000000"}, "InvalidSubnetID.NotFound", "subnet-00000000"),
        ({"SecurityGroupIds": ["sg-00000000"]}, "InvalidGroup.NotFound", "sg-00000000"),
        ({"IamInstanceProfile": {"Name": "nobody"}}, "InvalidParameterValue", "nobody"),
        ({"Placement": {"AvailabilityZone": "eu-west-1a"}}, "InvalidParameterValue", "eu-west-1a"),
        ({"Placement": {"AvailabilityZone": "us-east-1e"}}, "Unsupported", "us-east-1a"),
        ({"InstanceInitiatedShutdownBehavior": "terminat"}, "InvalidParameterValue", "stop, terminate"),
        ({"MetadataOptions": {"HttpTokens": "always"}}, "InvalidParameterValue", "optional, required"),
        ({"MinCount": 2}, "InvalidParameterValue", "MaxCount"),
        ({"ClientToken": "x" * 65}, "InvalidParameterValue", "65 characters"),
        ({"UserData": "#" * 16385}, "InvalidParameterValue", "16385 bytes"),
        (
            {"TagSpecifications": [{"ResourceType": "instance", "Tags": [{"Key": "run", "Value": "x" * 257}]}]},
            "InvalidParameterValue",
            "TagSpecification.1.Tag.1.Value",
        ),
        (
            {"InstanceMarketOptions": {"MarketType": "spot", "SpotOptions": {"MaxPrice": "cheap"}}},
            "InvalidParameterValue",
            "cheap",
        ),
        ({"KeyName": "mine"}, "UnsupportedOperation", "KeyName"),
        ({"Placement": {"Tenancy": "dedicated"}}, "UnsupportedOperation", "Placement.Tenancy"),
        (
            {"InstanceMarketOptions": {"MarketType": "spot", "SpotOptions": {"SpotInstanceType": "persistent"}}},
            "UnsupportedOperation",
            "persistent",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_launch_that_asks_for_what_there_is_not_is_refused(cloud: Any, request_: Any, code: str, named: str) -> None:
    before = launched(cloud)
    said, status, message = refused(cloud.run, IDLE, **request_)
    assert (said, status) == (code, 400)
    assert named in message
    assert launched(cloud) == before
    assert all(reservation["Instances"] for reservation in cloud.ec2.describe_instances()["Reservations"])


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        ({"InstanceTyp": "g5.xlarge"}, "UnknownParameter"),
        ({"TagSpecification.1.Tags.1.Key": "run"}, "UnknownParameter"),
        ({"MetadataOptions": "required"}, "UnknownParameter"),
        ({"MaxCount": "many"}, "InvalidParameterValue"),
        ({"Monitoring.Enabled": "yes"}, "InvalidParameterValue"),
        ({"UserData": "no base64!"}, "InvalidParameterValue"),
        ({"ImageId": ""}, "MissingParameter"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_botocore_would_not_let_through_is_refused_on_the_wire_too(cloud: Any, wire: dict[str, str], code: str) -> None:
    def spoil(params: dict[str, Any], **_: Any) -> None:
        params["body"].update(wire)

    cloud.ec2.meta.events.register("before-call.ec2.RunInstances", spoil)
    try:
        assert refused(cloud.run, IDLE)[:2] == (code, 400)
    finally:
        cloud.ec2.meta.events.unregister("before-call.ec2.RunInstances", spoil)


def test_as_many_as_asked_for_are_launched_and_each_lives(cloud: Any) -> None:
    two = [instance["InstanceId"] for instance in cloud.run(IDLE, MinCount=1, MaxCount=2)["Instances"]]
    assert len(set(two)) == 2
    for instance in two:
        cloud.wait_for_state(instance, "running")


def test_other_ways_to_an_instance_are_refused(cloud: Any) -> None:
    assert refused(cloud.ec2.request_spot_instances, InstanceCount=1)[0] == "UnsupportedOperation"


# --- delayed visibility ----------------------------------------------------------------------------------------------------------


def test_a_new_instance_is_invisible_to_lists_and_unknown_by_its_id_until_the_time_is_over(cloud: Any) -> None:
    cloud.post("/_sandbox/ec2/visibility", {"seconds": 3600}).raise_for_status()
    tags = [{"ResourceType": "instance", "Tags": [{"Key": "crpbot:run", "Value": "late"}]}]
    instance = cloud.launch(IDLE, TagSpecifications=tags, ClientToken="late")
    by_tag = [{"Name": "tag:crpbot:run", "Values": ["late"]}]
    assert cloud.ec2.describe_instances(Filters=by_tag)["Reservations"] == []
    for call in (
        lambda: cloud.describe(instance),
        lambda: cloud.ec2.terminate_instances(InstanceIds=[instance]),
        lambda: cloud.ec2.get_console_output(InstanceId=instance),
        lambda: cloud.ec2.describe_instance_attribute(InstanceId=instance, Attribute="userData"),
    ):
        assert refused(call)[0] == "InvalidInstanceID.NotFound"
    assert cloud.launch(IDLE, TagSpecifications=tags, ClientToken="late") == instance
    cloud.wait_for(lambda: cloud.record(instance)["state"] == "running")  # it lives all the same
    cloud.post("/_sandbox/ec2/visibility", {"seconds": 0}).raise_for_status()
    found = cloud.ec2.describe_instances(Filters=by_tag)["Reservations"][0]["Instances"][0]
    assert (found["InstanceId"], found["State"]["Name"]) == (instance, "running")
    cloud.ec2.terminate_instances(InstanceIds=[instance])
    cloud.wait_for_state(instance, "terminated")


def test_an_invisible_instance_among_others_saves_them_all_from_a_termination(cloud: Any) -> None:
    cloud.post("/_sandbox/ec2/visibility", {"seconds": 3600}).raise_for_status()
    old, new = cloud.launch(IDLE), cloud.launch(IDLE)
    cloud.sandbox.runner.get(old).launched -= 3600
    code, _, message = refused(cloud.ec2.terminate_instances, InstanceIds=[old, new])
    assert (code, new in message, old in message) == ("InvalidInstanceID.NotFound", True, False)
    cloud.wait_for_state(old, "running")
    cloud.ec2.terminate_instances(InstanceIds=[old])
    cloud.wait_for_state(old, "terminated")


def test_a_negative_delay_is_refused(cloud: Any) -> None:
    answer = cloud.post("/_sandbox/ec2/visibility", {"seconds": -1})
    assert (answer.status_code, answer.json()["error"][:7]) == (400, "seconds")


# --- spot prices -----------------------------------------------------------------------------------------------------------------


def history(cloud: Any, kind: str, zone: str, **request: Any) -> list[tuple[float, datetime]]:
    rows = cloud.ec2.describe_spot_price_history(InstanceTypes=[kind], AvailabilityZone=zone, **request)["SpotPriceHistory"]
    return [(float(row["SpotPrice"]), row["Timestamp"]) for row in rows]


def test_a_price_is_set_by_zone_and_the_history_holds_what_was_in_force_and_what_changed(cloud: Any) -> None:
    start = datetime.now(UTC)
    assert history(cloud, "g6.xlarge", "us-east-1a") == []
    for price in (0.40, 0.50, 0.60):
        prices = {"g6.xlarge": {"us-east-1a": price, "us-east-1b": price * 2}}
        cloud.post("/_sandbox/ec2/spot_prices", prices).raise_for_status()
        # the next one comes at a later millisecond, the finest that an answer tells
        set_at = datetime.now(UTC)
        cloud.wait_for(lambda since=set_at: datetime.now(UTC) - since > timedelta(milliseconds=2))
    everything = history(cloud, "g6.xlarge", "us-east-1a")
    assert [price for price, _ in everything] == [0.60, 0.50, 0.40]  # newest first
    assert [price for price, _ in history(cloud, "g6.xlarge", "us-east-1b")] == [1.20, 1.00, 0.80]
    second = everything[1][1] + timedelta(milliseconds=1)  # a moment when 0.50 was in force
    assert [price for price, _ in history(cloud, "g6.xlarge", "us-east-1a", StartTime=second)] == [0.60, 0.50]
    assert [price for price, _ in history(cloud, "g6.xlarge", "us-east-1a", StartTime=second, EndTime=second)] == [0.50]
    assert [price for price, _ in history(cloud, "g6.xlarge", "us-east-1a", EndTime=second)] == [0.50, 0.40]
    assert [price for price, _ in history(cloud, "g6.xlarge", "us-east-1a", StartTime=datetime.now(UTC))] == [0.60]
    assert history(cloud, "g6.xlarge", "us-east-1a", EndTime=start - timedelta(minutes=1)) == []


def test_pages_of_the_history_join_to_the_whole(cloud: Any) -> None:
    whole = cloud.ec2.describe_spot_price_history()["SpotPriceHistory"]
    pages = cloud.ec2.get_paginator("describe_spot_price_history").paginate(PaginationConfig={"PageSize": 3})
    paged = [page["SpotPriceHistory"] for page in pages]
    assert len(paged) > 1
    assert [row for page in paged for row in page] == whole


def test_a_launch_pays_its_zone_s_price_and_a_limit_below_it_is_refused(cloud: Any) -> None:
    cloud.post("/_sandbox/ec2/spot_prices", {"g6.2xlarge": {"us-east-1a": 0.9, "us-east-1b": 0.3}}).raise_for_status()
    asked = {"InstanceType": "g6.2xlarge", "Placement": {"AvailabilityZone": "us-east-1b"}}
    instance = cloud.launch(IDLE, **asked)
    assert cloud.record(instance)["spot_price"] == 0.3
    limit = {"InstanceMarketOptions": {"MarketType": "spot", "SpotOptions": {"MaxPrice": "0.5"}}}
    assert cloud.launch(IDLE, **asked, **limit)
    asked["Placement"] = {"AvailabilityZone": "us-east-1a"}
    assert refused(cloud.run, IDLE, **asked, **limit)[0] == "SpotMaxPriceTooLow"


@pytest.mark.parametrize(
    ("prices", "complaint"),
    [
        ({"g5.huge": {"us-east-1a": 1}}, "us-east-1 offers no instance type g5.huge"),
        ({"g5.xlarge": {"us-east-1e": 1}}, "g5.xlarge is not offered in us-east-1e, but in us-east-1a"),
        ({"g5.xlarge": {"us-east-1a": 0}}, "greater than 0"),
        ({"g5.xlarge": 0.4}, "g5.xlarge"),
    ],
)
def test_a_price_of_nothing_or_nowhere_is_refused_and_none_changes(cloud: Any, prices: Any, complaint: str) -> None:
    before = cloud.get("/_sandbox/about").json()["aws"]["spot_prices"]
    answer = cloud.post("/_sandbox/ec2/spot_prices", prices)
    assert answer.status_code == 400
    assert complaint in answer.json()["error"]
    assert cloud.get("/_sandbox/about").json()["aws"]["spot_prices"] == before


def test_an_unknown_filter_is_an_error_and_not_an_empty_answer(cloud: Any) -> None:
    filters = [{"Name": "zone", "Values": ["us-east-1a"]}]
    assert refused(cloud.ec2.describe_spot_price_history, Filters=filters)[0] == "InvalidParameterValue"


def test_user_data_of_the_allowed_size_is_taken(cloud: Any) -> None:
    script = IDLE + "#" * (16384 - len(IDLE))
    instance = cloud.launch(script)
    kept = cloud.ec2.describe_instance_attribute(InstanceId=instance, Attribute="userData")["UserData"]["Value"]
    assert base64.b64decode(kept).decode() == script
