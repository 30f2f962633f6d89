"""Layer 5, the dead-man's switch: ends our instances past their deadline, whatever became of Airflow and of the instances.

AWS Lambda runs this text as it stands, every five minutes: crpbot.yaml carries it, and a test holds the two equal. So it imports
only what Lambda has, the standard library and boto3, and spells the tags of crpbot_lib/gpu/instances.py once more.
"""

import logging
import os
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
from botocore.config import Config

TAG_PROJECT = "crpbot:project"
TAG_DEADLINE = "crpbot:deadline"
ALIVE = ["pending", "running", "stopping", "stopped"]
GRACE = timedelta(minutes=5)
PAGE_SIZE = 100

log = logging.getLogger("dead_mans_switch")
log.setLevel(logging.INFO)


def why_end(instance: dict[str, Any], now: datetime) -> str | None:
    """Why an item of DescribeInstances must end at ``now`` (UTC); None while it may live."""
    tags = {tag["Key"]: tag["Value"] for tag in instance.get("Tags", [])}
    text = tags.get(TAG_DEADLINE, "")
    try:
        deadline = datetime.fromisoformat(text)
    except ValueError:
        age = now - instance["LaunchTime"]
        return f"its {TAG_DEADLINE} is {text!r}, no time, {age} after its launch" if age > GRACE else None
    deadline = deadline if deadline.tzinfo else deadline.replace(tzinfo=UTC)
    return f"past its deadline {text}" if now > deadline else None


def handler(_event: object, _context: object) -> dict[str, list[str]]:
    """One pass over the instances tagged with the project. RuntimeError, after all were tried, names those that EC2 refused."""
    # a call that hangs takes 30 s, so that the function's 120 s still reach the other instances
    config = Config(retries={"mode": "standard", "max_attempts": 3}, connect_timeout=5, read_timeout=10)
    ec2 = boto3.client("ec2", config=config)
    filters = [
        {"Name": f"tag:{TAG_PROJECT}", "Values": [os.environ["PROJECT"]]},
        {"Name": "instance-state-name", "Values": ALIVE},
    ]
    pages = ec2.get_paginator("describe_instances").paginate(Filters=filters, PaginationConfig={"PageSize": PAGE_SIZE})
    kept, ended, failed = [], [], []
    # each page is dealt with before the next one is asked for, which may fail
    for instance in (i for page in pages for r in page["Reservations"] for i in r["Instances"]):
        name, why = instance["InstanceId"], why_end(instance, datetime.now(UTC))
        if why is None:
            kept.append(name)
            continue
        try:
            ec2.terminate_instances(InstanceIds=[name])
        except Exception as error:
            # whatever it is, the other instances must not outlive it
            failed.append(f"{name}: {error}")
        else:
            ended.append(name)
            log.warning("terminated %s (%s): %s", name, instance.get("InstanceType"), why)
    log.info("kept %d, terminated %d, failed %d", len(kept), len(ended), len(failed))
    if failed:
        raise RuntimeError(f"{len(failed)} instances live past their deadline; end them in the EC2 console: {'; '.join(failed)}")
    return {"kept": kept, "terminated": ended}
