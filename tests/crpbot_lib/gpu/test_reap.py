"""The reaper: past the deadline at once, an ended run on the second pass, never a young or a busy instance."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import instances, launch, reap
from crpbot_lib.gpu.instances import Instance
from crpbot_lib.gpu.terminate import TerminationError
from crpbot_lib.lake import Lake

GRACE = timedelta(minutes=GpuSettings().reap_grace_minutes)
NOW = datetime(2025, 5, 29, 12, tzinfo=UTC)


def instance(age_minutes: float, deadline_in_minutes: float | None, **tags: str) -> Instance:
    if deadline_in_minutes is not None:
        tags[instances.TAG_DEADLINE] = (NOW + timedelta(minutes=deadline_in_minutes)).isoformat()
    launched = NOW - timedelta(minutes=age_minutes)
    return Instance("i-1", "g5.xlarge", "running", "spot", "us-east-1a", launched, None, "", tags)


@pytest.mark.parametrize(
    ("what", "found", "run_ended", "action"),
    [
        ("busy", instance(60, 60), False, "keep"),
        ("a run nobody here knows", instance(60, 60), None, "keep"),
        ("just launched, its run not visible yet", instance(2, 118), True, "keep"),
        ("past its deadline though its run is active", instance(121, -1), False, "terminate"),
        ("past its deadline, however young", instance(2, -1), None, "terminate"),
        ("no deadline at all", instance(60, None), False, "terminate"),
        ("its run has ended, first pass", instance(60, 60), True, "suspect"),
        ("its run has ended, second pass", instance(60, 60, **{instances.TAG_REAP: "earlier"}), True, "terminate"),
        ("marked once, but its run is active again", instance(60, 60, **{instances.TAG_REAP: "earlier"}), False, "keep"),
        ("its mark was taken back", instance(60, 60, **{instances.TAG_REAP: ""}), True, "suspect"),
    ],
)
def test_the_rule(what: str, found: Instance, run_ended: bool | None, action: str) -> None:
    assert reap.judge(found, run_ended, NOW, GRACE).action == action, what


def test_an_instance_past_its_deadline_is_ended_and_a_dry_run_only_says_so(
    ec2: Any, gpu: GpuSettings, lake: Lake, until: Callable[..., None], run: str
) -> None:
    launched = launch.ensure_instance(ec2, lake, gpu, run)
    later = datetime.now(UTC) + timedelta(minutes=gpu.max_lifetime_minutes + 1)

    (verdict,) = reap.reap(ec2, lake, gpu, lambda _: False, dry_run=True, now=lambda: later)
    assert verdict.action == "terminate"
    assert [i.id for i in instances.find(ec2, gpu.project_tag, states=instances.ALIVE)] == [launched.id]

    reap.reap(ec2, lake, gpu, lambda _: False, now=lambda: later)
    until(lambda: not instances.find(ec2, gpu.project_tag, states=instances.ALIVE))


def test_an_ended_runs_instance_takes_two_passes(
    ec2: Any, gpu: GpuSettings, lake: Lake, until: Callable[..., None], run: str
) -> None:
    launch.ensure_instance(ec2, lake, gpu, run)
    later = datetime.now(UTC) + GRACE + timedelta(minutes=1)
    actions = [reap.reap(ec2, lake, gpu, lambda _: True, now=lambda: later)[0].action for _ in range(2)]
    assert actions == ["suspect", "terminate"]
    until(lambda: not instances.find(ec2, gpu.project_tag, states=instances.ALIVE))


def test_a_run_that_goes_on_has_its_mark_taken_back(
    ec2: Any, gpu: GpuSettings, lake: Lake, until: Callable[..., None], run: str
) -> None:
    launch.ensure_instance(ec2, lake, gpu, run)
    later = datetime.now(UTC) + GRACE + timedelta(minutes=1)
    # marked as failed, cleared, and failed again: the second failure is not the first one's second pass
    ended = [True, False, True, True]
    actions = [reap.reap(ec2, lake, gpu, lambda _, over=over: over, now=lambda: later)[0].action for over in ended]
    assert actions == ["suspect", "keep", "suspect", "terminate"]
    until(lambda: not instances.find(ec2, gpu.project_tag, states=instances.ALIVE))


def test_of_another_lakes_runs_nothing_is_known_here_so_only_the_deadline_counts(
    ec2: Any, gpu: GpuSettings, lake: Lake, tmp_path: Path, until: Callable[..., None], run: str
) -> None:
    launch.ensure_instance(ec2, Lake(f"file://{tmp_path}/other"), gpu, run)
    later = datetime.now(UTC) + GRACE + timedelta(minutes=1)
    actions = [reap.reap(ec2, lake, gpu, lambda _: True, now=lambda: later)[0].action for _ in range(2)]
    assert actions == ["keep", "keep"]

    past = datetime.now(UTC) + timedelta(minutes=gpu.max_lifetime_minutes + 1)
    reap.reap(ec2, lake, gpu, lambda _: False, now=lambda: past)
    until(lambda: not instances.find(ec2, gpu.project_tag, states=instances.ALIVE))


def test_an_instance_that_cannot_be_ended_shields_no_other_and_is_named_at_the_end(
    ec2: Any, gpu: GpuSettings, lake: Lake, run: str, until: Callable[..., None]
) -> None:
    shielded = launch.ensure_instance(ec2, lake, gpu, f"{run}-a")
    odd = launch.ensure_instance(ec2, lake, gpu, f"{run}-b")
    ec2.create_tags(Resources=[odd.id], Tags=[{"Key": instances.TAG_GENERATION, "Value": "one"}])
    launch.ensure_instance(ec2, lake, gpu, f"{run}-c")
    ec2.modify_instance_attribute(InstanceId=shielded.id, DisableApiTermination={"Value": True})
    past = datetime.now(UTC) + timedelta(minutes=gpu.max_lifetime_minutes + 1)
    try:
        with pytest.raises(TerminationError, match=f"1 failures with 3 instances: {shielded.id}"):
            reap.reap(ec2, lake, gpu, lambda _: False, now=lambda: past)
        until(lambda: [i.id for i in instances.find(ec2, gpu.project_tag, states=instances.ALIVE)] == [shielded.id])
    finally:
        ec2.modify_instance_attribute(InstanceId=shielded.id, DisableApiTermination={"Value": False})


def test_another_projects_instance_is_never_looked_at(ec2: Any, gpu: GpuSettings, lake: Lake) -> None:
    launch.ensure_instance(ec2, lake, gpu.model_copy(update={"project_tag": "somebody-else"}), "run-x")
    later = datetime.now(UTC) + timedelta(days=1)
    assert reap.reap(ec2, lake, gpu, lambda _: True, now=lambda: later) == []
