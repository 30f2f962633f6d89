"""Following one generation's job: its status in the lake, its log stream and its instance's state, together.

Any one of the three alone misleads: a job that hangs keeps a stale "running", an instance can vanish with its job, and a log can
be silent for long. A ``Watcher`` says what is new in them, how far the job is and what it has cost, and whether it is over.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import instances
from crpbot_lib.gpu.instances import SPOT_INTERRUPTION, UTC_NOW, Instance
from crpbot_lib.gpu.launch import LaunchRecord, log_stream, records
from crpbot_lib.lake import KeyMissingError, Lake, keys

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client
    from mypy_boto3_logs import CloudWatchLogsClient

log = logging.getLogger(__name__)

Verdict = Literal["succeeded", "failed", "interrupted", "spot-interruption", "instance-gone", "heartbeat-stale", "boot-timeout"]
"""``interrupted`` is the job's own word (a spot notice or SIGTERM, and it stopped in order); ``spot-interruption`` is EC2's, of an
instance whose job had no time for a word."""

_ENDS = ("succeeded", "failed", "interrupted")
"""The states that a job writes last."""

LATEST_LINE = timedelta(minutes=2)
"""How much older than the newest line that was shown a line may be and still be shown when it comes."""
PROGRESS_INTERVAL = timedelta(seconds=10)


@dataclass(frozen=True)
class Outcome:
    """How a generation's job ended. ``permanent``: a retry would fail the same way."""

    verdict: Verdict
    message: str
    permanent: bool = False


@dataclass
class Watcher:
    """Follows generation ``generation`` of ``run``. Every call is one round of AWS calls and never sleeps. Clocks are UTC.

    It remembers nothing beyond its own life: one that is made anew, after a restart, shows the lines from the first on.
    """

    ec2: EC2Client
    logs: CloudWatchLogsClient
    lake: Lake
    gpu: GpuSettings
    run: str
    generation: int
    now: Callable[[], datetime] = UTC_NOW
    _from: int = field(default=0, init=False)
    _shown: Counter[tuple[int, str]] = field(default_factory=Counter, init=False)
    _gone_since: datetime | None = field(default=None, init=False)
    _seen: tuple[dict[str, Any] | None, Instance | None] = field(default=(None, None), init=False)
    _record: LaunchRecord | None = field(default=None, init=False)
    _told: tuple[datetime, str] | None = field(default=None, init=False)

    def new_lines(self) -> list[str]:
        """The job's log lines that came since the last call, by time; none while the stream does not exist yet.

        A token of GetLogEvents goes on from a point in time, past which a line that arrives late is never seen. So the last
        minutes are read again each time, and only what is more than before is new: a line comes once, however late (up to
        ``LATEST_LINE``) and in whatever order CloudWatch shows them, and as often as the job wrote it. A call that fails has
        shown nothing.
        """
        request: dict[str, Any] = {
            "logGroupName": self.gpu.log_group,
            "logStreamName": log_stream(self.run, self.generation),
            "startTime": self._from,
            "startFromHead": True,
        }
        found: list[tuple[int, str]] = []
        token = None
        while True:
            try:
                answer = self.logs.get_log_events(**request)
            except self.logs.exceptions.ResourceNotFoundException:
                return []
            found += [(event.get("timestamp", 0), event.get("message", "")) for event in answer["events"]]
            # GetLogEvents (CloudWatch Logs API reference): a page may be empty before the end, which gives the same token back
            if answer["nextForwardToken"] == token:
                break
            request["nextToken"] = token = answer["nextForwardToken"]
        there, lines = Counter[tuple[int, str]](), []
        for line in found:
            there[line] += 1
            if there[line] > self._shown[line]:
                lines.append(line[1])
        newest = max((timestamp for timestamp, _ in found), default=0)
        self._from = max(self._from, newest - int(LATEST_LINE.total_seconds() * 1000))
        # what CloudWatch leaves out of one answer and shows in the next is not new
        self._shown = Counter({line: count for line, count in (self._shown | there).items() if line[0] >= self._from})
        return lines

    def progress(self) -> str | None:
        """A line for the operator, from what the last ``outcome`` saw: symbol, epoch, step, loss, time left, dollars so far.

        None where nothing but the dollars has changed, or the last line is less than ``PROGRESS_INTERVAL`` old.
        """
        status, instance = self._seen
        now = self.now()
        done = _progress(status) if status else f"{instance.id} is {instance.state}, its job has not begun" if instance else None
        if done is None or (self._told and (done == self._told[1] or now - self._told[0] < PROGRESS_INTERVAL)):
            return None
        self._told = now, done
        return f"{done}; {self._dollars(instance, now)}"

    def _dollars(self, instance: Instance | None, now: datetime) -> str:
        if self._record is None:
            # the last one of the generation: those before it found no capacity
            self._record = next((r for r in reversed(records(self.lake, self.run)) if r.generation == self.generation), None)
        if (record := self._record) is None:
            return "no launch record, so its price is not known"
        price = record.price_usd_per_hour
        seconds = max(0.0, (now - (instance.launched_at if instance else record.recorded_at)).total_seconds())
        return f"${seconds / 3600 * price:.4f} so far ({record.instance_type} {record.market}, {seconds:.0f} s at ${price:.4f}/h)"

    def outcome(self) -> Outcome | None:
        """None while the job may still come to something; else how it ended."""
        # status first: an instance that ended after it wrote its status has told us how the job went
        status = _status(self.lake, self.run, self.generation)
        self._seen = status, self._seen[1]
        state = status.get("state") if status else None
        if state == "succeeded":
            return Outcome("succeeded", "training succeeded")
        if state == "failed":
            assert status is not None
            return Outcome("failed", str(status.get("error") or "training failed without a message"), bool(status.get("permanent")))
        if state == "interrupted":
            assert status is not None
            return Outcome("interrupted", f"the job stopped in order: {status.get('error') or 'it gave no reason'}")

        now = self.now()
        alive, last = self._instances()
        self._seen = status, alive[0] if alive else last
        if not alive:
            self._gone_since = self._gone_since or now
            if now - self._gone_since < timedelta(seconds=self.gpu.visibility_grace_seconds):
                return None
            if last and last.state_reason == SPOT_INTERRUPTION:
                return Outcome("spot-interruption", f"EC2 took {last.id} ({last.type}, {last.zone}) back: {_where(status)}")
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
    success, it trains by a spec that has been replaced since, its heartbeat has stopped, or it has not begun within the boot
    timeout."""

    def failed(instance: Instance) -> bool:
        status = _status(lake, run, instance.generation)
        if status is not None and not _is_of_the_runs_job(lake, run, status):
            return True
        if status is not None and status.get("state") in _ENDS:
            return bool(status["state"] != "succeeded")
        return _overdue(status, instance, gpu, now()) is not None

    return failed


def job_succeeded(lake: Lake, run: str) -> bool:
    """Whether the run's training is done: the instance of its last recorded launch said so, of the run's present spec. Another one
    would do it again."""
    launched = records(lake, run)
    status = _status(lake, run, launched[-1].generation) if launched else None
    return status is not None and status.get("state") == "succeeded" and _is_of_the_runs_job(lake, run, status)


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


def _is_of_the_runs_job(lake: Lake, run: str, status: dict[str, Any]) -> bool:
    """Whether the job of ``status`` trains by the run's ``job.json`` as it is now; it says nothing where it had not read it yet."""
    told = status.get("job")
    return told is None or told == lake.sha256(keys.training_run(run, "job.json"))


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


def _progress(status: dict[str, Any]) -> str:
    """How far the job is, by its status: the symbol in training, and its place among all."""
    symbols: dict[str, dict[str, Any]] = status.get("symbols", {})
    done = sum(own.get("state") == "succeeded" for own in symbols.values())
    for symbol, own in symbols.items():
        if own.get("state") == "running" and "step" in own:
            where = f"epoch {own['epoch']}/{own['epochs']}, step {own['step']}/{own['steps']}"
            return f"{symbol} ({done + 1} of {len(symbols)}): {where}, loss {own['loss']:.4f}, ETA {own['eta_seconds']:.0f} s"
        if own.get("state") == "running":
            return f"{symbol} ({done + 1} of {len(symbols)}): preparing its data"
    return f"{done} of {len(symbols)} symbols trained"
