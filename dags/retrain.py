"""# retrain

Retrains one LSTM per symbol on a spot GPU instance, publishes the models, and **always terminates the instance**.

`plan` → `ensure_coverage` (fetches what is missing) → `gaps` (tells outages from minutes without a trade) → `plan_features` →
`build_features` → `gate_features` (73 / 54 / 73) → `reserve` → `launch` → `train` (the job's log lines appear here while it
runs) → `check_model` → `sync_models` → `terminate` → `cost_report` → `verdict`.

* `terminate` is a teardown that finds the run's instances **by tag** and waits until EC2 says `terminated`. It runs after
  success, failure, a mark or a clear. `reap_gpu_instances`, the job's own power-off and the deadline that is scheduled at boot
  stand behind it.
* The run is green only if training, sync **and** termination succeeded: `verdict` fails it otherwise, also one that
  was marked as failed by hand. It looks at EC2 itself, and ends what was launched behind an earlier `terminate`, as happens
  when only the failed tasks are cleared.
* `train` retries on a new instance when an instance was interrupted or lost. What would fail the same way again is not retried.

**Parameters.** `start`, `end`: UTC days, `[start, end)`; empty means the days before the run's own day, as many as the setting
`training.days`. `symbols`: which to train. `smoke`: a few steps of a small model, allowed without a GPU; such a model says SMOKE
wherever it shows and never goes live.

**When it fails:** read the failed task's log; then check `crpbot gpu list` prints no living instance. The Telegram chat hears of
it, where one is configured. After what passes (no capacity, AWS away) clear the failed tasks; after a changed setting or image
start a new run.
"""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, date, datetime, timedelta
from typing import Any

from airflow.sdk import CronTriggerTimetable, Param, TriggerRule, dag, task
from airflow.sdk.exceptions import AirflowFailException

from crpbot_airflow.defaults import MODELS_ASSET, Tag, default_args, interval, run_step, scheduled, symbols_schema, tell_failure
from crpbot_airflow.operators import LaunchTrainingInstance, TerminateRunInstances, TrainOnInstance
from crpbot_lib.config import settings

SYMBOLS = [symbol.name for symbol in settings().symbols]


@dag(
    schedule=scheduled(CronTriggerTimetable("0 2 * * 1", timezone="UTC")),
    start_date=datetime(2023, 11, 10, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    # no dagrun_timeout here: it would skip the teardown (docs/termination.md); every task has its own limit instead
    default_args=default_args(),
    params={
        "start": Param("", type="string", description="first UTC day, e.g. 2025-05-26; empty: end - training.days"),
        "end": Param("", type="string", description="day after the last UTC day; empty: the day of the run"),
        "symbols": Param(SYMBOLS, **symbols_schema(SYMBOLS), description="what to train"),
        "smoke": Param(settings().training.smoke, type="boolean", description="few steps, small model, no GPU needed"),
    },
    doc_md=__doc__,
    tags=[Tag.TRAINING, Tag.GPU],
)
def retrain() -> None:
    @task
    def plan(params: dict[str, Any], dag_run: Any) -> dict[str, Any]:
        """The interval, the symbols and the name of this training run; everything after takes them from here."""
        try:
            end = date.fromisoformat(params["end"]) if params["end"] else dag_run.run_after.astimezone(UTC).date()
            start = date.fromisoformat(params["start"]) if params["start"] else end - timedelta(days=settings().training.days)
        except ValueError as error:
            raise AirflowFailException(
                f"start={params['start']!r}, end={params['end']!r}: expected days like 2025-05-26"
            ) from error
        if start >= end:
            raise AirflowFailException(f"start={start} is not before end={end}: nothing to train on; correct the run's parameters")
        # the slug alone may be cut or collide; the hash of the whole run id may not
        slug = re.sub(r"[^a-z0-9]+", "-", dag_run.run_id.lower()).strip("-")[:40].strip("-")
        run = f"{end.isoformat()}-{slug}-{hashlib.sha256(dag_run.run_id.encode()).hexdigest()[:8]}"
        return {
            "run": run,
            "start": start.isoformat(),
            "end": end.isoformat(),
            "symbols": params["symbols"],
            "smoke": bool(params["smoke"]),
        }

    @task
    def symbols_of(run_plan: dict[str, Any]) -> list[str]:
        return list(run_plan["symbols"])

    # as in market_data_range: some workers stay free for what ends an instance
    @task(max_active_tis_per_dag=2)
    def ensure_coverage(symbol: str, run_plan: dict[str, Any]) -> dict[str, Any]:
        from crpbot_lib.steps import ingest

        return run_step(ingest.ensure_coverage, symbol, *interval(run_plan))

    @task
    def gaps(run_plan: dict[str, Any]) -> dict[str, Any]:
        from crpbot_lib.steps import quality

        return run_step(quality.gaps, run_plan["symbols"], *interval(run_plan))

    @task
    def plan_features(run_plan: dict[str, Any]) -> dict[str, Any]:
        from crpbot_lib.steps import features

        return run_step(features.plan_features, run_plan["symbols"], *interval(run_plan))

    @task
    def build_features(symbol: str, feature_plan: dict[str, Any]) -> dict[str, Any]:
        from crpbot_lib.steps import features

        return run_step(features.build_features, feature_plan, symbol)

    @task
    def gate_features(feature_plan: dict[str, Any]) -> dict[str, Any]:
        from crpbot_lib.steps import features

        return run_step(features.gate_features, feature_plan)

    @task
    def reserve(run_plan: dict[str, Any], feature_plan: dict[str, Any], ti: Any) -> str:
        """Writes the job's spec. Never touches EC2: it always succeeds as a setup, so the teardown always runs.

        Cleared by hand together with `train`: what had succeeded is trained anew, what was interrupted or had failed is gone on
        with. A later task that is cleared alone clears its setups too, so this one runs again; what is trained then stays, and the
        job that it was trained by."""
        from crpbot_lib import training
        from crpbot_lib.gpu import watch

        states = ti.get_task_states(dag_id=ti.dag_id, run_ids=[ti.run_id], task_ids=["train"])

        def write(current: Any, lake: Any) -> str:
            if states.get(ti.run_id, {}).get("train") == "success" and watch.job_succeeded(lake, run_plan["run"]):
                return str(run_plan["run"])
            spec = training.job_spec(
                current, lake, run_plan["run"], feature_plan["version"], run_plan["symbols"], run_plan["smoke"]
            )
            training.write_job(lake, spec)
            watch.clear_status(lake, run_plan["run"])
            return str(run_plan["run"])

        return run_step(write)

    @task
    def check_model(symbol: str, run: str) -> dict[str, Any]:
        from crpbot_lib import training

        return run_step(lambda _, lake: training.check_model(lake, run, symbol))

    @task(outlets=[MODELS_ASSET])
    def sync_models(run: str, outlet_events: Any) -> dict[str, Any]:
        from crpbot_lib import registry

        published = run_step(registry.publish, run)
        outlet_events[MODELS_ASSET].extra = {"version": published["version"]}
        return published

    @task
    def cost_report(run: str) -> dict[str, Any]:
        from crpbot_airflow.operators import cost_of_run

        return cost_of_run(run)

    @task(retries=5, on_failure_callback=tell_failure)
    def verdict(run: str, ti: Any) -> None:
        """Decides the run's state: without it a green teardown would make a failed run green, and a run that somebody marks as
        failed would turn green as well. A teardown itself, because Airflow skips everything else of such a run.

        Where only failed tasks are cleared, the `terminate` and `cost_report` of the former pass stay as they are; what has been
        launched since is ended and billed here."""
        from crpbot_airflow.operators import end_what_is_left

        end_what_is_left(run, ti.dag_id, ti.run_id, ti.xcom_pull(task_ids="terminate"))
        states = ti.get_task_states(dag_id=ti.dag_id, run_ids=[ti.run_id])[ti.run_id]
        bad = {name: str(state) for name, state in states.items() if state != "success" and name != ti.task_id}
        if bad:
            shown = ", ".join(f"{name} is {state}" for name, state in sorted(bad.items()))
            raise AirflowFailException(f"not everything of this run succeeded: {shown}. The first failed task's log says why")

    run_plan = plan()
    symbols = symbols_of(run_plan)
    covered = ensure_coverage.partial(run_plan=run_plan).expand(symbol=symbols)
    told = gaps(run_plan)
    feature_plan = plan_features(run_plan)
    built = build_features.partial(feature_plan=feature_plan).expand(symbol=symbols)
    gate = gate_features(feature_plan)
    reserved = reserve(run_plan, feature_plan).as_setup()
    # empty where there is no plan: what ends a run then goes by its own ids
    run = "{{ (ti.xcom_pull(task_ids='plan') or {}).get('run', '') }}"
    launch = LaunchTrainingInstance(task_id="launch", run=run).as_setup()
    train = TrainOnInstance(task_id="train", run=run)
    checked = check_model.partial(run=run).expand(symbol=symbols)
    synced = sync_models(run)
    terminate = TerminateRunInstances(task_id="terminate", run=run, retries=5, on_failure_callback=tell_failure)
    terminate.as_teardown(setups=[reserved, launch])

    # of the setup, so that whoever clears a task behind it clears these too
    cost = cost_report(run).as_teardown(setups=[reserved])
    judged = verdict(run).as_teardown(setups=[reserved], on_failure_fail_dagrun=True)
    for teardown in (terminate, cost.operator, judged.operator):
        # whatever became of the setups: Airflow's own rule for a teardown leaves it out where none of them succeeded
        teardown.trigger_rule = TriggerRule.ALL_DONE

    covered >> told >> feature_plan >> built >> gate >> reserved >> launch >> train >> checked >> synced >> terminate >> cost
    # cleared alone, a task is not waited for by way of those behind it
    [train, checked] >> terminate
    [run_plan, covered, told, feature_plan, built, gate, launch, train, checked, synced, terminate, cost] >> judged


retrain()
