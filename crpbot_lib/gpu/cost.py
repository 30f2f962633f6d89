"""What a run's instances came to."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import instances
from crpbot_lib.gpu.instances import UTC_NOW, GpuError, Instance
from crpbot_lib.gpu.launch import LaunchRecord, records
from crpbot_lib.lake import KeyMissingError, Lake, keys

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client

_MINIMUM_SECONDS = 60
"""Linux instances are billed by the second with a minimum of one minute (Amazon EC2 pricing)."""


def cost_of(instance: Instance, record: LaunchRecord | None, now: datetime) -> dict[str, Any]:
    """One instance's bill: seconds from launch to EC2's recorded end (to ``now`` while it lives), at the recorded price.

    The spot price is the one seen at launch; AWS bills the price of each hour, so a long run may differ by its drift.
    """
    end = instance.ended_at or now
    seconds = max((end - instance.launched_at).total_seconds(), 0.0)
    billed = max(seconds, _MINIMUM_SECONDS)
    price = record.price_usd_per_hour if record else None
    on_demand = record.on_demand_usd_per_hour if record else None
    return {
        "id": instance.id,
        "type": instance.type,
        "market": instance.market,
        "generation": instance.generation,
        "state": instance.state,
        "reason": instance.reason,
        "launched_at": instance.launched_at.isoformat(),
        "ended_at": instance.ended_at.isoformat() if instance.ended_at else None,
        "seconds": round(seconds, 1),
        "usd_per_hour": price,
        "on_demand_usd_per_hour": on_demand,
        "usd": round(billed / 3600 * price, 6) if price is not None else None,
        "on_demand_usd": round(billed / 3600 * on_demand, 6) if on_demand is not None else None,
    }


def report(ec2: EC2Client, lake: Lake, gpu: GpuSettings, run: str, *, now: Callable[[], datetime] = UTC_NOW) -> dict[str, Any]:
    """The bill of all instances of ``run``, written to ``training-runs/<run>/cost.json``.

    EC2 forgets terminated instances after about an hour, so a report is made at the end of each run and kept in the lake.
    """
    at = now()
    by_generation = {r.generation: r for r in records(lake, run)}
    found = instances.find(ec2, gpu.project_tag, run, lake=lake)
    rows = [cost_of(i, by_generation.get(i.generation), at) for i in found]
    total = {
        "run": run,
        "instances": rows,
        "usd": round(sum(r["usd"] or 0.0 for r in rows), 6),
        "on_demand_usd": round(sum(r["on_demand_usd"] or 0.0 for r in rows), 6),
        "alive": [i.id for i in found if i.alive],
    }
    lake.write_json(keys.training_run(run, "cost.json"), total)
    return total


def reports(lake: Lake, run: str | None = None) -> list[dict[str, Any]]:
    """The kept reports of one run, or of all. GpuError when ``run`` has none."""
    if run is None:
        return [lake.read_json(key) for key in lake.keys(keys.TRAINING_RUNS) if key.endswith("/cost.json")]
    try:
        return [lake.read_json(keys.training_run(run, "cost.json"))]
    except KeyMissingError:
        raise GpuError(f"no cost report of run {run!r} in {lake.root}: `crpbot gpu cost` lists the runs that have one") from None
