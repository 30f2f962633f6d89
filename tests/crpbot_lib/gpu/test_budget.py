"""The caps hold before a launch, and the ledger says what was spent, whoever asks and however often."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import budget, instances, launch, reap
from crpbot_lib.gpu.budget import BudgetExceededError, Entry
from crpbot_lib.gpu.terminate import terminate_run
from crpbot_lib.lake import Lake, LakeError, UnreadableError, keys

# the sandbox's candidates: the dearest is g5.xlarge, $1.006 an hour on demand, for two hours
WORST = 2.012


def ledger(lake: Lake) -> list[Entry]:
    return [Entry.model_validate(lake.read_json(key)) for key in lake.keys(keys.LEDGER)]


def calls_of(ec2: Any) -> list[str]:
    """The names of the calls that the client sends from now on."""
    sent: list[str] = []
    ec2.meta.events.register("before-send.ec2", lambda event_name, **_: sent.append(event_name.rpartition(".")[2]))
    return sent


def spent(lake: Lake, usd: float, month: str, run: str = "earlier", generation: int = 1) -> None:
    """A run that ended before EC2's memory, with its bill."""
    at = datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC)
    bill = {
        "id": f"i-{run}",
        "type": "g5.xlarge",
        "market": "spot",
        "zone": "us-east-1a",
        "generation": generation,
        "sequence": generation,
        "state": "terminated",
        "reason": "",
        "launched_at": at.isoformat(),
        "ended_at": (at + timedelta(hours=1)).isoformat(),
        "seconds": 3600,
        "billed_seconds": 3600,
        "usd_per_hour": usd,
        "price_source": "launch record",
        "on_demand_usd_per_hour": 2 * usd,
        "usd": usd,
        "on_demand_usd": 2 * usd,
        "saved_usd": usd,
    }
    entry = Entry.model_validate(
        {
            "run": run,
            "generation": generation,
            "month": month,
            "sequence": generation,
            "state": "ended",
            "worst_usd": 2 * usd,
            "deadline": (at + timedelta(hours=2)).isoformat(),
            "bills": [bill],
        }
    )
    lake.write_json(entry.key, entry.model_dump(mode="json"))


def test_a_run_that_could_exceed_its_cap_is_refused_before_run_instances_with_both_sums(
    ec2: Any, gpu: GpuSettings, lake: Lake, run: str
) -> None:
    sent = calls_of(ec2)
    with pytest.raises(BudgetExceededError) as refused:
        launch.ensure_instance(ec2, lake, gpu.model_copy(update={"max_run_usd": 2.0}), run)
    message = str(refused.value)
    assert f"run {run}: $0.00 so far + $2.01 worst case of this launch = $2.01 of $2.00" in message
    assert f"month {datetime.now(UTC):%Y-%m}: $0.00 so far + $2.01 = $2.01 of $50.00" in message
    assert "CRPBOT_GPU__MAX_RUN_USD" in message
    assert isinstance(refused.value, launch.LaunchRefusedError)  # permanent: no retry mends it
    assert "DescribeInstances" in sent
    assert "RunInstances" not in sent
    # nothing was launched, so nothing is held against the next
    assert [(entry.state, entry.counted_usd) for entry in ledger(lake)] == [("nothing", 0)]


def test_the_month_so_far_counts_and_the_months_before_it_do_not(ec2: Any, gpu: GpuSettings, lake: Lake, run: str) -> None:
    capped = gpu.model_copy(update={"max_month_usd": 10.0})
    spent(lake, 100.0, "2020-01", "long-ago")
    spent(lake, 8.0, f"{datetime.now(UTC):%Y-%m}")
    with pytest.raises(BudgetExceededError, match=r"\$8\.00 so far \+ \$2\.01 = \$10\.01 of \$10\.00"):
        launch.ensure_instance(ec2, lake, capped, run)
    spent(lake, 7.9, f"{datetime.now(UTC):%Y-%m}")
    assert launch.ensure_instance(ec2, lake, capped, run).run == run


def test_what_is_alive_counts_with_its_worst_case_also_another_deployments(
    ec2: Any, gpu: GpuSettings, lake: Lake, tmp_path: Path, run: str
) -> None:
    other = Lake(f"file://{tmp_path}/other")
    launched = launch.ensure_instance(ec2, other, gpu, run)
    worst = (launched.max_usd_per_hour or 0) * 2
    refused = rf"\${worst:.2f} so far \+ \$2\.01"
    with pytest.raises(BudgetExceededError, match=refused):
        launch.ensure_instance(ec2, lake, gpu.model_copy(update={"max_month_usd": 2.5}), run)


def test_an_earlier_generation_counts_with_its_bill_and_not_with_its_worst_case(
    ec2: Any, gpu: GpuSettings, lake: Lake, run: str
) -> None:
    # room for one worst case and some cents: enough for any number of short lives
    capped = gpu.model_copy(update={"max_run_usd": WORST + 0.1})
    for generation in (1, 2, 3):
        assert launch.ensure_instance(ec2, lake, capped, run).generation == generation
        terminate_run(ec2, lake, capped, run)
    budget.report(ec2, lake, capped, run)
    assert [(entry.generation, entry.state) for entry in ledger(lake)] == [(1, "ended"), (2, "ended"), (3, "ended")]


def test_a_launch_in_flight_counts_before_its_instance_is_there(
    ec2: Any, gpu: GpuSettings, lake: Lake, wrapped: Any, run: str
) -> None:
    both = gpu.model_copy(update={"max_month_usd": 1.5 * WORST})

    def while_it_is_launched(**request: Any) -> Any:
        with pytest.raises(BudgetExceededError, match=r"\$2\.01 so far \+ \$2\.01"):
            launch.ensure_instance(ec2, lake, both, f"{run}-other")
        return ec2.run_instances(**request)

    launch.ensure_instance(wrapped(ec2, run_instances=while_it_is_launched), lake, both, run)


def test_a_refused_launcher_takes_nothing_back_that_another_one_of_its_run_has_reserved(
    ec2: Any, gpu: GpuSettings, lake: Lake, wrapped: Any, run: str
) -> None:
    both = gpu.model_copy(update={"max_month_usd": 1.5 * WORST})

    def while_it_is_launched(**request: Any) -> Any:
        (mine,) = ledger(lake)
        # another run's launcher has written its reservation, and adds up only after this run's second launcher has been refused
        other = mine.model_copy(update={"run": f"{run}-other"})
        lake.write_json(other.key, other.model_dump(mode="json"))
        with pytest.raises(BudgetExceededError):
            budget.reserve(ec2, lake, both, launch.records(lake, run)[-1])
        assert [entry.state for entry in ledger(lake) if entry.run == run] == ["open"]
        return ec2.run_instances(**request)

    launch.ensure_instance(wrapped(ec2, run_instances=while_it_is_launched), lake, both, run)


def test_a_request_that_is_never_sent_reserves_nothing(ec2: Any, gpu: GpuSettings, lake: Lake, run: str) -> None:
    with pytest.raises(launch.LaunchRefusedError, match="malformed"):
        launch.ensure_instance(ec2, lake, gpu.model_copy(update={"security_group_ids": (1,)}), run)
    assert [entry.state for entry in ledger(lake)] == ["nothing"]


@pytest.mark.parametrize("answer", ["InsufficientInstanceCapacity", "VcpuLimitExceeded"])
def test_a_launch_that_ec2_refuses_gives_its_reservation_back(
    answer: str, ec2: Any, gpu: GpuSettings, lake: Lake, wrapped: Any, run: str
) -> None:
    def refuse(**_: Any) -> Any:
        error: Any = {"Error": {"Code": answer, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": 400}}
        raise ec2.exceptions.ClientError(error, "RunInstances")

    with pytest.raises(instances.GpuError):
        launch.ensure_instance(wrapped(ec2, run_instances=refuse), lake, gpu, run)
    assert [entry.state for entry in ledger(lake)] == ["nothing"]


def test_a_ledger_that_cannot_be_read_is_no_permission(ec2: Any, gpu: GpuSettings, lake: Lake, run: str) -> None:
    lake.write(keys.ledger(f"{datetime.now(UTC):%Y-%m}", "broken", 1), b'{"usd": 1}')
    with pytest.raises(UnreadableError, match="crpbot gpu cost --rebuild"):
        launch.ensure_instance(ec2, lake, gpu, run)
    assert instances.find(ec2, gpu.project_tag, run, instances.ALIVE) == []


def test_a_runs_report_has_all_its_generations_and_is_kept_in_the_lake(
    ec2: Any, gpu: GpuSettings, lake: Lake, tmp_path: Path, run: str
) -> None:
    launched = []
    for _ in range(2):
        launched.append(launch.ensure_instance(ec2, lake, gpu, run).id)
        terminate_run(ec2, lake, gpu, run)
    launch.ensure_instance(ec2, Lake(f"file://{tmp_path}/other"), gpu, run)  # a run of the same name is another deployment's bill
    report = budget.report(ec2, lake, gpu, run)
    assert [row["id"] for row in report["instances"]] == launched
    for row in report["instances"]:
        assert (row["state"], row["usd_per_hour"], row["price_source"]) == ("terminated", 0.16, "spot price history")
        assert (row["on_demand_usd_per_hour"], row["billed_seconds"]) == (0.526, 60)
        assert row["ended_at"] is not None
    assert report["usd"] == pytest.approx(2 * 0.16 / 60, abs=2e-6)
    assert report["saved_usd"] == pytest.approx(2 * (0.526 - 0.16) / 60, abs=2e-6)
    assert report["alive"] == []
    assert lake.read_json(keys.training_run(run, "cost.json")) == report
    assert budget.report(ec2, lake, gpu, run) == report


def test_what_ec2_has_forgotten_stays_on_the_report(ec2: Any, gpu: GpuSettings, lake: Lake, wrapped: Any, run: str) -> None:
    launched = launch.ensure_instance(ec2, lake, gpu, run)
    terminate_run(ec2, lake, gpu, run)
    before = budget.report(ec2, lake, gpu, run)

    class Nothing:
        def paginate(self, **_: Any) -> list[dict[str, Any]]:
            return [{"Reservations": []}]

    after = budget.report(wrapped(ec2, get_paginator=lambda _: Nothing()), lake, gpu, run)
    assert after == before
    assert [row["id"] for row in after["instances"]] == [launched.id]


def test_the_reaper_enters_what_it_ends_and_says_what_it_came_to(
    ec2: Any, gpu: GpuSettings, lake: Lake, run: str, until: Callable[..., None]
) -> None:
    launch.ensure_instance(ec2, lake, gpu, run)
    late = datetime.now(UTC) + timedelta(minutes=gpu.max_lifetime_minutes + 1)
    (verdict,) = reap.reap(ec2, lake, gpu, lambda _: None, now=lambda: late)
    assert verdict.usd == round(0.16 / 60, 6)
    (entry,) = ledger(lake)
    assert (entry.run, entry.state, entry.usd, entry.counted_usd) == (run, "ended", verdict.usd, verdict.usd)

    until(lambda: not instances.find(ec2, gpu.project_tag, run, ("shutting-down",)))
    reap.reap(ec2, lake, gpu, lambda _: None, now=lambda: late)
    (again,) = ledger(lake)
    assert (again.usd, [bill.state for bill in again.bills]) == (entry.usd, ["terminated"])


def test_an_instance_that_ended_by_itself_is_entered_by_the_reapers_next_pass(
    ec2: Any, gpu: GpuSettings, lake: Lake, run: str
) -> None:
    launch.ensure_instance(ec2, lake, gpu, run)
    assert [entry.state for entry in ledger(lake)] == ["open"]
    terminate_run(ec2, lake, gpu, run)
    reap.reap(ec2, lake, gpu, lambda _: None)
    assert [entry.state for entry in ledger(lake)] == ["ended"]


def test_a_ledger_that_is_away_keeps_no_instance_alive_and_fails_the_pass(
    ec2: Any, gpu: GpuSettings, lake: Lake, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = launch.ensure_instance(ec2, lake, gpu, run)

    def away(*_: Any, **__: Any) -> None:
        raise LakeError("SlowDown")

    monkeypatch.setattr(budget, "settle", away)
    late = datetime.now(UTC) + timedelta(minutes=gpu.max_lifetime_minutes + 1)
    with pytest.raises(reap.TerminationError, match="the ledger could not be brought up to date: SlowDown"):
        reap.reap(ec2, lake, gpu, lambda _: None, now=lambda: late)
    assert launched.id not in [i.id for i in instances.find(ec2, gpu.project_tag, run, instances.ALIVE)]


def test_a_ledger_that_is_lost_is_rebuilt_from_records_tags_and_prices(ec2: Any, gpu: GpuSettings, lake: Lake, run: str) -> None:
    for _ in range(2):
        launch.ensure_instance(ec2, lake, gpu, run)
        terminate_run(ec2, lake, gpu, run)
    reap.reap(ec2, lake, gpu, lambda _: None)
    before = ledger(lake)
    folder = Path(lake.root.removeprefix("file://")) / "ledger"
    for path in folder.rglob("*.json"):
        path.unlink()
    assert budget.rebuild(ec2, lake, gpu) == before == ledger(lake)


def test_what_ec2_has_forgotten_is_rebuilt_from_the_runs_report_and_without_any_trace_counts_with_its_worst_case(
    ec2: Any, gpu: GpuSettings, lake: Lake, wrapped: Any, run: str
) -> None:
    launch.ensure_instance(ec2, lake, gpu, run)
    terminate_run(ec2, lake, gpu, run)
    budget.report(ec2, lake, gpu, run)
    launch.ensure_instance(ec2, lake, gpu, f"{run}-other")
    terminate_run(ec2, lake, gpu, f"{run}-other")
    (before, _) = ledger(lake)
    folder = Path(lake.root.removeprefix("file://")) / "ledger"
    for path in folder.rglob("*.json"):
        path.unlink()

    class Forgotten:
        def paginate(self, **_: Any) -> list[dict[str, Any]]:
            return [{"Reservations": []}]

    def paginator(name: str) -> Any:
        return Forgotten() if name == "describe_instances" else ec2.get_paginator(name)

    kept, lost = budget.rebuild(wrapped(ec2, get_paginator=paginator), lake, gpu)
    assert kept == before
    assert (lost.state, lost.bills, lost.counted_usd) == ("open", (), WORST)


def test_the_months_report_adds_up(gpu: GpuSettings, lake: Lake) -> None:
    spent(lake, 1.5, "2026-11", "run-a", 1)
    spent(lake, 0.5, "2026-11", "run-a", 2)
    spent(lake, 9.0, "2026-10", "run-b", 1)
    report = budget.month_report(lake, gpu, "2026-11")
    assert [(row["run"], row["generation"], row["usd"]) for row in report["launches"]] == [("run-a", 1, 1.5), ("run-a", 2, 0.5)]
    assert (report["usd"], report["on_demand_usd"], report["saved_usd"], report["counted_usd"]) == (2.0, 4.0, 2.0, 2.0)
    assert report["max_month_usd"] == 50
