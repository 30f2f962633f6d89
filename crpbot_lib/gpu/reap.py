"""Layer 4: ends tagged instances that nothing else ended. The DAG and `crpbot gpu reap` share this one implementation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import instances
from crpbot_lib.gpu.instances import UTC_NOW, Instance
from crpbot_lib.gpu.terminate import terminate

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client

log = logging.getLogger(__name__)

BOOT_GRACE = timedelta(minutes=5)
"""A younger instance may belong to a run whose state is not visible yet."""


@dataclass(frozen=True)
class Verdict:
    """What the reaper decided about one living instance: ``keep``, ``suspect`` (ends on the next pass) or ``terminate``."""

    instance: Instance
    action: str
    why: str


def judge(instance: Instance, run_ended: bool | None, now: datetime) -> Verdict:
    """The rule. ``run_ended``: True, False, or None when nobody knows; then only the deadline counts.

    Past the deadline, or with no readable deadline after the boot grace: terminate. A run that has ended: suspect on the first
    pass, terminate on the second, so that a state read at the wrong moment kills nothing.
    """
    age = now - instance.launched_at
    deadline = instance.deadline
    if deadline is not None and now > deadline:
        return Verdict(instance, "terminate", f"past its deadline {deadline.isoformat()}")
    if age < BOOT_GRACE:
        return Verdict(instance, "keep", f"launched {age.total_seconds():.0f} s ago")
    if deadline is None:
        return Verdict(instance, "terminate", f"carries no readable {instances.TAG_DEADLINE} tag")
    if run_ended:
        if instances.TAG_REAP in instance.tags:
            return Verdict(instance, "terminate", f"its run has ended (first seen {instance.tags[instances.TAG_REAP]})")
        return Verdict(instance, "suspect", "its run has ended; ends on the next pass")
    return Verdict(
        instance,
        "keep",
        f"its run is {'not known here' if run_ended is None else 'active'}; deadline {deadline.isoformat()}",
    )


def reap(
    ec2: EC2Client,
    gpu: GpuSettings,
    run_ended: Callable[[Instance], bool | None],
    *,
    dry_run: bool = False,
    now: Callable[[], datetime] = UTC_NOW,
) -> list[Verdict]:
    """Judges every living instance of the project and acts on it; ``dry_run`` only says what it would do.

    An API error propagates: "could not look" is never reported as "nothing there".
    """
    at = now()
    verdicts = [judge(i, run_ended(i), at) for i in instances.find(ec2, gpu.project_tag, states=instances.ALIVE)]
    for verdict in verdicts:
        i = verdict.instance
        log.log(
            logging.INFO if verdict.action == "keep" else logging.WARNING,
            "%s%s %s (%s, %s, run %s): %s",
            "would " if dry_run and verdict.action != "keep" else "",
            verdict.action,
            i.id,
            i.type,
            i.state,
            i.run or "unknown",
            verdict.why,
        )
        if dry_run:
            continue
        if verdict.action == "suspect":
            ec2.create_tags(Resources=[i.id], Tags=[{"Key": instances.TAG_REAP, "Value": at.isoformat()}])
        elif verdict.action == "terminate":
            terminate(ec2, [i.id])
    if not verdicts:
        log.info("no living instance tagged %s=%s", instances.TAG_PROJECT, gpu.project_tag)
    return verdicts
