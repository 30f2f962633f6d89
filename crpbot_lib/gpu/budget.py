"""What may still be spent, checked before each launch, and what was: the ledger.

The ledger is one object a run and generation, under the UTC month in which the generation was begun. A launcher writes it before
RunInstances with the generation's worst case, then adds up: of two launchers at once at least one sees the other's. When the
instances have ended their bills take the place of the worst case. Both the cost report and the reaper do that, for whatever EC2
shows, and doing it again changes nothing.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import cost, instances
from crpbot_lib.gpu.cost import Bill
from crpbot_lib.gpu.instances import UTC_NOW, GpuError, Instance, LaunchRefusedError
from crpbot_lib.gpu.records import LaunchRecord, record_of, records
from crpbot_lib.lake import KeyExistsError, KeyMissingError, Lake, UnreadableError, keys

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client

log = logging.getLogger(__name__)


class BudgetExceededError(LaunchRefusedError):
    """A launch could cost more than a cap allows; the message has both sums. Nothing was launched."""


class Entry(BaseModel):
    """One generation of a run in the ledger. USD, UTC.

    ``open``: something may still cost, at most ``worst_usd``; ``ended``: every instance has its final bill; ``nothing``: no
    instance was launched.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    generation: int
    month: str
    sequence: int
    """Of the generation's launches the last; when it has ended, all have."""
    state: Literal["open", "ended", "nothing"]
    worst_usd: float
    deadline: datetime
    bills: tuple[Bill, ...] = ()

    @property
    def key(self) -> str:
        return keys.ledger(self.month, self.run, self.generation)

    @property
    def usd(self) -> float:
        """What the known bills come to; those of living instances up to when they were written."""
        return sum(bill.usd or 0.0 for bill in self.bills)

    @property
    def counted_usd(self) -> float:
        """What counts against a cap: the bills where all have ended and have a price, else the worst case as well."""
        if self.state == "nothing":
            return 0.0
        ended = sum(bill.usd or 0.0 for bill in self.bills if bill.ended_at is not None)
        final = self.state == "ended" and all(bill.usd is not None and bill.ended_at is not None for bill in self.bills)
        return ended if final else ended + self.worst_usd


def reserve(ec2: EC2Client, lake: Lake, gpu: GpuSettings, record: LaunchRecord, *, now: Callable[[], datetime] = UTC_NOW) -> None:
    """Reserves the worst case of the record's generation under both caps, before RunInstances; again and again without harm.

    Raises BudgetExceededError, and reserves nothing, where the run's generations or the month could come to more than the caps;
    what another launcher of the run has reserved stays, for it may be about to launch. Any error of S3 or EC2 propagates: a sum
    that is not known is no permission.
    """
    at = now()
    found = instances.find(ec2, gpu.project_tag)
    settle(ec2, lake, found, now=now)
    mine, opened = _open(lake, record)
    # written, then read: whoever reserves at the same time sees this reservation, or this one sees theirs
    began = {f"{at:%Y-%m}", f"{at - timedelta(minutes=gpu.max_lifetime_minutes):%Y-%m}", mine.month}
    entries = [entry for name in began for entry in month(lake, name) if entry.month == f"{at:%Y-%m}" or entry.state == "open"]
    covered = {(entry.run, entry.generation) for entry in entries if entry.state == "open"}
    own = instances.lake_id(lake)
    # another deployment's, or of a launcher that was overtaken
    others = [i for i in found if i.alive and not (i.tags.get(instances.TAG_LAKE) == own and (i.run, i.generation) in covered)]
    worst = mine.worst_usd
    run_usd = sum(entry.counted_usd for entry in _of_run(lake, record.run))
    month_usd = sum(entry.counted_usd for entry in entries) + sum(_exposure(i, gpu) for i in others)
    sums = (
        f"run {record.run}: ${run_usd - worst:.2f} so far + ${worst:.2f} worst case of this launch = ${run_usd:.2f} "
        f"of ${gpu.max_run_usd:.2f}; month {at:%Y-%m}: ${month_usd - worst:.2f} so far + ${worst:.2f} = ${month_usd:.2f} "
        f"of ${gpu.max_month_usd:.2f}"
    )
    # half a millionth of a dollar: sums of binary fractions
    if run_usd > gpu.max_run_usd + 5e-7 or month_usd > gpu.max_month_usd + 5e-7:
        if opened:
            release(lake, record)
        raise BudgetExceededError(
            f"not launched, a cap could be exceeded: {sums}. What to do: see `crpbot gpu cost --month {at:%Y-%m}`; raise "
            "CRPBOT_GPU__MAX_RUN_USD or CRPBOT_GPU__MAX_MONTH_USD, or lower CRPBOT_GPU__MAX_LIFETIME_MINUTES and start a new run"
        )
    log.info("budget: %s", sums)


def _open(lake: Lake, record: LaunchRecord) -> tuple[Entry, bool]:
    """The entry of the record's generation, which from now on counts with its worst case, and whether it did not before."""
    mine = _entry(record)
    before: Entry | None = None
    try:
        lake.write_json(mine.key, mine.model_dump(mode="json"), only_if_absent=True)
    except KeyExistsError:
        before = _read(lake, mine.key)
        if before is not None:
            # what has ended of this generation stays on the bill
            worst, sequence = max(before.worst_usd, mine.worst_usd), max(before.sequence, mine.sequence)
            mine = mine.model_copy(update={"worst_usd": worst, "sequence": sequence, "bills": before.bills})
        if mine != before:
            _write(lake, mine)
    return mine, before is None or before.state != "open"


def release(lake: Lake, record: LaunchRecord) -> None:
    """Takes the reservation of a generation back of which nothing was launched. What was launched all the same is settled later."""
    entry = _read(lake, keys.ledger(record.month, record.run, record.generation))
    if entry is not None and entry.state == "open":
        _write(lake, entry.model_copy(update={"state": "ended" if entry.bills else "nothing"}))


def forgotten(lake: Lake, record: LaunchRecord) -> None:
    """Closes the entry of a generation whose instance EC2 no longer shows, where its bill is known; else its worst case stays."""
    entry = _read(lake, keys.ledger(record.month, record.run, record.generation))
    if entry is None or entry.state != "open" or any(bill.ended_at is None for bill in entry.bills):
        return
    if any(bill.sequence >= entry.sequence for bill in entry.bills):
        _write(lake, entry.model_copy(update={"state": "ended"}))


def settle(
    ec2: EC2Client, lake: Lake, found: Iterable[Instance], *, anew: bool = False, now: Callable[[], datetime] = UTC_NOW
) -> list[Entry]:
    """Brings the ledger up to the instances ``found``, of which those of other lakes are passed over.

    Returns the entries of their generations, the bills of living instances up to now. ``anew``: bills that were final are
    computed again.
    """
    own = instances.lake_id(lake)
    groups: dict[tuple[str, int], list[Instance]] = defaultdict(list)
    for instance in found:
        if instance.tags.get(instances.TAG_LAKE) == own and instance.run:
            groups[instance.run, instance.generation].append(instance)
    return [_settle(ec2, lake, group, anew, now()) for group in groups.values()]


def _settle(ec2: EC2Client, lake: Lake, group: Sequence[Instance], anew: bool, at: datetime) -> Entry:
    """The entry of one generation, with the bills of ``group``."""
    by_id = {instance.id: record_of(lake, instance) for instance in group}
    recorded = next((record for record in by_id.values() if record is not None), None)
    entry = _entry(recorded) if recorded else _entry_without_record(group[0])
    before = _read(lake, entry.key)
    bills = {bill.id: bill for bill in before.bills} if before else {}
    for instance in group:
        old = bills.get(instance.id)
        if old is not None and old.ended_at is not None:
            if old.state == instance.state and not anew:
                continue
            # the end was dated when it was first seen; a later look dates it no later
            instance = replace(instance, ended_at=instance.ended_at or old.ended_at)
        bills[instance.id] = _bill(ec2, instance, by_id[instance.id], at)
    new = before or entry
    over = new.deadline <= at or any(bill.sequence >= new.sequence for bill in bills.values())
    # a generation whose last launch was not seen yet may still begin to cost
    state: Literal["open", "ended"] = "ended" if over and not any(i.alive for i in group) else "open"
    new = new.model_copy(update={"state": state, "bills": tuple(bills[name] for name in sorted(bills))})
    if before is None or anew or _facts(before) != _facts(new):
        _write(lake, new)
    return new


def _facts(entry: Entry) -> Any:
    """What is worth a write; the running bill of a living instance is not."""
    return entry.state, [(bill.id, bill.state, bill.ended_at) for bill in entry.bills]


def _bill(ec2: EC2Client, instance: Instance, record: LaunchRecord | None, at: datetime) -> Bill:
    changes: Sequence[cost.Change] = ()
    if instance.market == "spot":
        changes = cost.spot_changes(ec2, instance.type, instance.zone, instance.launched_at, instance.ended_at or at)
    return cost.bill(instance, record, at, changes)


def report(ec2: EC2Client, lake: Lake, gpu: GpuSettings, run: str, *, now: Callable[[], datetime] = UTC_NOW) -> dict[str, Any]:
    """The bill of all instances of ``run``, those that EC2 has forgotten from the ledger, written to the run's ``cost.json``."""
    fresh = {entry.key: entry for entry in settle(ec2, lake, instances.find(ec2, gpu.project_tag, run, lake=lake), now=now)}
    entries = {entry.key: entry for entry in _of_run(lake, run)} | fresh
    bills = [bill for entry in entries.values() for bill in entry.bills]
    total = {"run": run, "instances": [_row(bill) for bill in bills], **totals(bills)}
    total["alive"] = [bill.id for bill in bills if bill.ended_at is None]
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


def _row(bill: Bill) -> dict[str, Any]:
    return bill.model_dump(mode="json")


def totals(bills: Iterable[Bill]) -> dict[str, float]:
    """Seconds billed, USD paid, USD on demand and what was saved, of all bills whose price is known."""
    known = list(bills)
    return {
        "billed_seconds": round(sum(bill.billed_seconds for bill in known), 1),
        "usd": round(sum(bill.usd or 0.0 for bill in known), 6),
        "on_demand_usd": round(sum(bill.on_demand_usd or 0.0 for bill in known), 6),
        "saved_usd": round(sum(bill.saved_usd or 0.0 for bill in known), 6),
    }


def month(lake: Lake, name: str) -> list[Entry]:
    """The ledger of one UTC month, written as 2026-11, by run and generation."""
    return [entry for key in lake.keys(keys.ledger_month(name)) if (entry := _read(lake, key)) is not None]


def month_report(lake: Lake, gpu: GpuSettings, name: str) -> dict[str, Any]:
    """The month in figures: a row a generation, the totals, and what counts against the month's cap."""
    entries = month(lake, name)
    rows = [
        {
            "run": entry.run,
            "generation": entry.generation,
            "state": entry.state,
            "instances": [bill.id for bill in entry.bills],
            **totals(entry.bills),
            "counted_usd": round(entry.counted_usd, 6),
        }
        for entry in entries
    ]
    return {
        "month": name,
        "launches": rows,
        **totals(bill for entry in entries for bill in entry.bills),
        "counted_usd": round(sum(entry.counted_usd for entry in entries), 6),
        "max_month_usd": gpu.max_month_usd,
    }


def rebuild(ec2: EC2Client, lake: Lake, gpu: GpuSettings, *, now: Callable[[], datetime] = UTC_NOW) -> list[Entry]:
    """The whole ledger anew, from launch records, from the instances and tags that EC2 still knows, and spot price history.

    What EC2 has forgotten keeps the bills that the ledger or the run's cost report has; a generation that left no trace counts
    with its worst case, unless the ledger says that nothing was launched.
    """
    found = {i.id: i for i in instances.find(ec2, gpu.project_tag, lake=lake)}
    runs = {key.split("/")[1] for key in lake.keys(keys.TRAINING_RUNS) if "/launches/" in key}
    for run in sorted(runs):
        # of a generation's records the last
        entries = {entry.key: entry for entry in map(_entry, records(lake, run))}
        known = _kept_bills(lake, run, entries)
        for entry in entries.values():
            kept = [_instance(bill, lake, entry) for bill in known if bill.generation == entry.generation and bill.id not in found]
            if kept:
                settle(ec2, lake, kept, anew=True, now=now)
            elif not lake.exists(entry.key):
                _write(lake, entry)
    settle(ec2, lake, found.values(), anew=True, now=now)
    return [written for key in lake.keys(keys.LEDGER) if (written := _read(lake, key)) is not None]


def _kept_bills(lake: Lake, run: str, entries: Iterable[str]) -> list[Bill]:
    """The bills of a run that the ledger and the run's report hold."""
    try:
        kept = {row["id"]: Bill.model_validate(row) for row in lake.read_json(keys.training_run(run, "cost.json"))["instances"]}
    except KeyMissingError:
        kept = {}
    for key in entries:
        entry = _read(lake, key)
        kept |= {bill.id: bill for bill in entry.bills} if entry else {}
    return list(kept.values())


def _instance(bill: Bill, lake: Lake, entry: Entry) -> Instance:
    """The instance of a kept bill, which EC2 has forgotten: it has ended, at its deadline where nobody saw when."""
    tags = {
        instances.TAG_LAKE: instances.lake_id(lake),
        instances.TAG_RUN: entry.run,
        instances.TAG_GENERATION: str(bill.generation),
        instances.TAG_LAUNCH: str(bill.sequence),
    }
    ended_at = bill.ended_at or entry.deadline
    return Instance(bill.id, bill.type, "terminated", bill.market, bill.zone, bill.launched_at, ended_at, bill.reason, tags)


def _entry(record: LaunchRecord) -> Entry:
    return Entry(
        run=record.run,
        generation=record.generation,
        month=record.month,
        sequence=record.sequence,
        state="open",
        worst_usd=record.worst_usd,
        deadline=record.deadline,
    )


def _entry_without_record(instance: Instance) -> Entry:
    deadline = instance.deadline or instance.launched_at
    return Entry(
        run=instance.run,
        generation=instance.generation,
        month=f"{instance.launched_at:%Y-%m}",
        sequence=instance.sequence,
        state="open",
        worst_usd=round((instance.max_usd_per_hour or 0.0) * (deadline - instance.launched_at).total_seconds() / 3600, 6),
        deadline=deadline,
    )


def _exposure(instance: Instance, gpu: GpuSettings) -> float:
    """What a living instance can come to by its tags; where they say nothing, as much as the dearest candidate could."""
    price = instance.max_usd_per_hour or max(c.on_demand_usd_per_hour for c in gpu.candidates)
    seconds = gpu.max_lifetime_minutes * 60.0
    if instance.deadline is not None:
        seconds = (instance.deadline - instance.launched_at).total_seconds()
    return price * max(seconds, 0.0) / 3600


def _of_run(lake: Lake, run: str) -> list[Entry]:
    """The run's entries, of all months."""
    found = dict.fromkeys(keys.ledger(record.month, run, record.generation) for record in records(lake, run))
    return [entry for key in found if (entry := _read(lake, key)) is not None]


def _read(lake: Lake, key: str) -> Entry | None:
    try:
        text = lake.read_json(key)
    except KeyMissingError:
        return None
    try:
        return Entry.model_validate(text)
    except ValueError as error:
        raise UnreadableError(
            f"{lake.url(key)} is no entry of the ledger ({error}); delete it and run `crpbot gpu cost --rebuild`"
        ) from error


def _write(lake: Lake, entry: Entry) -> None:
    lake.write_json(entry.key, entry.model_dump(mode="json"))
