"""AWS clients for the command line, and what holds for those as well that Airflow tasks get from the Amazon provider's hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import boto3
from botocore.config import Config

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client

CONFIG = Config(connect_timeout=5, read_timeout=20, retries={"mode": "standard", "max_attempts": 4})
"""botocore's own patience, a minute a try, would keep a watcher of several services from the ones that answer."""


def ec2(region: str) -> EC2Client:
    """An EC2 client; endpoint and credentials as the AWS SDKs read them."""
    return boto3.session.Session().client("ec2", region_name=region, config=CONFIG)
