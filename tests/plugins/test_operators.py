"""The operators where Airflow's own ways could mislead them."""

from __future__ import annotations

import sys
from datetime import UTC, date, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "plugins"))


@pytest.mark.parametrize(("state", "ended"), [("success", True), ("failed", True), ("running", False), ("queued", False)])
def test_the_reaper_knows_an_ended_run_by_the_state_as_airflow_tells_it(
    monkeypatch: pytest.MonkeyPatch, state: str, ended: bool
) -> None:
    from airflow.sdk.execution_time.comms import DagRunStateResult

    from crpbot_airflow import operators
    from crpbot_lib.gpu.instances import TAG_DAG, TAG_DAG_RUN, Instance

    class Task:
        def get_dagrun_state(self, dag_id: str, run_id: str) -> str:
            assert (dag_id, run_id) == ("retrain", "manual__1")
            return DagRunStateResult(state=state).state

    at = datetime(2025, 5, 29, tzinfo=UTC)
    of_run = Instance("i-1", "g5.xlarge", "running", "spot", "z", at, None, "", {TAG_DAG: "retrain", TAG_DAG_RUN: "manual__1"})
    asked: list[bool | None] = []
    monkeypatch.setattr(operators.reap, "reap", lambda _ec2, _lake, _gpu, run_ended: asked.append(run_ended(of_run)) or [])
    monkeypatch.setattr(operators, "_ec2_hook", lambda: SimpleNamespace(conn=None))
    monkeypatch.setenv("CRPBOT_LAKE", "file:///tmp/nowhere")
    operators.settings.cache_clear()
    operators.ReapInstances(task_id="reap").execute({"ti": Task()})
    operators.settings.cache_clear()
    assert asked == [ended]


def test_the_event_of_another_run_ends_no_task() -> None:
    """Airflow on SQLite can resume a task with it: the id of a deleted trigger is given to the next one."""
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    from crpbot_airflow.operators import TrainOnInstance

    task = TrainOnInstance(task_id="train", run="run-b")
    event = {"run": "run-a", "generation": 1, "verdict": "succeeded", "message": "done", "permanent": False}
    with pytest.raises(AirflowException, match="run-b: the event is of run-a") as refused:
        task.execute_complete({}, event)
    assert not isinstance(refused.value, AirflowFailException), "another try follows the run anew"
    assert task.execute_complete({}, {**event, "run": "run-b"})["verdict"] == "succeeded"


@pytest.mark.parametrize("how", ["terminate", "verdict"])
def test_a_run_that_has_lost_its_plan_ends_what_its_earlier_pass_has_launched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    """`plan` is cleared while an instance lives, and fails: nobody knows the training run's name, but the instance's tags."""
    from crpbot_airflow import operators
    from crpbot_lib.gpu import launch
    from crpbot_lib.lake import Lake
    from crpbot_lib.sandbox.server import Sandbox, SandboxOptions

    monkeypatch.setenv("CRPBOT_LAKE", f"file://{tmp_path}")
    monkeypatch.setenv("CRPBOT_GPU__POLL_SECONDS", "0.1")
    monkeypatch.setenv("CRPBOT_GPU__VISIBILITY_GRACE_SECONDS", "0.1")
    with Sandbox(SandboxOptions(boot_seconds=0.2, shutdown_seconds=0.2)) as cloud:
        for name, value in cloud.env().items():
            if name.startswith("AWS_"):
                monkeypatch.setenv(name, value)
        operators.settings.cache_clear()
        current, ec2 = operators.settings(), operators._ec2_hook().conn
        mine, other = (
            launch.ensure_instance(ec2, Lake(current.lake), current.gpu, run, dag="retrain", dag_run=dag_run)
            for run, dag_run in (("run-a", "manual__a"), ("run-b", "manual__b"))
        )
        if how == "terminate":
            task = operators.TerminateRunInstances(task_id="terminate", run="")
            (ended,) = task.execute({"dag_run": SimpleNamespace(dag_id="retrain", run_id="manual__a")})
            assert ended["instance"] == mine.id
            assert task.execute({"dag_run": SimpleNamespace(dag_id="retrain", run_id="manual__none")}) == []
        else:
            operators.end_what_is_left("", "retrain", "manual__none", None)
            operators.end_what_is_left("", "retrain", "manual__a", None)
            assert [row["id"] for report in budget_reports(current) for row in report["instances"]] == [mine.id]
        alive = [i.id for i in operators.instances.find(ec2, current.gpu.project_tag) if i.alive]
        assert alive == [other.id]
        operators.terminate.terminate_run(ec2, Lake(current.lake), current.gpu, "run-b")
    operators.settings.cache_clear()


def budget_reports(current: Any) -> list[dict[str, Any]]:
    from crpbot_lib.gpu import budget
    from crpbot_lib.lake import Lake

    return budget.reports(Lake(current.lake))


@pytest.mark.parametrize("key", [None, "None", "2025-5-26", "today"])
def test_a_partition_key_that_names_no_day_fails_for_good_and_says_what_is_expected(key: str) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    from crpbot_airflow.defaults import day_of

    with pytest.raises(AirflowFailException, match="expected a UTC day like 2025-05-26"):
        day_of(str(key))
    assert day_of("2025-05-26") == date(2025, 5, 26)


def test_the_chat_hears_of_a_safety_task_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    from crpbot_airflow.defaults import tell_failure
    from crpbot_lib.runtime import telegram

    told: list[str] = []
    monkeypatch.setattr(telegram, "notify", lambda _settings, text: told.append(text))
    task = SimpleNamespace(dag_id="retrain", task_id="terminate", run_id="manual__1")
    tell_failure({"ti": task, "exception": RuntimeError("EC2 answers 5 times with an error")})
    assert told == [
        "FAILED retrain / terminate, run manual__1: EC2 answers 5 times with an error. See its log, and `crpbot gpu list`"
    ]
