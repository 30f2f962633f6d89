"""The local cloud as a process of its own: it announces itself, ends cleanly, and nothing outlives it, not even after SIGKILL."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests

from crpbot_lib.config import GpuSettings
from crpbot_lib.sandbox.__main__ import _options, _parser
from crpbot_lib.sandbox.faults import RateLimit
from crpbot_lib.sandbox.processes import MARKER, processes_with_marker, send

REPOSITORY = Path(__file__).resolve().parents[3]
CAP_SYS_ADMIN = 21
PR_CAPBSET_DROP = 24

# shells, a loop, a process in the background, and a job in a container
BUSY = """#!/bin/bash
shutdown -h +60
while true; do sleep 0.2; done &
docker run --rm -e PYTHONPATH={folder} image &
trap '' TERM
echo busy
while true; do sleep 600; done
"""


def test_the_command_line_says_what_the_options_say(tmp_path: Path) -> None:
    said = (
        "--venue candles_1m_spot --synthetic-symbol SOL-USD --omit-minutes 0.05 --now 2025-06-01 --coingecko-plan demo "
        "--rate-limit exchange=10 --rate-limit coingecko=0.5:5 --coingecko-messy"
    )
    options = _options(_parser().parse_args(["serve", "--state", str(tmp_path), *said.split()]))
    assert (options.venue, options.synthetic_symbols, options.omit_minutes) == ("candles_1m_spot", ("SOL-USD",), 0.05)
    assert options.now == datetime(2025, 6, 1, tzinfo=UTC)
    assert (options.coingecko_plan, options.coingecko_messy) == ("demo", True)
    assert options.rate_limits == {
        "exchange": RateLimit(per_second=10, burst=10),
        "coingecko": RateLimit(per_second=0.5, burst=5),
    }


@pytest.mark.parametrize("wrong", ["nowhere=1", "exchange", "exchange=-1", "exchange=fast"])
def test_a_rate_limit_that_is_none_is_refused(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(["serve", "--state", str(tmp_path), "--rate-limit", wrong])


def without_namespaces() -> None:
    """What a container without CAP_SYS_ADMIN is like."""
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_SYS_ADMIN, 0, 0, 0)


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    give_up = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < give_up, f"did not happen within {seconds} s"
        time.sleep(0.05)


class Served:
    """A ``serve`` process with a busy instance."""

    def __init__(self, folder: Path, prepare: Callable[[], None] | None) -> None:
        self.marker = uuid.uuid4().hex
        self.state = folder / "state"
        # stands for the training: the job of the container, found by its PYTHONPATH
        job = folder / "job" / "crpbot_lib" / "training"
        job.mkdir(parents=True)
        (job / "__main__.py").write_text("import time\nprint('job runs', flush=True)\ntime.sleep(600)\n")
        with (folder / "stderr").open("wb") as log:
            serve = [sys.executable, "-m", "crpbot_lib.sandbox", "serve", "--synthetic", "--state", str(self.state)]
            self.process = subprocess.Popen(
                [*serve, "--boot-seconds", "0", "--shutdown-seconds", "0"],
                cwd=REPOSITORY,
                env={**os.environ, MARKER: self.marker},
                stderr=log,
                preexec_fn=prepare,
            )
        ready = self.state / "sandbox.json"
        wait_for(lambda: ready.exists() or self.process.poll() is not None)
        assert self.process.poll() is None, (folder / "stderr").read_text()
        self.announced: dict[str, Any] = json.loads(ready.read_text())
        env = self.announced["env"]
        session = boto3.session.Session(env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"], region_name=env["AWS_REGION"])
        ec2 = session.client("ec2", endpoint_url=env["AWS_ENDPOINT_URL"])
        script = BUSY.format(folder=folder / "job")
        image = GpuSettings().ami
        launched = ec2.run_instances(ImageId=image, InstanceType="g5.xlarge", MinCount=1, MaxCount=1, UserData=script)
        self.instance = launched["Instances"][0]["InstanceId"]
        wait_for(lambda: "busy" in self.console() and "job runs" in self.console())

    def console(self) -> str:
        return requests.get(f"{self.announced['control_url']}/_sandbox/instances/{self.instance}/console", timeout=10).text

    def processes(self) -> list[int]:
        return processes_with_marker(MARKER, self.marker)


@pytest.fixture
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    cloud = None
    try:
        cloud = Served(tmp_path, request.param)
        if request.param is without_namespaces:
            assert "not isolated" in cloud.console()
        yield cloud
    finally:
        if cloud is not None:
            send([cloud.process.pid, *cloud.processes()], signal.SIGKILL)
            cloud.process.wait()


@pytest.mark.parametrize("served", [None, without_namespaces], indirect=True)
def test_nothing_outlives_a_killed_cloud(served: Served) -> None:
    assert len(served.processes()) >= 7  # the cloud; root, first process, shell, loop, docker, job
    served.process.kill()
    served.process.wait()
    wait_for(lambda: served.processes() == [], 10)


@pytest.mark.parametrize("served", [None, without_namespaces], indirect=True)
def test_a_frozen_instance_does_not_outlive_it_either(served: Served) -> None:
    frozen = requests.post(f"{served.announced['control_url']}/_sandbox/instances/{served.instance}/freeze", json={}, timeout=10)
    assert len(frozen.json()["frozen"]) >= 5
    served.process.kill()
    served.process.wait()
    wait_for(lambda: served.processes() == [], 10)


@pytest.mark.parametrize("served", [without_namespaces], indirect=True)
def test_sigterm_ends_the_cloud_with_its_instances(served: Served) -> None:
    announced = served.announced
    assert announced["pid"] == served.process.pid
    assert announced["data"] == {"kind": "synthetic", "folder": None}
    assert announced["env"]["CRPBOT_COINGECKO_URL"] == f"{announced['control_url']}/api/v3"
    served.process.terminate()
    assert served.process.wait(timeout=20) == 0
    assert served.processes() == []
    assert not (served.state / "sandbox.json").exists()
