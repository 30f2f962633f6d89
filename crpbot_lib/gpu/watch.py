"""Following one generation's job: its status in the lake, its log stream and its instance's state, together.

Any one of the three alone misleads: a job that hangs keeps a stale "running", an instance can vanish with its job, and a log can
be silent for long. ``Watcher.poll`` looks at all three once and says what is new and whether it is over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import instances
from crpbot_lib.gpu.instances import UTC_NOW, Instance
from crpbot_lib.gpu.launch import log_stream, records
from crpbot_lib.lake import KeyMissingError, Lake, keys

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client
    from mypy_boto3_logs import CloudWatchLogsClient

log = logging.getLogger(__name__)

Verdict = Literal["succeeded", "failed", "interrupted", "instance-gone", "heartbeat-stale", "boot-timeout"]

_ENDS = ("succeeded", "failed", "interrupted")
"""The states that a job writes last."""


@dataclass(frozen=True)
class Outcome:
    """How a generation's job ended. ``permanent``: a retry would fail the same way."""

    verdict: Verdict
    message: str
    permanent: bool = False


@dataclass
class Watcher:
    """Follows generation ``generation`` of ``run``. Every call is one round of AWS calls and never sleeps. Clocks are UTC."""

    ec2: EC2Client
    logs: CloudWatchLogsClient
    lake: Lake
    gpu: GpuSettings
    run: str
    generation: int
    now: Callable[[], datetime] = UTC_NOW
    _token: str | None = field(default=None, init=False)
    _gone_since: datetime | None = field(default=None, init=False)

    def new_lines(self) -> list[str]:
        """The job's log lines that came since the last call, in order; none while the stream does not exist yet."""
        lines: list[str] = []
        while True:
            request: dict[str, Any] = {
                "logGroupName": self.gpu.log_group,
                "logStreamName": log_stream(self.run, self.generation),
                "startFromHead": True,
            }
            if self._token:
                request["nextToken"] = self._token
            try:
                answer = self.logs.get_log_events(**request)
            except self.logs.exceptions.ResourceNotFoundException:
                return lines
            lines += [event.get("message", "") for event in answer["events"]]
            token = answer["nextForwardToken"]
            # GetLogEvents (CloudWatch Logs API reference): the end of the stream gives the same token back
            if token == self._token or not answer["events"]:
                self._token = token
                return lines
            self._token = token

    def outcome(self) -> Outcome | None:
        """None while the job may still come to something; else how it ended."""
        # status first: an instance that ended after it wrote its status has told us how the job went
        status = _status(self.lake, self.run, self.generation)
        state = status.get("state") if status else None
        if state == "succeeded":
            return Outcome("succeeded", "training succeeded")
        if state == "failed":
            assert status is not None
            return Outcome("failed", str(status.get("error") or "training failed without a message"), bool(status.get("permanent")))
        if state == "interrupted":
            return Outcome("interrupted", "the job was interrupted and stopped in order")

        now = self.now()
        alive, last = self._instances()
        if not alive:
            self._gone_since = self._gone_since or now
            if now - self._gone_since < timedelta(seconds=self.gpu.visibility_grace_seconds):
                return None
            what = f"{last.id} is {last.state} ({last.reason or 'no reason given'})" if last else "no instance is visible"
            return Outcome("instance-gone", f"{what}, and the job wrote no end: {_where(status)}")
        self._gone_since = None
        return _overdue(status, alive[0], self.gpu, now)

    def _instances(self) -> tuple[list[Instance], Instance | None]:
        mine = [
            i for i in instances.find(self.ec2, self.gpu.project_tag, self.run, lake=self.lake) if i.generation == self.generation
        ]
        return [i for i in mine if i.alive], mine[-1] if mine else None


def job_failed(lake: Lake, gpu: GpuSettings, run: str, *, now: Callable[[], datetime] = UTC_NOW) -> Callable[[Instance], bool]:
    """Says of a living instance whether its job came to nothing, so that a retry needs another instance: it has ended without
    success, its heartbeat has stopped, or it has not begun within the boot timeout."""

    def failed(instance: Instance) -> bool:
        status = _status(lake, run, instance.generation)
        if status is not None and status.get("state") in _ENDS:
            return bool(status["state"] != "succeeded")
        return _overdue(status, instance, gpu, now()) is not None

    return failed


def job_succeeded(lake: Lake, run: str) -> bool:
    """Whether the run's training is done: the instance of its last recorded launch said so. Another one would do it again."""
    launched = records(lake, run)
    status = _status(lake, run, launched[-1].generation) if launched else None
    return status is not None and status.get("state") == "succeeded"


def clear_status(lake: Lake, run: str) -> None:
    """Takes back the last word of the run's earlier job. For a deliberate repetition.

    What had succeeded is trained anew; what was interrupted or had failed is gone on with. The status of a job that may still be
    at work stays: without it the job would look as if it had never begun.
    """
    key = keys.training_run(run, "status.json")
    try:
        status = lake.read_json(key)
    except KeyMissingError:
        return
    if (state := status.get("state")) in _ENDS:
        # the job builds on nothing that an earlier generation than this one left
        since = int(status.get("generation", 0)) + 1 if state == "succeeded" else status.get("since", 0)
        # generation 0 is nobody's; the other fields are those that a reader of any status expects
        cleared = {"run": run, "state": "cleared", "generation": 0, "error": None, "permanent": False, "symbols": {}}
        lake.write_json(key, {**cleared, "since": since})


def _status(lake: Lake, run: str, generation: int) -> dict[str, Any] | None:
    try:
        status: dict[str, Any] = lake.read_json(keys.training_run(run, "status.json"))
    except KeyMissingError:
        return None
    # another generation's word says nothing about this one
    return status if int(status.get("generation", 0)) == generation else None


def _overdue(status: dict[str, Any] | None, instance: Instance, gpu: GpuSettings, now: datetime) -> Outcome | None:
    """What is wrong with a job that has not ended, on an instance that lives; None while all is well."""
    if status is None:
        # from the launch, and not from when somebody began to watch: a retry gives a dead boot no new time
        if now - instance.launched_at > timedelta(minutes=gpu.boot_timeout_minutes):
            return Outcome(
                "boot-timeout",
                f"{instance.id} is {instance.state} but its job has not started within {gpu.boot_timeout_minutes:g} min: "
                "look at the instance's console output (image pull, driver)",
            )
        return None
    beat = datetime.fromisoformat(str(status["heartbeat"]))
    if now - beat > timedelta(minutes=gpu.heartbeat_timeout_minutes):
        return Outcome("heartbeat-stale", f"no heartbeat from the job since {beat.isoformat()}: {_where(status)}")
    return None


def _where(status: dict[str, Any] | None) -> str:
    return "it never started" if status is None else f"its last state was {status.get('state')} at {status.get('heartbeat')}"
