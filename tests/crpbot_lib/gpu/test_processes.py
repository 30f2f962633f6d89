"""Launchers as the processes that they are, at the same time, some of them killed: one launch, one instance."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests

from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import instances, launch
from crpbot_lib.gpu.terminate import terminate_run
from crpbot_lib.lake import Lake
from crpbot_lib.sandbox import processes
from crpbot_lib.sandbox.server import Sandbox

AT_ONCE = 8
LAUNCHER = """
import sys, time
from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import clients, launch
from crpbot_lib.lake import Lake

url, run, settings = sys.argv[1:]
gpu, lake = GpuSettings.model_validate_json(settings), Lake(url)
ec2 = clients.ec2(gpu.region)
print("ready", flush=True)
for _ in sys.stdin:
    for attempt in range(5):  # as often as a task might be tried
        try:
            print(launch.ensure_instance(ec2, lake, gpu, run, sleep=lambda seconds: time.sleep(seconds / 20)).id, flush=True)
            break
        except launch.LaunchUnresolvedError as error:
            print(error, file=sys.stderr, flush=True)
"""


class Launcher:
    """A process that asks for the run's instance each time that it is told to."""

    def __init__(self, lake: Lake, run: str, gpu: GpuSettings) -> None:
        command = [sys.executable, "-c", LAUNCHER, lake.root, run, gpu.model_dump_json()]
        self.process = processes.spawn(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._in, self._out = self.process.stdin, self.process.stdout

    def said(self) -> str:
        """Its next line; empty when it has ended."""
        return self._out.readline().decode().strip()

    def go(self) -> None:
        self._in.write(b"go\n")
        self._in.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def launchers(cloud: Sandbox, gpu: GpuSettings, run: str) -> Iterator[list[Launcher]]:
    """As many as work at once, ready to go."""
    lake = Lake(f"{cloud.env()['CRPBOT_LAKE']}/{run}")
    started = [Launcher(lake, run, gpu) for _ in range(AT_ONCE)]
    try:
        assert [one.said() for one in started] == ["ready"] * AT_ONCE
        yield started
    finally:
        for one in started:
            one.end()


@pytest.fixture
def control(cloud: Sandbox) -> Iterator[Callable[[str, Any], None]]:
    def post(what: str, body: Any) -> None:
        requests.post(f"{cloud.control_url}/_sandbox/ec2/{what}", json=body, timeout=10).raise_for_status()

    yield post
    post("faults", [])
    post("visibility", {"seconds": 0})


def test_eight_processes_at_once_and_again_launch_one_instance_though_answers_are_lost_and_two_of_them_are_killed(
    launchers: list[Launcher],
    control: Callable[[str, Any], None],
    ec2: Any,
    gpu: GpuSettings,
    cloud: Sandbox,
    run: str,
    until: Callable[..., None],
) -> None:
    def launched() -> list[str]:
        return [i["id"] for i in cloud.instances() if i["tags"].get(instances.TAG_RUN) == run]

    # nobody sees the instance in a list; what the first calls made is known by the token alone
    control("visibility", {"seconds": 3600})
    lost = {"action": "RunInstances", "after": True}
    control("faults", [{**lost, "error": "InternalError", "count": 6}, {**lost, "cut": "reset", "count": 6}])
    for one in launchers:
        one.go()
    until(launched)
    killed, left = launchers[:2], launchers[2:]
    for one in killed:
        one.process.kill()
    found = [one.said() for one in left]
    for one in left:
        one.go()
    found += [one.said() for one in left]
    assert launched() == [found[0]]
    assert set(found) == {found[0]}

    control("visibility", {"seconds": 0})
    for one in left:
        one.go()
    assert {one.said() for one in left} == {found[0]}
    lake = Lake(f"{cloud.env()['CRPBOT_LAKE']}/{run}")
    assert [(record.generation, record.sequence) for record in launch.records(lake, run)] == [(1, 1)]
    assert launched() == [i.id for i in terminate_run(ec2, lake, gpu, run)] == [found[0]]
