"""# promote

Takes a published model version live, if it deserves it: `download_and_verify` (checksums; training data, runtime and checkpoint
agree on names, order and the counts 73 / 54 / 73) → `dry_run` (a few iterations of the real runtime) → `promote` (moves the pointer
that the runtime follows) → `notify`.

Runs when `retrain` has published models, or by hand with the parameter `version`. A smoke model is promoted only where the setting
`promotion.allow_smoke` says so, and live mode refuses it all the same; a real one only if its test rows show skill, or where
`promotion.allow_without_skill` says so.

**When it fails:** nothing was promoted; the champion stays. The log says which of the checks failed. `crpbot models rollback`
brings the former champion back.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from airflow.sdk import Param, dag, task
from airflow.sdk.exceptions import AirflowFailException

from crpbot_airflow.defaults import MODELS_ASSET, Tag, default_args, run_step
from crpbot_lib.config import settings


@dag(
    schedule=[MODELS_ASSET],
    start_date=datetime(2023, 11, 10, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    default_args=default_args(),
    params={"version": Param("", type="string", description="model version; empty: the one whose publication triggered this run")},
    doc_md=__doc__,
    tags=[Tag.MODELS],
)
def promote() -> None:
    @task
    def choose_version(params: dict[str, Any], triggering_asset_events: Any) -> str:
        if params["version"]:
            return str(params["version"])
        events = [event for events in triggering_asset_events.values() for event in events]
        version = events[-1].extra.get("version") if events else None
        if not version:
            raise AirflowFailException("no version: name one in the run's parameters (`crpbot models list` shows them)")
        return str(version)

    @task
    def download_and_verify(version: str) -> dict[str, Any]:
        from crpbot_lib import registry

        return run_step(registry.verify, version)

    @task
    def dry_run(version: str) -> dict[str, Any]:
        from crpbot_lib.runtime import loop

        return run_step(loop.run, "dryrun", iterations=settings().promotion.dry_run_iterations, model=version)

    @task(task_id="promote")
    def promote_version(version: str, evidence: dict[str, Any]) -> dict[str, Any]:
        from crpbot_lib import registry

        return run_step(registry.promote, version, evidence)

    @task
    def notify(promoted: dict[str, Any]) -> bool:
        """Tells the Telegram chat, where one is configured; the promotion stands either way."""
        from crpbot_lib.runtime import telegram

        return telegram.notify(settings(), promoted["message"])

    version = choose_version()
    verified = download_and_verify(version)
    evidence = dry_run(version)
    verified >> evidence
    notify(promote_version(version, evidence))


promote()
