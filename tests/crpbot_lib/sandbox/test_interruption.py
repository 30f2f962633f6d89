"""What an instance learns of its own end and how it comes: metadata, spot interruption, and an instance that hangs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests
from botocore.utils import InstanceMetadataRegionFetcher

from crpbot_lib.sandbox.instances import Timing
from crpbot_lib.sandbox.processes import alive

TTL, TOKEN = "X-aws-ec2-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token"
INSTANCE_ACTION, REBALANCE = "spot/instance-action", "events/recommendations/rebalance"
BUSY = "#!/bin/bash\nwhile true; do sleep 0.1; done &\necho started\nsleep 600\n"


@pytest.fixture(autouse=True)
def nothing_left(cloud: Any) -> Iterator[None]:
    yield
    if living := [i["id"] for i in cloud.sandbox.instances() if i["state"] != "terminated"]:
        cloud.ec2.terminate_instances(InstanceIds=living)


class Metadata:
    """A client of one instance's metadata service."""

    def __init__(self, cloud: Any, instance: str) -> None:
        self.url = cloud.sandbox.runner.metadata_url(instance)

    def put(self, path: str = "api/token", **headers: str) -> requests.Response:
        return requests.put(f"{self.url}/latest/{path}", headers=headers, timeout=10)

    def token(self, seconds: int = 60) -> str:
        return self.put(**{TTL: str(seconds)}).text

    def get(self, path: str, token: str | None = None) -> requests.Response:
        headers = {TOKEN: self.token() if token is None else token}
        return requests.get(f"{self.url}/latest/meta-data/{path}", headers=headers, timeout=10)


def interrupt(cloud: Any, instance: str, **how: Any) -> requests.Response:
    answer: requests.Response = cloud.post(f"/_sandbox/instances/{instance}/interrupt", how)
    return answer


def freeze(cloud: Any, instance: str) -> requests.Response:
    answer: requests.Response = cloud.post(f"/_sandbox/instances/{instance}/freeze", {})
    return answer


def started(cloud: Any, user_data: str = BUSY, **request: Any) -> str:
    instance = str(cloud.launch(user_data, **request))
    cloud.wait_for_console(instance, "started")
    return instance


def status(pid: int) -> str:
    """The process's state letter, as of proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# --- metadata ----------------------------------------------------------------------------------------------------------------


def test_metadata_says_what_the_instance_is(cloud: Any) -> None:
    instance = cloud.launch("#!/bin/bash\n", Placement={"AvailabilityZone": "us-east-1b"})
    metadata = Metadata(cloud, instance)
    for path, value in {
        "instance-id": instance,
        "instance-type": "g5.xlarge",
        "placement/availability-zone": "us-east-1b",
        "instance-life-cycle": "spot",
    }.items():
        answer = metadata.get(path)
        assert (answer.status_code, answer.text) == (200, value)


def test_botocore_s_own_client_finds_its_way(cloud: Any) -> None:
    metadata = Metadata(cloud, cloud.launch("#!/bin/bash\n"))
    client = InstanceMetadataRegionFetcher(env={}, config={"ec2_metadata_service_endpoint": metadata.url})
    assert client.retrieve_region() == "us-east-1"


def test_nothing_is_told_without_a_token_of_the_instance(cloud: Any) -> None:
    instance, other = cloud.launch("#!/bin/bash\n"), cloud.launch("#!/bin/bash\n")
    metadata = Metadata(cloud, instance)
    assert requests.get(f"{metadata.url}/latest/meta-data/instance-id", timeout=10).status_code == 401
    assert metadata.get("instance-id", "made up").status_code == 401
    assert metadata.get("instance-id", Metadata(cloud, other).token()).status_code == 401
    assert metadata.get(INSTANCE_ACTION, "made up").status_code == 401


def test_a_token_is_given_for_a_time_and_ends_with_it(cloud: Any) -> None:
    metadata = Metadata(cloud, cloud.launch("#!/bin/bash\n"))
    given = metadata.put(**{TTL: "21600"})
    assert (given.status_code, given.headers[TTL]) == (200, "21600")
    for seconds in ("0", "21601", "-1", "soon"):
        assert metadata.put(**{TTL: seconds}).status_code == 400
    assert metadata.put().status_code == 400
    assert metadata.put(**{TTL: "60", "X-Forwarded-For": "127.0.0.1"}).status_code == 403
    assert metadata.put("meta-data/instance-id", **{TTL: "60"}).status_code == 405
    token = metadata.token(1)
    cloud.wait_for(lambda: metadata.get("instance-id", token).status_code == 401)
    assert metadata.get("instance-id", given.text).status_code == 200


def test_where_nothing_is_announced_or_known_the_answer_is_404(cloud: Any) -> None:
    metadata = Metadata(cloud, cloud.launch("#!/bin/bash\n"))
    for path in (INSTANCE_ACTION, "spot/termination-time", REBALANCE, "iam/security-credentials/", "nothing"):
        assert metadata.get(path).status_code == 404


def test_the_instance_and_its_container_are_told_the_address_and_boto3_not_to_use_it(cloud: Any) -> None:
    script = (
        "#!/bin/bash\necho at $AWS_EC2_METADATA_SERVICE_ENDPOINT disabled $AWS_EC2_METADATA_DISABLED\n"
        "docker run --rm --network host image\n"
    )
    instance = cloud.launch(script)
    console = cloud.finish(instance)
    assert f"at {Metadata(cloud, instance).url} disabled true" in console
    names = next(line for line in console.splitlines() if line.startswith("environment"))
    assert "'AWS_EC2_METADATA_SERVICE_ENDPOINT'" in names
    assert "'AWS_EC2_METADATA_DISABLED'" in names


# --- interruption ------------------------------------------------------------------------------------------------------------


def test_a_notice_is_there_at_once_and_the_instance_runs_on_until_its_time(cloud: Any) -> None:
    instance = started(cloud)
    before = datetime.now(UTC).replace(microsecond=0)
    assert interrupt(cloud, instance, notice_seconds=3600, rebalance=True).status_code == 200
    metadata = Metadata(cloud, instance)
    action = metadata.get(INSTANCE_ACTION).json()
    assert action["action"] == "terminate"
    time = datetime.strptime(action["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert timedelta(hours=1) <= time - before <= timedelta(hours=1, seconds=30)
    assert metadata.get("spot/termination-time").text == action["time"]
    notice = metadata.get(REBALANCE).json()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", notice["noticeTime"])
    assert cloud.state(instance) == "running"


def test_when_the_notice_is_over_ec2_ends_the_instance_and_says_so(cloud: Any) -> None:
    instance = started(cloud)
    pids = cloud.record(instance)["pids"]
    interrupt(cloud, instance, notice_seconds=0.1).raise_for_status()
    cloud.wait_for_state(instance, "terminated")
    described = cloud.describe(instance)
    assert described["StateReason"] == {
        "Code": "Server.SpotInstanceTermination",
        "Message": "Server.SpotInstanceTermination: Spot instance termination",
    }
    assert described["StateTransitionReason"] == "Server.SpotInstanceTermination"
    record = cloud.record(instance)
    assert [entry["state"] for entry in record["history"]] == ["pending", "running", "shutting-down", "terminated"]
    assert (record["state_reason"], record["pids"]) == ("Server.SpotInstanceTermination", [])
    assert [pid for pid in pids if alive(pid)] == []


def test_the_processes_of_an_interrupted_instance_get_sigterm_first(cloud: Any) -> None:
    script = "#!/bin/bash\ntrap 'echo saved; on=' TERM\necho started\non=1\nwhile [ $on ]; do sleep 0.1; done\n"
    instance = started(cloud, script)
    interrupt(cloud, instance, notice_seconds=0).raise_for_status()
    cloud.wait_for_state(instance, "terminated")
    assert "saved" in cloud.console(instance)


def test_a_recommendation_alone_ends_nothing(cloud: Any) -> None:
    instance = started(cloud)
    interrupt(cloud, instance, notice_seconds=None, rebalance=True).raise_for_status()
    metadata = Metadata(cloud, instance)
    assert metadata.get(REBALANCE).status_code == 200
    assert metadata.get(INSTANCE_ACTION).status_code == 404
    assert cloud.state(instance) == "running"


def test_a_later_interruption_replaces_the_time_of_an_earlier_one(cloud: Any) -> None:
    instance = started(cloud)
    interrupt(cloud, instance, notice_seconds=3600).raise_for_status()
    interrupt(cloud, instance, notice_seconds=0).raise_for_status()
    cloud.wait_for_state(instance, "terminated")


def test_an_instance_that_is_still_pending_can_be_interrupted(cloud: Any) -> None:
    instance = cloud.launch("#!/bin/bash\n")
    interrupt(cloud, instance, notice_seconds=0).raise_for_status()
    cloud.wait_for_state(instance, "terminated")
    assert cloud.describe(instance)["StateReason"]["Code"] == "Server.SpotInstanceTermination"


def test_whoever_terminates_during_the_notice_is_named_as_the_one_who_did(cloud: Any) -> None:
    instance = started(cloud)
    interrupt(cloud, instance, notice_seconds=3600).raise_for_status()
    cloud.ec2.terminate_instances(InstanceIds=[instance])
    cloud.wait_for_state(instance, "terminated")
    assert cloud.describe(instance)["StateReason"]["Code"] == "Client.UserInitiatedShutdown"


def test_only_a_living_spot_instance_can_be_interrupted(cloud: Any) -> None:
    on_demand = started(cloud, InstanceMarketOptions={})
    answer = interrupt(cloud, on_demand, notice_seconds=1)
    assert answer.status_code == 400
    assert answer.json()["error"] == f"{on_demand} is on-demand: only spot instances can be interrupted"
    spot = started(cloud)
    cloud.ec2.terminate_instances(InstanceIds=[spot])
    cloud.wait_for_state(spot, "terminated")
    answer = interrupt(cloud, spot, notice_seconds=1)
    assert (answer.status_code, answer.json()["error"][: len(spot) + 14]) == (400, f"{spot} is terminated")
    assert interrupt(cloud, "i-00000000000000000", notice_seconds=1).status_code == 404


@pytest.mark.parametrize("how", [{"notice_seconds": -1}, {"notice_seconds": None}, {"seconds": 1}])
def test_an_interruption_that_makes_no_sense_is_refused(cloud: Any, how: dict[str, Any]) -> None:
    instance = started(cloud)
    assert interrupt(cloud, instance, **how).status_code == 400
    assert Metadata(cloud, instance).get(INSTANCE_ACTION).status_code == 404


# --- an instance that hangs ----------------------------------------------------------------------------------------------------


def power(cloud: Any, instance: str, **what: Any) -> None:
    """What the instance's shutdown and poweroff say."""
    cloud.post(f"/_sandbox/instances/{instance}/power", what).raise_for_status()


def test_a_frozen_instance_stands_still_misses_its_deadline_and_is_ended_by_the_api_alone(cloud: Any) -> None:
    script = BUSY.replace("sleep 600", "docker run --rm -e SECONDS=600 image")
    instance, twin = started(cloud, script), started(cloud, script)
    cloud.wait_for_console(instance, "lake None")
    frozen = freeze(cloud, instance).json()["frozen"]
    pids = cloud.record(instance)["pids"]
    assert len(frozen) >= 5  # first process, shell, loop, docker, job
    assert frozen == pids[1:]
    assert {pid: status(pid) for pid in frozen} == dict.fromkeys(frozen, "T")
    for one in (instance, twin):
        power(cloud, one, action="schedule", minutes=0)
    cloud.wait_for_state(twin, "terminated")
    power(cloud, instance, action="off")
    assert cloud.state(instance) == "running"
    cloud.ec2.terminate_instances(InstanceIds=[instance])
    cloud.wait_for_state(instance, "terminated")
    assert [pid for pid in pids if alive(pid)] == []
    assert cloud.describe(instance)["StateReason"]["Code"] == "Client.UserInitiatedShutdown"


def test_an_instance_that_is_frozen_while_pending_runs_but_never_starts_anything(
    cloud: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud.sandbox.runner, "_timing", Timing(boot=2, shutdown=0.1))
    instance = cloud.launch("#!/bin/bash\necho booted\n")
    assert freeze(cloud, instance).status_code == 200
    cloud.wait_for_state(instance, "running")
    cloud.ec2.terminate_instances(InstanceIds=[instance])
    cloud.wait_for_state(instance, "terminated")
    assert "booted" not in cloud.console(instance)


def test_ec2_takes_a_frozen_spot_instance_back_all_the_same(cloud: Any) -> None:
    instance = started(cloud)
    pids = cloud.record(instance)["pids"]
    freeze(cloud, instance).raise_for_status()
    interrupt(cloud, instance, notice_seconds=0).raise_for_status()
    cloud.wait_for_state(instance, "terminated")
    assert cloud.describe(instance)["StateReason"]["Code"] == "Server.SpotInstanceTermination"
    assert [pid for pid in pids if alive(pid)] == []


def test_an_instance_whose_power_off_fails_works_on_and_is_ended_by_the_api_alone(cloud: Any) -> None:
    instance, twin = started(cloud), started(cloud)
    answer = cloud.post(f"/_sandbox/instances/{instance}/freeze", {"processes": False})
    assert answer.json() == {"frozen": []}
    for one in (instance, twin):
        power(cloud, one, action="schedule", minutes=0)
    cloud.wait_for_state(twin, "terminated")
    power(cloud, instance, action="off")
    assert cloud.state(instance) == "running"
    assert "T" not in {status(pid) for pid in cloud.sandbox.runner.get(instance).pids()[:2]}
    cloud.ec2.terminate_instances(InstanceIds=[instance])
    cloud.wait_for_state(instance, "terminated")
    assert cloud.describe(instance)["StateReason"]["Code"] == "Client.UserInitiatedShutdown"


def test_what_has_ended_cannot_be_frozen(cloud: Any) -> None:
    instance = cloud.launch("#!/bin/bash\n")
    cloud.ec2.terminate_instances(InstanceIds=[instance])
    cloud.wait_for_state(instance, "terminated")
    answer = freeze(cloud, instance)
    assert answer.status_code == 400
    assert "only a pending or running instance can be frozen" in answer.json()["error"]
