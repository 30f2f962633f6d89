"""The bill: seconds that EC2 recorded, the price that was seen, kept after EC2 has forgotten the instance."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import cost, launch
from crpbot_lib.gpu.instances import Instance
from crpbot_lib.gpu.launch import LaunchRecord
from crpbot_lib.gpu.terminate import terminate_run
from crpbot_lib.lake import Lake, keys

LAUNCHED = datetime(2025, 5, 29, 2, 0, tzinfo=UTC)
RECORD = LaunchRecord(
    run="run-a",
    sequence=1,
    generation=1,
    nonce="0",
    instance_type="g5.xlarge",
    subnet_id=None,
    market="spot",
    price_usd_per_hour=0.30,
    on_demand_usd_per_hour=1.006,
    recorded_at=LAUNCHED,
    deadline=LAUNCHED + timedelta(hours=2),
    user_data_sha256="0",
    remaining=(),
)


def ended(seconds: float) -> Instance:
    end = LAUNCHED + timedelta(seconds=seconds)
    return Instance("i-1", "g5.xlarge", "terminated", "spot", "us-east-1a", LAUNCHED, end, "User initiated", {})


def test_half_an_hour_at_thirty_cents() -> None:
    row = cost.cost_of(ended(1800), RECORD, now=LAUNCHED + timedelta(days=3))
    assert (row["seconds"], row["usd"], row["on_demand_usd"]) == (1800, 0.15, 0.503)


def test_the_first_minute_is_billed_whole() -> None:
    assert cost.cost_of(ended(10), RECORD, now=LAUNCHED)["usd"] == round(0.30 / 60, 6)


def test_an_instance_that_still_lives_is_billed_until_now() -> None:
    alive = Instance("i-1", "g5.xlarge", "running", "spot", "us-east-1a", LAUNCHED, None, "", {})
    assert cost.cost_of(alive, RECORD, now=LAUNCHED + timedelta(hours=72))["usd"] == 21.6


def test_an_instance_without_a_record_has_an_unknown_price_not_a_zero() -> None:
    row = cost.cost_of(ended(1800), None, now=LAUNCHED)
    assert (row["usd"], row["usd_per_hour"]) == (None, None)


def test_a_runs_report_is_kept_in_the_lake(ec2: Any, gpu: GpuSettings, lake: Lake, run: str) -> None:
    launched = launch.ensure_instance(ec2, lake, gpu, run)
    terminate_run(ec2, lake, gpu, run)
    launch.ensure_instance(ec2, Lake(f"{lake.root}/other"), gpu, run)  # a run of the same name is another deployment's bill
    report = cost.report(ec2, lake, gpu, run)
    (row,) = report["instances"]
    assert (row["id"], row["state"], row["usd_per_hour"]) == (launched.id, "terminated", 0.16)
    assert row["ended_at"] is not None
    assert report["alive"] == []
    assert lake.read_json(keys.training_run(run, "cost.json")) == report
