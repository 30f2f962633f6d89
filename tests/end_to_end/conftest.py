"""The deployment that ``make demo`` starts: the local cloud and a real Airflow, each in its own processes."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import requests

from crpbot_lib.config import Settings
from crpbot_lib.lake import Lake
from crpbot_lib.sandbox import demo, processes
from crpbot_lib.sandbox.local_airflow import LocalAirflow


@dataclass
class Deployment:
    """What a test needs of the running deployment."""

    airflow: LocalAirflow
    cloud: dict[str, Any]
    lake: Lake
    settings: Settings

    def instances(self) -> list[dict[str, Any]]:
        """Every instance that was ever launched, as the local cloud itself knows it: with its processes."""
        answer = requests.get(f"{self.cloud['control_url']}/_sandbox/instances", timeout=10)
        answer.raise_for_status()
        return list(answer.json())

    def living(self) -> list[str]:
        return [i["id"] for i in self.instances() if i["state"] != "terminated" or i["pids"]]

    def control(self, what: str, body: dict[str, Any]) -> None:
        requests.post(f"{self.cloud['control_url']}/_sandbox/{what}", json=body, timeout=10).raise_for_status()

    def telegram(self) -> list[str]:
        answer = requests.get(f"{self.cloud['control_url']}/_sandbox/telegram", timeout=10).json()
        return [message["text"] for message in answer]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Ends with the file that asked for it: an Airflow that idles takes a good part of a core from the tests after it."""
    state = tmp_path_factory.mktemp("deployment")
    marker = f"test-{uuid.uuid4().hex}"
    with demo.local_cloud(state / "cloud", marker) as cloud:
        env = demo.profile(cloud["env"])
        env["CRPBOT_RUNTIME__AS_OF"] = "2025-05-28T00:00:00+00:00"
        before = dict(os.environ)
        os.environ.update(env)
        try:
            with LocalAirflow(state / "airflow", env, marker=marker) as airflow:
                for dag in demo.DAGS:
                    airflow.unpause(dag)
                yield Deployment(airflow, cloud, Lake(env["CRPBOT_LAKE"]), Settings())
        finally:
            os.environ.clear()
            os.environ.update(before)
    # the promise of this fixture, checked for every run of the suite
    assert processes.processes_with_marker(processes.MARKER, marker) == []
