"""The operators where Airflow's own ways could mislead them."""

from __future__ import annotations

import sys
from datetime import UTC, date, datetime
from pathlib import Path
from types import SimpleNamespace

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


def test_a_run_without_a_plan_is_asked_for_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its teardown runs all the same, and nothing can have been launched for it."""
    from crpbot_airflow import operators

    def hook() -> None:
        raise AssertionError("EC2 was asked")

    monkeypatch.setattr(operators, "_ec2_hook", hook)
    assert operators.TerminateRunInstances(task_id="terminate", run="").execute({}) == []
    assert operators.cost_of_run("") == {}
    operators.end_what_is_left("", None)


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
