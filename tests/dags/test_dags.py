"""What holds for every DAG, and what the retraining DAG promises by its shape alone."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DAG_IDS = ["market_data", "market_data_range", "promote", "reap_gpu_instances", "retrain"]
ENDS = ("terminate", "cost_report", "verdict")


def test_these_are_the_dags(dags: dict[str, Any]) -> None:
    assert sorted(dags) == DAG_IDS


def test_airflow_itself_lists_no_import_error(airflow_env: dict[str, str]) -> None:
    airflow = Path(sys.executable).with_name("airflow")
    command = [airflow, "dags", "list-import-errors", "--local", "--output", "json"]
    answer = subprocess.run(command, env=airflow_env, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip().splitlines()[-1] in ("[]", "No data found")


@pytest.mark.parametrize("dag_id", DAG_IDS)
def test_every_dag_has_a_page_tags_of_the_closed_set_and_an_owner(dags: dict[str, Any], dag_id: str) -> None:
    from crpbot_airflow.defaults import OWNER, Tag

    dag = dags[dag_id]
    assert dag.doc_md.startswith(f"# {dag_id}")
    assert "**When it fails:**" in dag.doc_md
    assert dag.tags
    assert set(dag.tags) <= {str(tag) for tag in Tag}
    assert {task.owner for task in dag.tasks} == {OWNER}


@pytest.mark.parametrize("dag_id", DAG_IDS)
def test_every_task_has_a_time_limit_and_no_dag_skips_its_teardown_by_one(dags: dict[str, Any], dag_id: str) -> None:
    dag = dags[dag_id]
    assert dag.dagrun_timeout is None
    assert all(task.execution_timeout for task in dag.tasks)
    assert dag.catchup is False


def test_a_day_of_market_data_runs_at_the_next_midnight_and_is_named_by_its_key(dags: dict[str, Any]) -> None:
    from airflow.serialization.serialized_objects import DagSerialization
    from airflow.timetables.base import TimeRestriction

    # as the scheduler reads it back from the database
    timetable = DagSerialization.from_dict(DagSerialization.to_dict(dags["market_data"])).timetable
    restriction = TimeRestriction(earliest=None, latest=None, catchup=False)
    info = timetable.next_dagrun_info_v2(last_dagrun_info=None, restriction=restriction)
    assert info is not None
    assert info.partition_key is not None
    run_after = info.run_after
    assert (run_after - datetime.fromisoformat(info.partition_key).replace(tzinfo=UTC)).days == 1


def test_years_are_loaded_in_one_run_by_hand_only(dags: dict[str, Any]) -> None:
    dag = dags["market_data_range"]
    assert dag.timetable.can_be_scheduled is False
    assert [task.task_id for task in dag.topological_sort()] == ["plan", "symbols_of", "load", "gaps", "report"]
    load = dag.get_task("load")
    assert load.is_mapped
    assert load.execution_timeout == timedelta(hours=24)
    # an outage shows in all symbols at once: the gaps are told after all of them are there
    assert dag.get_task("gaps").upstream_task_ids >= {"load"}


def test_a_range_is_checked_before_anything_is_loaded(
    dags: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    monkeypatch.setenv("CRPBOT_LAKE", f"file://{tmp_path}")
    monkeypatch.setenv("CRPBOT_COINGECKO_API_KEY", "key")
    plan = dags["market_data_range"].get_task("plan").python_callable
    good = {"start": "2025-05-01", "end": "2025-05-03", "symbols": ["BTC-USD"], "refetch": "absent", "candles_only": False}
    assert plan(good) == good | {"present": 0, "partitions": 12, "requests": 16, "seconds": plan(good)["seconds"]}
    for wrong, said in (
        ({"end": "2025-05-01"}, "holds no day"),
        ({"end": "2999-01-01"}, "is not over yet"),
        ({"start": "2010-01-01"}, "lies before the listing of bitcoin"),
    ):
        with pytest.raises(AirflowFailException, match=said):
            plan(good | wrong)


def test_a_range_that_coingecko_s_plan_does_not_reach_is_loaded_without_it(
    dags: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    from crpbot_lib.steps import ingest

    monkeypatch.setenv("CRPBOT_LAKE", f"file://{tmp_path}")
    monkeypatch.setenv("CRPBOT_COINGECKO_PLAN", "public")
    task = dags["market_data_range"].get_task
    params = {"start": "2023-11-10", "end": "2023-11-12", "symbols": ["BTC-USD"], "refetch": "absent", "candles_only": False}
    with pytest.raises(
        AirflowFailException, match=r"the bitcoin daily history for 2023-11-10 begins on .*the plan 'public' reaches"
    ):
        task("plan").python_callable(params)
    planned = task("plan").python_callable(params | {"candles_only": True})
    assert planned["partitions"] == 8
    asked: dict[str, Any] = {}
    monkeypatch.setattr(ingest, "load", lambda *_, **chosen: asked.update(chosen))
    task("load").python_callable("BTC-USD", planned)
    assert asked == {"coingecko": False, "refetch": "absent"}


@pytest.mark.parametrize("dag_id", ["market_data_range", "retrain"])
def test_parameters_that_cannot_be_are_refused_before_there_is_a_run(dags: dict[str, Any], dag_id: str) -> None:
    from airflow.sdk.exceptions import ParamValidationError
    from airflow.serialization.serialized_objects import DagSerialization

    def given(**conf: Any) -> dict[str, Any]:
        # as the API server has it
        dag = DagSerialization.from_dict(DagSerialization.to_dict(dags[dag_id]))
        return dag.params.deep_merge({"start": "2025-05-01", "end": "2025-05-03"} | conf).validate()

    assert given(symbols=["ETH-USD"])["symbols"] == ["ETH-USD"]
    wrong: list[dict[str, Any]] = [{"symbols": []}, {"symbols": ["NOPE-USD"]}, {"symbols": ["ETH-USD", "ETH-USD"]}]
    if dag_id == "market_data_range":
        wrong += [{"start": ""}, {"start": None}, {"end": "2025-13-01"}, {"refetch": "some"}, {"candles_only": "yes"}]
    for conf in wrong:
        with pytest.raises(ParamValidationError):
            given(**conf)


def test_a_retraining_records_the_gaps_of_what_it_learns_from(dags: dict[str, Any]) -> None:
    gaps = dags["retrain"].get_task("gaps")
    assert (gaps.upstream_task_ids, gaps.downstream_task_ids) == ({"ensure_coverage", "plan"}, {"plan_features", "verdict"})


def test_the_schedules_can_be_switched_off_but_not_the_reapers(airflow_env: dict[str, str]) -> None:
    script = """
import sys
sys.path.insert(0, sys.argv[1] + "/plugins")
from airflow.dag_processing.dagbag import DagBag
bag = DagBag(sys.argv[1] + "/dags")
assert not bag.import_errors, bag.import_errors
print({name: dag.timetable.can_be_scheduled for name, dag in sorted(bag.dags.items())})
"""
    env = {**airflow_env, "CRPBOT_ORCHESTRATION__SCHEDULES": "false"}
    command = [sys.executable, "-c", script, str(REPOSITORY)]
    answer = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert "'market_data': False" in answer.stdout
    assert "'retrain': False" in answer.stdout
    assert "'reap_gpu_instances': True" in answer.stdout


def test_the_teardown_belongs_to_both_setups_and_the_first_never_touches_aws(dags: dict[str, Any]) -> None:
    retrain = dags["retrain"]
    terminate = retrain.get_task("terminate")
    assert terminate.is_teardown
    setups = {task.task_id for task in retrain.tasks if task.is_setup}
    assert setups == {"reserve", "launch"}
    assert setups <= set(terminate.upstream_task_ids)
    # a failing teardown must not be hidden, and a green one must not hide a failure: the watcher decides
    assert terminate.on_failure_fail_dagrun is False


def test_the_verdict_alone_decides_the_run_and_stands_behind_every_task(dags: dict[str, Any]) -> None:
    retrain = dags["retrain"]
    verdict = retrain.get_task("verdict")
    # a teardown, since Airflow skips all others when somebody marks the run as failed
    assert verdict.is_teardown
    assert verdict.on_failure_fail_dagrun is True
    assert verdict.upstream_task_ids == {task.task_id for task in retrain.tasks if task.task_id not in ("verdict", "symbols_of")}
    assert [task.task_id for task in retrain.leaves] == ["verdict"]


def test_what_ends_a_run_runs_whatever_became_of_the_setups(dags: dict[str, Any]) -> None:
    """By Airflow's own rule a teardown is left out where none of its setups succeeded, though an earlier pass may have launched."""
    for name in ENDS:
        assert dags["retrain"].get_task(name).trigger_rule == "all_done"


@pytest.mark.parametrize("task", ["launch", "train", "check_model", "sync_models"])
@pytest.mark.parametrize("downstream", [False, True])
def test_whoever_clears_what_launches_clears_what_ends_it_and_judges_it(dags: dict[str, Any], task: str, downstream: bool) -> None:
    """As the scheduler finds the tasks that are cleared together (Airflow's ``partial_subset``)."""
    from airflow.serialization.serialized_objects import DagSerialization

    retrain = DagSerialization.from_dict(DagSerialization.to_dict(dags["retrain"]))
    cleared = retrain.partial_subset(task_ids={task}, include_downstream=downstream, include_upstream=False)
    launching = {"launch", "train"} & set(cleared.task_dict)
    assert launching
    # launch alone is cleared with the teardown; its bill is then the verdict's
    assert {"terminate", "verdict"} <= set(cleared.task_dict)
    for name in launching:
        assert {"terminate", "verdict"} <= cleared.get_task(name).downstream_task_ids


def test_the_chat_hears_of_every_safety_task_that_fails(dags: dict[str, Any]) -> None:
    for dag_id, task_id in (("retrain", "terminate"), ("retrain", "verdict"), ("reap_gpu_instances", "reap")):
        callbacks = dags[dag_id].get_task(task_id).on_failure_callback
        assert [getattr(one, "__name__", None) for one in callbacks] == ["tell_failure"]


def test_long_loads_leave_workers_free_for_what_ends_an_instance(dags: dict[str, Any]) -> None:
    for dag_id, task_id in (("market_data_range", "load"), ("retrain", "ensure_coverage")):
        assert dags[dag_id].get_task(task_id).max_active_tis_per_dag == 2


def test_models_are_published_only_by_sync_and_promotion_waits_for_it(dags: dict[str, Any]) -> None:
    publishers = [task.task_id for task in dags["retrain"].tasks if task.outlets]
    assert publishers == ["sync_models"]
    assert "crpbot_models" in str(dags["promote"].timetable.asset_condition)


# an audit hook sees every open(), connect() and name look-up of the process, also those inside libraries
AUDIT = """
import importlib.util, os, sys, sysconfig, tempfile
repository = sys.argv[1]
sys.path.insert(0, repository + "/plugins")
# the libraries first: what they read while they load is theirs
import airflow.sdk, airflow.providers.amazon.aws.operators.ec2, airflow.providers.amazon.aws.hooks.ec2, asgiref.sync, croniter
allowed = tuple(os.path.realpath(p) for p in (repository, sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()))
seen = []
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "subprocess.Popen", "os.system"):
        seen.append(f"{event} {args}")
    elif event == "open" and isinstance(args[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(args[0]))
        if not path.startswith(allowed) and not path.startswith(("/proc/", "/dev/")):
            seen.append(f"open {path}")
        elif args[1] and any(flag in args[1] for flag in "wax+") and "__pycache__" not in path:
            seen.append(f"write {path}")
sys.addaudithook(hook)
for name in sorted(os.listdir(repository + "/dags")):
    if name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(name[:-3], f"{repository}/dags/{name}")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
sys.addaudithook(lambda *_: None)
print("\\n".join(seen))
probe = len(seen)
open(tempfile.gettempdir() + "/../etc/hostname")
import socket
try:
    socket.create_connection(("127.0.0.1", 9), timeout=0.2)
except OSError:
    pass
print("HOOK SEES" if len(seen) >= probe + 2 else "HOOK IS BLIND", len(seen) - probe)
"""


def test_importing_the_dags_opens_no_connection_and_reads_nothing_outside_the_repository(airflow_env: dict[str, str]) -> None:
    command = [sys.executable, "-c", AUDIT, str(REPOSITORY)]
    answer = subprocess.run(command, env=airflow_env, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    *found, proof = answer.stdout.strip().splitlines()
    assert proof.startswith("HOOK SEES")
    assert [line for line in found if line] == []
