"""# reap_gpu_instances

Every ten minutes (`gpu.reap_seconds`): terminates tagged GPU instances that nothing else ended, because their run is over or their
deadline has passed, and says what it did. Layer 4 of the promise that no GPU is left running. `crpbot gpu reap` is its counterpart
for cron, which without Airflow's database knows deadlines and overtaken launches only.

An instance past its deadline ends at once. One whose run has ended is marked on the first pass and ends on the second; one that
was launched less than five minutes ago is left alone.

**When it fails:** it could not look or could not terminate. That is never "nothing there": run `crpbot gpu list`, and see AWS's
health page. The deadline on the instance itself stands behind it. The Telegram chat hears of it, where one is configured.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from airflow.sdk import DeltaTriggerTimetable, dag

from crpbot_airflow.defaults import Tag, default_args, tell_failure
from crpbot_airflow.operators import ReapInstances
from crpbot_lib.config import settings


@dag(
    schedule=DeltaTriggerTimetable(timedelta(seconds=settings().gpu.reap_seconds)),
    start_date=datetime(2023, 11, 10, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    default_args=default_args(),
    doc_md=__doc__,
    tags=[Tag.GPU, Tag.SAFETY],
    is_paused_upon_creation=False,
)
def reap_gpu_instances() -> None:
    ReapInstances(task_id="reap", execution_timeout=timedelta(minutes=5), on_failure_callback=tell_failure)


reap_gpu_instances()
