"""Connections that break at any call, over real sockets: at most one living instance a run, none in the end.

The clients are botocore's own, but for how long they wait for an answer and before they ask again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import botocore.endpoint
import pytest
import requests
from botocore.config import Config

from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import instances, launch, reap
from crpbot_lib.gpu.terminate import TerminationError, terminate_run
from crpbot_lib.lake import Lake, LakeError
from crpbot_lib.sandbox.instances import Timing
from crpbot_lib.sandbox.server import Sandbox

CUTS: dict[str, dict[str, Any]] = {
    "reset before the call": {"cut": "reset"},
    "reset after the call": {"cut": "reset", "after": True},
    "ended in the headers": {"cut": "headers"},
    "ended in the body": {"cut": "body"},
    "silent before the call": {"stall": 3600},
    "silent after the call": {"stall": 3600, "after": True},
}
BROKEN = (*instances.API_ERRORS, LakeError, launch.LaunchUnresolvedError, TerminationError)
"""What a call that broke may come to. Anything else is a wrong belief, such as a refusal or a want of capacity."""


@pytest.fixture(params=list(CUTS.values()), ids=list(CUTS))
def cut(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


@pytest.fixture(autouse=True)
def never_booted(cloud: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here looks at what runs on an instance."""
    monkeypatch.setattr(cloud.runner, "_timing", Timing(boot=3600, shutdown=0.1))


@pytest.fixture
def rules(cloud: Sandbox) -> Iterator[Callable[..., None]]:
    def post(*rules: dict[str, Any]) -> None:
        requests.post(f"{cloud.control_url}/_sandbox/ec2/faults", json=rules, timeout=10).raise_for_status()

    yield post
    post()


class _NoWait:
    """The module ``time`` for botocore's retries."""

    @staticmethod
    def sleep(_: float) -> None:
        pass


@pytest.fixture(scope="module")
def clients(cloud: Sandbox) -> dict[str, Any]:
    """By name: ``ec2``, and those whose connections break, which wait a second for an answer and ask twice. Made once: to read
    the services' models costs more than a test here."""
    session = boto3.session.Session()
    config = Config(read_timeout=1, retries={"mode": "standard", "total_max_attempts": 2})
    broken = {f"broken {service}": session.client(service, config=config) for service in ("ec2", "s3")}
    return {"ec2": session.client("ec2"), "s3": session.client("s3"), **broken}


@pytest.fixture
def ec2(clients: dict[str, Any], cloud: Sandbox) -> Iterator[Any]:
    yield clients["ec2"]
    for instance in cloud.runner.all():
        instance.terminate()


@pytest.fixture
def lake(clients: dict[str, Any], cloud: Sandbox, run: str) -> Lake:
    """A part of the bucket of its own."""
    return _lake(f"{cloud.env()['CRPBOT_LAKE']}/{run}", clients["s3"])


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, clients: dict[str, Any], lake: Lake) -> tuple[Any, Lake]:
    """EC2 and the same lake over connections that break."""
    monkeypatch.setattr(botocore.endpoint, "time", _NoWait)
    return clients["broken ec2"], _lake(lake.root, clients["broken s3"])


def _lake(url: str, client: Any) -> Lake:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boto3.session.Session, "client", lambda *_, **__: client)
        return Lake(url)


def living(cloud: Sandbox, *runs: str) -> list[str]:
    """As the cloud itself knows it, without a call that could break."""
    return [i["id"] for i in cloud.instances() if i["tags"].get(instances.TAG_RUN) in runs and i["state"] in instances.ALIVE]


@pytest.mark.parametrize("action", ["RunInstances", "DescribeInstances", "PutObject", "GetObject", "ListObjectsV2"])
def test_a_launch_whose_connection_breaks_leaves_one_instance_and_its_teardown_none(
    action: str,
    cut: dict[str, Any],
    ec2: Any,
    lake: Lake,
    gpu: GpuSettings,
    cloud: Sandbox,
    broken: tuple[Any, Lake],
    rules: Callable[..., None],
    run: str,
) -> None:
    rules({"action": action, "count": 2, **cut})
    launched: list[str] = []
    for _ in range(3):
        with contextlib.suppress(*BROKEN):
            launched.append(launch.ensure_instance(*broken, gpu, run, sleep=lambda _: None).id)
        assert len(living(cloud, run)) <= 1
    rules()
    launched.append(launch.ensure_instance(ec2, lake, gpu, run).id)
    assert living(cloud, run) == [launched[0]]
    assert set(launched) == {launched[0]}
    assert [i.state for i in terminate_run(ec2, lake, gpu, run)] == ["terminated"]


@pytest.mark.parametrize("action", ["DescribeInstances", "TerminateInstances"])
def test_a_teardown_whose_connection_breaks_ends_the_instance_all_the_same(
    action: str,
    cut: dict[str, Any],
    ec2: Any,
    lake: Lake,
    gpu: GpuSettings,
    cloud: Sandbox,
    broken: tuple[Any, Lake],
    rules: Callable[..., None],
    run: str,
) -> None:
    launched = launch.ensure_instance(ec2, lake, gpu, run)
    rules({"action": action, "count": 2, **cut})
    ended = terminate_run(*broken, gpu, run, sleep=lambda _: time.sleep(0.1))
    assert [(i.id, i.state) for i in ended] == [(launched.id, "terminated")]
    assert living(cloud, run) == []


def test_a_teardown_whose_every_look_breaks_is_an_error_and_never_nothing_there(
    cut: dict[str, Any],
    ec2: Any,
    lake: Lake,
    gpu: GpuSettings,
    cloud: Sandbox,
    broken: tuple[Any, Lake],
    rules: Callable[..., None],
    run: str,
) -> None:
    launched = launch.ensure_instance(ec2, lake, gpu, run)
    rules({"action": "DescribeInstances", **cut})
    with pytest.raises(TerminationError, match=f"unknown whether instances of {run} live"):
        terminate_run(*broken, gpu, run, sleep=lambda _: None)
    rules()
    assert living(cloud, run) == [launched.id]
    assert [i.state for i in terminate_run(ec2, lake, gpu, run)] == ["terminated"]


def test_a_reaper_whose_connection_breaks_at_one_instance_asks_for_the_other_and_the_next_pass_ends_all(
    cut: dict[str, Any],
    ec2: Any,
    lake: Lake,
    gpu: GpuSettings,
    cloud: Sandbox,
    broken: tuple[Any, Lake],
    rules: Callable[..., None],
    run: str,
) -> None:
    runs = [f"{run}-{letter}" for letter in "ab"]
    both = [launch.ensure_instance(ec2, lake, gpu, one).id for one in runs]
    past = datetime.now(UTC) + timedelta(minutes=gpu.max_lifetime_minutes + 1)
    asked_once = cut.get("cut") in ("headers", "body")
    rules({"action": "TerminateInstances", "count": 1 if asked_once else 2, **cut})
    with pytest.raises(TerminationError, match="could not be terminated") as told:
        reap.reap(*broken, gpu, lambda _: None, now=lambda: past)
    (hit,) = [one for one in both if one in str(told.value)]
    assert set(living(cloud, *runs)) <= {hit}
    reap.reap(ec2, lake, gpu, lambda _: None, now=lambda: past)
    assert living(cloud, *runs) == []


def test_a_list_or_an_object_of_the_lake_that_breaks_off_is_never_read_as_empty(
    cut: dict[str, Any], lake: Lake, broken: tuple[Any, Lake], rules: Callable[..., None], run: str
) -> None:
    lake.write(f"{run}/there", b"something")
    rules(*({"action": action, **cut} for action in ("GetObject", "ListObjectsV2")))
    for read in (lambda: broken[1].keys(f"{run}/"), lambda: broken[1].read(f"{run}/there")):
        with pytest.raises(LakeError):
            read()
    rules()
    assert (lake.keys(f"{run}/"), lake.read(f"{run}/there")) == ([f"{run}/there"], b"something")
