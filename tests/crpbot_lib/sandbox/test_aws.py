"""AWS as the launcher meets it: idempotent, short of capacity on demand, priced, and with a lake that takes conditional writes."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import pytest
from botocore.exceptions import ClientError

from crpbot_lib.lake import KeyExistsError, Lake
from crpbot_lib.sandbox.server import Sandbox

IDLE = "#!/bin/bash\n"


def code_of(error: pytest.ExceptionInfo[ClientError]) -> str:
    return str(error.value.response["Error"]["Code"])


def test_the_same_token_gives_the_same_instance_back_and_none_after_its_end(cloud: Any) -> None:
    first = cloud.run(IDLE, ClientToken="once")
    again = cloud.run(IDLE, ClientToken="once")
    assert again["ReservationId"] == first["ReservationId"]
    instance = first["Instances"][0]["InstanceId"]
    assert [i["InstanceId"] for i in again["Instances"]] == [instance]
    cloud.ec2.terminate_instances(InstanceIds=[instance])
    cloud.wait_for_state(instance, "terminated")
    with pytest.raises(ClientError, match=instance) as error:
        cloud.run(IDLE, ClientToken="once")
    assert code_of(error) == "IdempotentInstanceTerminated"


def test_the_same_token_with_other_parameters_is_refused(cloud: Any) -> None:
    instance = cloud.launch(IDLE, ClientToken="other")
    with pytest.raises(ClientError) as error:
        cloud.run("#!/bin/bash\n# changed\n", ClientToken="other")
    assert code_of(error) == "IdempotentParameterMismatch"
    assert "UserData" in str(error.value)
    cloud.ec2.terminate_instances(InstanceIds=[instance])


def test_capacity_fails_by_type_on_demand_and_the_token_stays_usable(cloud: Any) -> None:
    cloud.post("/_sandbox/capacity", {"unavailable": ["g5.xlarge"]})
    with pytest.raises(ClientError) as error:
        cloud.run(IDLE, ClientToken="later")
    assert code_of(error) == "InsufficientInstanceCapacity"
    assert error.value.response["ResponseMetadata"]["HTTPStatusCode"] == 500
    other = cloud.launch(IDLE, InstanceType="g4dn.xlarge")
    cloud.post("/_sandbox/capacity", {"unavailable": []})
    same = cloud.launch(IDLE, ClientToken="later")
    cloud.ec2.terminate_instances(InstanceIds=[other, same])


def test_spot_capacity_can_be_short_while_on_demand_is_not(cloud: Any) -> None:
    cloud.post("/_sandbox/capacity", {"unavailable_spot": ["g5.xlarge"]})
    with pytest.raises(ClientError) as error:
        cloud.run(IDLE)
    assert code_of(error) == "InsufficientInstanceCapacity"
    instance = cloud.launch(IDLE, InstanceMarketOptions={})
    assert cloud.record(instance)["lifecycle"] == "on-demand"
    cloud.post("/_sandbox/capacity", {})
    cloud.ec2.terminate_instances(InstanceIds=[instance])


def test_a_spot_price_below_the_market_is_refused(cloud: Any) -> None:
    with pytest.raises(ClientError) as error:
        cloud.run(IDLE, InstanceMarketOptions={"MarketType": "spot", "SpotOptions": {"MaxPrice": "0.29"}})
    assert code_of(error) == "SpotMaxPriceTooLow"


def test_spot_prices_differ_by_type_and_zone_and_can_be_filtered(cloud: Any) -> None:
    history = cloud.ec2.describe_spot_price_history(InstanceTypes=["g5.xlarge"], ProductDescriptions=["Linux/UNIX"])[
        "SpotPriceHistory"
    ]
    assert min(float(row["SpotPrice"]) for row in history) == 0.30
    assert sorted(row["AvailabilityZone"] for row in history) == [f"us-east-1{zone}" for zone in "abcdf"]  # where it is offered
    one = cloud.ec2.describe_spot_price_history(
        Filters=[{"Name": "availability-zone", "Values": ["us-east-1a"]}, {"Name": "instance-type", "Values": ["g4dn.xlarge"]}]
    )["SpotPriceHistory"]
    assert [(row["InstanceType"], float(row["SpotPrice"])) for row in one] == [("g4dn.xlarge", 0.16)]
    assert cloud.ec2.describe_spot_price_history(InstanceTypes=["p5.48xlarge"])["SpotPriceHistory"] == []


def test_an_image_is_resolved_by_its_parameter_and_an_unknown_parameter_is_an_error(cloud: Any) -> None:
    name = cloud.sandbox.options.gpu.ami.removeprefix("resolve:ssm:")
    image = cloud.ssm.get_parameter(Name=name)["Parameter"]["Value"]
    instance = cloud.launch(IDLE)
    assert cloud.describe(instance)["ImageId"] == image
    assert cloud.ec2.describe_images(ImageIds=[image])["Images"]
    with pytest.raises(ClientError) as error:
        cloud.run(IDLE, ImageId="resolve:ssm:/no/such/parameter")
    assert code_of(error) == "InvalidParameterValue"
    cloud.ec2.terminate_instances(InstanceIds=[instance])


def test_market_tags_profile_and_volume_are_recorded(cloud: Any) -> None:
    tags = [{"Key": "crpbot:run", "Value": "r1"}]
    instance = cloud.launch(
        IDLE,
        IamInstanceProfile={"Name": cloud.sandbox.options.gpu.instance_profile},
        TagSpecifications=[{"ResourceType": kind, "Tags": tags} for kind in ("instance", "volume")],
        MetadataOptions={"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
        BlockDeviceMappings=[
            {"DeviceName": "/dev/xvda", "Ebs": {"VolumeSize": 10, "Encrypted": True, "DeleteOnTermination": True}}
        ],
    )
    found = cloud.ec2.describe_instances(Filters=[{"Name": "tag:crpbot:run", "Values": ["r1"]}])["Reservations"][0]["Instances"][0]
    assert (found["InstanceId"], found["InstanceLifecycle"]) == (instance, "spot")
    volumes = cloud.ec2.describe_volumes(Filters=[{"Name": "tag:crpbot:run", "Values": ["r1"]}])["Volumes"]
    assert [v["Size"] for v in volumes] == [10]
    record = cloud.record(instance)
    assert (record["type"], record["lifecycle"], record["spot_price"], record["tags"]) == (
        "g5.xlarge",
        "spot",
        0.30,
        {"crpbot:run": "r1"},
    )
    cloud.ec2.terminate_instances(InstanceIds=[instance])
    cloud.wait_for_state(instance, "terminated")
    assert cloud.ec2.describe_volumes(Filters=[{"Name": "tag:crpbot:run", "Values": ["r1"]}])["Volumes"] == []


def test_unknown_instances_and_profiles_are_errors(cloud: Any) -> None:
    with pytest.raises(ClientError) as error:
        cloud.ec2.terminate_instances(InstanceIds=["i-00000000000000000"])
    assert code_of(error) == "InvalidInstanceID.NotFound"
    with pytest.raises(ClientError):
        cloud.run(IDLE, IamInstanceProfile={"Name": "no-such-profile"})
    with pytest.raises(ClientError) as error:
        cloud.run(IDLE, DryRun=True)
    assert code_of(error) == "DryRunOperation"


def test_of_two_conditional_writes_at_once_one_wins(cloud: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cloud.env.items():
        monkeypatch.setenv(name, value)
    lake = Lake(cloud.env["CRPBOT_LAKE"])

    def write(number: int) -> bool:
        try:
            lake.write("race", str(number).encode(), only_if_absent=True)
        except KeyExistsError:
            return False
        return True

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        won = [number for number, first in enumerate(pool.map(write, range(16))) if first]
    assert len(won) == 1
    assert lake.read("race") == str(won[0]).encode()
    lake.write("tagged", b"x", tags={"run": "r 1", "gpu": "A10G"})
    assert lake.tags("tagged") == {"run": "r 1", "gpu": "A10G"}


def test_a_second_cloud_in_the_same_process_is_refused(cloud: Any) -> None:
    assert cloud.state  # one runs
    with pytest.raises(RuntimeError, match="runs in this process already"):
        Sandbox().start()
