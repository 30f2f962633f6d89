"""The dead-man's switch against the local cloud, whose instances are real processes: layer 5 ends what no other layer did."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import boto3
import pytest
import requests

from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import launch
from crpbot_lib.gpu.instances import TAG_DEADLINE, TAG_PROJECT
from crpbot_lib.lake import Lake
from crpbot_lib.sandbox.server import Sandbox, SandboxOptions

INFRA = Path(__file__).resolve().parents[2] / "infra"
NOW = datetime(2025, 5, 29, 12, tzinfo=UTC)
# stands where the training image's entry point would, and does not listen to SIGTERM
JOB = (sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)")


@pytest.fixture(scope="module")
def cloud() -> Iterator[Sandbox]:
    options = SandboxOptions(boot_seconds=0.1, shutdown_seconds=0.1, entry_point=JOB)
    with pytest.MonkeyPatch.context() as patch, Sandbox(options) as running:
        for name, value in running.env().items():
            patch.setenv(name, value)
        yield running


@pytest.fixture
def ec2(cloud: Sandbox) -> Iterator[Any]:
    client = boto3.session.Session().client("ec2", region_name="us-east-1")
    yield client
    inject(cloud)
    if living := [i["id"] for i in cloud.instances() if i["state"] != "terminated"]:
        client.terminate_instances(InstanceIds=living)
    until(lambda: all(i["state"] == "terminated" for i in cloud.instances()))


@pytest.fixture
def switch(cloud: Sandbox, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The function's module, in a process that has its environment."""
    spec = importlib.util.spec_from_file_location("dead_mans_switch", INFRA / "dead_mans_switch.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("PROJECT", GpuSettings().project_tag)
    return module


def until(condition: Callable[[], Any], seconds: float = 30) -> None:
    """Waits for a real process or server to get there; fails after ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def inject(cloud: Sandbox, *rules: dict[str, Any]) -> None:
    requests.post(f"{cloud.control_url}/_sandbox/ec2/faults", json=list(rules), timeout=10).raise_for_status()


def of(cloud: Sandbox, instance_id: str) -> dict[str, Any]:
    return next(i for i in cloud.instances() if i["id"] == instance_id)


def tagged(ec2: Any, *, deadline: str | None, project: str = "crpbot", count: int = 1, **request: Any) -> list[str]:
    """Ids of instances that idle, with the tags by which the switch goes."""
    tags = {TAG_PROJECT: project} | ({} if deadline is None else {TAG_DEADLINE: deadline})
    answer = ec2.run_instances(
        ImageId=GpuSettings().ami,
        InstanceType="g5.xlarge",
        MinCount=count,
        MaxCount=count,
        TagSpecifications=[{"ResourceType": "instance", "Tags": [{"Key": k, "Value": v} for k, v in tags.items()]}],
        **request,
    )
    return [i["InstanceId"] for i in answer["Instances"]]


def hours_from_now(hours: float) -> str:
    return (datetime.now(UTC) + timedelta(hours=hours)).isoformat()


def as_lambda_runs_it(template: dict[str, Any], cloud: Sandbox, folder: Path) -> dict[str, list[str]]:
    """The template's own code as ``index.py`` in a process with the function's variables, called as its Handler says."""
    properties = template["Resources"]["Switch"]["Properties"]
    (folder / "index.py").write_text(properties["Code"]["ZipFile"])
    variables = properties["Environment"]["Variables"]
    assert variables == {"PROJECT": {"Ref": "ProjectTag"}}
    environment = {**cloud.env(), "PROJECT": template["Parameters"]["ProjectTag"]["Default"], "PATH": os.environ["PATH"]}
    module, _, function = properties["Handler"].partition(".")
    script = f"import json, {module}; print(json.dumps({module}.{function}({{}}, None)))"
    result = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    answer: dict[str, list[str]] = json.loads(result.stdout)
    return answer


def test_an_instance_that_is_frozen_past_its_deadline_is_ended_by_the_code_that_is_deployed(
    template: dict[str, Any], cloud: Sandbox, ec2: Any, tmp_path: Path
) -> None:
    gpu = GpuSettings()
    # launched by the code that launches, as it would have been an hour before its deadline's end
    earlier = datetime.now(UTC) - timedelta(minutes=gpu.max_lifetime_minutes + 60)
    launched = launch.ensure_instance(ec2, Lake(f"file://{tmp_path / 'lake'}"), gpu, "2025-05-29", now=lambda: earlier)
    until(lambda: any("time.sleep(600)" in Path(f"/proc/{pid}/cmdline").read_text() for pid in of(cloud, launched.id)["pids"]))
    requests.post(f"{cloud.control_url}/_sandbox/instances/{launched.id}/freeze", json={}, timeout=10).raise_for_status()

    assert as_lambda_runs_it(template, cloud, tmp_path) == {"kept": [], "terminated": [launched.id]}
    until(lambda: of(cloud, launched.id)["state"] == "terminated")
    assert of(cloud, launched.id)["pids"] == []

    assert as_lambda_runs_it(template, cloud, tmp_path) == {"kept": [], "terminated": []}


def test_an_instance_within_its_deadline_and_another_projects_stay(cloud: Sandbox, ec2: Any, switch: ModuleType) -> None:
    (busy,) = tagged(ec2, deadline=hours_from_now(1))
    (foreign,) = tagged(ec2, deadline=hours_from_now(-1), project="somebody-else")
    (overdue,) = tagged(ec2, deadline=hours_from_now(-1))

    assert switch.handler({}, None) == {"kept": [busy], "terminated": [overdue]}
    until(lambda: of(cloud, overdue)["state"] == "terminated")
    assert {of(cloud, name)["state"] for name in (busy, foreign)} <= {"pending", "running"}


def test_a_stopped_instance_is_ended_too_since_somebody_may_start_it(cloud: Sandbox, ec2: Any, switch: ModuleType) -> None:
    (stopped,) = tagged(ec2, deadline=hours_from_now(-1))
    until(lambda: of(cloud, stopped)["state"] == "running")
    ec2.stop_instances(InstanceIds=[stopped])
    until(lambda: of(cloud, stopped)["state"] == "stopped")
    assert switch.handler({}, None)["terminated"] == [stopped]
    until(lambda: of(cloud, stopped)["state"] == "terminated")


@pytest.mark.parametrize("deadline", [None, "", "soon", "2025-13-45"])
def test_an_instance_without_a_readable_deadline_has_a_grace_and_then_ends(
    cloud: Sandbox, ec2: Any, switch: ModuleType, monkeypatch: pytest.MonkeyPatch, deadline: str | None
) -> None:
    (found,) = tagged(ec2, deadline=deadline)
    assert switch.handler({}, None) == {"kept": [found], "terminated": []}
    monkeypatch.setattr(switch, "GRACE", timedelta(0))
    # EC2 dates a launch by the second
    until(lambda: switch.handler({}, None)["terminated"] == [found])
    until(lambda: of(cloud, found)["state"] == "terminated")


@pytest.mark.parametrize(
    ("deadline", "ends"),
    [
        ("2025-05-29T11:59:59+00:00", True),
        ("2025-05-29T12:00:01+00:00", False),
        ("2025-05-29T11:59:59Z", True),
        ("2025-05-29T11:59:59", True),
        ("2025-05-29T13:59:59+02:00", True),
        ("2025-05-29T11:59:59-01:00", False),
        ("never", True),
    ],
)
def test_the_rule(switch: ModuleType, deadline: str, ends: bool) -> None:
    instance = {"LaunchTime": NOW - timedelta(hours=1), "Tags": [{"Key": TAG_DEADLINE, "Value": deadline}]}
    assert (switch.why_end(instance, NOW) is not None) is ends


def test_one_instance_that_cannot_be_ended_shields_no_other_and_the_pass_fails(
    cloud: Sandbox, ec2: Any, switch: ModuleType
) -> None:
    overdue = tagged(ec2, deadline=hours_from_now(-1), count=3)
    inject(cloud, {"error": "UnauthorizedOperation", "action": "TerminateInstances", "count": 1})

    with pytest.raises(RuntimeError, match=r"1 instances live past their deadline.*UnauthorizedOperation") as failed:
        switch.handler({}, None)
    (refused,) = [name for name in overdue if name in str(failed.value)]
    until(lambda: all(of(cloud, name)["state"] == "terminated" for name in overdue if name != refused))
    assert of(cloud, refused)["state"] in ("pending", "running")

    assert switch.handler({}, None)["terminated"] == [refused]


def test_a_throttled_call_is_made_again(cloud: Sandbox, ec2: Any, switch: ModuleType) -> None:
    overdue = tagged(ec2, deadline=hours_from_now(-1))
    inject(
        cloud,
        {"error": "RequestLimitExceeded", "action": "DescribeInstances", "count": 1},
        {"error": "RequestLimitExceeded", "action": "TerminateInstances", "count": 1},
    )
    assert switch.handler({}, None)["terminated"] == overdue


def test_an_api_that_cannot_be_asked_is_a_failure_and_never_nothing_found(cloud: Sandbox, ec2: Any, switch: ModuleType) -> None:
    inject(cloud, {"error": "UnauthorizedOperation", "action": "DescribeInstances"})
    with pytest.raises(Exception, match="UnauthorizedOperation"):
        switch.handler({}, None)


def test_all_pages_are_read_and_what_is_found_ends_before_the_next_is_asked_for(
    cloud: Sandbox, ec2: Any, switch: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    overdue = [name for _ in range(7) for name in tagged(ec2, deadline=hours_from_now(-1))]
    monkeypatch.setattr(switch, "PAGE_SIZE", 5)
    make, broken, asked = boto3.client, [True], []

    def client(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)

        def second_page_fails(params: dict[str, Any], **_: Any) -> None:
            asked.append("NextToken" in params["body"])
            if broken[0] and asked[-1]:
                raise ConnectionError("cut off")

        made.meta.events.register("before-call.ec2.DescribeInstances", second_page_fails)
        return made

    monkeypatch.setattr(switch.boto3, "client", client)
    with pytest.raises(ConnectionError):
        switch.handler({}, None)
    assert asked == [False, True]
    until(lambda: sum(of(cloud, name)["state"] == "terminated" for name in overdue) == 5)

    broken[0] = False
    assert len(switch.handler({}, None)["terminated"]) == 2
    until(lambda: all(of(cloud, name)["state"] == "terminated" for name in overdue))
