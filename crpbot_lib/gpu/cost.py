"""What one instance came to: seconds billed, price paid, what it would have been on demand."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, ConfigDict

from crpbot_lib.gpu import instances
from crpbot_lib.gpu.instances import Instance
from crpbot_lib.gpu.records import LaunchRecord

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client

log = logging.getLogger(__name__)

_MINIMUM_SECONDS = 60
"""Linux instances are billed by the second with a minimum of one minute (Amazon EC2 pricing)."""
_HOUR = 3600.0


class Change(NamedTuple):
    """A spot price, USD an hour, and since when it is in force (UTC)."""

    since: datetime
    price: float


class Bill(BaseModel):
    """One instance's bill. Times are UTC, prices USD an hour, None where no record says them. The volume and traffic are not in it.

    ``ended_at`` is EC2's own time of the end; where EC2 tells none, the time at which the end was first seen.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    type: str
    market: str
    zone: str
    generation: int
    sequence: int
    state: str
    reason: str
    launched_at: datetime
    ended_at: datetime | None
    seconds: float
    billed_seconds: float
    usd_per_hour: float | None
    """The mean of what was in force."""
    price_source: str
    """``spot price history``, ``launch record``, ``tag`` (the limit of the request) or ``unknown``."""
    on_demand_usd_per_hour: float | None
    usd: float | None
    on_demand_usd: float | None
    saved_usd: float | None


def spot_changes(ec2: EC2Client, instance_type: str, zone: str, start: datetime, end: datetime) -> list[Change]:
    """The zone's spot prices from ``start`` to ``end``, the one in force at ``start`` included, oldest first.

    Empty where EC2 does not tell: the bill then goes by the launch record and says so.
    """
    try:
        pages = ec2.get_paginator("describe_spot_price_history").paginate(
            InstanceTypes=[instance_type],  # type: ignore[list-item]  # any type that was launched
            ProductDescriptions=["Linux/UNIX"],
            AvailabilityZone=zone,
            StartTime=start,
            EndTime=end,
        )
        return sorted(Change(row["Timestamp"], float(row["SpotPrice"])) for page in pages for row in page["SpotPriceHistory"])
    except instances.API_ERRORS as error:
        log.warning("no spot price history of %s in %s, the price at launch is used: %s", instance_type, zone, error)
        return []


def bill(instance: Instance, record: LaunchRecord | None, now: datetime, changes: Sequence[Change] = ()) -> Bill:
    """The instance's bill from its launch to its end, to ``now`` while it lives.

    A spot instance pays for each of its hours the price that was in force when the hour began (EC2 user guide, "Spot Instance
    pricing history"). ``changes`` are those prices; without one that reaches back to the launch the recorded price counts for all.
    An interruption by EC2 in the first hour, which AWS does not charge, is counted all the same.
    """
    end = instance.ended_at or (now if instance.state in instances.ENDING else None)
    seconds = max(((end or now) - instance.launched_at).total_seconds(), 0.0)
    billed = max(seconds, _MINIMUM_SECONDS)
    usd: float | None = None
    source = "unknown"
    if instance.market == "spot" and changes and changes[0].since <= instance.launched_at:
        usd, source = _by_the_hour(instance.launched_at, billed, changes), "spot price history"
    elif record is not None:
        usd, source = billed / _HOUR * record.price_usd_per_hour, "launch record"
    elif instance.max_usd_per_hour is not None:
        usd, source = billed / _HOUR * instance.max_usd_per_hour, "tag"
    on_demand = record.on_demand_usd_per_hour if record else None
    on_demand_usd = billed / _HOUR * on_demand if on_demand is not None else None
    return Bill(
        id=instance.id,
        type=instance.type,
        market=instance.market,
        zone=instance.zone,
        generation=instance.generation,
        sequence=instance.sequence,
        state=instance.state,
        reason=instance.reason,
        launched_at=instance.launched_at,
        ended_at=end,
        seconds=round(seconds, 1),
        billed_seconds=round(billed, 1),
        usd_per_hour=None if usd is None else round(usd / billed * _HOUR, 6),
        price_source=source,
        on_demand_usd_per_hour=on_demand,
        usd=None if usd is None else round(usd, 6),
        on_demand_usd=None if on_demand_usd is None else round(on_demand_usd, 6),
        saved_usd=None if usd is None or on_demand_usd is None else round(on_demand_usd - usd, 6),
    )


def _by_the_hour(launched_at: datetime, billed: float, changes: Sequence[Change]) -> float:
    usd, hour = 0.0, 0
    while hour * _HOUR < billed:
        begins = launched_at + timedelta(hours=hour)
        price = [change.price for change in changes if change.since <= begins][-1]
        usd += price * min(billed - hour * _HOUR, _HOUR) / _HOUR
        hour += 1
    return usd
