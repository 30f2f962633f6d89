"""The workflow in a real scheduler with real workers and processes: once to the end, and failing on purpose."""

from __future__ import annotations

import hashlib
import time
from datetime import datetime
from typing import Any

import pytest

from crpbot_lib import registry
from crpbot_lib.gpu import instances
from crpbot_lib.lake import keys
from crpbot_lib.sandbox.server import SandboxOptions

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

DAYS = ["2025-05-26", "2025-05-27"]
"""As in the fixture `trained`."""
LIMIT = 600
"""Seconds for one DAG run on a busy machine; nothing here asserts a time."""


def states(deployment: Any, dag: str, run: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for task in deployment.airflow.tasks(dag, run):
        found.setdefault(task["task_id"], set()).add(task["state"])
    return found


def launched(deployment: Any) -> str:
    """The one living instance, once there is one."""
    until = time.monotonic() + LIMIT
    while not deployment.living():
        assert time.monotonic() < until, "no instance was launched"
        time.sleep(0.1)
    (instance,) = deployment.living()
    return str(instance)


def digests(deployment: Any, prefix: str) -> dict[str, str]:
    lake = deployment.lake
    return {key: hashlib.sha256(lake.read(key)).hexdigest() for key in lake.keys(prefix)}


def test_no_dag_has_an_import_error(deployment: Any) -> None:
    assert deployment.airflow.import_errors() == []


def test_the_days_are_fetched_and_a_second_run_writes_the_same_bytes(deployment: Any, trained: dict[str, Any]) -> None:
    assert trained["data"] == ["success", "success"]
    # a day of three symbols: four timeframes each, hourly and daily CoinGecko each
    day = f"date={DAYS[0]}"
    before = {key: digest for key, digest in digests(deployment, "raw/").items() if day in key and "quality" not in key}
    assert len(before) == 3 * 4 + 3 * 2
    again = deployment.airflow.trigger("market_data", partition_key=DAYS[0])
    assert deployment.airflow.wait("market_data", again, LIMIT) == "success"
    after = digests(deployment, "raw/")
    assert {key: after[key] for key in before} == before


def test_the_retraining_ends_green_with_its_instance_terminated(deployment: Any, trained: dict[str, Any]) -> None:
    assert trained["state"] == "success"
    (instance,) = [i for i in deployment.instances() if i["tags"].get("crpbot:run") == trained["name"]]
    assert instance["state"] == "terminated"
    assert instance["pids"] == []
    assert [entry["state"] for entry in instance["history"]] == ["pending", "running", "shutting-down", "terminated"]
    assert deployment.living() == []


def test_the_jobs_lines_were_in_the_task_log_while_it_ran(trained: dict[str, Any]) -> None:
    counts = [lines for alive, lines in trained["seen"] if alive]
    assert max(counts) > 0
    assert counts == sorted(counts)


def test_the_three_counts_are_the_missions(deployment: Any, trained: dict[str, Any]) -> None:
    log = deployment.airflow.task_log("retrain", trained["run"], "train")
    for symbol, count in (("BTC-USD", 73), ("ETH-USD", 54), ("SOL-USD", 73)):
        assert f"{symbol}: Numeric features selected: {count}" in log
        metrics = deployment.lake.read_json(keys.run_symbol(trained["name"], symbol, "metrics.json"))
        assert (metrics["file_features"], metrics["input_size"]) == (count, count)


def test_the_models_lie_published_tagged_and_verified(deployment: Any, trained: dict[str, Any]) -> None:
    (version,) = [v for v in registry.list_versions(deployment.settings, deployment.lake) if v["run"] == trained["name"]]
    assert version["smoke"] is True
    stored = [k for k in deployment.lake.keys(f"models/{version['version']}/") if k.endswith(".pt")]
    assert len(stored) == 3
    for key in stored:
        tags = deployment.lake.tags(key)
        assert tags["run"] == trained["name"]
        assert {"trained_date", "gpu"} <= tags.keys()
    registry.verify(deployment.settings, deployment.lake, version["version"])


def test_the_cost_of_the_run_is_recorded(deployment: Any, trained: dict[str, Any]) -> None:
    bill = deployment.lake.read_json(keys.training_run(trained["name"], "cost.json"))
    (row,) = bill["instances"]
    assert (row["state"], row["market"], row["type"], row["usd_per_hour"]) == ("terminated", "spot", "g4dn.xlarge", 0.16)
    assert 0 < bill["usd"] < bill["on_demand_usd"]


def test_publication_starts_the_promotion_and_telegram_hears_of_it(deployment: Any, trained: dict[str, Any]) -> None:
    airflow = deployment.airflow
    until = time.monotonic() + 120
    while not airflow.runs("promote"):
        assert time.monotonic() < until, "the publication of the models triggered no promote run"
        time.sleep(1)
    run = airflow.runs("promote")[0]["dag_run_id"]
    assert airflow.wait("promote", run, LIMIT) == "success"
    log = airflow.task_log("promote", run, "dry_run")
    assert "SMOKE BTC-USD: " in log
    assert "(LSTM: 0." in log
    assert len(registry.champions(deployment.settings, deployment.lake)) == 3
    assert any("SMOKE" in message for message in deployment.telegram())


def test_a_training_that_fails_on_purpose_fails_the_run_and_leaves_no_instance(deployment: Any, trained: dict[str, Any]) -> None:
    """The local cloud has no GPU, and a job that is no smoke run refuses to train without one. The power-off at the job's end never
    comes, so that the teardown alone ends the instance."""
    airflow = deployment.airflow
    run = airflow.trigger("retrain", conf={"start": DAYS[0], "end": "2025-05-28", "symbols": ["ETH-USD"], "smoke": False})
    instance = launched(deployment)
    deployment.control(f"instances/{instance}/freeze", {"processes": False})
    assert airflow.wait("retrain", run, LIMIT) == "failed"

    found = states(deployment, "retrain", run)
    assert found["train"] == {"failed"}
    assert found["terminate"] == {"success"}
    assert found["sync_models"] == {"upstream_failed"}
    log = airflow.task_log("retrain", run, "train")
    assert "models are never trained locally or on a CPU" in log
    # it would fail the same way again, so it is not tried again
    (train,) = [t for t in airflow.tasks("retrain", run) if t["task_id"] == "train"]
    assert train["try_number"] == 1
    (ended,) = [i for i in deployment.instances() if i["id"] == instance]
    assert (ended["state"], ended["state_reason"]) == ("terminated", "Client.UserInitiatedShutdown")
    assert deployment.living() == []


def test_a_launch_that_fails_on_purpose_fails_the_run_and_leaves_no_instance(deployment: Any, trained: dict[str, Any]) -> None:
    airflow = deployment.airflow
    before = len(deployment.instances())
    deployment.control("capacity", {"unavailable": ["g5.xlarge", "g4dn.xlarge"]})
    try:
        run = airflow.trigger("retrain", conf={"start": DAYS[0], "end": "2025-05-28", "symbols": ["ETH-USD"]})
        assert airflow.wait("retrain", run, LIMIT) == "failed"
    finally:
        deployment.control("capacity", {"unavailable": []})

    found = states(deployment, "retrain", run)
    assert found["launch"] == {"failed"}
    assert found["train"] == {"upstream_failed"}
    # the teardown belongs to the reservation as well, so it ran though nothing was launched
    assert found["terminate"] == {"success"}
    (launch,) = [t for t in airflow.tasks("retrain", run) if t["task_id"] == "launch"]
    log = airflow.task_log("retrain", run, "launch", launch["try_number"])
    assert "g4dn.xlarge (spot), g5.xlarge (spot) were refused" in log
    assert "CRPBOT_GPU__ALLOW_ON_DEMAND" in log
    assert len(deployment.instances()) == before
    assert deployment.living() == []


def test_clearing_only_what_failed_launches_behind_the_teardown_and_leaves_no_instance(
    deployment: Any, trained: dict[str, Any]
) -> None:
    """Airflow then leaves the `terminate` of the first pass as it is. Trained without a GPU the job fails, and its power-off never
    comes, so that the verdict alone ends the instance."""
    airflow = deployment.airflow
    deployment.control("capacity", {"unavailable": ["g5.xlarge", "g4dn.xlarge"]})
    try:
        run = airflow.trigger("retrain", conf={"start": DAYS[0], "end": "2025-05-28", "symbols": ["ETH-USD"], "smoke": False})
        assert airflow.wait("retrain", run, LIMIT) == "failed"
    finally:
        deployment.control("capacity", {"unavailable": []})
    torn_down = {t["task_id"]: t for t in airflow.tasks("retrain", run)}["terminate"]

    airflow.clear_failed("retrain", run)
    instance = launched(deployment)
    deployment.control(f"instances/{instance}/freeze", {"processes": False})
    assert airflow.wait("retrain", run, LIMIT) == "failed"

    tasks = {t["task_id"]: t for t in airflow.tasks("retrain", run)}
    assert (tasks["terminate"]["try_number"], tasks["terminate"]["end_date"]) == (1, torn_down["end_date"])
    assert (tasks["train"]["state"], tasks["verdict"]["state"]) == ("failed", "failed")
    assert f"{instance}" in airflow.task_log("retrain", run, "verdict", tasks["verdict"]["try_number"])
    (ended,) = [i for i in deployment.instances() if i["id"] == instance]
    assert (ended["state"], ended["state_reason"]) == ("terminated", "Client.UserInitiatedShutdown")
    assert "Caller/_PythonDecoratedOperator" in ended["ended_by"]
    assert deployment.living() == []
    bill = deployment.lake.read_json(keys.training_run(airflow.xcom("retrain", run, "plan")["run"], "cost.json"))
    assert [row["id"] for row in bill["instances"]] == [instance]
    assert any(f"FAILED retrain / verdict, run {run}" in message for message in deployment.telegram())


def test_clearing_the_running_work_leaves_one_instance_and_then_none(deployment: Any, trained: dict[str, Any]) -> None:
    """What leaks with the stock operators: the setup is cleared too, and would launch a second instance."""
    airflow = deployment.airflow
    run = airflow.trigger("retrain", conf={"start": DAYS[0], "end": "2025-05-28", "symbols": ["ETH-USD"]})
    launched(deployment)
    until = time.monotonic() + LIMIT
    while states(deployment, "retrain", run).get("train") != {"deferred"}:
        assert time.monotonic() < until, "train was never deferred"
        time.sleep(0.2)
    airflow.clear("retrain", run, "train")
    assert airflow.wait("retrain", run, LIMIT) == "success"
    name = airflow.xcom("retrain", run, "plan")["run"]
    mine = [i for i in deployment.instances() if i["tags"].get("crpbot:run") == name]
    assert all(i["state"] == "terminated" for i in mine)
    assert deployment.living() == []

    # what is trained is not trained again because something behind it is done again
    airflow.clear("retrain", run, "sync_models")
    assert airflow.wait("retrain", run, LIMIT) == "success"
    assert states(deployment, "retrain", run)["launch"] == {"success"}
    assert [i["id"] for i in deployment.instances() if i["tags"].get("crpbot:run") == name] == [i["id"] for i in mine]

    # cleared alone, the training is waited for before its instance is ended
    airflow.clear("retrain", run, "train", downstream=False)
    assert airflow.wait("retrain", run, LIMIT) == "success"
    again = [i for i in deployment.instances() if i["tags"].get("crpbot:run") == name]
    assert len(again) == len(mine) + 1
    assert deployment.lake.read_json(keys.training_run(name, "status.json"))["state"] == "succeeded"
    assert deployment.living() == []


def test_a_run_that_somebody_marks_as_failed_stays_failed_and_leaves_no_instance(deployment: Any, trained: dict[str, Any]) -> None:
    """Airflow then skips every task but the teardowns, and a green teardown would make the run green."""
    airflow = deployment.airflow
    run = airflow.trigger("retrain", conf={"start": DAYS[0], "end": "2025-05-28", "symbols": ["ETH-USD"]})
    until = time.monotonic() + LIMIT
    while states(deployment, "retrain", run).get("train") != {"deferred"}:
        assert time.monotonic() < until, "train was never deferred"
        time.sleep(0.2)
    airflow.mark_run("retrain", run, "failed")
    until = time.monotonic() + LIMIT
    while states(deployment, "retrain", run)["verdict"] == {None}:
        assert time.monotonic() < until, "the verdict was never given"
        time.sleep(0.5)
    assert airflow.wait("retrain", run, LIMIT) == "failed"
    found = states(deployment, "retrain", run)
    assert found["terminate"] == {"success"}
    assert found["cost_report"] == {"success"}
    assert deployment.living() == []


def test_how_soon_each_instance_ended_after_its_job_is_told(deployment: Any, trained: dict[str, Any], proof: list[str]) -> None:
    """From the job's last word to EC2's `terminated`, less the time that the local cloud takes for a shutdown by itself."""
    shutdown = SandboxOptions().shutdown_seconds
    by = {"Client.InstanceInitiatedShutdown": "its own power-off", "Client.UserInitiatedShutdown": "the teardown"}
    ended_by = set()
    for instance in deployment.instances():
        tags = instance["tags"]
        at = keys.training_run(tags[instances.TAG_RUN], "status.json")
        if not deployment.lake.exists(at):
            # ended before its job had said anything
            continue
        status = deployment.lake.read_json(at)
        # of an earlier generation nothing is told any more, and an interrupted job was ended with its instance
        if str(status["generation"]) != tags[instances.TAG_GENERATION] or status["state"] not in ("succeeded", "failed"):
            continue
        (ended,) = [entry["at"] for entry in instance["history"] if entry["state"] == "terminated"]
        after = (datetime.fromisoformat(ended) - datetime.fromisoformat(status["heartbeat"])).total_seconds()
        who = by[instance["state_reason"]]
        ended_by.add(who)
        proof.append(
            f"job {status['state']} -> terminated by {who}: {after - shutdown:.1f} s beyond the shutdown's own {shutdown:g} s"
        )
    assert ended_by == set(by.values())
