"""The Amazon provider's EC2 operators, extended where they fall short: instances found by tag, a launch that survives its
launcher, a teardown that waits for ``terminated``, a deferrable watch.

``on_kill`` raises in each: it runs in the signal handler of the task's main thread, so ``execute`` really stops.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.providers.amazon.aws.hooks.ec2 import EC2Hook
from airflow.providers.amazon.aws.links.ec2 import EC2InstanceDashboardLink
from airflow.providers.amazon.aws.operators.ec2 import EC2CreateInstanceOperator, EC2TerminateInstanceOperator
from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from crpbot_airflow.triggers import TrainingJobTrigger
from crpbot_lib.config import settings
from crpbot_lib.gpu import budget, clients, instances, launch, reap, terminate, watch
from crpbot_lib.gpu.instances import TAG_DAG, TAG_DAG_RUN, Instance
from crpbot_lib.lake import Lake

if TYPE_CHECKING:
    from airflow.sdk import Context


log = logging.getLogger(__name__)


def _ec2_hook() -> EC2Hook:
    gpu = settings().gpu
    return EC2Hook(aws_conn_id=gpu.aws_conn_id, region_name=gpu.region, api_type="client_type", config=clients.CONFIG)


def _ensure(context: Context, run: str) -> Instance | None:
    """The run's instance; None where its job has succeeded, and a task runs once more after its instance has ended."""
    current = settings()
    lake = Lake(current.lake)
    dag_run = context["dag_run"]
    try:
        return launch.ensure_instance(
            _ec2_hook().conn,
            lake,
            current.gpu,
            run,
            dag=dag_run.dag_id,
            dag_run=dag_run.run_id,
            replace=watch.job_failed(lake, current.gpu, run),
            done=lambda: watch.job_succeeded(lake, run),
        )
    except launch.JobDoneError as done:
        log.info("%s", done)
        return None
    except launch.LaunchRefusedError as error:
        raise AirflowFailException(str(error)) from error


class LaunchTrainingInstance(EC2CreateInstanceOperator):
    """The run's one instance, launched if there is none. A second call, by a retry or a clear, finds the first one's by tag, and
    launches nothing where the training is done already.

    :param run: the name of the training run.
    """

    template_fields: Sequence[str] = ("run",)

    def __init__(self, *, run: str, **kwargs: Any) -> None:
        gpu = settings().gpu
        super().__init__(image_id=gpu.ami, aws_conn_id=gpu.aws_conn_id, region_name=gpu.region, **kwargs)
        self.run = run

    def execute(self, context: Context) -> dict[str, str]:
        instance = _ensure(context, self.run)
        if instance is None:
            return {"run": self.run}
        EC2InstanceDashboardLink.persist(
            context=context,
            operator=self,
            region_name=self.hook.conn_region_name,
            aws_partition=self.hook.conn_partition,
            instance_ids=EC2InstanceDashboardLink.format_instance_id_filter([instance.id]),
        )
        return {"run": self.run, "instance": instance.id, "type": instance.type}

    def on_kill(self) -> NoReturn:
        # not terminated here: the teardown finds the instance by tag, and a killed process must not start long calls
        raise AirflowException(f"killed while launching for {self.run}; the teardown ends what was launched")


class TrainOnInstance(BaseOperator):
    """One deferrable task for all coins of a run: ensures the instance, then follows the job until it ends.

    A try after an interruption launches the next generation. The job's log lines appear in this task's log.

    :param run: the name of the training run.
    """

    template_fields: Sequence[str] = ("run",)

    def __init__(self, *, run: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.run = run

    def execute(self, context: Context) -> dict[str, Any]:
        instance = _ensure(context, self.run)
        if instance is None:
            return {"verdict": "succeeded", "message": "training had succeeded before this try", "permanent": False}
        gpu = settings().gpu
        self.log.info("following %s on %s (generation %d)", self.run, instance.id, instance.generation)
        self.defer(
            trigger=TrainingJobTrigger(run=self.run, generation=instance.generation),
            method_name="execute_complete",
            timeout=timedelta(minutes=gpu.max_lifetime_minutes + gpu.boot_timeout_minutes),
        )
        raise AssertionError("defer returns never")

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """The trigger's verdict as the task's end; only what another try may mend is retried.

        An event of another run is none of this one's. On SQLite, which gives the id of a deleted row to the next one, Airflow can
        resume a task with the event of a trigger that had its trigger's id before.
        """
        if event["run"] != self.run:
            raise AirflowException(f"{self.run}: the event is of {event['run']} and says nothing of this run; following it anew")
        if event["verdict"] == "succeeded":
            return event
        message = f"{self.run}: {event['verdict']}: {event['message']}"
        raise AirflowFailException(message) if event["permanent"] else AirflowException(message)

    def on_kill(self) -> NoReturn:
        raise AirflowException(f"killed while training {self.run}; the teardown ends its instance")


class TerminateRunInstances(EC2TerminateInstanceOperator):
    """Terminates every instance tagged with the run and waits until EC2 says ``terminated``.

    :param run: the name of the training run.
    """

    template_fields: Sequence[str] = ("run",)

    def __init__(self, *, run: str, **kwargs: Any) -> None:
        gpu = settings().gpu
        super().__init__(instance_ids=[], aws_conn_id=gpu.aws_conn_id, region_name=gpu.region, **kwargs)
        self.run = run

    def execute(self, context: Context) -> list[dict[str, str]]:
        dag_run = context["dag_run"]
        run = self.run or _launched_by(dag_run.dag_id, dag_run.run_id)
        if not run:
            self.log.info("this run has no plan, and no instance carries its name: nothing was launched for it")
            return []
        current = settings()
        ended = terminate.terminate_run(_ec2_hook().conn, Lake(current.lake), current.gpu, run)
        if not ended:
            self.log.info("no instance of %s was ever launched", run)
        return [{"instance": i.id, "type": i.type, "state": i.state, "reason": i.reason} for i in ended]

    def on_kill(self) -> NoReturn:
        raise AirflowException(f"killed while terminating {self.run}; the reaper and the deadline end what is left")


class ReapInstances(BaseOperator):
    """Ends tagged instances whose run has ended or whose deadline has passed. ``crpbot gpu reap`` cannot ask after runs."""

    def execute(self, context: Context) -> dict[str, int]:
        ti = context["ti"]

        def run_ended(instance: Instance) -> bool | None:
            dag, dag_run = instance.tags.get(TAG_DAG), instance.tags.get(TAG_DAG_RUN)
            if not dag or not dag_run:
                return None
            try:
                # an enum that equals its value; its str() is "DagRunState.FAILED"
                return ti.get_dagrun_state(dag_id=dag, run_id=dag_run) in ("success", "failed")
            except Exception as error:
                # whatever the reason, unknown is not ended: the deadline decides, and the log says why
                self.log.warning("state of %s/%s unknown (%s); only the deadline counts for %s", dag, dag_run, error, instance.id)
                return None

        current = settings()
        verdicts = reap.reap(_ec2_hook().conn, Lake(current.lake), current.gpu, run_ended)
        counts = {"keep": 0, "suspect": 0, "terminate": 0}
        for verdict in verdicts:
            counts[verdict.action] += 1
        return counts


def _launched_by(dag_id: str, run_id: str) -> str:
    """The training run that instances of this Airflow run are tagged with; empty where there are none.

    For a run without a plan: one whose plan is cleared and fails has lost it, and an instance of the earlier pass may live.
    """
    current = settings()
    found = instances.find(_ec2_hook().conn, current.gpu.project_tag, lake=Lake(current.lake))
    return next((i.run for i in found if (i.tags.get(TAG_DAG), i.tags.get(TAG_DAG_RUN)) == (dag_id, run_id)), "")


def end_what_is_left(run: str, dag_id: str, run_id: str, known: Sequence[dict[str, str]] | None) -> None:
    """Ends whatever instance of ``run`` lives, and bills the run anew where EC2 shows one that is not among the ``known`` ones,
    which are what ``TerminateRunInstances`` returned. TerminationError as ``terminate_run`` raises it.

    Without a plan, ``run`` is empty: then the Airflow run's own instances are those that its ids name.
    """
    run = run or _launched_by(dag_id, run_id)
    if not run:
        return
    current = settings()
    ended = terminate.terminate_run(_ec2_hook().conn, Lake(current.lake), current.gpu, run)
    if new := sorted({i.id for i in ended} - {row["instance"] for row in known or ()}):
        log.info("not among what `terminate` has ended: %s of %s; terminated now", ", ".join(new), run)
        cost_of_run(run)


def cost_of_run(run: str) -> dict[str, Any]:
    """The bill of one run, logged as a line an instance, entered into the ledger and kept in the lake. Of no run an empty one."""
    if not run:
        log.info("this run has no plan; the verdict bills what an earlier pass of it has launched")
        return {}
    current = settings()
    report = budget.report(_ec2_hook().conn, Lake(current.lake), current.gpu, run)
    for row in report["instances"]:
        log.info(
            "%s %s %s in %s: %.0f s billed at $%s/h (by %s) = $%s, on demand $%s, saved $%s; %s",
            row["id"],
            row["type"],
            row["market"],
            row["zone"],
            row["billed_seconds"],
            row["usd_per_hour"],
            row["price_source"],
            row["usd"],
            row["on_demand_usd"],
            row["saved_usd"],
            row["state"],
        )
    log.info(
        "run %s: %.0f s billed, $%.4f paid, on demand $%.4f, saved $%.4f, %d instance(s)",
        run,
        report["billed_seconds"],
        report["usd"],
        report["on_demand_usd"],
        report["saved_usd"],
        len(report["instances"]),
    )
    return report
