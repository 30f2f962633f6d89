"""Layer 4: ends tagged instances that nothing else ended. The DAG and `crpbot gpu reap` share this one implementation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import budget, instances
from crpbot_lib.gpu.instances import API_ERRORS, UTC_NOW, Instance
from crpbot_lib.gpu.terminate import TerminationError, terminate
from crpbot_lib.lake import Lake, LakeError

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What the reaper decided about one living instance: ``keep``, ``suspect`` (ends on the next pass) or ``terminate``.

    ``mark``: what its tag is to be from now on, None: as it is. ``usd``: what it came to, where it was ended and its price is
    known."""

    instance: Instance
    action: str
    why: str
    mark: str | None = None
    usd: float | None = None


def judge(instance: Instance, run_ended: bool | None, now: datetime, grace: timedelta, *, overtaken: bool = False) -> Verdict:
    """The rule. ``run_ended``: True, False, or None when nobody knows; then only the deadline counts. ``grace``: of an instance
    that was just launched. ``overtaken``: a later launch of the same run is alive.

    Past the deadline, which its tag alone says, or with no readable deadline after the grace: terminate. A run that has ended,
    or another instance that has taken over: suspect on the first pass, terminate on the second, so that a state read at the wrong
    moment kills nothing. A run that is seen to go on, because it was cleared, has its mark taken back.
    """
    age = now - instance.launched_at
    deadline = instance.deadline
    if deadline is not None and now > deadline:
        return Verdict(instance, "terminate", f"past its deadline {deadline.isoformat()}")
    if age < grace:
        return Verdict(instance, "keep", f"launched {age.total_seconds():.0f} s ago")
    if deadline is None:
        return Verdict(instance, "terminate", f"carries no readable {instances.TAG_DEADLINE} tag")
    marked = instance.tags.get(instances.TAG_REAP)
    if run_ended or overtaken:
        why = "its run has ended" if run_ended else "a later launch of its run is alive"
        if marked:
            return Verdict(instance, "terminate", f"{why} (first seen {marked})")
        return Verdict(instance, "suspect", f"{why}; ends on the next pass", mark=now.isoformat())
    return Verdict(
        instance,
        "keep",
        f"its run is {'not known here' if run_ended is None else 'active'}; deadline {deadline.isoformat()}",
        mark="" if marked and run_ended is False else None,
    )


def reap(
    ec2: EC2Client,
    lake: Lake | None,
    gpu: GpuSettings,
    run_ended: Callable[[Instance], bool | None],
    *,
    dry_run: bool = False,
    now: Callable[[], datetime] = UTC_NOW,
) -> list[Verdict]:
    """Judges every living instance of the project and acts on it; ``dry_run`` only says what it would do.

    ``run_ended`` is asked only about instances that work on ``lake``: of another deployment's runs nothing is known here, so for
    its instances only the deadline counts. Without a lake that holds for all of them, and no ledger is kept.
    An API error while looking propagates: "could not look" is never reported as "nothing there". One while acting on an instance
    keeps none of the others from being ended; TerminationError at the end names them all. What has ended, by whatever hand, is
    entered into the ledger.
    """
    at = now()
    own = instances.lake_id(lake) if lake else None
    failed: list[str] = []
    alive = instances.find(ec2, gpu.project_tag, states=instances.ALIVE)
    grace = timedelta(minutes=gpu.reap_grace_minutes)
    verdicts = [
        judge(i, run_ended(i) if own and i.tags.get(instances.TAG_LAKE) == own else None, at, grace, overtaken=_overtaken(i, alive))
        for i in alive
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
            if verdict.mark is not None:
                ec2.create_tags(Resources=[i.id], Tags=[{"Key": instances.TAG_REAP, "Value": verdict.mark}])
            if verdict.action == "terminate":
                terminate(ec2, [i.id])
        except TerminationError as error:
            failed.append(str(error))
        except API_ERRORS as error:
            failed.append(f"{i.id} could not be marked: {error}")
    if not verdicts:
        log.info("no living instance tagged %s=%s", instances.TAG_PROJECT, gpu.project_tag)
    if lake and not dry_run:
        try:
            verdicts = _with_costs(ec2, lake, gpu, verdicts, now)
        except (*API_ERRORS, LakeError) as error:
            # after all that had to end was asked to
            failed.append(f"the ledger could not be brought up to date: {error}")
    if failed:
        raise TerminationError(
            f"{len(failed)} failures with {len(verdicts)} instances: {'; '.join(failed)}. "
            "The next pass tries again; end what stays by hand in the EC2 console."
        )
    return verdicts


def _overtaken(instance: Instance, alive: list[Instance]) -> bool:
    same = [i for i in alive if all(i.tags.get(t) == instance.tags.get(t) for t in (instances.TAG_LAKE, instances.TAG_RUN))]
    return bool(instance.run) and instances.newest(same) is not instance


def _with_costs(
    ec2: EC2Client, lake: Lake, gpu: GpuSettings, verdicts: list[Verdict], now: Callable[[], datetime]
) -> list[Verdict]:
    """Enters every ended instance into the ledger, and says of those that were ended here what they came to."""
    entries = budget.settle(ec2, lake, instances.find(ec2, gpu.project_tag, lake=lake), now=now)
    usd = {bill.id: bill.usd for entry in entries for bill in entry.bills}
    told: list[Verdict] = []
    for verdict in verdicts:
        if verdict.action == "terminate" and (spent := usd.get(verdict.instance.id)) is not None:
            log.warning("%s of run %s came to $%.4f", verdict.instance.id, verdict.instance.run, spent)
            verdict = replace(verdict, usd=spent)
        told.append(verdict)
    return told
