"""Ending a run's instances, by tag, until EC2 itself says that they are terminated."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

from botocore.exceptions import ClientError

from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import instances
from crpbot_lib.gpu.instances import API_ERRORS, UTC_NOW, GpuError, Instance
from crpbot_lib.lake import Lake

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client

log = logging.getLogger(__name__)

# How often the same question may fail before the failure is the answer. Throttling and a network hiccup are retried by botocore
# already; this covers an API that is away for longer.
_API_TRIES = 5


class TerminationError(GpuError):
    """Instances may still be alive; the message names them. The reaper and the deadlines are the next layers."""


def terminate(ec2: EC2Client, ids: list[str]) -> list[str]:
    """Asks EC2 to terminate ``ids``. Returns those that EC2 does not know: ended long ago, or launched a moment ago and not
    visible yet (EC2 API reference, "Eventual consistency"); whoever has just launched one asks again.

    Every id is asked for, whatever happens to the others; TerminationError at the end names those that EC2 refused.
    """
    refused: list[str] = []
    unknown: list[str] = []
    for instance_id in ids:
        try:
            ec2.terminate_instances(InstanceIds=[instance_id])
        except API_ERRORS as error:
            if isinstance(error, ClientError) and error.response["Error"]["Code"] == "InvalidInstanceID.NotFound":
                log.warning("%s is unknown to EC2 (a new instance may be invisible for a moment)", instance_id)
                unknown.append(instance_id)
            else:
                refused.append(f"{instance_id} could not be terminated: {error}")
    if refused:
        raise TerminationError("; ".join(refused))
    return unknown


def terminate_run(
    ec2: EC2Client,
    lake: Lake,
    gpu: GpuSettings,
    run: str,
    *,
    generation: int | None = None,
    now: Callable[[], datetime] = UTC_NOW,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Instance]:
    """Terminates every instance tagged with ``run`` of ``lake`` and waits until each is ``terminated``.

    ``generation``: only those of generations up to this one, for a launcher that replaces it while another may have done so.
    Looks twice, with ``gpu.visibility_grace_seconds`` between, before it believes that there is nothing to end. Returns the
    run's instances, all terminated. Raises TerminationError when one is not within ``gpu.termination_timeout_seconds``.
    """
    started = now()
    failures = 0
    looked_twice = False
    while True:
        try:
            seen = instances.find(ec2, gpu.project_tag, run, lake=lake)
            if generation is not None:
                seen = [i for i in seen if i.generation <= generation]
            alive = [i for i in seen if i.alive]
            if alive:
                log.info("terminating %s of %s", ", ".join(f"{i.id} ({i.type}, {i.state})" for i in alive), run)
                terminate(ec2, [i.id for i in alive])
            failures = 0
        except (*API_ERRORS, TerminationError) as error:
            failures += 1
            if failures >= _API_TRIES:
                raise TerminationError(
                    f"EC2 answers {failures} times with an error, so it is unknown whether instances of {run} live: {error}. "
                    "Run `crpbot gpu list`; the reaper and each instance's own deadline end what is left."
                ) from error
            log.warning("EC2 error %d of %d while ending %s: %s", failures, _API_TRIES, run, error)
            sleep(min(30.0, 2.0**failures))
            continue
        open_ = [i for i in seen if i.state != "terminated"]
        if not open_ and not looked_twice:
            # a new instance may be invisible to DescribeInstances for a moment (EC2 API reference, eventual consistency), so one
            # answer without a living instance proves nothing
            looked_twice = True
            sleep(gpu.visibility_grace_seconds)
            continue
        if not open_:
            for i in seen:
                log.info("%s is terminated (%s)", i.id, i.reason or "no reason given")
            return seen
        waited = (now() - started).total_seconds()
        if waited > gpu.termination_timeout_seconds:
            raise TerminationError(
                f"{', '.join(f'{i.id} is {i.state}' for i in open_)} {waited:.0f} s after TerminateInstances for {run}: "
                "look at the EC2 console; the reaper tries again every ten minutes."
            )
        sleep(gpu.poll_seconds)
