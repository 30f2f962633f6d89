"""The bill of one instance: seconds from launch to EC2's recorded end, each hour at the price that was in force when it began."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import pytest
from botocore.stub import Stubber

from crpbot_lib.gpu import cost, instances
from crpbot_lib.gpu.cost import Change
from crpbot_lib.gpu.instances import Instance
from crpbot_lib.gpu.records import LaunchRecord

LAUNCHED = datetime(2025, 5, 29, 2, 0, tzinfo=UTC)
RECORD = LaunchRecord(
    run="run-a",
    sequence=1,
    generation=1,
    began_at=LAUNCHED,
    nonce="0",
    instance_type="g5.xlarge",
    subnet_id="subnet-a",
    zone="us-east-1a",
    market="spot",
    price_usd_per_hour=0.30,
    max_usd_per_hour=1.006,
    on_demand_usd_per_hour=1.006,
    worst_usd=2.012,
    recorded_at=LAUNCHED,
    deadline=LAUNCHED + timedelta(hours=2),
    user_data_sha256="0",
    dag="",
    dag_run="",
    remaining=(),
)


def ended(seconds: float, market: str = "spot", **tags: str) -> Instance:
    end = LAUNCHED + timedelta(seconds=seconds)
    return Instance("i-1", "g5.xlarge", "terminated", market, "us-east-1a", LAUNCHED, end, "User initiated", tags)


def test_half_an_hour_at_thirty_cents_by_the_price_at_launch_where_no_history_is_known() -> None:
    row = cost.bill(ended(1800), RECORD, LAUNCHED + timedelta(days=3))
    assert (row.billed_seconds, row.usd, row.on_demand_usd, row.saved_usd) == (1800, 0.15, 0.503, 0.353)
    assert (row.usd_per_hour, row.price_source) == (0.30, "launch record")


def test_each_hour_pays_the_price_in_force_when_it_began() -> None:
    changes = [
        Change(LAUNCHED - timedelta(days=1), 0.30),
        Change(LAUNCHED + timedelta(minutes=30), 9.0),  # dear, but over before the next hour begins
        Change(LAUNCHED + timedelta(minutes=50), 0.40),
        Change(LAUNCHED + timedelta(hours=2), 0.50),  # with the third hour
    ]
    row = cost.bill(ended(2.5 * 3600), RECORD, LAUNCHED, changes)
    assert (row.usd, row.price_source) == (0.30 + 0.40 + 0.25, "spot price history")
    assert row.usd_per_hour == 0.38


def test_a_history_that_does_not_reach_back_to_the_launch_is_not_half_used() -> None:
    row = cost.bill(ended(7200), RECORD, LAUNCHED, [Change(LAUNCHED + timedelta(minutes=1), 0.9)])
    assert (row.usd, row.price_source) == (0.6, "launch record")


def test_an_on_demand_instance_pays_its_one_price_whatever_spot_costs() -> None:
    record = RECORD.model_copy(update={"market": "on-demand", "price_usd_per_hour": 1.006})
    row = cost.bill(ended(3600, "on-demand"), record, LAUNCHED, [Change(LAUNCHED, 0.1)])
    assert (row.usd, row.saved_usd) == (1.006, 0)


def test_the_first_minute_is_billed_whole() -> None:
    row = cost.bill(ended(10), RECORD, LAUNCHED)
    assert (row.seconds, row.billed_seconds, row.usd) == (10, 60, 0.005)


def test_an_instance_that_still_lives_is_billed_until_now() -> None:
    alive = Instance("i-1", "g5.xlarge", "running", "spot", "us-east-1a", LAUNCHED, None, "", {})
    row = cost.bill(alive, RECORD, LAUNCHED + timedelta(hours=72))
    assert (row.usd, row.ended_at) == (21.6, None)


def test_an_end_that_ec2_does_not_date_is_dated_when_it_is_seen() -> None:
    gone = Instance("i-1", "g5.xlarge", "terminated", "spot", "us-east-1a", LAUNCHED, None, "Server.SpotInstanceTermination", {})
    row = cost.bill(gone, RECORD, LAUNCHED + timedelta(hours=1))
    assert (row.usd, row.ended_at) == (0.3, LAUNCHED + timedelta(hours=1))


def test_without_a_record_the_limit_in_the_tag_counts_and_without_either_the_price_is_unknown_not_zero() -> None:
    tagged = cost.bill(ended(1800, **{instances.TAG_MAX_PRICE: "1.006"}), None, LAUNCHED)
    assert (tagged.usd, tagged.price_source) == (0.503, "tag")
    unknown = cost.bill(ended(1800), None, LAUNCHED)
    assert (unknown.usd, unknown.usd_per_hour, unknown.price_source) == (None, None, "unknown")


def test_the_history_of_the_instances_own_zone_and_life_is_asked_for_on_every_page() -> None:
    client = boto3.session.Session().client("ec2", region_name="us-east-1")
    end = LAUNCHED + timedelta(hours=1)
    asked = {
        "InstanceTypes": ["g5.xlarge"],
        "ProductDescriptions": ["Linux/UNIX"],
        "AvailabilityZone": "us-east-1a",
        "StartTime": LAUNCHED,
        "EndTime": end,
    }

    def page(price: str, minutes: int, **more: Any) -> dict[str, Any]:
        return {"SpotPriceHistory": [{"SpotPrice": price, "Timestamp": LAUNCHED + timedelta(minutes=minutes)}], **more}

    with Stubber(client) as stub:
        stub.add_response("describe_spot_price_history", page("0.4", 30, NextToken="more"), asked)
        stub.add_response("describe_spot_price_history", page("0.3", -30), {**asked, "NextToken": "more"})
        changes = cost.spot_changes(client, "g5.xlarge", "us-east-1a", LAUNCHED, end)
    assert [change.price for change in changes] == [0.3, 0.4]


def test_a_history_that_cannot_be_had_is_none_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    client = boto3.session.Session().client("ec2", region_name="us-east-1")
    with Stubber(client) as stub:
        stub.add_client_error("describe_spot_price_history", "UnauthorizedOperation")
        assert cost.spot_changes(client, "g5.xlarge", "us-east-1a", LAUNCHED, LAUNCHED) == []
    assert "the price at launch is used" in caplog.text
