"""The one instance of a run: found by tag, else launched under an identity that survives the death of the launcher.

Before RunInstances a record is written to the lake with a conditional put, one per candidate tried: ``launches/001.json``,
``002.json``, …. The request is rebuilt from the record and carries a ClientToken derived from it, so a launcher that dies
anywhere and runs again gets the same instance back (EC2 API reference, "Ensuring idempotency"). The run's instance is that of
its last record; any other that lives was overtaken and is ended. A new generation begins only when the former one's instance
is shutting-down or terminated.
"""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError, HTTPClientError, IncompleteReadError, ParamValidationError
from botocore.parsers import ResponseParserError

from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import budget, instances, user_data
from crpbot_lib.gpu.instances import UTC_NOW, GpuError, Instance
from crpbot_lib.gpu.instances import LaunchRefusedError as LaunchRefusedError
from crpbot_lib.gpu.records import LaunchRecord as LaunchRecord
from crpbot_lib.gpu.records import Offer
from crpbot_lib.gpu.records import records as records
from crpbot_lib.gpu.terminate import terminate, terminate_run
from crpbot_lib.lake import KeyExistsError, Lake, keys

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client
    from mypy_boto3_ec2.type_defs import SubnetTypeDef

log = logging.getLogger(__name__)

# EC2 API reference, "Error codes": these say that this type, subnet or price cannot be had now, and another may be.
CAPACITY_ERRORS = frozenset(
    {
        "InsufficientInstanceCapacity",
        "InsufficientCapacity",
        "InsufficientHostCapacity",
        "InsufficientFreeAddressesInSubnet",
        "UnfulfillableCapacity",
        "SpotMaxPriceTooLow",
        "Unsupported",
    }
)
# Definite refusals of the whole request: repeating it, or trying another candidate, changes nothing.
ADVICE = {
    "VcpuLimitExceeded": "request a higher vCPU quota for G instances in Service Quotas",
    "MaxSpotInstanceCountExceeded": "request a higher spot quota for G instances in Service Quotas",
    "UnauthorizedOperation": (
        "give the Airflow role ec2:RunInstances, ec2:CreateTags, ec2:DescribeSubnets, ec2:DescribeSpotPriceHistory, and "
        "iam:PassRole on the instance profile's role"
    ),
    "IdempotentParameterMismatch": "the settings changed since this launch was recorded; start a new run",
    "InvalidAMIID.NotFound": "set CRPBOT_GPU__AMI to an image of the region",
    "InvalidAMIID.Malformed": "set CRPBOT_GPU__AMI to an image of the region",
    "InvalidSubnetID.NotFound": "correct subnet_ids of the GPU candidates",
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
# "The request uses the same client token as a previous request for which the instance has been terminated"; EC2 may as well answer
# with the dead instance
_TERMINATED = "IdempotentInstanceTerminated"
_OTHER_ADVICE = "mend what the message names (the EC2 API reference, Error codes, explains the code) and clear the task"
# "Slow down" and "took too long" come as 4xx too, and are no refusals (EC2 API reference, "Error codes")
_TEMPORARY = frozenset({"RequestLimitExceeded", "BandwidthLimitExceeded", "TooManyRequestsException", "SlowDown", "RequestTimeout"})
# How often RunInstances is sent, with one token, before its outcome is left to the next call of ensure_instance
_LAUNCH_TRIES = 5


class NoCapacityError(GpuError):
    """Every candidate was refused for want of capacity; a later try may succeed."""


class JobDoneError(GpuError):
    """The run's job has succeeded, and its instance has ended: another one would only repeat it."""


class LaunchUnresolvedError(GpuError):
    """EC2 did not say whether it launched the instance; the next try asks with the same token."""


def log_stream(run: str, generation: int) -> str:
    """The CloudWatch stream of one generation's job."""
    return f"{run}/{generation:03d}"


def candidates_by_price(ec2: EC2Client, gpu: GpuSettings, *, now: Callable[[], datetime] = UTC_NOW) -> list[Offer]:
    """What could be launched: spot by the present price of each subnet's own zone, cheapest first, then on-demand where allowed.

    A type without a spot price in a subnet's zone is left out there. The dearest price of a spot instance is the
    on-demand price, or the present one should that be higher: the request states it as its limit. Raises LaunchRefusedError for
    what another try does not mend, NoCapacityError when nothing has a price.
    """
    try:
        subnets = {ids: _subnets(ec2, gpu, ids) for ids in dict.fromkeys(c.subnet_ids for c in gpu.candidates)}
        prices = _spot_prices(ec2, gpu, now())
    except ClientError as error:
        if _definite(error):
            raise _refused(error, "to say what can be launched") from error
        raise
    spot: list[Offer] = []
    on_demand: list[Offer] = []
    for candidate in gpu.candidates:
        kind, limit = candidate.instance_type, candidate.on_demand_usd_per_hour
        for subnet in subnets[candidate.subnet_ids]:
            offer = Offer(
                instance_type=kind,
                subnet_id=subnet["SubnetId"],
                zone=subnet["AvailabilityZone"],
                market="on-demand",
                price_usd_per_hour=limit,
                max_usd_per_hour=limit,
                on_demand_usd_per_hour=limit,
            )
            on_demand.append(offer)
            if (price := prices.get((kind, offer.zone))) is not None:
                present = {"market": "spot", "price_usd_per_hour": price, "max_usd_per_hour": max(price, limit)}
                spot.append(offer.model_copy(update=present))
            elif candidate.subnet_ids:
                log.warning("no spot price for %s in %s, the zone of %s: left out", kind, offer.zone, offer.subnet_id)
    found = sorted(spot, key=lambda offer: offer.price_usd_per_hour)
    if gpu.allow_on_demand:
        found += sorted(on_demand, key=lambda offer: offer.price_usd_per_hour)
    if not found:
        raise NoCapacityError(
            f"no spot price for any of {', '.join(c.instance_type for c in gpu.candidates)} in {gpu.region}: "
            "check CRPBOT_GPU__REGION and the candidates, or allow on-demand with CRPBOT_GPU__ALLOW_ON_DEMAND=true"
        )
    return found


def _subnets(ec2: EC2Client, gpu: GpuSettings, ids: tuple[str, ...]) -> list[SubnetTypeDef]:
    """The subnets ``ids`` in their order; without any the region's default ones, by zone."""
    paginator = ec2.get_paginator("describe_subnets")
    if ids:
        by_id = {s["SubnetId"]: s for page in paginator.paginate(SubnetIds=list(ids)) for s in page["Subnets"]}
        return [by_id[i] for i in ids if i in by_id]
    pages = paginator.paginate(Filters=[{"Name": "default-for-az", "Values": ["true"]}])
    found = sorted((s for page in pages for s in page["Subnets"]), key=lambda s: s["AvailabilityZone"])
    if not found:
        raise LaunchRefusedError(f"{gpu.region} has no default subnet: name some in subnet_ids of CRPBOT_GPU__CANDIDATES")
    return found


def _spot_prices(ec2: EC2Client, gpu: GpuSettings, at: datetime) -> dict[tuple[str, str], float]:
    """(instance type, zone) → the spot price in force, USD an hour."""
    types: Any = sorted({c.instance_type for c in gpu.candidates})  # boto3's stubs know only those of their day
    # from now on, so that the answer is each zone's present price and not the changes of the last 90 days
    pages = ec2.get_paginator("describe_spot_price_history").paginate(
        InstanceTypes=types,
        ProductDescriptions=["Linux/UNIX"],
        StartTime=at,
    )
    newest: dict[tuple[str, str], tuple[datetime, float]] = {}
    for row in (row for page in pages for row in page["SpotPriceHistory"]):
        where, seen = (str(row["InstanceType"]), row["AvailabilityZone"]), (row["Timestamp"], float(row["SpotPrice"]))
        newest[where] = max(newest.get(where, seen), seen)
    return {where: price for where, (_, price) in newest.items()}


def ensure_instance(
    ec2: EC2Client,
    lake: Lake,
    gpu: GpuSettings,
    run: str,
    *,
    dag: str = "",
    dag_run: str = "",
    replace: Callable[[Instance], bool] = lambda _: False,
    done: Callable[[], bool] = lambda: False,
    now: Callable[[], datetime] = UTC_NOW,
    sleep: Callable[[float], None] = time.sleep,
) -> Instance:
    """The living instance of ``run``, launched if there is none. Safe to call again, from anywhere, at any time.

    ``replace`` says of a living instance whether its job has already failed; such a one, and one past its deadline, is terminated
    first and a new generation begins. ``done`` says whether the run's job has succeeded. It is asked after the look for a living
    instance, since a job says so before its instance ends. Raises JobDoneError then, LaunchRefusedError (another try fails
    too), NoCapacityError or LaunchUnresolvedError (a later try may succeed).
    """
    alive = instances.find(ec2, gpu.project_tag, run, instances.ALIVE, lake=lake)
    # read after the look: a record is older than its instance, so none that was seen can be of a later launch than the last record
    written = records(lake, run)
    current = _current(alive, written)
    if extra := [i.id for i in alive if i is not current]:
        # a launcher that was overtaken died before it could end what it had launched
        log.warning("%s has living instances of launches that were overtaken: ending %s", run, ", ".join(extra))
        terminate(ec2, extra)
    if current is not None:
        overdue = current.deadline is None or current.deadline <= now()
        if not overdue and not replace(current):
            log.info("instance %s (%s, %s) of %s is there already", current.id, current.type, current.state, run)
            return current
        terminate_run(ec2, lake, gpu, run, generation=current.generation, now=now, sleep=sleep)

    if done():
        raise JobDoneError(f"{run} has been trained already: nothing is launched")
    asked_by = (dag, dag_run)
    record, replayed = _open_record(ec2, lake, gpu, run, asked_by, now)
    while True:
        budget.reserve(ec2, lake, gpu, record, now=now)
        try:
            launched = _run_instances(ec2, lake, gpu, record, sleep)
        except LaunchRefusedError:
            if not replayed:
                # its request was never sent
                budget.release(lake, record)
            raise
        except ClientError as error:
            if _code(error) not in CAPACITY_ERRORS:
                budget.release(lake, record)
                raise _refused(error, f"to launch {record.instance_type} ({record.market}) for {run}") from error
            log.warning(
                "%s (%s) cannot be had in %s: %s",
                record.instance_type,
                record.market,
                record.zone,
                error.response["Error"].get("Message"),
            )
            following = _next_candidate(lake, gpu, record, now)
            if following is None:
                budget.release(lake, record)
                if replayed:
                    # what an earlier try recorded is refused to its end, so no instance of it exists: the list begins anew
                    following = _new_generation(ec2, lake, gpu, run, record, asked_by, now)
                    replayed = False
            if following is None:
                raise NoCapacityError(_nothing_left(lake, record)) from error
            record = following
            continue
        if launched is None:
            budget.forgotten(lake, record)
        latest = records(lake, run)[-1]
        if latest.sequence > record.sequence:
            # this launcher was slow: another one had moved on before the call, and what it recorded last is the run's instance
            overtaken = "which has ended" if launched is None else f"ending {launched.id}"
            log.warning("launch %d of %s is out of date: %s, going on with %d", record.sequence, run, overtaken, latest.sequence)
            if launched is not None and terminate(ec2, [launched.id]):
                sleep(gpu.visibility_grace_seconds)
                terminate(ec2, [launched.id])
            record, replayed = latest, True
            continue
        if launched is None or launched.state in instances.ENDING:
            # the recorded launch is one that has ended since
            if done():
                raise JobDoneError(f"{run} has been trained meanwhile: nothing more is launched")
            record, replayed = _new_generation(ec2, lake, gpu, run, record, asked_by, now), False
            continue
        return launched


def _current(alive: list[Instance], written: list[LaunchRecord]) -> Instance | None:
    """Of the living instances the one that is not overtaken by a newer launch, which another launcher recorded."""
    if not alive:
        return None
    newest = instances.newest(alive)
    if written and (newest.generation, newest.sequence) < (written[-1].generation, written[-1].sequence):
        return None
    return newest


def _code(error: ClientError) -> str:
    return str(error.response["Error"]["Code"])


def _definite(error: ClientError) -> bool:
    """Whether AWS said a plain no: a 4xx that is no throttling, or one of ``ADVICE``. The server's own errors may pass."""
    status, code = error.response["ResponseMetadata"]["HTTPStatusCode"], _code(error)
    if code in ADVICE:
        return True
    return 400 <= status < 500 and status not in (408, 429) and "Throttl" not in code and code not in _TEMPORARY


def _refused(error: ClientError, what: str) -> LaunchRefusedError:
    return LaunchRefusedError(f"AWS refused {what}: {error}. What to do: {ADVICE.get(_code(error), _OTHER_ADVICE)}.")


def _nothing_left(lake: Lake, record: LaunchRecord) -> str:
    tried = [r for r in records(lake, record.run) if r.generation == record.generation]
    kinds = dict.fromkeys(f"{r.instance_type} ({r.market})" for r in tried)
    zones = ", ".join(sorted({r.zone for r in tried}))
    return (
        f"no capacity for {record.run}: {', '.join(kinds)} were refused in {zones}. Try again later, add candidates or "
        "subnets in other zones, or allow on-demand with CRPBOT_GPU__ALLOW_ON_DEMAND=true"
    )


def _open_record(
    ec2: EC2Client, lake: Lake, gpu: GpuSettings, run: str, asked_by: tuple[str, str], now: Callable[[], datetime]
) -> tuple[LaunchRecord, bool]:
    """The record to launch by, and whether it is an earlier one: the last while its outcome is open, else a new generation's."""
    written = records(lake, run)
    if not written:
        return _new_generation(ec2, lake, gpu, run, None, asked_by, now), False
    last = written[-1]
    ended = instances.find(ec2, gpu.project_tag, run, instances.ENDING, lake=lake)
    # by launch and not by generation: of one generation an overtaken instance may have ended while the right one is invisible yet
    if any((i.generation, i.sequence) == (last.generation, last.sequence) for i in ended) or last.deadline <= now():
        return _new_generation(ec2, lake, gpu, run, last, asked_by, now), False
    return last, True


def _new_generation(
    ec2: EC2Client,
    lake: Lake,
    gpu: GpuSettings,
    run: str,
    former: LaunchRecord | None,
    asked_by: tuple[str, str],
    now: Callable[[], datetime],
) -> LaunchRecord:
    offers = candidates_by_price(ec2, gpu, now=now)
    at = now().replace(microsecond=0)
    worst = max(offer.max_usd_per_hour for offer in offers) * gpu.max_lifetime_minutes / 60
    shown = ", ".join(f"{o.instance_type} {o.market} {o.zone} ${o.price_usd_per_hour:.4f}/h" for o in offers)
    log.info("candidates: %s; worst case of this launch $%.2f (%d min)", shown, worst, gpu.max_lifetime_minutes)
    record = LaunchRecord(
        **offers[0].model_dump(),
        run=run,
        sequence=former.sequence + 1 if former else 1,
        generation=(generation := former.generation + 1 if former else 1),
        began_at=at,
        nonce=uuid.uuid4().hex,
        worst_usd=round(worst, 6),
        recorded_at=at,
        deadline=at + timedelta(minutes=gpu.max_lifetime_minutes),
        user_data_sha256=_sha256(_script(lake, gpu, run, generation)),
        dag=asked_by[0],
        dag_run=asked_by[1],
        remaining=tuple(offers[1:]),
    )
    return _write(lake, record)


def _next_candidate(lake: Lake, gpu: GpuSettings, record: LaunchRecord, now: Callable[[], datetime]) -> LaunchRecord | None:
    """The record of the generation's next candidate; None when none is left."""
    if not record.remaining:
        return None
    at = now().replace(microsecond=0)
    update = {
        **record.remaining[0].model_dump(),
        "sequence": record.sequence + 1,
        "nonce": uuid.uuid4().hex,
        "recorded_at": at,
        "deadline": at + timedelta(minutes=gpu.max_lifetime_minutes),
        "remaining": record.remaining[1:],
    }
    return _write(lake, record.model_copy(update=update))


def _write(lake: Lake, record: LaunchRecord) -> LaunchRecord:
    """The record under its number: this one, or that of another launcher who was faster."""
    key = keys.launch(record.run, record.sequence)
    try:
        lake.write_json(key, record.model_dump(mode="json"), only_if_absent=True)
    except KeyExistsError:
        # its record is the truth, and its token makes both get one instance
        return LaunchRecord.model_validate(lake.read_json(key))
    return record


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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


def _run_instances(
    ec2: EC2Client, lake: Lake, gpu: GpuSettings, record: LaunchRecord, sleep: Callable[[float], None]
) -> Instance | None:
    """Sends the record's request until EC2 says what came of it: the instance, which may have ended, or None where EC2 says that
    the token is that of one which has. ClientError is a definite no, of capacity or of the request.
    """
    request = _request(lake, gpu, record)
    _ask_once(ec2)
    for attempt in range(1, _LAUNCH_TRIES + 1):
        try:
            launched = instances.from_api(ec2.run_instances(**request)["Instances"][0])
        except ParamValidationError as error:
            raise LaunchRefusedError(
                f"the request to launch for {record.run} is malformed: {error}; correct the GPU settings"
            ) from error
        except (ClientError, HTTPClientError, IncompleteReadError, ResponseParserError) as error:
            if isinstance(error, ClientError) and _code(error) == _TERMINATED:
                return None
            if isinstance(error, ClientError) and (_code(error) in CAPACITY_ERRORS or _definite(error)):
                raise
            # launched or not: the same token asks again, and no other candidate is tried before there is an answer
            if attempt == _LAUNCH_TRIES:
                raise LaunchUnresolvedError(
                    f"{attempt} requests to launch {record.instance_type} ({record.market}) for {record.run} had no clear answer: "
                    f"{error}. The next try asks with the same token; `crpbot gpu list` shows what lives."
                ) from error
            log.warning(
                "no answer to launch %d of %s (try %d of %d): %s", record.sequence, record.run, attempt, _LAUNCH_TRIES, error
            )
            sleep(min(2.0**attempt, 15.0))
        else:
            log.info(
                "launched %s: %s %s in %s at $%.4f/h for %s, generation %d, deadline %s",
                launched.id,
                record.instance_type,
                record.market,
                record.zone,
                record.price_usd_per_hour,
                record.run,
                record.generation,
                record.deadline.isoformat(),
            )
            return launched
    raise AssertionError("unreachable: the last try raises")


def _ask_once(ec2: EC2Client) -> None:
    """Takes RunInstances out of the client's own retries, whatever their mode.

    botocore takes a missing capacity (HTTP 500) for a fault of the server and asks for it again, seconds that another candidate
    could have been launched in. A handler of this event decides by raising, as botocore's own does at its last attempt.
    """

    def give_up(response: tuple[Any, dict[str, Any]] | None, caught_exception: Exception | None, **_: Any) -> None:
        if caught_exception is not None:
            raise caught_exception
        if response is not None and response[0].status_code >= 300:
            raise ClientError(response[1], "RunInstances")  # type: ignore[arg-type]  # the parsed answer, as botocore itself does

    ec2.meta.events.register_first("needs-retry.ec2.RunInstances", give_up, unique_id="crpbot-ask-once")


def _request(lake: Lake, gpu: GpuSettings, record: LaunchRecord) -> dict[str, Any]:
    """RunInstances' parameters. Equal for every replay of the record under equal settings."""
    script = _script(lake, gpu, record.run, record.generation)
    if _sha256(script) != record.user_data_sha256:
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
        instances.TAG_LAUNCH: str(record.sequence),
        instances.TAG_DEADLINE: record.deadline.isoformat(),
        instances.TAG_MAX_PRICE: f"{record.max_usd_per_hour:g}",
        instances.TAG_OWNER: gpu.owner_tag,
        instances.TAG_DAG: record.dag,
        instances.TAG_DAG_RUN: record.dag_run,
    }
    tag_list = [{"Key": key, "Value": value} for key, value in tags.items() if value]
    request: dict[str, Any] = {
        "ImageId": gpu.ami,
        "InstanceType": record.instance_type,
        "SubnetId": record.subnet_id,
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
    if record.market == "spot":
        request["InstanceMarketOptions"] = {
            "MarketType": "spot",
            "SpotOptions": {
                "SpotInstanceType": "one-time",
                "InstanceInterruptionBehavior": "terminate",
                "MaxPrice": f"{record.max_usd_per_hour:g}",
            },
        }
    return request
