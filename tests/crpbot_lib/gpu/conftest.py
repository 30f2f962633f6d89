"""A local cloud with short delays, and clients that fail on demand."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests

from crpbot_lib.config import GpuSettings
from crpbot_lib.lake import Lake
from crpbot_lib.sandbox.server import Sandbox, SandboxOptions

# stands where the training image's entry point would: two lines, then it waits to be ended
JOB = (sys.executable, "-c", "import time; print('first line', flush=True); print('second line', flush=True); time.sleep(600)")


@pytest.fixture(scope="module")
def cloud() -> Iterator[Sandbox]:
    options = SandboxOptions(boot_seconds=0.2, shutdown_seconds=0.2, entry_point=JOB)
    with pytest.MonkeyPatch.context() as patch, Sandbox(options) as running:
        for name, value in running.env().items():
            patch.setenv(name, value)
        yield running


@pytest.fixture
def gpu() -> GpuSettings:
    return GpuSettings(poll_seconds=0.1, visibility_grace_seconds=0.1, termination_timeout_seconds=20)


@pytest.fixture
def run() -> str:
    """A name of its own for each test: the cloud remembers the instances of the others."""
    return f"2025-05-29-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(f"file://{tmp_path}")


@pytest.fixture
def ec2(cloud: Sandbox, gpu: GpuSettings) -> Iterator[Any]:
    """An EC2 client; what a test launched is ended after it, and every type has capacity again."""
    client = boto3.session.Session().client("ec2", region_name=gpu.region)
    yield client
    living = [i["id"] for i in cloud.instances() if i["state"] not in ("shutting-down", "terminated")]
    if living:
        client.terminate_instances(InstanceIds=living)
    until(lambda: all(i["state"] == "terminated" for i in cloud.instances()))
    requests.post(f"{cloud.control_url}/_sandbox/capacity", json={"unavailable": []}, timeout=10).raise_for_status()


@pytest.fixture
def no_capacity(cloud: Sandbox) -> Callable[..., None]:
    """Takes the capacity of the named instance types away."""

    def take(*types: str) -> None:
        requests.post(f"{cloud.control_url}/_sandbox/capacity", json={"unavailable": types}, timeout=10).raise_for_status()

    return take


class Wrapped:
    """A client whose calls a test may replace; all others go through."""

    def __init__(self, client: Any, **calls: Callable[..., Any]) -> None:
        self._client, self._calls = client, calls

    def __getattr__(self, name: str) -> Any:
        return self._calls.get(name) or getattr(self._client, name)


@pytest.fixture
def wrapped() -> type[Wrapped]:
    return Wrapped


def until(condition: Callable[[], Any], seconds: float = 20) -> None:
    """Waits for a real process or server to get there; fails after ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture(name="until")
def _until() -> Callable[..., None]:
    return until
