"""A local cloud with short delays, and the clients that talk to it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests
from botocore.config import Config

from crpbot_lib.sandbox.server import Sandbox, SandboxOptions

# stands for the training job: says what it was given, prints a line now and then, exits as it is told
JOB = """
import os, sys, time
print("environment", sorted(os.environ), flush=True)
print("arguments", sys.argv[1:], flush=True)
print("lake", os.environ.get("CRPBOT_LAKE"), flush=True)
for number in range(int(os.environ.get("LINES", "0"))):
    print("line", number, flush=True)
    time.sleep(0.1)
time.sleep(float(os.environ.get("SECONDS", "0")))
sys.exit(int(os.environ.get("EXIT", "0")))
"""


@dataclass
class Cloud:
    """A started local cloud and its clients. ``launch`` and ``wait_for`` are what most tests need."""

    sandbox: Sandbox

    def __post_init__(self) -> None:
        env = self.sandbox.env()
        session = boto3.session.Session(env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"], region_name=env["AWS_REGION"])
        config = Config(retries={"max_attempts": 0})
        make: Callable[[str], Any] = lambda name: session.client(name, endpoint_url=env["AWS_ENDPOINT_URL"], config=config)  # noqa: E731
        self.env = env
        self.ec2, self.s3, self.logs, self.ssm = make("ec2"), make("s3"), make("logs"), make("ssm")

    def get(self, path: str, **params: Any) -> requests.Response:
        headers = {"x-cg-pro-api-key": self.env["CRPBOT_COINGECKO_API_KEY"]}
        return requests.get(f"{self.sandbox.control_url}{path}", params=params, headers=headers, timeout=10)

    def post(self, path: str, body: Any) -> requests.Response:
        return requests.post(f"{self.sandbox.control_url}{path}", json=body, timeout=10)

    def launch(self, user_data: str, **request: Any) -> str:
        """Launches one spot g5.xlarge that terminates on power-off; returns its id."""
        return str(self.run(user_data, **request)["Instances"][0]["InstanceId"])

    def run(self, user_data: str, **request: Any) -> Any:
        asked = {
            "ImageId": self.sandbox.options.gpu.ami,
            "InstanceType": "g5.xlarge",
            "MinCount": 1,
            "MaxCount": 1,
            "UserData": user_data,
            "InstanceInitiatedShutdownBehavior": "terminate",
            "InstanceMarketOptions": {"MarketType": "spot"},
            **request,
        }
        return self.ec2.run_instances(**asked)

    def describe(self, instance_id: str) -> Any:
        return self.ec2.describe_instances(InstanceIds=[instance_id])["Reservations"][0]["Instances"][0]

    def state(self, instance_id: str) -> str:
        return str(self.describe(instance_id)["State"]["Name"])

    def record(self, instance_id: str) -> dict[str, Any]:
        return next(r for r in self.sandbox.instances() if r["id"] == instance_id)

    def console(self, instance_id: str) -> str:
        return self.get(f"/_sandbox/instances/{instance_id}/console").text

    def wait_for(self, what: Callable[[], bool], seconds: float = 20.0) -> None:
        """Processes need real time: polls until ``what`` holds; AssertionError after ``seconds``."""
        give_up = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < give_up, f"did not happen within {seconds} s"
            time.sleep(0.05)

    def wait_for_state(self, instance_id: str, state: str) -> None:
        self.wait_for(lambda: self.state(instance_id) == state)

    def wait_for_console(self, instance_id: str, text: str) -> str:
        self.wait_for(lambda: text in self.console(instance_id))
        return self.console(instance_id)

    def finish(self, instance_id: str) -> str:
        """Waits for the user data's end, terminates the instance, returns the console."""
        console = self.wait_for_console(instance_id, "the user data ended")
        self.ec2.terminate_instances(InstanceIds=[instance_id])
        return console


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """Generated data, instances that boot in 0.1 s, minutes of 0.5 s. Shared: each test launches its own instances."""
    options = SandboxOptions(
        state_dir=tmp_path_factory.mktemp("local-cloud"),
        boot_seconds=0.1,
        shutdown_seconds=0.1,
        minute_seconds=0.5,
        entry_point=(sys.executable, "-c", JOB),
    )
    with Sandbox(options) as sandbox:
        yield Cloud(sandbox)


@pytest.fixture(scope="session")
def api_samples() -> Path | None:
    """The folder of recorded responses, or None where it is not at hand."""
    path = Path(__file__).resolve().parents[4] / "shared" / "api_samples"
    return path if path.is_dir() else None
