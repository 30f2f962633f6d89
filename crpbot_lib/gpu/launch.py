"""The one instance of a run: found by tag, else launched under an identity that survives the death of the launcher.

Before RunInstances a record is written to the lake with a conditional put, one per candidate tried: ``launches/001.json``,
``002.json``, …. The request is rebuilt from the record alone and carries a ClientToken derived from it, so a launcher that
dies anywhere and runs again gets the same instance back (EC2 API reference, "Ensuring idempotency"). A new generation begins
only when the former one's instance is shutting-down or terminated.
"""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from botocore.exceptions import ClientError
from pydantic import BaseModel, ConfigDict

from crpbot_lib.config import GpuCandidate, GpuSettings
from crpbot_lib.gpu import instances, user_data
from crpbot_lib.gpu.instances import UTC_NOW, GpuError, Instance
from crpbot_lib.lake import KeyExistsError, Lake, keys

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client

log = logging.getLogger(__name__)

# EC2 API reference, "Error codes": these say that this type, zone or price cannot be had now, and another may be.
CAPACITY_ERRORS = frozenset(
    {
        "InsufficientInstanceCapacity",
        "InsufficientCapacity",
        "InsufficientHostCapacity",
        "SpotMaxPriceTooLow",
        "Unsupported",
    }
)
# Definite refusals of the whole request: repeating it, or trying another candidate, changes nothing.
ADVICE = {
    "VcpuLimitExceeded": "request a higher vCPU quota for G instances in Service Quotas",
    "MaxSpotInstanceCountExceeded": "request a higher spot quota for G instances in Service Quotas",
    "UnauthorizedOperation": "give the Airflow role ec2:RunInstances, ec2:CreateTags and iam:PassRole on the instance profile",
    "IdempotentParameterMismatch": "the settings changed since this launch was recorded; start a new run",
    "InvalidAMIID.NotFound": "set CRPBOT_GPU__AMI to an image of the region",
    "InvalidAMIID.Malformed": "set CRPBOT_GPU__AMI to an image of the region",
    "InvalidSubnetID.NotFound": "correct subnet_id of the GPU candidates",
    "InvalidGroup.NotFound": "correct CRPBOT_GPU__SECURITY_GROUP_IDS",
    "InvalidParameterValue": "correct the GPU settings that the message names",
    "InvalidParameterCombination": "correct the GPU settings that the message names",
    "AuthFailure.ServiceLinkedRoleCreationNotPermitted": (
        "create the service-linked role AWSServiceRoleForEC2Spot once: "
        "aws iam create-service-linked-role --aws-service-name spot.amazonaws.com"
    ),
    # resolve:ssm: in ImageId is read with the caller's own permissions
    "AccessDeniedException": "give the Airflow role ssm:GetParameters on the parameter that CRPBOT_GPU__AMI names",
    "AccessDenied": "give the Airflow role ssm:GetParameters on the parameter that CRPBOT_GPU__AMI names",
}
_OTHER_ADVICE = "mend what the message names (the EC2 API reference, Error codes, explains the code) and clear the task"
# "Slow down" and "took too long" come as 4xx too, and are no refusals (EC2 API reference, "Error codes")
_TEMPORARY = frozenset({"RequestLimitExceeded", "BandwidthLimitExceeded", "TooManyRequestsException", "SlowDown", "RequestTimeout"})


class NoCapacityError(GpuError):
    """Every candidate was refused for want of capacity; a later try may succeed."""


class LaunchRefusedError(GpuError):
    """AWS refuses the launch for a reason that repeating does not mend: quota, permission, parameters."""


class LaunchRecord(BaseModel):
    """What one launch was to be, written before it. Times are ISO 8601 UTC, prices USD an hour."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    sequence: int
    generation: int
    nonce: str
    """Random, so that a run name used again in another lake or after a clean-up never meets an old token."""
    instance_type: str
    subnet_id: str | None
    market: str
    price_usd_per_hour: float
    on_demand_usd_per_hour: float
    recorded_at: datetime
    deadline: datetime
    user_data_sha256: str
    remaining: tuple[tuple[str, str], ...]
    """(instance type, market) pairs that come next if this one has no capacity."""

    @property
    def token(self) -> str:
        """The ClientToken (at most 64 characters): equal for every replay of this record, and for nothing else."""
        text = f"{self.nonce}\n{self.run}\n{self.generation}\n{self.instance_type}\n{self.subnet_id}\n{self.market}"
        return hashlib.sha256(text.encode()).hexdigest()


def log_stream(run: str, generation: int) -> str:
    """The CloudWatch stream of one generation's job."""
    return f"{run}/{generation:03d}"


class Offer(NamedTuple):
    """A candidate in a market. Prices in USD an hour: of the cheapest zone, by which it is chosen, and of the dearest."""

    candidate: GpuCandidate
    market: str
    price: float
    dearest: float


def candidates_by_price(ec2: EC2Client, gpu: GpuSettings, *, now: Callable[[], datetime] = UTC_NOW) -> list[Offer]:
    """What could be launched: spot by current price, cheapest first, then on-demand where allowed.

    Spot prices are those of DescribeSpotPriceHistory, by zone of the region; a type without one is left out, with a warning.
    """
    found: list[Offer] = []
    for candidate in gpu.candidates:
        # from now on, so that the answer is each zone's present price and not the changes of the last 90 days
        pages = ec2.get_paginator("describe_spot_price_history").paginate(
            InstanceTypes=[candidate.instance_type],  # type: ignore[list-item]  # any type that the configuration names
            ProductDescriptions=["Linux/UNIX"],
            StartTime=now(),
        )
        history = [row for page in pages for row in page["SpotPriceHistory"]]
        if not history:
            log.warning("no spot price for %s in %s: left out", candidate.instance_type, gpu.region)
            continue
        newest: dict[str, tuple[datetime, float]] = {}
        for row in history:
            zone, seen = row["AvailabilityZone"], (row["Timestamp"], float(row["SpotPrice"]))
            newest[zone] = max(newest.get(zone, seen), seen)
        prices = [price for _, price in newest.values()]
        found.append(Offer(candidate, "spot", min(prices), max(prices)))
    found.sort(key=lambda offer: offer.price)
    if gpu.allow_on_demand:
        by_price = sorted(gpu.candidates, key=lambda c: c.on_demand_usd_per_hour)
        found += [Offer(c, "on-demand", c.on_demand_usd_per_hour, c.on_demand_usd_per_hour) for c in by_price]
    if not found:
        raise NoCapacityError(
            f"no spot price for any of {', '.join(c.instance_type for c in gpu.candidates)} in {gpu.region}: "
            "check CRPBOT_GPU__REGION and the candidates, or allow on-demand with CRPBOT_GPU__ALLOW_ON_DEMAND=true"
        )
    return found


def ensure_instance(
    ec2: EC2Client,
    lake: Lake,
    gpu: GpuSettings,
    run: str,
    *,
    dag: str = "",
    dag_run: str = "",
    replace: Callable[[Instance], bool] = lambda _: False,
    now: Callable[[], datetime] = UTC_NOW,
    sleep: Callable[[float], None] = time.sleep,
) -> Instance:
    """The living instance of ``run``, launched if there is none. Safe to call again, from anywhere, at any time.

    ``replace`` says of a living instance whether its job has already failed; such a one is terminated first and a new
    generation begins. Raises NoCapacityError (a later try may succeed) or LaunchRefusedError (it will not).
    """
    from crpbot_lib.gpu.terminate import terminate, terminate_run

    alive = instances.find(ec2, gpu.project_tag, run, instances.ALIVE, lake=lake)
    if len(alive) > 1:
        # an older launcher and a newer one overlapped: only the newest generation may stay
        newest = max(alive, key=lambda i: (i.generation, i.launched_at))
        extra = [i for i in alive if i.id != newest.id]
        log.warning("%s has %d living instances: keeping %s, ending %s", run, len(alive), newest.id, [i.id for i in extra])
        terminate(ec2, [i.id for i in extra])
        alive = [newest]
    if alive and not replace(alive[0]):
        log.info("instance %s (%s, %s) of %s is there already", alive[0].id, alive[0].type, alive[0].state, run)
        return alive[0]
    if alive:
        terminate_run(ec2, lake, gpu, run, now=now, sleep=sleep)

    record, replayed = _open_record(ec2, lake, gpu, run, now)
    while True:
        try:
            launched = _run_instances(ec2, lake, gpu, record, dag, dag_run)
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code not in CAPACITY_ERRORS:
                advice = ADVICE.get(code, _OTHER_ADVICE)
                if code not in ADVICE and not _definite(error):
                    raise
                raise LaunchRefusedError(
                    f"AWS refused to launch {record.instance_type} ({record.market}) for {run}: {error}. What to do: {advice}."
                ) from error
            log.warning("%s (%s) cannot be had: %s", record.instance_type, record.market, error.response["Error"].get("Message"))
            following = _next_candidate(ec2, lake, gpu, record, now)
            if following is None and replayed:
                # what an earlier try recorded is refused to its end, so no instance of it exists: the list begins anew
                following = _new_generation(ec2, lake, gpu, run, record.sequence + 1, record.generation + 1, now)
                replayed = False
            if following is None:
                tried = ", ".join(
                    f"{r.instance_type} ({r.market})" for r in records(lake, run) if r.generation == record.generation
                )
                raise NoCapacityError(
                    f"no capacity for {run}: {tried} were refused. Try again later, add candidates or a second zone, "
                    "or allow on-demand with CRPBOT_GPU__ALLOW_ON_DEMAND=true"
                ) from error
            record = following
            continue
        latest = records(lake, run)[-1]
        if latest.sequence > record.sequence:
            # this launcher was slow: another one had moved on before the call, and what it recorded last is the run's instance
            log.warning(
                "launch %d of %s is out of date: ending %s, going on with %d", record.sequence, run, launched.id, latest.sequence
            )
            terminate(ec2, [launched.id])
            record, replayed = latest, True
            continue
        if launched.state in instances.ENDING:
            # the recorded launch is one that has ended since: the token hands the dead instance back
            record, replayed = _new_generation(ec2, lake, gpu, run, record.sequence + 1, record.generation + 1, now), False
            continue
        return launched


def _definite(error: ClientError) -> bool:
    """Whether AWS said a plain no: a 4xx that is no throttling. The server's own errors may pass."""
    status, code = error.response["ResponseMetadata"]["HTTPStatusCode"], error.response["Error"]["Code"]
    return 400 <= status < 500 and status not in (408, 429) and "Throttl" not in code and code not in _TEMPORARY


def records(lake: Lake, run: str) -> list[LaunchRecord]:
    """The launch records of a run, in the order in which they were written."""
    found = lake.keys(keys.training_run(run, "launches/"))
    return [LaunchRecord.model_validate(lake.read_json(key)) for key in found]


def _open_record(ec2: EC2Client, lake: Lake, gpu: GpuSettings, run: str, now: Callable[[], datetime]) -> tuple[LaunchRecord, bool]:
    """The record to launch by, and whether it is an earlier one: the last while its outcome is open, else a new generation's."""
    written = records(lake, run)
    if not written:
        return _new_generation(ec2, lake, gpu, run, 1, 1, now), False
    last = written[-1]
    ended = instances.find(ec2, gpu.project_tag, run, instances.ENDING, lake=lake)
    if any(i.generation == last.generation for i in ended) or last.deadline <= now():
        return _new_generation(ec2, lake, gpu, run, last.sequence + 1, last.generation + 1, now), False
    return last, True


def _new_generation(
    ec2: EC2Client, lake: Lake, gpu: GpuSettings, run: str, sequence: int, generation: int, now: Callable[[], datetime]
) -> LaunchRecord:
    choices = candidates_by_price(ec2, gpu, now=now)
    # AWS chooses the zone, so the worst case is the dearest one's price
    worst = max(offer.dearest for offer in choices) * gpu.max_lifetime_minutes / 60
    shown = ", ".join(f"{o.candidate.instance_type} {o.market} ${o.price:.4f}/h" for o in choices)
    log.info("candidates: %s; worst case of this launch $%.2f (%d min)", shown, worst, gpu.max_lifetime_minutes)
    return _write(lake, gpu, run, sequence, generation, choices, now)


def _next_candidate(
    ec2: EC2Client, lake: Lake, gpu: GpuSettings, record: LaunchRecord, now: Callable[[], datetime]
) -> LaunchRecord | None:
    """The record of the generation's next candidate; None when none is left or configured any longer."""
    if not record.remaining:
        return None
    offers = {(o.candidate.instance_type, o.market): o for o in candidates_by_price(ec2, gpu, now=now)}
    choices = [offers[pair] for pair in record.remaining if pair in offers]
    return _write(lake, gpu, record.run, record.sequence + 1, record.generation, choices, now) if choices else None


def _write(
    lake: Lake,
    gpu: GpuSettings,
    run: str,
    sequence: int,
    generation: int,
    choices: list[Offer],
    now: Callable[[], datetime],
) -> LaunchRecord:
    (candidate, market, price, _), *rest = choices
    at = now().replace(microsecond=0)
    record = LaunchRecord(
        run=run,
        sequence=sequence,
        generation=generation,
        nonce=uuid.uuid4().hex,
        instance_type=candidate.instance_type,
        subnet_id=candidate.subnet_id,
        market=market,
        price_usd_per_hour=price,
        on_demand_usd_per_hour=candidate.on_demand_usd_per_hour,
        recorded_at=at,
        deadline=at + timedelta(minutes=gpu.max_lifetime_minutes),
        user_data_sha256=hashlib.sha256(_script(lake, gpu, run, generation).encode()).hexdigest(),
        remaining=tuple((o.candidate.instance_type, o.market) for o in rest),
    )
    key = keys.launch(run, sequence)
    try:
        lake.write_json(key, record.model_dump(mode="json"), only_if_absent=True)
    except KeyExistsError:
        # another launcher of the same run was faster: its record is the truth, and its token makes both get one instance
        return LaunchRecord.model_validate(lake.read_json(key))
    return record


def _script(lake: Lake, gpu: GpuSettings, run: str, generation: int) -> str:
    return user_data.render(
        run=run,
        generation=generation,
        lake=lake.root,
        image=gpu.training_image,
        region=gpu.region,
        log_group=gpu.log_group,
        log_stream=log_stream(run, generation),
        max_lifetime_minutes=gpu.max_lifetime_minutes,
    )


def _run_instances(ec2: EC2Client, lake: Lake, gpu: GpuSettings, record: LaunchRecord, dag: str, dag_run: str) -> Instance:
    script = _script(lake, gpu, record.run, record.generation)
    if hashlib.sha256(script.encode()).hexdigest() != record.user_data_sha256:
        raise LaunchRefusedError(
            f"the settings that make the user data changed since launch {record.sequence} of {record.run} was recorded: "
            "start a new run instead of repeating this one"
        )
    tags = {
        "Name": f"crpbot {record.run}",
        instances.TAG_PROJECT: gpu.project_tag,
        instances.TAG_LAKE: instances.lake_id(lake),
        instances.TAG_RUN: record.run,
        instances.TAG_GENERATION: str(record.generation),
        instances.TAG_DEADLINE: record.deadline.isoformat(),
        instances.TAG_OWNER: gpu.owner_tag,
        instances.TAG_DAG: dag,
        instances.TAG_DAG_RUN: dag_run,
    }
    tag_list = [{"Key": key, "Value": value} for key, value in tags.items() if value]
    request: dict[str, Any] = {
        "ImageId": gpu.ami,
        "InstanceType": record.instance_type,
        "MinCount": 1,
        "MaxCount": 1,
        "ClientToken": record.token,
        "UserData": script,
        "IamInstanceProfile": {"Name": gpu.instance_profile},
        "InstanceInitiatedShutdownBehavior": "terminate",
        # hop limit 2: with 1 a container behind a bridge gets no credentials
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2, "HttpEndpoint": "enabled"},
        "BlockDeviceMappings": [
            {
                "DeviceName": "/dev/xvda",
                "Ebs": {
                    "VolumeSize": gpu.volume_gib,
                    "VolumeType": "gp3",
                    "Encrypted": True,
                    "DeleteOnTermination": True,
                },
            }
        ],
        "TagSpecifications": [{"ResourceType": kind, "Tags": tag_list} for kind in ("instance", "volume")],
    }
    if gpu.security_group_ids:
        request["SecurityGroupIds"] = list(gpu.security_group_ids)
    if record.subnet_id:
        request["SubnetId"] = record.subnet_id
    if record.market == "spot":
        request["InstanceMarketOptions"] = {
            "MarketType": "spot",
            "SpotOptions": {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"},
        }
    item = ec2.run_instances(**request)["Instances"][0]
    launched = instances.from_api(item)
    log.info(
        "launched %s: %s %s at $%.4f/h for %s, generation %d, deadline %s",
        launched.id,
        record.instance_type,
        record.market,
        record.price_usd_per_hour,
        record.run,
        record.generation,
        record.deadline.isoformat(),
    )
    return launched
