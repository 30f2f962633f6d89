"""Layer 4: ends tagged instances that nothing else ended. The DAG and `crpbot gpu reap` share this one implementation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from botocore.exceptions import BotoCoreError, ClientError

from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import instances
from crpbot_lib.gpu.instances import UTC_NOW, Instance
from crpbot_lib.gpu.terminate import TerminationError, terminate
from crpbot_lib.lake import Lake

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
    lake: Lake,
    gpu: GpuSettings,
    run_ended: Callable[[Instance], bool | None],
    *,
    dry_run: bool = False,
    now: Callable[[], datetime] = UTC_NOW,
) -> list[Verdict]:
    """Judges every living instance of the project and acts on it; ``dry_run`` only says what it would do.

    ``run_ended`` is asked only about instances that work on ``lake``: of another deployment's runs nothing is known here, so for
    its instances only the deadline counts.
    An API error while looking propagates: "could not look" is never reported as "nothing there". One while acting on an instance
    keeps none of the others from being ended; TerminationError at the end names them all.
    """
    at = now()
    own = instances.lake_id(lake)
    failed: list[str] = []
    verdicts = [
        judge(i, run_ended(i) if i.tags.get(instances.TAG_LAKE) == own else None, at)
        for i in instances.find(ec2, gpu.project_tag, states=instances.ALIVE)
    ]
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
        try:
            if verdict.action == "suspect":
                ec2.create_tags(Resources=[i.id], Tags=[{"Key": instances.TAG_REAP, "Value": at.isoformat()}])
            elif verdict.action == "terminate":
                terminate(ec2, [i.id])
        except TerminationError as error:
            failed.append(str(error))
        except (ClientError, BotoCoreError) as error:
            failed.append(f"{i.id} could not be marked: {error}")
    if not verdicts:
        log.info("no living instance tagged %s=%s", instances.TAG_PROJECT, gpu.project_tag)
    if failed:
        raise TerminationError(
            f"{len(failed)} of {len(verdicts)} instances could not be handled: {'; '.join(failed)}. "
            "The next pass tries again; end what stays by hand in the EC2 console."
        )
    return verdicts
