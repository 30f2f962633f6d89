"""Our instances as EC2 sees them, found by tag and never only by a remembered id."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from crpbot_lib.lake import Lake

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client
    from mypy_boto3_ec2.type_defs import FilterTypeDef, InstanceTypeDef

# Tag keys. The dead-man's switch, the IAM policies and the reaper select by the first.
TAG_PROJECT = "crpbot:project"
TAG_LAKE = "crpbot:lake"
TAG_RUN = "crpbot:run"
TAG_GENERATION = "crpbot:generation"
TAG_LAUNCH = "crpbot:launch"
TAG_DEADLINE = "crpbot:deadline"
TAG_MAX_PRICE = "crpbot:max-usd-per-hour"
TAG_OWNER = "crpbot:owner"
TAG_DAG = "crpbot:dag"
TAG_DAG_RUN = "crpbot:dag-run"
TAG_REAP = "crpbot:reap-seen"

ALIVE = ("pending", "running", "stopping", "stopped")
"""States in which an instance bills or can be started again. ``stopped`` counts: its volume bills, and somebody may start it."""
ENDING = ("shutting-down", "terminated")

SPOT_INTERRUPTION = "Server.SpotInstanceTermination"
"""The StateReason of a spot instance that EC2 took back (EC2 API reference, StateReason)."""

API_ERRORS = (ClientError, BotoCoreError, ResponseParserError)
"""What a call of AWS raises whose outcome is an error or not known. The last is of an answer that was cut, which botocore neither
asks for again nor counts among its own errors."""

UTC_NOW: Callable[[], datetime] = lambda: datetime.now(UTC)  # noqa: E731


class GpuError(Exception):
    """An instance could not be handled as asked; the message says what to do."""


class LaunchRefusedError(GpuError):
    """The launch is refused for a reason that repeating does not mend: quota, permission, parameters, budget."""


def lake_id(lake: Lake) -> str:
    """The value of TAG_LAKE. Two deployments in one account give equal names to their scheduled runs; their lakes differ."""
    return hashlib.sha256(lake.root.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Instance:
    """One instance. Times are UTC; ``ended_at`` is EC2's own record of the transition, None while it lives."""

    id: str
    type: str
    state: str
    market: str
    zone: str
    launched_at: datetime
    ended_at: datetime | None
    reason: str
    tags: dict[str, str]
    state_reason: str = ""
    """The code of EC2's StateReason, e.g. ``Client.InstanceInitiatedShutdown``; empty while nothing has ended it."""

    @property
    def run(self) -> str:
        return self.tags.get(TAG_RUN, "")

    @property
    def generation(self) -> int:
        """The launch's generation, from 1; 0 when the tag is missing or unreadable, so that such an instance can still be ended."""
        try:
            return int(self.tags[TAG_GENERATION])
        except (KeyError, ValueError):
            return 0

    @property
    def sequence(self) -> int:
        """The number of the launch record that it was made by, from 1; 0 when the tag is missing or unreadable."""
        try:
            return int(self.tags[TAG_LAUNCH])
        except (KeyError, ValueError):
            return 0

    @property
    def alive(self) -> bool:
        return self.state in ALIVE

    @property
    def deadline(self) -> datetime | None:
        """The time by which the instance must be gone; None when the tag is missing or unreadable, which is itself suspicious."""
        try:
            value = datetime.fromisoformat(self.tags[TAG_DEADLINE])
        except (KeyError, ValueError):
            return None
        return value if value.tzinfo else value.replace(tzinfo=UTC)

    @property
    def max_usd_per_hour(self) -> float | None:
        """The dearest price that can be paid for it; None when the tag is missing or unreadable."""
        try:
            return float(self.tags[TAG_MAX_PRICE])
        except (KeyError, ValueError):
            return None


def newest(found: Iterable[Instance]) -> Instance:
    """Of one run's instances that of the latest launch, which alone may stay alive."""
    return max(found, key=lambda i: (i.generation, i.sequence, i.launched_at, i.id))


def find(
    ec2: EC2Client,
    project: str,
    run: str | None = None,
    states: Iterable[str] = (*ALIVE, *ENDING),
    *,
    lake: Lake | None = None,
) -> list[Instance]:
    """All instances of the project, or of one run, in any of ``states``, oldest first.

    ``lake``: only those that work on it. A run is known by its name and its lake together, so whoever acts on one gives both.
    An API error propagates: it is never read as "none found".
    """
    filters: list[FilterTypeDef] = [
        {"Name": f"tag:{TAG_PROJECT}", "Values": [project]},
        {"Name": "instance-state-name", "Values": list(states)},
    ]
    if run is not None:
        filters.append({"Name": f"tag:{TAG_RUN}", "Values": [run]})
    if lake is not None:
        filters.append({"Name": f"tag:{TAG_LAKE}", "Values": [lake_id(lake)]})
    pages = ec2.get_paginator("describe_instances").paginate(Filters=filters)
    found = [from_api(item) for page in pages for reservation in page["Reservations"] for item in reservation["Instances"]]
    return sorted(found, key=lambda i: (i.launched_at, i.generation, i.id))


def from_api(item: InstanceTypeDef) -> Instance:
    """One item of DescribeInstances or RunInstances as our own type."""
    state = item["State"]["Name"]
    reason = item.get("StateTransitionReason", "")
    # EC2 dates a transition only inside this text: "User initiated (2025-06-01 10:00:00 GMT)"
    stamp = re.search(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:GMT|UTC)\)", reason)
    ended = datetime.fromisoformat(stamp.group(1)).replace(tzinfo=UTC) if stamp and state in ENDING else None
    placement: Any = item.get("Placement") or {}
    return Instance(
        id=item["InstanceId"],
        type=item.get("InstanceType", "unknown"),
        state=state,
        market="spot" if item.get("InstanceLifecycle") == "spot" else "on-demand",
        zone=placement.get("AvailabilityZone", ""),
        launched_at=item["LaunchTime"].astimezone(UTC),
        ended_at=ended,
        reason=reason,
        tags={tag.get("Key", ""): tag.get("Value", "") for tag in item.get("Tags", [])},
        state_reason=item.get("StateReason", {}).get("Code", ""),
    )
