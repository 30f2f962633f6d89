"""The deployment that ``make demo`` starts: the local cloud and a real Airflow, each in its own processes.

Every secret that it knows is a canary: a value of its own that must show nowhere (test_workflow_secrets.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests
from cryptography.fernet import Fernet

from crpbot_lib.config import Settings
from crpbot_lib.lake import Lake
from crpbot_lib.sandbox import coingecko, demo, processes, server
from crpbot_lib.sandbox.local_airflow import LocalAirflow

DAYS = ["2025-05-26", "2025-05-27"]
LIMIT = 600
"""Seconds for one DAG run on a busy machine; nothing here asserts a time."""
AWS, COINBASE, COINGECKO = "aws_canary", "coinbase_canary", "coingecko_canary"
"""The Connections: the first in Airflow's environment, the others in its database."""


@dataclass
class Deployment:
    """What a test needs of the running deployment."""

    airflow: LocalAirflow
    cloud: dict[str, Any]
    lake: Lake
    settings: Settings
    config: Path
    """The file that CRPBOT_CONFIG names: Telegram's address."""
    secrets: dict[str, str]
    """What it is called -> the secret."""

    def instances(self) -> list[dict[str, Any]]:
        """Every instance that was ever launched, as the local cloud itself knows it: with its processes."""
        answer = requests.get(f"{self.cloud['control_url']}/_sandbox/instances", timeout=10)
        answer.raise_for_status()
        return list(answer.json())

    def living(self) -> list[str]:
        return [i["id"] for i in self.instances() if i["state"] != "terminated" or i["pids"]]

    def control(self, what: str, body: Any) -> None:
        requests.post(f"{self.cloud['control_url']}/_sandbox/{what}", json=body, timeout=10).raise_for_status()

    def at_the_moment(self) -> list[tuple[str, str]]:
        """What is there only while a job runs: the volumes with their tags, the processes' command lines. Where -> text."""
        volumes = boto3.session.Session().client("ec2").describe_volumes()["Volumes"]
        commands = []
        for pid in processes.processes_with_marker(processes.MARKER, self.airflow.marker):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                commands.append(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace"))
        return [("a volume", json.dumps(v, default=str)) for v in volumes] + [("a command line", c) for c in commands]

    def telegram(self) -> list[str]:
        answer = requests.get(f"{self.cloud['control_url']}/_sandbox/telegram", timeout=10).json()
        return [message["text"] for message in answer]


def canary(name: str) -> str:
    """Looks different in base64, in a URL, in JSON and in Python."""
    return f'canary/{name}+"{secrets.token_hex(16)}\\'


def _secrets() -> dict[str, str]:
    return {
        "AWS secret": canary("aws-secret"),
        # goes into a header as it is
        "AWS session token": canary("aws-token").replace('"', "=").replace("\\", "/"),
        "AWS Connection's password": canary("aws-password"),
        "AWS Connection's extra": canary("aws-extra").replace('"', "=").replace("\\", "/"),
        "instance profile's secret": server._CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        "Coinbase Connection's password": canary("coinbase"),
        "CoinGecko key": coingecko.PRO_KEY,
        "Telegram token": server.TELEGRAM_TOKEN,
        "Airflow's Fernet key": Fernet.generate_key().decode(),
        "Airflow's JWT secret": canary("jwt"),
        "Airflow's API secret key": canary("api"),
    }


def _environment(cloud: dict[str, str], secret: dict[str, str], config: Path) -> dict[str, str]:
    env = demo.profile(cloud)
    # the Connection and the file have them instead
    del env["CRPBOT_COINGECKO_API_KEY"], env["CRPBOT_TELEGRAM__URL"]
    aws = {
        "conn_type": "aws",
        "login": "canary-login",
        "password": secret["AWS Connection's password"],
        "extra": {"aws_session_token": secret["AWS Connection's extra"]},
    }
    return {
        **env,
        "AWS_SECRET_ACCESS_KEY": secret["AWS secret"],
        "AWS_SESSION_TOKEN": secret["AWS session token"],
        f"AIRFLOW_CONN_{AWS.upper()}": json.dumps(aws),
        "CRPBOT_GPU__AWS_CONN_ID": AWS,
        "CRPBOT_ORCHESTRATION__COINBASE_CONN_ID": COINBASE,
        "CRPBOT_ORCHESTRATION__COINGECKO_CONN_ID": COINGECKO,
        "CRPBOT_CONFIG": str(config),
        "CRPBOT_RUNTIME__AS_OF": "2025-05-28T00:00:00+00:00",
        "AIRFLOW__CORE__FERNET_KEY": secret["Airflow's Fernet key"],
        "AIRFLOW__API_AUTH__JWT_SECRET": secret["Airflow's JWT secret"],
        "AIRFLOW__API__SECRET_KEY": secret["Airflow's API secret key"],
    }


@pytest.fixture(scope="package")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """One for this folder; ends with it: an Airflow that idles takes a good part of a core from the tests after it."""
    state = tmp_path_factory.mktemp("deployment")
    marker = f"test-{uuid.uuid4().hex}"
    secret = _secrets()
    config = state / "crpbot.toml"
    with demo.local_cloud(state / "cloud", marker) as cloud:
        config.write_text(f'[telegram]\nurl = "{cloud["control_url"]}"\n')
        env = _environment(cloud["env"], secret, config)
        before = dict(os.environ)
        os.environ.update(env)
        try:
            with LocalAirflow(state / "airflow", env, marker=marker) as airflow:
                secret["Airflow's admin password"] = airflow.password
                airflow.put_connection(
                    COINBASE, "http", host=env["CRPBOT_COINBASE_URL"], password=secret["Coinbase Connection's password"]
                )
                airflow.put_connection(COINGECKO, "http", host=env["CRPBOT_COINGECKO_URL"], password=secret["CoinGecko key"])
                for dag in demo.DAGS:
                    airflow.unpause(dag)
                yield Deployment(airflow, cloud, Lake(env["CRPBOT_LAKE"]), Settings(), config, secret)
        finally:
            os.environ.clear()
            os.environ.update(before)
    # the promise of this fixture, checked for every run of the suite
    assert processes.processes_with_marker(processes.MARKER, marker) == []


@pytest.fixture(scope="package")
def trained(deployment: Deployment) -> dict[str, Any]:
    """Two days fetched, then one whole retraining, watched while it ran."""
    airflow = deployment.airflow
    runs = [airflow.trigger("market_data", partition_key=day) for day in DAYS]
    data = [airflow.wait("market_data", run, LIMIT) for run in runs]

    seen_alive: list[tuple[bool, int]] = []
    moments: list[list[tuple[str, str]]] = []

    def watch(tasks: list[dict[str, Any]]) -> None:
        state = {t["task_id"]: t["state"] for t in tasks}
        if state.get("train") == "deferred":
            lines = airflow.task_log("retrain", run, "train").count("SMOKE")
            seen_alive.append((bool(deployment.living()), lines))
            if lines and not moments:
                moments.append(deployment.at_the_moment())

    run = airflow.trigger("retrain", conf={"start": DAYS[0], "end": "2025-05-28"})
    state = airflow.wait("retrain", run, LIMIT, progress=watch)
    name = airflow.xcom("retrain", run, "plan")["run"] if state == "success" else ""
    return {"data": data, "run": run, "state": state, "name": name, "seen": seen_alive, "moments": moments}
