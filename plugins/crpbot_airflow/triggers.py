"""The long-lived trigger behind ``TrainOnInstance``. In plugins/, since the triggerer cannot import from the dags folder."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from airflow.triggers.base import BaseTrigger, TriggerEvent
from asgiref.sync import sync_to_async

if TYPE_CHECKING:
    from crpbot_lib.gpu.watch import Watcher

# How many rounds in a row may fail (AWS or the lake away) before the task is told; each round waits poll_seconds more.
_MAX_FAILURES = 20
# docker's awslogs driver ships a batch every five seconds: a line is that old before CloudWatch has it, so the log is read twice a
# round, and after the end the last lines, a traceback among them, are still to come
_SETTLE_SECONDS = 15.0
_QUIET_SECONDS = 8.0


class TrainingJobTrigger(BaseTrigger):
    """Follows one generation's job until it ends; its log lines become lines of the task's log.

    One trigger for the whole job: each new trigger would begin the task's trigger log anew. A restarted triggerer runs it again
    with the same arguments and so re-attaches: it launches nothing, and shows the job's lines from the first on, since what the
    former triggerer has shown may be lost with it.
    """

    def __init__(self, run: str, generation: int) -> None:
        super().__init__()
        self.run_name = run
        self.generation = generation

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return "crpbot_airflow.triggers.TrainingJobTrigger", {"run": self.run_name, "generation": self.generation}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        # boto3 is synchronous: its calls run in a thread, so that one slow answer does not hold up the other triggers
        watcher = await sync_to_async(self._watcher, thread_sensitive=False)()
        ask = sync_to_async(watcher.outcome, thread_sensitive=False)
        self.log.info(
            "following %s, generation %d: its lines from the first on (those known already come again after a restart)",
            self.run_name,
            self.generation,
        )
        failures = 0
        while True:
            # the outcome is asked for first: lines written before it are then all fetched below
            try:
                outcome = await ask()
                failures = 0
            except Exception as error:
                outcome = None
                failures += 1
                self.log.warning("round failed (%d of %d): %s", failures, _MAX_FAILURES, error)
                if failures >= _MAX_FAILURES:
                    message = f"the job could not be followed any longer: {error}"
                    yield self._event("unknown", message)
                    return
            await self._show_new_lines(watcher)
            if outcome:
                await self._show_last_lines(watcher)
                yield self._event(outcome.verdict, outcome.message, outcome.permanent)
                return
            await self._show_progress(watcher)
            await asyncio.sleep(watcher.gpu.poll_seconds / 2)
            await self._show_new_lines(watcher)
            await asyncio.sleep(watcher.gpu.poll_seconds / 2)

    def _event(self, verdict: str, message: str, permanent: bool = False) -> TriggerEvent:
        """The verdict with what it is about: see ``TrainOnInstance.execute_complete``."""
        about = {"run": self.run_name, "generation": self.generation}
        return TriggerEvent({**about, "verdict": verdict, "message": message, "permanent": permanent})

    async def _show_new_lines(self, watcher: Watcher) -> int:
        """The job's new log lines; how many. Logs that cannot be read decide nothing about the job: they only warn."""
        try:
            lines = await sync_to_async(watcher.new_lines, thread_sensitive=False)()
        except Exception as error:
            self.log.warning("the job's log lines cannot be read now: %s", error)
            return 0
        for line in lines:
            self.log.info("%s", line)
        return len(lines)

    async def _show_progress(self, watcher: Watcher) -> None:
        try:
            line = await sync_to_async(watcher.progress, thread_sensitive=False)()
        except Exception as error:
            self.log.warning("the progress cannot be told now: %s", error)
            return
        if line:
            self.log.info("%s: %s", self.run_name, line)

    async def _show_last_lines(self, watcher: Watcher) -> None:
        """Reads on until nothing new has come for a while."""
        began = quiet_since = time.monotonic()
        while time.monotonic() - began < _SETTLE_SECONDS and time.monotonic() - quiet_since < _QUIET_SECONDS:
            await asyncio.sleep(1)
            if await self._show_new_lines(watcher):
                quiet_since = time.monotonic()

    def _watcher(self) -> Watcher:
        from airflow.providers.amazon.aws.hooks.base_aws import AwsBaseHook
        from airflow.providers.amazon.aws.hooks.ec2 import EC2Hook

        from crpbot_lib.config import settings
        from crpbot_lib.gpu import clients
        from crpbot_lib.gpu.watch import Watcher
        from crpbot_lib.lake import Lake

        current = settings()
        options: dict[str, Any] = {
            "aws_conn_id": current.gpu.aws_conn_id,
            "region_name": current.gpu.region,
            "config": clients.CONFIG,
        }
        return Watcher(
            ec2=EC2Hook(api_type="client_type", **options).conn,
            logs=AwsBaseHook(client_type="logs", **options).conn,
            lake=Lake(current.lake),
            gpu=current.gpu,
            run=self.run_name,
            generation=self.generation,
        )
