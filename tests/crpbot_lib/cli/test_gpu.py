"""``crpbot gpu``: what a person or a cron job sees of instances and their cost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from typer.testing import CliRunner

from crpbot_lib.cli import app
from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import budget, instances, launch
from crpbot_lib.lake import Lake, keys
from crpbot_lib.sandbox.server import Sandbox, SandboxOptions

RUN = "2025-05-29-run"


@pytest.fixture(scope="module")
def cloud() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, Sandbox(SandboxOptions(boot_seconds=0.2, shutdown_seconds=0.2)) as running:
        for name, value in running.env().items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lake:
    monkeypatch.setenv("CRPBOT_LAKE", f"file://{tmp_path}")
    monkeypatch.setenv("CRPBOT_GPU__POLL_SECONDS", "0.1")
    monkeypatch.setenv("CRPBOT_GPU__VISIBILITY_GRACE_SECONDS", "0.1")
    return Lake(f"file://{tmp_path}")


@pytest.fixture
def month(cloud: None, lake: Lake) -> str:
    """The ledger's month of one run that was launched and ended by the command line."""
    ec2: Any = boto3.session.Session().client("ec2", region_name="us-east-1")
    launch.ensure_instance(ec2, lake, GpuSettings(), RUN)
    ended = json.loads(said("reap", "--run", RUN, "--json"))
    assert [(row["action"], row["usd"]) for row in ended] == [("terminated", round(0.16 / 60, 6))]
    return launch.records(lake, RUN)[0].month


def said(*arguments: str, status: int = 0) -> str:
    from crpbot_lib.config import settings

    settings.cache_clear()
    result = CliRunner().invoke(app, ["gpu", *arguments])
    assert result.exit_code == status, result.output
    return result.output


def test_the_months_ledger_is_a_table_with_its_sum_against_the_cap(month: str) -> None:
    table = said("cost", "--month", month)
    assert RUN in table
    assert f"{month}: paid $0.0027, on demand $0.0088, saved $0.0061; $0.0027 counts against the cap of $50.00" in table


def test_the_months_ledger_as_json_has_every_launch(month: str) -> None:
    report = json.loads(said("cost", "--month", month, "--json"))
    (row,) = report["launches"]
    assert (report["month"], row["run"], row["generation"], row["state"], row["billed_seconds"]) == (month, RUN, 1, "ended", 60)
    assert json.loads(said("cost", "--month", "2020-01", "--json"))["launches"] == []


def test_a_lost_ledger_is_rebuilt_and_shown(month: str, lake: Lake) -> None:
    before = said("cost", "--month", month, "--json")
    (key,) = lake.keys(keys.LEDGER)
    (Path(lake.root.removeprefix("file://")) / key).unlink()
    assert json.loads(said("cost", "--month", month, "--json"))["launches"] == []
    assert json.loads(said("cost", "--rebuild", "--json")) == [json.loads(before)]
    assert said("cost", "--month", month, "--json") == before


def test_a_runs_cost_names_seconds_price_its_source_and_what_was_saved(month: str, lake: Lake) -> None:
    ec2: Any = boto3.session.Session().client("ec2", region_name="us-east-1")
    budget.report(ec2, lake, GpuSettings(), RUN)
    table = said("cost", RUN)
    for column in ("billed s", "USD/h", "on demand", "saved", "price by"):
        assert column in table
    assert "spot price history" in table
    assert "total $0.0027, on demand $0.0088, saved $0.0061" in table


@pytest.mark.parametrize("value", ["2026-13", "2026", "2026-1", "november"])
def test_a_month_that_is_none_is_named(value: str, lake: Lake) -> None:
    assert f"'{value}' is not a month" in said("cost", "--month", value, status=2)


def test_a_run_with_a_month_is_refused(lake: Lake) -> None:
    assert "leave RUN out" in said("cost", RUN, "--month", "2026-11", status=2)


def test_an_empty_ledger_says_so(cloud: None, lake: Lake) -> None:
    assert "the ledger is empty" in said("cost", "--rebuild")


def test_a_dry_run_for_one_run_names_what_would_end_and_ends_nothing(cloud: None, lake: Lake) -> None:
    ec2: Any = boto3.session.Session().client("ec2", region_name="us-east-1")
    launched = launch.ensure_instance(ec2, lake, GpuSettings(), RUN)
    try:
        assert said("reap", "--run", RUN, "--dry-run").strip() == f"would terminate {launched.id}: --run {RUN}"
        assert said("reap", "--run", "another", "--dry-run").strip() == "nothing to reap"
        assert launched.id in said("list")
    finally:
        said("reap", "--run", RUN)


def test_what_is_past_its_deadline_is_ended_where_no_lake_is_named(
    cloud: None, lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last resort, from any machine: what it needs is EC2."""
    ec2: Any = boto3.session.Session().client("ec2", region_name="us-east-1")
    launched = launch.ensure_instance(ec2, lake, GpuSettings(), RUN)
    ec2.create_tags(Resources=[launched.id], Tags=[{"Key": instances.TAG_DEADLINE, "Value": "2025-05-29T00:00:00+00:00"}])
    monkeypatch.delenv("CRPBOT_LAKE")
    told = said("reap")
    assert "CRPBOT_LAKE is not set: the ledger is not brought up to date" in told
    assert f"terminate {launched.id}: past its deadline 2025-05-29T00:00:00+00:00" in told
    assert "CRPBOT_LAKE=''" in said("reap", "--run", RUN, status=1)
    monkeypatch.setenv("CRPBOT_LAKE", lake.root)
    # the ledger is made good by the next pass that knows it
    said("reap")
    assert json.loads(said("cost", "--month", launch.records(lake, RUN)[0].month, "--json"))["launches"][0]["state"] == "ended"
