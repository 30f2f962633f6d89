"""No secret shows anywhere, after runs that succeed and runs that fail; and the search that says so finds what is planted."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import secrets
import sqlite3
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator
from math import ceil
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import boto3
import polars as pl
import pytest
import requests
from cryptography.fernet import Fernet

from crpbot_lib import registry
from crpbot_lib.lake import Lake
from crpbot_lib.sandbox import processes, server
from crpbot_lib.sandbox.local_airflow import AirflowError

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(1800)]

DAY = "2025-05-28"
"""Not fetched by the fixture `trained`."""
LIMIT = 600
"""Seconds for one DAG run on a busy machine; nothing here asserts a time."""
Piece = tuple[str, bytes]
"""Where something stands, and all of it."""


# --- how a secret may be written ------------------------------------------------------------------------------------------------


def base64_of(raw: bytes, before: int) -> bytes:
    """What is always the same of ``raw`` in the base64 of a longer text, with ``before`` bytes (modulo 3) in front of it."""
    encoded = base64.b64encode(bytes(before) + raw)
    return encoded[ceil(before * 8 / 6) : (before + len(raw)) * 8 // 6]


def forms(secret: str) -> set[bytes]:
    """Plain, in a URL, in JSON, in JSON within JSON, in Python, in hex, in both base64s; in small letters."""
    in_json = json.dumps(secret)[1:-1]
    written = {
        secret,
        quote(secret, safe=""),
        quote(secret),
        quote_plus(secret),
        in_json,
        json.dumps(in_json)[1:-1],
        repr(secret)[1:-1],
    }
    raw = secret.encode()
    encoded = [base64_of(raw, before) for before in range(3)]
    both = {*encoded, *(one.translate(bytes.maketrans(b"+/", b"-_")) for one in encoded)}
    return {form.lower() for form in ({text.encode() for text in written} | both | {raw.hex().encode()})}


def leaks(pieces: Iterable[Piece], hidden: dict[str, str]) -> set[tuple[str, str]]:
    """(where, which) of the ``hidden`` secrets that stand in ``pieces`` in any form."""
    wanted = {name: forms(secret) for name, secret in hidden.items()}
    found = set()
    for where, data in pieces:
        small = data.lower()
        found |= {(where, name) for name, written in wanted.items() if any(form in small for form in written)}
    return found


# --- where it may stand -----------------------------------------------------------------------------------------------------------


def airflows_files(deployment: Any) -> Iterator[Piece]:
    """Task logs, the components' output, the generated configuration, the database's pages. The password has a file of its own."""
    for path in sorted(deployment.airflow.home.rglob("*")):
        if path.is_file() and path.name != "passwords.json":
            yield f"Airflow's file {path.relative_to(deployment.airflow.home)}", path.read_bytes()


def airflows_database(database: Path, fernet: Fernet) -> Iterator[Piece]:
    """Every value of every table; what is encrypted (arguments of triggers) decrypted, but for the Connections themselves."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60)) as connection:
        connection.text_factory = bytes
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            table = name.decode()
            for row in connection.execute(f'SELECT * FROM "{table}"'):
                for value in row:
                    data = value if isinstance(value, bytes) else str(value).encode()
                    yield f"Airflow's table {table}", data
                    if data.startswith(b"gAAAA") and table != "connection":
                        yield f"Airflow's table {table}", fernet.decrypt(data)


def lake(of: Lake) -> Iterator[Piece]:
    """Every object, what is compressed in it as well, with its tags."""
    for key in of.keys(""):
        data = of.read(key)
        yield f"the lake's {key}", data
        yield f"the tags of the lake's {key}", json.dumps(of.tags(key)).encode()
        if key.endswith(".parquet"):
            texts = pl.read_parquet(io.BytesIO(data)).select(pl.selectors.string(include_categorical=True))
            yield f"the lake's {key}", texts.write_json().encode()
        elif zipfile.is_zipfile(io.BytesIO(data)):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                for member in archive.namelist():
                    yield f"the lake's {key}", archive.read(member)


def ec2(deployment: Any) -> Iterator[Piece]:
    """All that EC2 tells of its instances, and their consoles."""
    client = boto3.session.Session().client("ec2")
    for found in client.describe_instances()["Reservations"]:
        for instance in found["Instances"]:
            yield "an instance", json.dumps(instance, default=str).encode()
            script = client.describe_instance_attribute(InstanceId=instance["InstanceId"], Attribute="userData")["UserData"]
            yield "user data", base64.b64decode(script.get("Value", ""))
            url = f"{deployment.cloud['control_url']}/_sandbox/instances/{instance['InstanceId']}/console"
            yield "a console", requests.get(url, timeout=10).content
    for tag in client.describe_tags()["Tags"]:
        yield f"a tag of {tag['ResourceType']}", json.dumps(tag).encode()


def cloudwatch() -> Iterator[Piece]:
    client = boto3.session.Session().client("logs")
    for group in client.describe_log_groups()["logGroups"]:
        name = group["logGroupName"]
        for stream in client.describe_log_streams(logGroupName=name)["logStreams"]:
            pages = client.get_paginator("filter_log_events").paginate(logGroupName=name, logStreamNames=[stream["logStreamName"]])
            lines = [event["message"] for page in pages for event in page["events"]]
            yield "a log stream", "\n".join([stream["logStreamName"], *lines]).encode()


def everything(deployment: Any, database: Path) -> Iterator[Piece]:
    yield from airflows_files(deployment)
    yield from airflows_database(database, Fernet(deployment.secrets["Airflow's Fernet key"]))
    yield from lake(deployment.lake)
    yield from ec2(deployment)
    yield from cloudwatch()
    yield from (("a Telegram message", text.encode()) for text in deployment.telegram())
    yield from ((where, text.encode()) for where, text in deployment.at_the_moment())


def database_of(deployment: Any) -> Path:
    return Path(deployment.airflow.home / "airflow.db")


# --- runs that fail, with errors that like to show requests -----------------------------------------------------------------------


def log_of(deployment: Any, dag: str, run: str, task: str) -> str:
    tries = [(t["try_number"] or 1, t["map_index"]) for t in deployment.airflow.tasks(dag, run) if t["task_id"] == task]
    return "\n".join(deployment.airflow.task_log(dag, run, task, attempt, index) for attempt, index in tries)


@pytest.fixture(scope="module")
def failures(deployment: Any, trained: dict[str, Any]) -> dict[str, str]:
    """What a task's log says of each: a launch that AWS refuses, a Telegram that is away, a key that CoinGecko refuses, a wrong
    host."""
    airflow, config = deployment.airflow, deployment.config.read_text()
    said: dict[str, str] = {}
    (version,) = [v["version"] for v in registry.list_versions(deployment.settings, deployment.lake) if v["run"] == trained["name"]]
    until = time.monotonic() + LIMIT
    while not airflow.runs("promote") or airflow.runs("promote")[0]["state"] not in ("success", "failed"):
        assert time.monotonic() < until, "the publication of the models triggered no promote run, or it does not end"
        time.sleep(1)
    deployment.control("ec2/faults", [{"error": "UnauthorizedOperation", "action": "RunInstances"}])
    deployment.config.write_text('[telegram]\nurl = "http://127.0.0.1:1"\n')
    try:
        promote = airflow.trigger("promote", conf={"version": version})
        retrain = airflow.trigger("retrain", conf={"start": "2025-05-26", "end": DAY, "symbols": ["ETH-USD"]})
        assert airflow.wait("retrain", retrain, LIMIT) == "failed"
        said["launch"] = log_of(deployment, "retrain", retrain, "launch")
        assert airflow.wait("promote", promote, LIMIT) == "success"
        said["telegram"] = log_of(deployment, "promote", promote, "notify")
    finally:
        deployment.control("ec2/faults", [])
        deployment.config.write_text(config)
    cloud = deployment.cloud["env"]
    deployment.secrets["CoinGecko key that is wrong"] = wrong = f"canary-{secrets.token_hex(16)}-wrong"
    try:
        airflow.put_connection("coingecko_canary", "http", password=wrong)
        run = airflow.trigger("market_data", partition_key=DAY)
        assert airflow.wait("market_data", run, LIMIT) == "failed"
        said["key"] = log_of(deployment, "market_data", run, "fetch_coingecko")
        # nobody listens there, so it would be tried for minutes
        airflow.put_connection("coingecko_canary", "http", host="http://127.0.0.1:1")
        run = airflow.trigger("market_data", partition_key=DAY)
        until = time.monotonic() + LIMIT
        while "port=1)" not in said.get("host", ""):
            assert time.monotonic() < until, f"no request to a wrong host was told of: {said.get('host')}"
            time.sleep(0.5)
            with contextlib.suppress(AirflowError):  # a task that has not begun has no log
                said["host"] = log_of(deployment, "market_data", run, "fetch_coingecko")
        airflow.mark_run("market_data", run, "failed")
        assert airflow.wait("market_data", run, LIMIT) == "failed"
    finally:
        airflow.put_connection(
            "coingecko_canary", "http", host=cloud["CRPBOT_COINGECKO_URL"], password=deployment.secrets["CoinGecko key"]
        )
    return said


def test_no_secret_shows_anywhere_after_runs_that_succeed_and_runs_that_fail(
    deployment: Any, trained: dict[str, Any], failures: dict[str, str], proof: list[str]
) -> None:
    assert trained["state"] == "success"
    assert "UnauthorizedOperation" in failures["launch"]
    assert "Telegram: 127.0.0.1:1 did not answer" in failures["telegram"]
    assert "API Key Missing" in failures["key"]
    pieces = [
        *everything(deployment, database_of(deployment)),
        *((where, text.encode()) for where, text in trained["moments"][0]),
    ]
    assert leaks(pieces, deployment.secrets) == set()
    size = sum(len(data) for _, data in pieces)
    proof.append(f"canaries: {len(deployment.secrets)} secrets, none in {len(pieces):,} places with {size:,} bytes")


# --- the search itself -----------------------------------------------------------------------------------------------------------


def test_a_secret_is_found_however_it_is_written() -> None:
    secret = 'canary/one+"two\\three four'
    texts = [
        secret,
        f"https://host/?key={quote(secret, safe='')}&x",
        f"https://host/?key={quote_plus(secret)}",
        json.dumps({"key": secret}),
        json.dumps({"body": json.dumps({"key": secret})}),
        repr([secret]),
        secret.upper(),
        secret.encode().hex(),
        *(base64.b64encode(f"{'x' * n}{secret} and more".encode()).decode() for n in range(3)),
        *(base64.urlsafe_b64encode(f"{'?' * n}{secret}>>>".encode()).decode() for n in range(3)),
    ]
    for text in texts:
        assert leaks([("here", f"before {text} after".encode())], {"it": secret, "another": "canary/two"}) == {("here", "it")}, text


@pytest.fixture
def database(deployment: Any, tmp_path: Path) -> Path:
    """A copy of Airflow's, to spoil."""
    copy = tmp_path / "copy.db"
    with (
        contextlib.closing(sqlite3.connect(f"file:{database_of(deployment)}?mode=ro", uri=True, timeout=60)) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)
    return copy


class Planted(dict[str, str]):
    """Where -> a canary of its own."""

    def __missing__(self, where: str) -> str:
        self[where] = f'planted/{len(self)}+"{where}\\'
        return self[where]


def plant_in_the_database(database: Path, fernet: Fernet, planted: Planted) -> None:
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        for table, column in (
            ("xcom", "value"),
            ("rendered_task_instance_fields", "rendered_fields"),
            ("log", "extra"),
            ("dag_run", "conf"),
            ("serialized_dag", "data"),
        ):
            text = json.dumps({"it": planted[f"Airflow's table {table}"]})
            row = f"(SELECT rowid FROM {table} LIMIT 1)"
            assert connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = {row}", [text]).rowcount == 1
        arguments = fernet.encrypt(json.dumps({"it": planted["Airflow's table trigger"]}).encode()).decode()
        columns = "INSERT INTO trigger (classpath, kwargs, created_date) VALUES ('x', ?, '2025-05-28')"
        connection.execute(columns, [arguments])


def plant_in_the_lake(of: Lake, planted: Planted) -> None:
    of.write("planted/text", planted["the lake's planted/text"].encode(), tags={"it": "planted tag of the lake"})
    planted["the tags of the lake's planted/text"] = "planted tag of the lake"
    of.write_frame("planted/frame.parquet", pl.DataFrame({"it": [planted["the lake's planted/frame.parquet"]] * 1000}))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", planted["the lake's planted/model.pt"] * 100)
    of.write("planted/model.pt", buffer.getvalue())


def plant_on_an_instance(deployment: Any, planted: Planted) -> str:
    """User data, console, and a tag of the instance and of its volume."""
    planted["a console"] = "planted-on-the-console"
    # with quotes in the middle, so that the user data has another one
    script = f"#!/bin/bash\n# {planted['user data']}\necho plan''ted-on-the-console\n"
    launched = (
        boto3.session.Session()
        .client("ec2")
        .run_instances(
            ImageId=deployment.settings.gpu.ami,
            InstanceType="g5.xlarge",
            MinCount=1,
            MaxCount=1,
            UserData=script,
            TagSpecifications=[
                {"ResourceType": "instance", "Tags": [{"Key": "planted", "Value": planted["a tag of instance"]}]},
                {"ResourceType": "volume", "Tags": [{"Key": "planted", "Value": planted["a volume"]}]},
            ],
        )
    )
    return str(launched["Instances"][0]["InstanceId"])


def test_the_search_finds_a_secret_wherever_it_is_planted(deployment: Any, trained: dict[str, Any], database: Path) -> None:
    planted = Planted()
    log = next((deployment.airflow.home / "logs").rglob("*task_id=train*/*.log"))
    for path in (log, deployment.airflow.home / "scheduler.log"):
        line = planted[f"Airflow's file {path.relative_to(deployment.airflow.home)}"]
        with path.open("a") as out:
            out.write(json.dumps({"event": f"Authorization: {base64.b64encode(line.encode()).decode()}"}) + "\n")
    plant_in_the_database(database, Fernet(deployment.secrets["Airflow's Fernet key"]), planted)
    plant_in_the_lake(deployment.lake, planted)
    gpu = deployment.settings.gpu
    logs = boto3.session.Session().client("logs")
    logs.create_log_stream(logGroupName=gpu.log_group, logStreamName="planted")
    event = {"timestamp": int(time.time() * 1000), "message": f"GET /?key={quote_plus(planted['a log stream'])}"}
    logs.put_log_events(logGroupName=gpu.log_group, logStreamName="planted", logEvents=[event])
    message = {"chat_id": server.TELEGRAM_CHAT, "text": planted["a Telegram message"]}
    requests.post(
        f"{deployment.cloud['control_url']}/bot{server.TELEGRAM_TOKEN}/sendMessage", json=message, timeout=10
    ).raise_for_status()
    instance = plant_on_an_instance(deployment, planted)
    command = [sys.executable, "-c", "import time; time.sleep(600)", planted["a command line"]]
    idle = processes.spawn(command, marker=deployment.airflow.marker)
    try:
        until = time.monotonic() + 60
        while not any(where == "a console" and b"planted-on-the-console" in data for where, data in ec2(deployment)):
            assert time.monotonic() < until, "the user data did not run"
            time.sleep(0.2)
        found = leaks(everything(deployment, database), planted)
    finally:
        processes.end_group(idle.pid)
        idle.wait()
        boto3.session.Session().client("ec2").terminate_instances(InstanceIds=[instance])
    assert {where for where, name in found if where == name} == planted.keys()
    until = time.monotonic() + 60
    while deployment.living():
        assert time.monotonic() < until, f"{instance} does not end"
        time.sleep(0.2)
