"""A run is held at a point of its way until it is let go, and no other run with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from crpbot_lib.sandbox.processes import alive

PULL = "#!/bin/bash\nshutdown -h +1000\ndocker pull image\necho pulled\nshutdown -h now\n"
RUN = "crpbot:run"


@pytest.fixture
def held(cloud: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., str]]:
    """Holds the test's own run, whose name it returns; everything is let go in the end."""
    points: list[str] = []

    def hold(at: str, **how: Any) -> str:
        cloud.post("/_sandbox/holds", {"run": request.node.name, "at": at, **how}).raise_for_status()
        points.append(at)
        return str(request.node.name)

    yield hold
    for at in points:
        cloud.post("/_sandbox/holds/release", {"run": request.node.name, "at": at}).raise_for_status()


def release(cloud: Any, run: str, at: str, **how: Any) -> None:
    cloud.post("/_sandbox/holds/release", {"run": run, "at": at, **how}).raise_for_status()


def tagged(run: str) -> dict[str, Any]:
    return {
        "TagSpecifications": [{"ResourceType": "instance", "Tags": [{"Key": "Name", "Value": "x"}, {"Key": RUN, "Value": run}]}]
    }


def reached(cloud: Any, run: str, at: str) -> int:
    return sum(one["reached"] for one in cloud.get("/_sandbox/holds").json() if (one["run"], one["at"]) == (run, at))


class Beside:
    """A call in a thread of its own: its result, or its error, once it has returned."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.result: Any = None

        def run() -> None:
            try:
                self.result = call()
            except ClientError as error:
                self.result = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def get(self) -> Any:
        self._thread.join(20)
        assert self.done
        return self.result


def instances_of(cloud: Any, run: str) -> Any:
    return cloud.ec2.describe_instances(Filters=[{"Name": f"tag:{RUN}", "Values": [run]}])["Reservations"]


def test_a_look_for_the_runs_instances_waits_and_the_other_runs_does_not(cloud: Any, held: Callable[..., str]) -> None:
    run = held("look")
    look = Beside(lambda: instances_of(cloud, run))
    cloud.wait_for(lambda: reached(cloud, run, "look") == 1)
    assert instances_of(cloud, "another") == []
    assert not look.done
    release(cloud, run, "look")
    assert look.get() == []


def test_what_is_let_go_may_be_refused_and_so_the_next_ones(cloud: Any, held: Callable[..., str]) -> None:
    run = held("look")
    look = Beside(lambda: instances_of(cloud, run))
    cloud.wait_for(lambda: reached(cloud, run, "look") == 1)
    release(cloud, run, "look", error="UnauthorizedOperation", times=2)
    assert look.get().response["Error"]["Code"] == "UnauthorizedOperation"
    with pytest.raises(ClientError, match="UnauthorizedOperation"):
        instances_of(cloud, run)
    assert instances_of(cloud, run) == []


def test_the_first_calls_may_pass(cloud: Any, held: Callable[..., str]) -> None:
    run = held("look", skip=1)
    assert instances_of(cloud, run) == []
    look = Beside(lambda: instances_of(cloud, run))
    cloud.wait_for(lambda: reached(cloud, run, "look") == 1)
    release(cloud, run, "look")
    assert look.get() == []


def test_a_launch_is_carried_out_before_its_answer_is_held(cloud: Any, held: Callable[..., str]) -> None:
    run = held("launched")
    launch = Beside(lambda: cloud.launch(PULL, **tagged(run)))
    cloud.wait_for(lambda: reached(cloud, run, "launched") == 1)
    (reservation,) = instances_of(cloud, run)
    assert not launch.done
    release(cloud, run, "launched")
    assert launch.get() == reservation["Instances"][0]["InstanceId"]


def test_a_boot_is_held_and_an_end_comes_through(cloud: Any, held: Callable[..., str]) -> None:
    run = held("boot")
    first, second = cloud.launch(PULL, **tagged(run)), cloud.launch(PULL, **tagged(run))
    cloud.wait_for_state(cloud.launch(PULL), "terminated")  # another run's has come and gone
    assert [cloud.state(i) for i in (first, second)] == ["pending", "pending"]
    cloud.ec2.terminate_instances(InstanceIds=[first])
    cloud.wait_for_state(first, "terminated")
    release(cloud, run, "boot")
    cloud.wait_for_console(second, "pulled")


def test_a_pull_hangs_on_the_runs_instance_alone(cloud: Any, held: Callable[..., str]) -> None:
    run = held("pull")
    instance = cloud.launch(PULL, **tagged(run))
    cloud.wait_for_console(cloud.launch(PULL), "pulled")
    assert "pulled" not in cloud.wait_for_console(instance, "image: pulling, and the registry says nothing")
    pids = cloud.record(instance)["pids"]
    cloud.ec2.terminate_instances(InstanceIds=[instance])
    cloud.wait_for_state(instance, "terminated")
    assert [pid for pid in pids if alive(pid)] == []
    assert "pulled" not in cloud.console(instance)


def test_a_power_off_is_held_and_the_deadline_is_not(cloud: Any, held: Callable[..., str]) -> None:
    run = held("power-off")
    instance = cloud.launch(PULL.replace("+1000", "+4"), **tagged(run))
    cloud.wait_for(lambda: reached(cloud, run, "power-off") > 0)
    cloud.wait_for_state(instance, "terminated")
    assert cloud.record(instance)["ended_by"] == "deadline"


def test_an_end_says_whose_it_was(cloud: Any) -> None:
    own, asked = cloud.launch(PULL), cloud.launch(PULL.replace("docker", "sleep 600\ndocker"))
    cloud.ec2.terminate_instances(InstanceIds=[asked])
    cloud.wait_for_state(own, "terminated")
    cloud.wait_for_state(asked, "terminated")
    assert cloud.record(own)["ended_by"] == "power-off"
    assert cloud.record(asked)["ended_by"].startswith("Boto3/")


def test_a_termination_is_held_before_it_is_carried_out(cloud: Any, held: Callable[..., str]) -> None:
    run = held("terminate")
    instance = cloud.launch("#!/bin/bash\n", **tagged(run))
    end = Beside(lambda: cloud.ec2.terminate_instances(InstanceIds=[instance]))
    cloud.wait_for(lambda: reached(cloud, run, "terminate") == 1)
    assert cloud.state(instance) in ("pending", "running")
    release(cloud, run, "terminate")
    end.get()
    cloud.wait_for_state(instance, "terminated")


def test_the_publication_of_a_model_is_held_and_of_another_runs_is_not(cloud: Any, held: Callable[..., str]) -> None:
    run = held("publish")
    bucket = cloud.env["CRPBOT_LAKE"].removeprefix("s3://")
    session = boto3.session.Session(cloud.env["AWS_ACCESS_KEY_ID"], cloud.env["AWS_SECRET_ACCESS_KEY"])
    s3 = session.client("s3", endpoint_url=cloud.env["AWS_ENDPOINT_URL"], region_name=cloud.env["AWS_REGION"])

    def publish(name: str) -> Any:
        return s3.put_object(Bucket=bucket, Key=f"models/v-{name}/model.pt", Body=b"weights", Tagging=f"gpu=none&run={name}")

    storing = Beside(lambda: publish(run))
    cloud.wait_for(lambda: reached(cloud, run, "publish") == 1)
    publish("another")
    assert not storing.done
    release(cloud, run, "publish", error="AccessDenied")
    assert storing.get().response["Error"]["Code"] == "AccessDenied"
    assert "Contents" not in cloud.s3.list_objects_v2(Bucket=bucket, Prefix=f"models/v-{run}/")


@pytest.mark.parametrize(
    "how", [{}, {"run": "r"}, {"run": "", "at": "boot"}, {"run": "r", "at": "lunch"}, {"run": "r", "at": "boot", "skip": -1}]
)
def test_a_hold_that_makes_no_sense_is_refused(cloud: Any, how: dict[str, Any]) -> None:
    assert cloud.post("/_sandbox/holds", how).status_code == 400


def test_what_is_not_held_cannot_be_let_go(cloud: Any) -> None:
    answer = cloud.post("/_sandbox/holds/release", {"run": "nobody", "at": "boot"})
    assert (answer.status_code, answer.json()) == (400, {"error": "there is no hold of nobody at boot"})
