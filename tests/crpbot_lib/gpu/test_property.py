"""Whatever dies, and whenever: one living instance a run at most, and none in the end.

A fake of EC2's contract and an S3 in memory stand here, small and strict, because thousands of steps must be fast; requests and
answers are checked against botocore's own model. Launchers, teardowns and reapers are threads of which one moves at a time, from
one call of AWS to the next, so that hypothesis chooses how they interleave and where each of them is killed, as SIGKILL would:
before a call, or after it with the answer lost.

CI runs the same examples each time. For more, and other ones each time:

    PROPERTY_EXAMPLES=5000 .venv/bin/python -m pytest tests/crpbot_lib/gpu/test_property.py -k interleaving
"""

from __future__ import annotations

import copy
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, ClassVar

import botocore.session
import pytest
from botocore.exceptions import ClientError, ReadTimeoutError
from botocore.hooks import HierarchicalEmitter
from botocore.validate import ParamValidator
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from crpbot_lib.config import GpuCandidate, GpuSettings
from crpbot_lib.gpu import budget, instances, launch, reap
from crpbot_lib.gpu.instances import Instance
from crpbot_lib.gpu.terminate import terminate_run
from crpbot_lib.lake import KeyExistsError, KeyMissingError, Lake, LakeError, keys

# two hours before the month's end: a ledger of two months
START = datetime(2025, 5, 31, 22, 0, tzinfo=UTC)
ZONES = ("us-east-1a", "us-east-1b")
PRICES = {("g5.xlarge", "us-east-1a"): 0.30, ("g5.xlarge", "us-east-1b"): 0.35, ("g4dn.xlarge", "us-east-1b"): 0.16}
ON_DEMAND = {"g5.xlarge": 1.0, "g4dn.xlarge": 0.5}
GPU = GpuSettings(
    candidates=tuple(
        GpuCandidate(instance_type=kind, gpu="any", on_demand_usd_per_hour=price, subnet_ids=("subnet-1a", "subnet-1b"))
        for kind, price in ON_DEMAND.items()
    ),
    security_group_ids=("sg-1",),
    max_run_usd=1000,
)
RUNS = ("run-a", "run-b")
WORST = 2.0
"""USD: two hours of the dearest candidate, whichever is launched."""
BOOT, SHUTDOWN, MEMORY = timedelta(seconds=20), timedelta(seconds=40), timedelta(hours=1)
MAX_LAG = timedelta(seconds=8)
"""How far DescribeInstances is behind; less than ``visibility_grace_seconds``, which is what the teardown's two looks bear."""

EC2_MODEL = botocore.session.get_session().get_service_model("ec2")
# every example launches and loses instances by the dozen: what the library says of it is of no use here
pytestmark = pytest.mark.usefixtures("quiet")
TURNING_POINTS = ("RunInstances", "RunInstances", "TerminateInstances", "DescribeInstances", "PutObject", None, None, None)
FAULTS = ("killed before", "killed after", "error", "throttled", "answer lost")


@pytest.fixture
def quiet() -> Iterator[None]:
    logger = logging.getLogger("crpbot_lib.gpu")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


class Killed(BaseException):
    """SIGKILL: no handler of the code under test sees it, and its process makes no further call."""


@dataclass
class Machine:
    """An instance as EC2 has it."""

    id: str
    request: dict[str, Any]
    launched_at: datetime
    tags: dict[str, str]
    overtaken: bool
    """The run had a newer launch record when EC2 carried out the request."""
    launcher: int = 0
    """The actor that EC2 carried it out for."""
    ending_at: datetime | None = None
    reason: tuple[str, str] = ("", "")

    def state(self, at: datetime) -> str:
        if self.ending_at is not None and at >= self.ending_at:
            return "terminated" if at >= self.ending_at + SHUTDOWN else "shutting-down"
        return "running" if at >= self.launched_at + BOOT else "pending"

    def forgotten(self, at: datetime) -> bool:
        return self.ending_at is not None and at >= self.ending_at + SHUTDOWN + MEMORY

    @property
    def run(self) -> str:
        return self.tags[instances.TAG_RUN]

    @property
    def deadline(self) -> datetime:
        return datetime.fromisoformat(self.tags[instances.TAG_DEADLINE])


@dataclass
class World:
    """EC2, S3 and the clock."""

    now: datetime = START
    lag: timedelta = timedelta(0)
    machines: list[Machine] = field(default_factory=list)
    tokens: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    without_capacity: set[tuple[str, str]] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    """Instances whose job has come to nothing."""
    over: set[str] = field(default_factory=set)
    """Runs that have ended."""
    max_month_usd: float = 1000

    @property
    def gpu(self) -> GpuSettings:
        return GPU.model_copy(update={"max_month_usd": self.max_month_usd})

    def copy(self) -> World:
        """Another world that has come to the same."""
        machines = [replace(machine, tags=dict(machine.tags)) for machine in self.machines]
        sets = {name: set(getattr(self, name)) for name in ("without_capacity", "failed", "over")}
        return replace(self, machines=machines, tokens=dict(self.tokens), objects=dict(self.objects), **sets)

    def alive(self, run: str | None = None) -> list[Machine]:
        return [m for m in self.machines if m.state(self.now) in instances.ALIVE and run in (None, m.run)]

    def end(self, machine: Machine, code: str, message: str) -> None:
        if machine.ending_at is None:
            machine.ending_at, machine.reason = self.now, (code, message)

    # --- EC2's actions ---

    def run_instances(self, request: dict[str, Any]) -> dict[str, Any]:
        self._check_safeguards(request)
        token = request["ClientToken"]
        before = next((m for m in self.machines if m.id == self.tokens.get(token)), None)
        if before is not None:
            if before.request != request:
                raise refusal("IdempotentParameterMismatch")
            if before.forgotten(self.now):
                # the token is remembered for longer, at least a day
                raise refusal("IdempotentInstanceTerminated")
            return {"Instances": [self._shown(before, self.now)]}
        where = (request["InstanceType"], zone_of(request["SubnetId"]))
        if where in self.without_capacity or where not in PRICES:
            raise refusal("InsufficientInstanceCapacity", 500)
        if float(request["InstanceMarketOptions"]["SpotOptions"]["MaxPrice"]) < PRICES[where]:
            raise refusal("SpotMaxPriceTooLow")
        tags = {tag["Key"]: tag["Value"] for tag in request["TagSpecifications"][0]["Tags"]}
        run = tags[instances.TAG_RUN]
        numbers = [int(key.rpartition("/")[2].removesuffix(".json")) for key in self.objects if f"/{run}/launches/" in f"/{key}"]
        overtaken = max(numbers, default=0) > int(tags.get(instances.TAG_LAUNCH, "0"))
        machine = Machine(f"i-{len(self.machines) + 1:017x}", request, self.now, tags, overtaken)
        self.machines.append(machine)
        self.tokens[token] = machine.id
        return {"Instances": [self._shown(machine, self.now)]}

    @staticmethod
    def _check_safeguards(request: dict[str, Any]) -> None:
        assert request["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 2, "HttpEndpoint": "enabled"}
        assert request["InstanceInitiatedShutdownBehavior"] == "terminate"
        assert "KeyName" not in request
        assert all(device["Ebs"]["Encrypted"] and device["Ebs"]["DeleteOnTermination"] for device in request["BlockDeviceMappings"])
        assert request["UserData"].startswith("#!/bin/bash\nshutdown -h +120\n")
        specified = {s["ResourceType"]: {tag["Key"] for tag in s["Tags"]} for s in request["TagSpecifications"]}
        wanted = {getattr(instances, name) for name in dir(instances) if name.startswith("TAG_")} - {instances.TAG_REAP}
        assert all(wanted <= specified[kind] for kind in ("instance", "volume"))

    def describe_instances(self, request: dict[str, Any]) -> dict[str, Any]:
        at, found = self.now - self.lag, []
        for machine in self.machines:
            if machine.launched_at > at or machine.forgotten(self.now):
                continue
            values = {f"tag:{key}": value for key, value in machine.tags.items()} | {"instance-state-name": machine.state(at)}
            if all(values.get(f["Name"]) in f["Values"] for f in request["Filters"]):
                found.append(self._shown(machine, at))
        return {"Reservations": [{"Instances": [item]} for item in found]}

    def _shown(self, machine: Machine, at: datetime) -> dict[str, Any]:
        code, message = machine.reason
        shown: dict[str, Any] = {
            "InstanceId": machine.id,
            "InstanceType": machine.request["InstanceType"],
            "InstanceLifecycle": "spot",
            "State": {"Name": machine.state(at)},
            "LaunchTime": machine.launched_at,
            "Placement": {"AvailabilityZone": zone_of(machine.request["SubnetId"])},
            "Tags": [{"Key": key, "Value": value} for key, value in machine.tags.items()],
        }
        if machine.ending_at is not None and machine.ending_at <= at:
            stamp = f" ({machine.ending_at:%Y-%m-%d %H:%M:%S} GMT)" if code.startswith("Client.") else ""
            shown |= {"StateTransitionReason": f"{message}{stamp}", "StateReason": {"Code": code, "Message": message}}
        return shown

    def terminate_instances(self, request: dict[str, Any]) -> dict[str, Any]:
        found = [self._visible(i) for i in request["InstanceIds"]]
        for machine in found:
            self.end(machine, "Client.UserInitiatedShutdown", "User initiated")
        return {"TerminatingInstances": [{"InstanceId": m.id, "CurrentState": {"Name": m.state(self.now)}} for m in found]}

    def create_tags(self, request: dict[str, Any]) -> dict[str, Any]:
        for resource in request["Resources"]:
            self._visible(resource).tags |= {tag["Key"]: tag["Value"] for tag in request["Tags"]}
        return {}

    def _visible(self, instance_id: str) -> Machine:
        for machine in self.machines:
            if machine.id == instance_id and machine.launched_at <= self.now - self.lag and not machine.forgotten(self.now):
                return machine
        raise refusal("InvalidInstanceID.NotFound")

    def describe_subnets(self, request: dict[str, Any]) -> dict[str, Any]:
        return {
            "Subnets": [{"SubnetId": i, "AvailabilityZone": f"us-east-{i.removeprefix('subnet-')}"} for i in request["SubnetIds"]]
        }

    def describe_spot_price_history(self, request: dict[str, Any]) -> dict[str, Any]:
        rows = [
            {"InstanceType": kind, "AvailabilityZone": zone, "SpotPrice": f"{price:.6f}", "Timestamp": START - timedelta(days=1)}
            for (kind, zone), price in PRICES.items()
            if kind in request["InstanceTypes"] and request.get("AvailabilityZone", zone) == zone
        ]
        return {"SpotPriceHistory": rows}


def zone_of(subnet: str) -> str:
    return f"us-east-{subnet.removeprefix('subnet-')}"


def refusal(code: str, http: int = 400) -> ClientError:
    answer: Any = {"Error": {"Code": code, "Message": "as EC2 would"}, "ResponseMetadata": {"HTTPStatusCode": http}}
    return ClientError(answer, "fake")


class Actor:
    """A process that works on the world: it stops before each call until it is its turn."""

    def __init__(self, world: World, what: str, run: str, work: Callable[[Actor], Any]) -> None:
        self.world, self.what, self.run = world, what, run
        self.ec2, self.lake = Client(self), lake_of(self)
        self.result: Any = None
        self.error: Exception | None = None
        self.killed = self.done = False
        self.began = len(world.machines)
        self.calls: list[str] = []
        self.waits_for: str | None = None
        self._fault: str | None = None
        self._turn, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._live, args=(work,), daemon=True)
        self._thread.start()

    def _live(self, work: Callable[[Actor], Any]) -> None:
        self._turn.acquire()
        try:
            if not self.killed:
                self.result = work(self)
        except Killed:
            self.killed = True
        except Exception as error:
            self.error = error
        self.done = True
        self._stopped.release()

    def step(self, fault: str | None = None) -> None:
        """Lets it make the call that it waits for, and go on to the next."""
        assert not self.done
        self._fault = fault
        self._turn.release()
        self._stopped.acquire()
        if self.done:
            self._thread.join()
            self.close()

    def finish(self) -> Actor:
        for _ in range(5000):
            if self.done:
                return self
            self.step()
        raise AssertionError(f"{self.what} goes on for ever: {self.calls[-20:]}")

    def kill(self) -> None:
        while not self.done:
            self.step("killed before")

    def close(self) -> None:
        """At the end of its work: an error that is expected where calls fail, and nothing of its own left behind."""
        expected = (launch.GpuError, LakeError, ClientError, ReadTimeoutError)
        if self.error is not None and not isinstance(self.error, expected):
            raise self.error
        if self.error is not None or self.killed:
            return
        if self.what == "launch":
            left = [m.id for m in self.world.alive() if m.overtaken and m.launcher == id(self)]
            assert left == [], f"an overtaken launcher went on without ending {left}"
            taken = next(m for m in self.world.machines if m.id == self.result.id)
            assert not taken.overtaken, f"{taken.id} is not the run's right instance"
        if self.what == "teardown":
            left = [m.id for m in self.world.alive(self.run) if m in self.world.machines[: self.began]]
            assert left == [], f"a teardown was content with {left} alive"

    def call(
        self, name: str, perform: Callable[[], Any], lost: Callable[[], Exception] | None, errors: dict[str, Exception]
    ) -> Any:
        """One call of AWS, in this actor's thread: waits for the turn, then is carried out, or what the fault says."""
        self.waits_for = name
        self._stopped.release()
        self._turn.acquire()
        fault, self._fault = self._fault, None
        if self.killed or fault == "killed before":
            self.killed = True
            raise Killed
        self.calls.append(name)
        if fault in errors:
            raise errors[fault]
        answer = perform()
        if fault == "killed after":
            self.killed = True
            raise Killed
        if fault == "answer lost" and lost is not None:
            raise lost()
        return answer

    def now(self) -> datetime:
        return self.world.now

    def sleep(self, seconds: float) -> None:
        def pass_() -> None:
            self.world.now += timedelta(seconds=seconds)

        self.call("sleep", pass_, None, {})


class Client:
    """The part of boto3's EC2 client that the library uses."""

    VALIDATOR: ClassVar = ParamValidator()

    def __init__(self, actor: Actor) -> None:
        self._actor = actor
        self.meta = SimpleNamespace(events=HierarchicalEmitter())

    def run_instances(self, **request: Any) -> Any:
        return self._call("RunInstances", "run_instances", request)

    def terminate_instances(self, **request: Any) -> Any:
        return self._call("TerminateInstances", "terminate_instances", request)

    def create_tags(self, **request: Any) -> Any:
        return self._call("CreateTags", "create_tags", request)

    def get_paginator(self, method: str) -> Any:
        action = {
            "describe_instances": "DescribeInstances",
            "describe_subnets": "DescribeSubnets",
            "describe_spot_price_history": "DescribeSpotPriceHistory",
        }[method]

        def paginate(**request: Any) -> Iterator[Any]:
            yield self._call(action, method, request)

        return SimpleNamespace(paginate=paginate)

    def _call(self, action: str, method: str, request: dict[str, Any]) -> Any:
        model, world = EC2_MODEL.operation_model(action), self._actor.world
        self._validate(request, model.input_shape)

        def perform() -> Any:
            if action == "TerminateInstances":
                self._may_end(request["InstanceIds"])
            before = len(world.machines)
            answer = getattr(world, method)(copy.deepcopy(request))
            for machine in world.machines[before:]:
                machine.launcher = id(self._actor)
            if model.output_shape is not None:
                self._validate(answer, model.output_shape)
            return answer

        errors = {"error": refusal("InternalError", 500), "throttled": refusal("RequestLimitExceeded", 503)}
        return self._actor.call(action, perform, lambda: ReadTimeoutError(endpoint_url="https://ec2"), dict(errors))

    def _validate(self, value: Any, shape: Any) -> None:
        report = self.VALIDATOR.validate(value, shape)
        assert not report.has_errors(), report.generate_report()

    def _may_end(self, ids: list[str]) -> None:
        """No layer ends another run's instance; a reaper none that is busy, and in time, and the run's right one."""
        world, actor = self._actor.world, self._actor
        for machine in (m for m in world.alive() if m.id in ids):
            useless = machine.overtaken or machine.id in world.failed or machine.deadline <= world.now
            if actor.what != "reap":
                assert machine.run == actor.run, f"{actor.what} of {actor.run} ends {machine.run}'s instance"
                assert actor.what == "teardown" or useless, f"the launcher ends {machine.id}, which is the run's right one"
            elif machine.run not in world.over and machine.deadline >= world.now:
                assert machine.overtaken, f"the reaper ends {machine.id}, whose run is active"


class Bucket:
    """S3: strongly consistent, with conditional puts."""

    at_once = 1

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    def _call(self, name: str, perform: Callable[[], Any], lost: Callable[[], Exception] = lambda: LakeError("timeout")) -> Any:
        away = {"error": LakeError("InternalError"), "throttled": LakeError("SlowDown")}
        return self._actor.call(name, perform, lost, dict(away))

    @property
    def _objects(self) -> dict[str, bytes]:
        return self._actor.world.objects

    def read(self, key: str) -> bytes:
        def get() -> bytes:
            if key not in self._objects:
                raise KeyMissingError(key)
            return self._objects[key]

        data: bytes = self._call("GetObject", get)
        return data

    def write(self, key: str, data: bytes, only_if_absent: bool, tags: Any) -> None:
        def put() -> None:
            if only_if_absent and key in self._objects:
                raise KeyExistsError(key)
            self._objects[key] = data

        # the SDK repeats a put whose answer it has not seen, and meets its own object
        self._call("PutObject", put, (lambda: KeyExistsError(key)) if only_if_absent else (lambda: LakeError("timeout")))

    def exists(self, key: str) -> bool:
        return bool(self._call("HeadObject", lambda: key in self._objects))

    def keys(self, prefix: str) -> list[str]:
        found: list[str] = self._call("ListObjectsV2", lambda: [key for key in self._objects if key.startswith(prefix)])
        return found


def lake_of(actor: Actor) -> Lake:
    lake = Lake("file:///in-memory")
    backend: Any = Bucket(actor)
    lake._backend = backend
    return lake


# --- what processes do ---


def ensure(world: World, run: str) -> Actor:
    def work(actor: Actor) -> Instance:
        ec2: Any = actor.ec2
        return launch.ensure_instance(
            ec2,
            actor.lake,
            world.gpu,
            run,
            dag="retrain",
            dag_run=run,
            replace=lambda i: i.id in world.failed,
            now=actor.now,
            sleep=actor.sleep,
        )

    return Actor(world, "launch", run, work)


def teardown(world: World, run: str) -> Actor:
    def work(actor: Actor) -> None:
        ec2: Any = actor.ec2
        terminate_run(ec2, actor.lake, GPU, run, now=actor.now, sleep=actor.sleep)

    return Actor(world, "teardown", run, work)


def reaper(world: World, _: str = "") -> Actor:
    def work(actor: Actor) -> None:
        ec2: Any = actor.ec2
        reap.reap(ec2, actor.lake, GPU, lambda i: i.run in world.over, now=actor.now)

    return Actor(world, "reap", "", work)


def report(world: World, run: str) -> Actor:
    def work(actor: Actor) -> Any:
        ec2: Any = actor.ec2
        return budget.report(ec2, actor.lake, GPU, run, now=actor.now)

    return Actor(world, "report", run, work)


# --- what holds at every moment ---


def check(world: World) -> None:
    for run in RUNS:
        # one whose launcher was overtaken is being ended, as is one past its deadline, which every layer ends
        right = [m for m in world.alive(run) if not m.overtaken and m.deadline > world.now]
        assert len(right) <= 1, f"{run} has {len(right)} living instances: {[m.id for m in right]}"
    exposed = WORST * len([m for m in world.alive() if not m.overtaken and m.deadline > world.now])
    assert exposed <= world.max_month_usd, f"${exposed} may be spent, ${world.max_month_usd} is the cap"


def check_the_end(world: World) -> None:
    """From here: a retry leaves one instance at most, and each of the last layers alone leaves none."""
    again = world.copy()
    again.now += timedelta(minutes=1)
    for run in RUNS:
        launched = ensure(again, run).finish()
        check(again)
        alive = [m.id for m in again.alive(run)]
        assert len(alive) <= 1
        if launched.error is None:
            assert alive == [launched.result.id]

    ended = world.copy()
    for run in RUNS:
        assert teardown(ended, run).finish().error is None
        assert ended.alive(run) == [], "the teardown leaves an instance"
    ended.now += timedelta(minutes=1)
    assert reaper(ended).finish().error is None
    check_the_ledger(ended)

    overdue = world.copy()
    overdue.now = max([overdue.now, *(m.deadline for m in overdue.machines)]) + timedelta(minutes=1)
    assert reaper(overdue).finish().error is None
    assert overdue.alive() == [], "the reaper leaves an instance past its deadline"

    over = world.copy()
    over.over = set(RUNS)
    over.now += timedelta(minutes=GPU.reap_grace_minutes + 1)
    for _ in range(2):
        assert reaper(over).finish().error is None
        over.now += timedelta(minutes=10)
    assert over.alive() == [], "two passes of the reaper leave an instance of a run that has ended"


def check_the_ledger(world: World) -> None:
    """Every ended instance that EC2 remembers is on the bill, at what EC2 would charge."""
    entries = [budget.Entry.model_validate_json(data) for key, data in world.objects.items() if key.startswith(keys.LEDGER)]
    bills = {bill.id: bill for entry in entries for bill in entry.bills}
    for machine in world.machines:
        if machine.forgotten(world.now):
            continue
        bill = bills[machine.id]
        assert bill.ended_at is not None
        assert machine.ending_at is not None
        where = (machine.request["InstanceType"], zone_of(machine.request["SubnetId"]))
        least = max((machine.ending_at - machine.launched_at).total_seconds(), 60) / 3600 * PRICES[where]
        # an end that EC2 does not date is dated when it was first seen
        assert bill.usd is not None
        assert bill.usd >= least - 1e-3
        entry = next(entry for entry in entries if bill in entry.bills)
        assert entry.counted_usd >= round(least, 2) - 0.01


# --- any interleaving ---


class Life(RuleBasedStateMachine):
    """Two runs, up to three processes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.actors: list[Actor] = []

    def _one(self, which: int) -> Actor:
        return self.actors[which % len(self.actors)]

    def _step(self, actor: Actor, fault: str | None = None) -> None:
        actor.step(fault)
        check(self.world)
        if actor.done:
            self.actors.remove(actor)

    @initialize(lag=st.sampled_from([0, 8]), to=st.sampled_from(TURNING_POINTS), cap=st.sampled_from([1.5 * WORST, 1000]))
    def a_launch_begins(self, lag: int, to: str | None, cap: float) -> None:
        self.world.lag, self.world.max_month_usd = timedelta(seconds=lag), cap
        self.begin(ensure, RUNS[0], to)

    @precondition(lambda self: len(self.actors) < 3)
    @rule(
        kind=st.sampled_from([ensure, ensure, ensure, ensure, teardown, report, reaper]),
        run=st.sampled_from([*RUNS, RUNS[0]]),
        to=st.sampled_from(TURNING_POINTS),
    )
    def begin(self, kind: Callable[[World, str], Actor], run: str, to: str | None) -> None:
        actor = kind(self.world, run)
        self.actors.append(actor)
        self._step(actor)
        self._go_on_to(actor, to)

    def _go_on_to(self, actor: Actor, call: str | None) -> None:
        """To the next call of that name; without a name, or where there is none, to the end."""
        for _ in range(3000):
            if actor.done or actor.waits_for == call:
                return
            self._step(actor)
        raise AssertionError(f"{actor.what} goes on for ever")

    @precondition(lambda self: self.actors)
    @rule(which=st.integers(0, 2), calls=st.integers(1, 10), fault=st.sampled_from([None, *FAULTS]))
    def go_on(self, which: int, calls: int, fault: str | None) -> None:
        actor = self._one(which)
        for n in range(calls):
            if not actor.done:
                self._step(actor, fault if n == calls - 1 else None)

    @precondition(lambda self: self.actors)
    @rule(which=st.integers(0, 2), to=st.sampled_from(TURNING_POINTS), fault=st.sampled_from([None, *FAULTS]))
    def go_on_to(self, which: int, to: str | None, fault: str | None) -> None:
        actor = self._one(which)
        self._step(actor, fault if actor.waits_for in TURNING_POINTS else None)
        self._go_on_to(actor, to)

    @precondition(lambda self: any(a.waits_for == "RunInstances" for a in self.actors))
    @rule(again=st.booleans())
    def another_launcher_overtakes(self, again: bool) -> None:
        """While one is about to launch, another is refused for its choice, moves on, and the capacity comes back."""
        slow = next(a for a in self.actors if a.waits_for == "RunInstances")
        before = self.world.without_capacity
        self.world.without_capacity = {("g4dn.xlarge", "us-east-1b")}
        fast = ensure(self.world, slow.run)
        self.actors.append(fast)
        while not fast.done and not (again and fast.calls.count("RunInstances") == 1 and fast.waits_for == "RunInstances"):
            self._step(fast)
        self.world.without_capacity = before

    @precondition(lambda self: self.world.alive())
    @rule(which=st.integers(0, 5), how=st.sampled_from(["interrupted", "powered off", "job failed"]))
    def instance(self, which: int, how: str) -> None:
        machine = self.world.alive()[which % len(self.world.alive())]
        if how == "interrupted":
            self.world.end(machine, "Server.SpotInstanceTermination", "Server.SpotInstanceTermination: Spot interruption")
        elif how == "powered off":
            self.world.end(machine, "Client.InstanceInitiatedShutdown", "Instance initiated")
        else:
            self.world.failed.add(machine.id)

    @rule(
        seconds=st.sampled_from([0, 1, 9, 60, 600, 3600, 7201]),
        without=st.sampled_from([(), (), tuple(PRICES)[2:], tuple(PRICES)]),
        over=st.sampled_from([(), (), RUNS[:1], RUNS]),
    )
    def time_passes(self, seconds: int, without: tuple[tuple[str, str], ...], over: tuple[str, ...]) -> None:
        """Capacity comes and goes, runs end and are cleared."""
        self.world.now += timedelta(seconds=seconds)
        self.world.without_capacity, self.world.over = set(without), set(over)

    @invariant()
    def at_most_one_a_run_and_within_the_cap(self) -> None:
        check(self.world)

    def teardown(self) -> None:
        for actor in self.actors:
            actor.kill()
        check_the_end(self.world)


EXAMPLES = os.environ.get("PROPERTY_EXAMPLES")
CHOSEN = settings(
    max_examples=int(EXAMPLES or 110),
    stateful_step_count=40,
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_any_interleaving_leaves_at_most_one_living_instance_a_run_and_none_in_the_end() -> None:
    run_state_machine_as_test(Life, settings=CHOSEN)


# --- races that chance finds too seldom ---


def go_on_to(actor: Actor, call: str) -> Actor:
    """Until it waits to make the next call of that name."""
    actor.step()
    while actor.waits_for != call:
        actor.step()
        assert not actor.done, f"{actor.what} never calls {call}"
    return actor


def test_an_overtaken_instance_that_has_ended_does_not_hide_the_right_one_that_is_not_visible_yet() -> None:
    world = World(lag=MAX_LAG)
    slow = go_on_to(ensure(world, "run-a"), "RunInstances")
    world.without_capacity = {("g4dn.xlarge", "us-east-1b")}
    fast = go_on_to(go_on_to(ensure(world, "run-a"), "RunInstances"), "RunInstances")
    world.without_capacity = set()
    slow.step()  # late: another launch is recorded already
    while world.alive():
        slow.step()
    slow.kill()
    world.now += MAX_LAG
    right = fast.finish().result
    assert ensure(world, "run-a").finish().result.id == right.id
    check(world)


def test_of_two_launchers_that_replace_an_instance_neither_ends_the_others_new_one() -> None:
    world = World()
    world.failed.add(ensure(world, "run-a").finish().result.id)
    slow = go_on_to(ensure(world, "run-a"), "TerminateInstances")
    new = ensure(world, "run-a").finish().result
    assert slow.finish().result.id == new.id
    assert [m.id for m in world.alive()] == [new.id]


def test_of_two_runs_that_reserve_at_once_never_both_are_let_through_a_cap_that_holds_one() -> None:
    for steps in range(40):
        world = World(max_month_usd=1.5 * WORST)
        one, other = ensure(world, "run-a"), ensure(world, "run-b")
        one.step()
        for _ in range(steps):
            if not one.done:
                one.step()
        other.finish()
        if not one.done:
            one.finish()
        check(world)
        refused = [actor for actor in (one, other) if isinstance(actor.error, budget.BudgetExceededError)]
        assert len(refused) >= 1


# --- every call, one after the other ---


def first_launch(world: World) -> None:
    pass


def launch_without_the_cheapest(world: World) -> None:
    world.without_capacity = {("g4dn.xlarge", "us-east-1b"), ("g5.xlarge", "us-east-1a")}


def launch_where_a_job_has_failed(world: World) -> None:
    world.failed.add(ensure(world, "run-a").finish().result.id)
    world.now += timedelta(minutes=5)


def launch_after_an_interruption(world: World) -> None:
    ensure(world, "run-a").finish()
    world.now += timedelta(minutes=5)
    world.end(world.machines[0], "Server.SpotInstanceTermination", "Server.SpotInstanceTermination: Spot interruption")
    world.now += timedelta(minutes=1)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "before", [first_launch, launch_without_the_cheapest, launch_where_a_job_has_failed, launch_after_an_interruption]
)
def test_a_fault_at_any_call_of_a_launch_is_mended_by_the_next_launch_and_by_every_last_layer(
    before: Callable[[World], None], fault: str
) -> None:
    start = World()
    before(start)
    start.lag = MAX_LAG
    calls = 0
    while True:
        world = start.copy()
        launcher = ensure(world, "run-a")
        launcher.step()  # to its first call
        for _ in range(calls):
            launcher.step()
            check(world)
        if launcher.done:
            break
        launcher.step(fault)
        check(world)
        launcher.finish()
        check(world)
        check_the_end(world)
        calls += 1
    assert launcher.error is None
    assert calls > 10
    assert launcher.calls.count("RunInstances") == (3 if before is launch_without_the_cheapest else 1)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_call_of_a_teardown_is_never_read_as_nothing_there(fault: str) -> None:
    start = World()
    ensure(start, "run-a").finish()
    calls = 0
    while True:
        world = start.copy()
        last = teardown(world, "run-a")
        last.step()
        for _ in range(calls):
            last.step()
        if last.done:
            break
        last.step(fault)
        last.finish()
        assert last.killed or last.error is not None or world.alive() == [], f"content after {fault} at call {calls + 1}"
        assert teardown(world, "run-a").finish().error is None
        assert world.alive() == []
        calls += 1
    assert calls > 5
